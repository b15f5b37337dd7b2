"""What a safetensors file holds, read from its header before any tensor is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from headwise.reading.opening import MEGABYTE, Unreadable, opened, size_of
from headwise.reading.values import check, parse_json

LIMIT = 100 * MEGABYTE
"""Bytes of a header, as the library has it."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class TensorHeader(NamedTuple):
    """Type (`F32`, `BF16`, …) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_tensor_headers(path: str | Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Every tensor of a safetensors file by name, and the file's metadata.

    Raises:
        Missing: there is no such file.
        Unreadable: the header is damaged, or claims what the file does not hold.
    """
    with opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LIMIT):
            raise Unreadable(path, f"its header claims {size_of(length)}, and the file has {size_of(size)}")
        text = file.read(length)
    try:
        header = check(parse_json(text), dict[str, dict[str, Any]])
        metadata = check(header.pop("__metadata__", {}), dict[str, str])
        entries = check(header, dict[str, _Entry])
    except Unreadable as error:
        raise Unreadable(path, f"its header is damaged ({error.reason})") from None
    found = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        bits = BITS.get(entry["dtype"])
        wrong = bits is not None and (end - begin) * 8 != math.prod(entry["shape"]) * bits
        if wrong or min(entry["shape"], default=0) < 0 or not 0 <= begin <= end <= size - 8 - length:
            raise Unreadable(
                path, f"its header is damaged (the tensor {name[:80]!r} is not where it should be)"
            )
        found[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]))
    return found, metadata
