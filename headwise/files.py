"""Files and folders that appear whole or not at all: written beside their place, then renamed.

A draft is a hidden folder beside the place that its content will take. Its writer holds a lock on it, which
the system gives up when the writer dies: so what a kill left can be told from work in progress.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError

DRAFT = ".draft"
"""Ends the name of the hidden folder that a file is written in before it takes its place."""

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this disk or user may have",
}
NO_PLACE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EIO,
}  # fmt: skip
"""Errors of a place that cannot be written to, as opposed to those of a mistake in this program."""

LONGEST = 255
"""Bytes that a name in a folder may have."""

_DRAFT = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(DRAFT)}", re.DOTALL)
_OLD = "old"
_swept: set[Path] = set()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; when the block succeeds, it takes the place of `path`.

    The block creates a file or a folder at the yielded path. When the block fails, nothing of
    it remains and `path` is as it was; folders that were made for it are gone.

    Raises:
        HeadwiseError: `path` cannot be written to, or the disk, or what the user may have of it, is full.
    """
    path = Path(path)
    with writing(path), _folder_of(path), _holder(path) as holder:
        draft = holder / path.name
        yield draft
        _sync(draft)
        if draft.is_dir() and path.is_dir():  # a folder cannot be renamed over a full one
            (holder / _OLD).mkdir()
            path.rename(holder / _OLD / path.name)
        os.replace(draft, path)
        _sync_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, turn the system's refusal to write `path` into the user's error.

    Raises:
        HeadwiseError: the disk is full, or `path` is where nothing can be written.
    """
    try:
        yield
    except HeadwiseError:
        raise
    except Exception as error:  # libraries hide the system's error in their own
        number = _system_error(error)
        if number in NO_ROOM or (number in NO_PLACE and _concerns(error, path)):
            raise _unwritable(path, error) from error
        raise


def local(path: str | Path) -> Path:
    """`path`, with `~` as the home folder unless a file or folder here has that very name."""
    path = Path(path)
    if os.path.lexists(path):
        return path
    with suppress(RuntimeError):  # nobody of that name has a home
        return path.expanduser()
    return path


def must_be_folder(path: str | Path, flag: str = "--out") -> None:
    """Refuse a folder to write to that cannot be one, before any work is done for it.

    Raises:
        HeadwiseError: it, or what it would lie in, is a file or may not be written to, or its name cannot be
            one.
    """
    if reason := no_folder(path):
        raise HeadwiseError(f"{flag} {shortened(path)} cannot be a folder: {reason}; give another")
    path = Path(path)
    place = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    try:
        tried = tempfile.mkdtemp(prefix=".headwise.", suffix=DRAFT, dir=place)
    except OSError as error:
        raise _unwritable(path, error) from error
    with suppress(FileNotFoundError):  # another process has swept it
        os.rmdir(tried)


def must_be_writable(path: str | Path, flag: str) -> None:
    """The same for a file.

    Raises:
        HeadwiseError: a folder has its name, or the folder that it would lie in cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise HeadwiseError(f"{flag} {shortened(path)} is a folder; give the name of a file")
    must_be_folder(path.parent, flag)


def no_folder(path: str | Path) -> str | None:
    """Why nothing can be written below `path`; None where it is a folder, or can become one."""
    for part in Path(path).parts:
        if "\0" in part:
            return f"the name {part!r} has a NUL character"
        if too_long(part):
            return f"a name in it is longer than {LONGEST} bytes"
    for place in (Path(path), *Path(path).parents):
        if os.path.lexists(place):
            return None if place.is_dir() else f"{place} is a file"
    return None


def too_long(name: str) -> bool:
    """Whether no file system here takes the name."""
    return len(name.encode("utf-8", "surrogatepass")) > LONGEST


def shortened(path: str | Path) -> str:
    """A path for a message, cut where it is too long to read."""
    text = str(path)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 400 else f"{text[:60]}… ({len(text)} characters)"


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill at any moment leaves either all of it or nothing under its name."""
    with suppress(OSError, HeadwiseError), _holder(path) as holder:
        path.rename(holder / path.name)


def sweep(folder: str | Path) -> None:
    """Delete what killed writers left in `folder` and below; what others write just now stays."""
    for parent, names, _ in os.walk(folder):
        drafts = [name for name in names if is_draft(name)]
        names[:] = [name for name in names if name not in drafts]
        for name in drafts:
            _sweep_draft(Path(parent, name))


@contextmanager
def alone(path: Path, work: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for this process; it is gone afterwards, and never outlives its holder.

    Args:
        work: what the holder does, for whoever comes second: "prepares shards in out".
        wait: wait for another holder instead of refusing.

    Raises:
        HeadwiseError: another process holds it; names it, and since when. Or `path` cannot be written.
    """
    with _folder_of(path):
        with writing(path):
            descriptor = _lock(path, work, wait=wait)
        try:
            who = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
            with writing(path):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, who.encode(), 0)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(path: Path, work: str, *, wait: bool) -> int:
    """The descriptor of the locked file that lies at `path`: not of one that its last holder deleted."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)
        except BlockingIOError:
            who = os.pread(descriptor, 1 << 12, 0)
            os.close(descriptor)
            raise HeadwiseError(f"another process {work}{_holder_of(who)}; wait for it, or stop it") from None
        except BaseException:
            os.close(descriptor)
            raise


def _holder_of(content: bytes) -> str:
    try:
        who = json.loads(content)
        since = datetime.datetime.fromtimestamp(float(who["since"])).isoformat(" ", "seconds")
        return f" (process {int(who['pid'])} of {str(who['host'])[:LONGEST]}, since {since})"
    except (ValueError, LookupError, TypeError, OverflowError):  # it has just begun
        return ""


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def is_draft(name: str) -> bool:
    """Whether a file's name is that of a draft's folder."""
    return _DRAFT.fullmatch(name) is not None


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=True) + "\n")


@contextmanager
def _folder_of(path: Path) -> Iterator[None]:
    """Make the folder of `path`; when the block fails, folders that were made and stayed empty go again."""
    made = [path.parent, *path.parent.parents]
    made = made[: next((i for i, place in enumerate(made) if os.path.lexists(place)), len(made))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty: others write there
            for place in made:
                place.rmdir()
        raise


@contextmanager
def _holder(path: Path) -> Iterator[Path]:
    """A draft's folder beside `path`, locked while the block runs, deleted after it."""
    folder = path.parent
    if folder not in _swept:
        _swept.add(folder)
        with suppress(OSError):  # a folder that may be written in and not read
            for name in filter(is_draft, os.listdir(folder)):
                _sweep_draft(folder / name)
    holder, descriptor = _new_draft(path)
    try:
        yield holder
    finally:
        _discard(holder)
        os.close(descriptor)


def _new_draft(path: Path) -> tuple[Path, int]:
    """A locked draft's folder beside `path`; made again where a sweep came between making and locking."""
    name = os.fsdecode(os.fsencode(path.name)[:100])  # the longest name leaves no room for more
    while True:
        try:
            holder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=DRAFT, dir=path.parent))
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            descriptor = os.open(holder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # a file system without locks: its drafts are never swept
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, holder):
            return holder, descriptor
        os.close(descriptor)


def _sweep_draft(holder: Path) -> None:
    """Delete a draft's folder unless its writer lives."""
    with suppress(OSError):  # its writer lives, or it is gone meanwhile, or a file
        descriptor = os.open(holder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _discard(holder)
        finally:
            os.close(descriptor)


def _discard(holder: Path) -> None:
    """Delete a draft's folder; what its writer set aside and did not replace goes back to its place."""
    if (holder / _OLD).is_dir():
        for old in (holder / _OLD).iterdir():
            if not os.path.lexists(holder.parent / old.name):
                old.rename(holder.parent / old.name)
    shutil.rmtree(holder, ignore_errors=True)


def _unwritable(path: Path, error: Exception) -> HeadwiseError:
    """The user's error for the system's refusal to write `path`."""
    number = _system_error(error) or 0
    place = shortened(Path(*(part for part in path.parts if not is_draft(part))))
    if number in NO_ROOM:
        return HeadwiseError(
            f"{NO_ROOM[number]}: {place} was not written; free space there, what was finished before is kept"
        )
    reason = os.strerror(number) if number else str(error)  # a NUL in a name is no system's error
    return HeadwiseError(f"cannot write {place}: {reason}; give another place")


def _system_error(error: BaseException) -> int | None:
    """The system's number of an error, also where a library's own error hides that the disk is full."""
    own = error.errno if isinstance(error, OSError) else None
    hidden: BaseException | None = error
    while own not in NO_ROOM and hidden is not None:
        found = re.search(r"(?:[(\[](?:os error|errno)|\bOs \{ code:) (\d+)", str(hidden), re.IGNORECASE)
        number = hidden.errno if isinstance(hidden, OSError) else None
        if found:
            number = number or int(found[1])
            own = own or number
        if number in NO_ROOM:
            return number
        hidden = hidden.__cause__ or hidden.__context__
    return own


def _concerns(error: Exception, path: Path) -> bool:
    """Whether an error is about `path` or its draft, not about something that was read."""
    names = [name for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    return not names or any(os.fsdecode(name).startswith(str(path.parent)) for name in names)


def _sync(draft: Path) -> None:
    files = [draft] if draft.is_file() else [p for p in draft.rglob("*") if p.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
