"""One part of a profile: from measures on the device to files, written while the device goes on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.measures import moments
from headwise.measures import table as head_table
from headwise.measures.collector import Collector
from headwise.measures.means import mean_of
from headwise.measures.moments import Moments
from headwise.measures.spec import FORMER_NAMES, PART, measure_of

_PENDING_BYTES = 1 << 30
"""Measures that may wait to be written before the device waits too: what memory holds."""


Row = tuple[int, int, float, float, str]
"""Layer, head, `Rows.uniform` and part of a head; empty for a whole one."""


@dataclass(frozen=True)
class Folders:
    """Where the parts of a profile lie."""

    out: Path

    @property
    def heads(self) -> Path:
        """The head table."""
        return self.out / "heads"

    @property
    def moments(self) -> Path:
        """What means and Pearson's correlations need of each part."""
        return self.out / "moments"

    @property
    def raw(self) -> Path:
        """q, k, v of chosen layers."""
        return self.out / "raw"

    def has(self, part: int) -> bool:
        """Whether a part is complete: its table is written last."""
        return (self.heads / f"{name_of(part)}.parquet").exists()


@dataclass(frozen=True)
class Block:
    """Measures of several contexts.

    Attributes:
        names: of the measures, M.
        rows: of each of the R heads, or parts of heads, what a `Row` has.
        values: `(M, B, R, T)` float32, on the device.
    """

    names: list[str]
    rows: list[Row]
    values: Tensor


@dataclass(frozen=True)
class Writing:
    """A part on its way to the disk.

    Attributes:
        nbytes: memory that it holds until it is written.
        write: waits for the copies from the device, and writes.
    """

    nbytes: int
    write: Callable[[], None]


def name_of(part: int) -> str:
    """File name of a part, without its ending."""
    return f"part_{part:06d}"


def take(collector: Collector) -> Block:
    """The measures of the forward pass that just ended, out of a collector of tokens.

    A measure that a layer does not offer is NaN there.

    Raises:
        HeadwiseError: there are none; says why.
    """
    if not collector.passes:
        collector.columns()  # raises with the reason
    layers = sorted(collector.passes.pop().items())
    present = {name for _, rows in layers for name in rows.values}
    names = [name for name in collector.measures if name in present]
    rows, stacked = [], []
    for (layer, part), measured in layers:
        like = next(iter(measured.values.values()))
        absent = torch.full_like(like, torch.nan)
        stacked.append(torch.stack([measured.values.get(name, absent) for name in names]))
        rows += [(layer, head, *measured.uniform, part) for head in range(like.shape[1])]
    return Block(names, rows, torch.cat(stacked, dim=2))


def together(blocks: Sequence[Block]) -> Block:
    """Blocks of the same heads as one, along B."""
    values = torch.cat([b.values for b in blocks], dim=1) if len(blocks) > 1 else blocks[0].values
    return Block(blocks[0].names, blocks[0].rows, values)


def writing(
    folders: Folders,
    part: int,
    first_sample: int,
    block: Block,
    raw: dict[str, Tensor],
    *,
    aggregate: bool,
    ignore_first: int,
    dtype: torch.dtype,
    metadata: dict[str, str],
    unmeasured: Mapping[int | str, str],
) -> Writing:
    """What writes one part. The copies from the device are begun here and waited for there."""
    values = block.values
    if aggregate:
        values = _over_tokens(block, ignore_first)
    found = moments.gather(block.values, block.names, ignore_first)
    rows, length = block.rows, block.values.shape[-1]
    values = values.to(dtype).contiguous()
    with _copying(values.device) as done:
        host = _to_host(values)
        found = {name: _to_host(value) for name, value in found.items()}
        raw = {name: _to_host(value) for name, value in raw.items()}
    names = block.names
    del values, block  # the device's memory is free again while the work waits

    def write() -> None:
        if done is not None:
            done.synchronize()
        name = name_of(part)
        if raw:
            _write_tensors(folders.raw / f"{name}.safetensors", raw, metadata)
        kept = found | {"rows": torch.tensor([row[:4] for row in rows], dtype=torch.float64)}
        about = {"names": " ".join(names)} | _part_names(rows)
        _write_tensors(folders.moments / f"{name}.safetensors", kept, about)
        columns = _keys(rows, first_sample, host.shape, per_token=host.shape[-1] == length)
        columns |= {measure: host[m].reshape(-1).numpy() for m, measure in enumerate(names)}
        head_table.write_part(folders.heads, name, columns, unmeasured=unmeasured)

    return Writing(host.nbytes + sum(value.nbytes for value in raw.values()), write)


WHOLE = "-"
"""Of a whole head among the names of parts."""


def _part_names(rows: Sequence[Row]) -> dict[str, str]:
    """The part of each row, where there is any, as metadata."""
    return {"parts": " ".join(row[4] or WHOLE for row in rows)} if any(row[4] for row in rows) else {}


def read_moments(folders: Folders) -> tuple[list[str], np.ndarray, list[str], Moments]:
    """Names of the measures, `Block.rows` as `(R, 4)` and the part of each, and the moments of all parts.

    Raises:
        HeadwiseError: a part is damaged or its moments are lost.
    """
    from safetensors import SafetensorError, safe_open

    names: list[str] = []
    of_heads: list[str] = []
    rows = np.empty((0, 4))
    found: list[Moments] = []
    for table in sorted(folders.heads.glob("*.parquet")):
        path = folders.moments / f"{table.stem}.safetensors"
        try:
            headers, about = reading.read_tensor_headers(path)
            _refuse_other_moments(path, headers, about, (len(rows), names) if found else None)
            with safe_open(path, "np") as file:
                names, rows = about["names"].split(), file.get_tensor("rows")
                names = [FORMER_NAMES.get(name, name) for name in names]
                of_heads = _parts_of_heads(path, about, len(rows), of_heads if found else None)
                fields = {name: file.get_tensor(name) for name in Moments.__dataclass_fields__}
        except (reading.Unreadable, OSError, SafetensorError, KeyError) as error:
            reason = error.reason if isinstance(error, reading.Unreadable) else reading.first_line(error)
            raise HeadwiseError(
                f"{path} is damaged or lost ({reason}); delete {table} and run again"
            ) from error
        found.append(Moments(**fields))
    return names, rows, of_heads, moments.merge(found)


def _parts_of_heads(path: Path, about: dict[str, str], n_rows: int, before: list[str] | None) -> list[str]:
    """The part of each row, empty for whole heads; the same as in the parts of the profile before."""
    given = about.get("parts", " ".join([WHOLE] * n_rows)).split()
    found = ["" if name == WHOLE else name for name in given]
    known = all(PART.fullmatch(name) for name in found if name)
    if len(found) != n_rows or not known or before not in (None, found):
        raise reading.Unreadable(path, "its parts of heads are not those of its rows")
    return found


def _refuse_other_moments(
    path: Path,
    headers: dict[str, reading.TensorHeader],
    about: dict[str, str],
    before: tuple[int, list[str]] | None,
) -> None:
    """Refuse, by their headers, moments that are not of the heads and measures that this part should have."""
    names = [FORMER_NAMES.get(name, name) for name in about.get("names", "").split()]
    m, r = len(names), (headers["rows"].shape or (0,))[0] if "rows" in headers else 0
    if not m or not r or before not in (None, (r, names)):
        raise reading.Unreadable(path, "its heads or measures are not those of the other parts")
    shapes = {
        "rows": (r, 4), "tokens": (m, r), "mean": (m, r), "paired": (), "centre": (m, r),
        "products": (r, m, m),
    }  # fmt: skip
    for name, shape in shapes.items():
        if headers.get(name) != reading.TensorHeader("F64", shape):
            raise reading.Unreadable(path, f"its {name} is {headers.get(name)}, expected F64 {shape}")


def check_parts(parts: Sequence[Path]) -> None:
    """Refuse, by their footers, parts that are no parts of a head table.

    Raises:
        HeadwiseError: names the first.
    """
    for part in parts:
        try:
            head_table.check_part(part)
        except reading.Unreadable as error:
            raise error.so("delete it and run again") from error


@contextmanager
def in_background() -> Iterator[Callable[[Writing], None]]:
    """Yield a function that has parts written on other threads; all are written when the block ends.

    It waits while too many wait to be written. An error of theirs is raised by the next call, or at
    the end. After Ctrl-C what has begun is finished and the rest dropped.
    """
    pending: deque[tuple[Future[None], int]] = deque()
    pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 2))

    def submit(part: Writing) -> None:
        held = sum(nbytes for _, nbytes in pending)
        while pending and (pending[0][0].done() or held + part.nbytes > _PENDING_BYTES):
            written, nbytes = pending.popleft()
            written.result()
            held -= nbytes
        pending.append((pool.submit(part.write), part.nbytes))

    try:
        yield submit
        while pending:
            pending.popleft()[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _over_tokens(block: Block, ignore_first: int) -> Tensor:
    """Means over tokens, `(M, B, R, 1)`, by the rules of a table without tokens."""
    means = []
    for name, values in zip(block.names, block.values.double(), strict=True):
        measure = measure_of(name)
        means.append(mean_of(measure, values[..., ignore_first:] if measure.needs_context else values)[1])
    return torch.stack(means).float()[..., None]


def _keys(
    rows: Sequence[Row], first_sample: int, shape: Sequence[int], *, per_token: bool
) -> dict[str, np.ndarray | str | int]:
    """Key columns of values `(M, B, R, T)`, flattened in that order."""
    _, batch, n_rows, tokens = shape
    samples = np.arange(first_sample, first_sample + batch)
    places = tuple((layer, head, part) for layer, head, _, _, part in rows)
    layers, heads, parts, tokens_of = _constant_keys(places, batch, tokens)
    keys: dict[str, np.ndarray | str | int] = {
        "sample": np.repeat(samples, n_rows * tokens), "layer": layers, "head": heads,
    }  # fmt: skip
    keys |= {"part": parts} if _part_names(rows) else {}
    return keys | ({"token": tokens_of} if per_token else {})


@lru_cache(maxsize=2)  # of whole parts, and of the last one, which may be smaller
def _constant_keys(rows: tuple[tuple[int, int, str], ...], batch: int, tokens: int) -> tuple[np.ndarray, ...]:
    """Layer, head, part and token, the same in all parts of a size."""
    layers, heads = (np.array([row[n] for row in rows], np.int32) for n in (0, 1))
    parts = np.array([row[2] or None for row in rows], object)
    token = np.tile(np.arange(tokens, dtype=np.int32), batch * len(rows))
    return *(np.tile(np.repeat(key, tokens), batch) for key in (layers, heads, parts)), token


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as draft:
        save_file(tensors, draft, metadata=metadata)


@contextmanager
def _copying(device: torch.device) -> Iterator[torch.cuda.Event | None]:
    """Have copies begun in the block run beside what the device does next; yields when they are done."""
    if device.type != "cuda":
        yield None
        return
    beside, done = _copy_stream(device), torch.cuda.Event()
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        yield done
        done.record(beside)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _to_host(value: Tensor) -> Tensor:
    """A copy in page-locked memory, begun but not waited for; the tensor itself on the CPU."""
    if value.device.type != "cuda":
        return value.cpu()
    value.record_stream(torch.cuda.current_stream(value.device))
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
