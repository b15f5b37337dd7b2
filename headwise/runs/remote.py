"""Stores for copies of runs: a folder, or any store that fsspec supports, including the Hugging Face hub.

A `Store` lists, reads and writes files by their names below its URL. The hub takes a batch of files in one
commit and returns the SHA-256 of large files; for other files it is computed by reading them back.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import local as local_path
from headwise.files import shortened
from headwise.names import hub_name, place_inside
from headwise.reading.opening import size_of

CHUNK = 1 << 22
LONGEST_URL = 2000
BATCH_FILES, BATCH_BYTES = 100, 1 << 32
"""The most files, and bytes, that are written at once; on the hub they are one commit."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB = re.compile(r"hf://(?:(datasets)/)?([^/@]+/[^/@]+)(?:@([^/@]+))?(?:/(.*))?", re.DOTALL)

Counted = Callable[[int], None]
"""Called with the number of bytes that were read or written."""

VOLATILE = "memory"
"""The protocol of fsspec whose files end with the process."""


@dataclass(frozen=True)
class Found:
    """A file in a store.

    Attributes:
        size: bytes.
        sha256: None if the store does not provide it.
    """

    size: int
    sha256: str | None = None


class Store:
    """Files below one URL of a file system of fsspec's."""

    def __init__(self, url: str, fs: Any, root: str) -> None:
        self.url, self.fs, self.root = url, fs, root.rstrip("/") or "/"
        self.folder = Path(self.root) if "file" in _protocols(fs) else None
        self.lasting = VOLATILE not in _protocols(fs)

    def below(self, name: str) -> Store:
        """The store of a folder inside."""
        return type(self)(f"{self.url.rstrip('/')}/{name}", self.fs, self._at(name))

    def files(self) -> dict[str, Found]:
        """Every file at or below the URL, by its name there; empty if nothing is there.

        Raises:
            HeadwiseError: the store cannot be reached.
        """
        with reaching(self.url):
            self.fs.invalidate_cache()
            try:
                found = self.fs.find(self.root, detail=True)
            except FileNotFoundError:
                return {}
            start = f"{self.root.rstrip('/')}/"
            return {
                path.removeprefix(start): Found(int(about.get("size") or 0), _known_digest(about))
                for path, about in found.items()
                if path.startswith(start)
            }

    def read(self, name: str, *, limit: int) -> bytes | None:
        """The content of a small file; None if there is none.

        Raises:
            HeadwiseError: it is larger than `limit` bytes, or the store cannot be reached.
        """
        with reaching(f"{self.url}/{name}"):
            self.fs.invalidate_cache()
            try:
                with self._opened(name) as file:
                    content: bytes = file.read(limit + 1)
            except (FileNotFoundError, reading.Missing):
                return None
        if len(content) > limit:
            raise HeadwiseError(f"{self.url}/{name} is larger than the {size_of(limit)} that it may have")
        return content

    def chunks(self, name: str, *, limit: int) -> Iterator[bytes]:
        """The bytes of a file, no more than `limit + 1` of them.

        Raises:
            HeadwiseError: it is not there, or the store cannot be reached.
        """
        with reaching(f"{self.url}/{name}"), self._opened(name) as file:
            left = limit + 1
            while left and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk

    def digest(self, name: str, found: Found, counted: Counted = lambda _: None) -> str:
        """SHA-256 of a file: the value of the store, or that of its bytes, which are read back."""
        if found.sha256 is not None:
            counted(found.size)
            return found.sha256
        digest = hashlib.sha256()
        for chunk in self.chunks(name, limit=found.size):
            digest.update(chunk)
            counted(len(chunk))
        return digest.hexdigest()

    def put(self, files: Sequence[tuple[str, Path | bytes]], counted: Counted = lambda _: None) -> None:
        """Write files in their order; existing files are replaced.

        Raises:
            HeadwiseError: the store cannot be reached, or takes no files.
        """
        for name, content in files:
            with reaching(f"{self.url}/{name}"):
                at = self._at(name)
                self.fs.makedirs(at.rpartition("/")[0], exist_ok=True)
                with self.fs.open(at, "wb") as out:
                    for chunk in _chunks_of(content):
                        out.write(chunk)
                        counted(len(chunk))
                    if self.folder is not None:
                        out.flush()
                        os.fsync(out.fileno())

    def delete(self, names: Sequence[str]) -> None:
        """Delete files."""
        for name in names:
            with reaching(f"{self.url}/{name}"):
                self.fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        """A file, open for reading; in a folder, a regular file that no link leads out to."""
        if self.folder is not None:
            with reading.opened(place_inside(self.folder, name, self.url)) as here:
                yield here
        else:
            with self.fs.open(self._at(name), "rb") as there:
                yield there


class Hub(Store):
    """A repository of the Hugging Face hub, or a folder in one."""

    def put(self, files: Sequence[tuple[str, Path | bytes]], counted: Counted = lambda _: None) -> None:
        """Write files in one commit; a repository that does not exist is created as a private one."""
        from huggingface_hub import CommitOperationAdd

        self._commit(
            [
                CommitOperationAdd(
                    self._inside(name), content if isinstance(content, bytes) else str(content)
                )
                for name, content in files
            ],
            f"headwise: {len(files)} files of a run",
        )
        for _, content in files:
            counted(len(content) if isinstance(content, bytes) else content.stat().st_size)

    def delete(self, names: Sequence[str]) -> None:
        """Delete files in one commit."""
        from huggingface_hub import CommitOperationDelete

        self._commit(
            [CommitOperationDelete(self._inside(name)) for name in names],
            f"headwise: {len(names)} files of a run that went on",
        )

    def _commit(self, operations: list[Any], message: str) -> None:
        if not operations:
            return
        kind, repository, revision, _ = _hub_parts(self.url)
        with reaching(self.url):
            api = self.fs._api
            if not api.repo_exists(repository, repo_type=kind):
                api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
            api.create_commit(
                repository, operations, commit_message=message, repo_type=kind, revision=revision
            )

    def _inside(self, name: str) -> str:
        inside = _hub_parts(self.url)[3]
        return f"{inside}/{name}" if inside else name


def open_store(url: str | Path) -> Store:
    """The store at a path or a URL: `runs-copy`, `file://…`, `s3://bucket/…`, `hf://USER/NAME[/path]`.

    Raises:
        HeadwiseError: it is none, holds a password, or what reaches it is not installed.
    """
    url = str(url)
    if not url.strip() or len(url) > LONGEST_URL or not url.isprintable():
        raise HeadwiseError(f"{shortened(url)!r} cannot be the place of a copy; give a path or a URL")
    if not _URL.match(url):
        return _open_folder(local_path(url))
    if "::" in url:
        raise HeadwiseError(f"{url} chains file systems (::), but a copy lies in one; give one URL")
    if re.match(r"[^/]*//[^/@]*:[^/@]*@", url):
        raise HeadwiseError(
            f"{url.split(':', 1)[0]}://… contains a password, which the run's folder would record; "
            "give the password in the environment or in fsspec's configuration"
        )
    if url.startswith("file://"):
        return _open_folder(Path(url.removeprefix("file://")))
    if url.startswith("hf://"):
        return _open_hub(url)
    from fsspec.core import url_to_fs

    with reaching(url):
        fs, root = url_to_fs(url)
    return Store(url.rstrip("/"), fs, str(root))


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Convert any exception of a store's client into a `HeadwiseError`.

    Raises:
        HeadwiseError: with the first line of what it raised.
    """
    try:
        yield
    except HeadwiseError:
        raise
    except ImportError as error:
        raise HeadwiseError(
            f"{url} needs a package that is not installed: {reading.first_line(error)}"
        ) from error
    except NotImplementedError as error:
        raise HeadwiseError(f"{url} is read-only; give a place that can be written to") from error
    except OSError as error:
        reason = error.strerror or reading.first_line(error)
        raise HeadwiseError(f"{shortened(url)} cannot be used: {reason}") from error
    except Exception as error:  # every client has its own
        reason = re.sub(r"^\[Errno -?\d+\] ", "", reading.first_line(error))
        raise HeadwiseError(f"{shortened(url)} cannot be used: {reason}") from error


def _open_folder(path: Path) -> Store:
    from fsspec.implementations.local import LocalFileSystem

    whole = Path(os.path.abspath(path))
    return Store(str(whole), LocalFileSystem(), str(whole))


def _open_hub(url: str) -> Store:
    from huggingface_hub import HfFileSystem

    kind, repository, revision, inside = _hub_parts(url)
    with reaching(url):
        fs = HfFileSystem(skip_instance_cache=True)
    start = f"{kind}s/{repository}" if kind == "dataset" else repository
    return Hub(url.rstrip("/"), fs, f"{start}@{revision}" + (f"/{inside}" if inside else ""))


def _hub_parts(url: str) -> tuple[str, str, str, str]:
    """Kind of repository, `owner/name`, revision, and the path inside."""
    found = _HUB.fullmatch(url)
    inside = (found[4] or "").strip("/") if found else ""
    if not found or any(part in ("", ".", "..") for part in inside.split("/") if inside):
        raise HeadwiseError(f"{url} is not hf://USER/NAME[/path] or hf://datasets/USER/NAME[/path]")
    return "dataset" if found[1] else "model", hub_name(found[2], url), found[3] or "main", inside


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _known_digest(about: dict[str, Any]) -> str | None:
    """The SHA-256 that the hub has of a large file."""
    large = about.get("lfs")
    digest = large.get("sha256") if isinstance(large, dict) else None
    return digest if isinstance(digest, str) else None


def _chunks_of(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with reading.opened(content) as file:
        while chunk := file.read(CHUNK):
            yield chunk
