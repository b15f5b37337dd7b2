"""Sizes of memory as text: 24GiB, 800 MB."""

from __future__ import annotations

import re

from headwise.errors import HeadwiseError

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(key: str, text: str) -> int:
    """Bytes of `24GiB`, `800MB` or a number of bytes.

    Args:
        key: names it in the message.

    Raises:
        HeadwiseError: the text is not a size above 0.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMGT]?i?B)?\s*", str(text), re.IGNORECASE)
    size = int(float(found[1]) * UNITS[(found[2] or "").upper()]) if found else 0
    if not 0 < size < 2**60:
        raise HeadwiseError(f"{key} is {text!r}; give a size of memory, such as 24GiB or 800MB")
    return size
