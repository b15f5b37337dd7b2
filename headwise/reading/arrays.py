"""Arrays of an `.npz` file. Nothing is unpickled, and no memory is taken on the word of a header alone."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from headwise.reading.opening import MEGABYTE, Unreadable, opened, size_of

if TYPE_CHECKING:
    import numpy as np

MEMBERS = 10_000
HEADER = 1 << 16
SMALL = 64 * MEGABYTE
RATIO = 250
"""Unpacked bytes a packed byte, of arrays that are not `SMALL`. Deflate reaches 1,030 for zeros alone."""

PROBLEMS = (
    zipfile.BadZipFile, zlib.error, ValueError, TypeError, EOFError, NotImplementedError, RuntimeError,
    SyntaxError, tokenize.TokenError, RecursionError, MemoryError, OverflowError, LookupError,
)  # fmt: skip


@dataclass(frozen=True)
class ArrayHeader:
    """What an array will be when it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Arrays:
    """The arrays of an open `.npz` file by name.

    Attributes:
        headers: of every array; each agrees with the bytes that the archive has for it.
    """

    def __init__(self, path: str | Path, file: BinaryIO) -> None:
        self.path = path
        with _refused(path):
            self._archive = zipfile.ZipFile(file)
            entries = self._archive.infolist()
            file.seek(0, 2)
            _refuse_lies(path, entries, file.tell())
            self._names = {entry.filename.removesuffix(".npy"): entry.filename for entry in entries}
            self.headers = {name: self._header(entry) for name, entry in self._names.items()}

    @classmethod
    @contextmanager
    def open(cls, path: str | Path) -> Iterator[Arrays]:
        """The arrays of `path`, in a `with` block.

        Raises:
            Missing: there is no such file.
            Unreadable: it is damaged, or a header claims what the archive does not hold.
        """
        with opened(path) as file:
            yield cls(path, file)

    def read(self, name: str, kinds: str = "iufbSU", dimensions: int | None = None) -> np.ndarray:
        """One array.

        Args:
            kinds: of numpy's type codes, those that are taken.
            dimensions: how many the array must have.

        Raises:
            Unreadable: there is none of that name, it is of another kind or shape, or it is damaged.
        """
        import numpy as np

        header = self.headers.get(name)
        if header is None:
            raise Unreadable(self.path, f"it has no array {name!r}")
        if (
            header.dtype.hasobject
            or header.dtype.kind not in kinds
            or dimensions not in (None, len(header.shape))
        ):
            raise Unreadable(self.path, f"its array {name!r} is {header.dtype} {header.shape}")
        with _refused(self.path), self._archive.open(self._names[name]) as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def _header(self, name: str) -> ArrayHeader:
        with self._archive.open(name) as member:
            header, length = _read_header(member)
        size = self._archive.getinfo(name).file_size
        claimed = math.prod(header.shape) * header.dtype.itemsize
        if header.dtype.hasobject:
            return header  # `read` never takes it: it would have to be unpickled
        if claimed != size - length:
            raise ValueError(f"{name} claims {size_of(claimed)} and holds {size_of(max(0, size - length))}")
        return header


@contextmanager
def _refused(path: str | Path) -> Iterator[None]:
    try:
        yield
    except PROBLEMS as error:
        reason = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise Unreadable(path, f"it is damaged ({reason or type(error).__name__})") from error


def _refuse_lies(path: str | Path, entries: list[zipfile.ZipInfo], archive_bytes: int) -> None:
    """Refuse members that unpack to more than an archive of that size holds."""
    if len(entries) > MEMBERS:
        raise ValueError(f"it has {len(entries)} members")
    if len({entry.filename.removesuffix(".npy") for entry in entries}) < len(entries):
        raise ValueError("two arrays have the same name")
    if sum(entry.compress_size for entry in entries) > archive_bytes:
        raise ValueError("its members claim more bytes than the file has")
    for entry in entries:
        if entry.flag_bits & 1:
            raise ValueError(f"{entry.filename} is encrypted")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{entry.filename} is packed in a way that numpy does not write")
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            raise ValueError(f"{entry.filename} has two sizes")
        if entry.file_size > max(SMALL, RATIO * entry.compress_size):
            raise ValueError(
                f"{entry.filename} would unpack {size_of(entry.compress_size)} to {size_of(entry.file_size)}"
            )


def _read_header(member: IO[bytes]) -> tuple[ArrayHeader, int]:
    """The header of an `.npy` member, and its length in bytes."""
    import io

    import numpy as np

    start = member.read(HEADER)
    stream = io.BytesIO(start)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise ValueError(f"it has an array of shape {str(shape)[:80]}")
    return ArrayHeader(shape, dtype), stream.tell()
