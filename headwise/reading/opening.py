"""The bytes of a regular file, no more of them than expected, without ever waiting for a writer."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwise.errors import HeadwiseError

MEGABYTE = 1 << 20

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Unreadable(HeadwiseError):
    """A file exists and cannot be used.

    Attributes:
        path: the file; None where the text was not in one.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path | None, reason: str) -> None:
        self.path, self.reason = path, one_line(reason)
        super().__init__(self.reason if path is None else f"{shown(path)} cannot be read: {self.reason}")

    def so(self, advice: str) -> HeadwiseError:
        """The error with what to do about it."""
        return HeadwiseError(f"{self}; {advice}")


class Missing(Unreadable):
    """There is no such file."""


def shown(path: str | Path) -> str:
    """A path as it can be printed on one line."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def one_line(text: str) -> str:
    """`text` on one line, cut short where it quotes much of a damaged file."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]} …"


@contextmanager
def opened(path: str | Path) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading; an error of the system's while it is read is an `Unreadable` too.

    Raises:
        Missing: there is no such file.
        Unreadable: it is a folder, a pipe, a socket or a device, or the system refuses it.
    """
    try:
        _must_be_regular(os.stat(path), path)
        # It may have become a pipe since: without O_NONBLOCK, opening one waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            _must_be_regular(os.fstat(file.fileno()), path)
            yield file
    except (FileNotFoundError, NotADirectoryError):
        raise Missing(path, "there is no such file") from None
    except ValueError as error:  # a NUL in the name
        if isinstance(error, UnicodeError):
            raise
        raise Unreadable(path, str(error)) from None
    except OSError as error:
        raise Unreadable(path, _reason(error)) from error


def must_be_regular(path: str | Path) -> int:
    """Refuse what is not a regular file, before a library opens it; returns its size in bytes.

    Raises:
        Missing: there is no such file.
        Unreadable: it is a folder, a pipe, a socket or a device, or cannot be opened.
    """
    with opened(path) as file:
        return os.fstat(file.fileno()).st_size


def read_bytes(path: str | Path, *, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        Missing: there is no such file.
        Unreadable: it is larger, not a regular file, or the system refuses it.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            content = file.read(limit + 1)  # a file of /proc has no size, and a file may grow
            if len(content) <= limit:
                return content
        raise Unreadable(path, f"it is larger than the {size_of(limit)} that such a file may have")


def read_text(path: str | Path, *, limit: int) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes.

    Raises:
        Missing: there is no such file.
        Unreadable: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(path, f"it is not UTF-8 text ({error.reason} at byte {error.start})") from None


def size_of(n_bytes: int) -> str:
    """`64 MB`."""
    for unit, factor in (("GB", 1 << 30), ("MB", MEGABYTE), ("kB", 1 << 10)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.4g} {unit}"
    return f"{n_bytes} bytes"


def _must_be_regular(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in KINDS if test(status.st_mode)), "not a regular file")
    raise Unreadable(path, f"it is {kind}, and a file is needed")


def _reason(error: OSError) -> str:
    if error.errno == errno.ENXIO:  # a socket, or a device without a driver
        return "it is a socket or a device, and a file is needed"
    return error.strerror or str(error)
