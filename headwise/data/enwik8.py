"""enwik8, the first 10^8 bytes of the English Wikipedia dump of 3 March 2006, from its home."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from headwise.data.progress import progress
from headwise.data.text import files_checksum, only_one
from headwise.errors import HeadwiseError
from headwise.files import replacing

URL = "http://mattmahoney.net/dc/enwik8.zip"
SIZE = 100_000_000
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"


def enwik8(cache: Path, url: str = URL, size: int = SIZE, sha256: str = SHA256) -> Path:
    """The file in the cache, downloaded when it is not there yet; whole and checked, or not there.

    Raises:
        HeadwiseError: no network, or what came is not enwik8.
    """
    target = cache / "enwik8" / "enwik8"
    with only_one(target):
        if not target.exists():
            with replacing(target) as draft:
                archive = draft.with_suffix(".zip")
                _download(url, archive)
                _unpack(archive, draft, size, sha256)
    if target.stat().st_size != size:
        raise HeadwiseError(
            f"{target} has {target.stat().st_size} bytes instead of {size}; delete it and run again"
        )
    if files_checksum([target]) != sha256:
        raise HeadwiseError(f"{target} has changed since its download; delete it and run again")
    return target


def _download(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, target.open("wb") as file:
            total = int(reply.headers.get("Content-Length") or 0) or None
            with progress("downloading enwik8", total, "B") as advance:
                while block := reply.read(1 << 18):
                    file.write(block)
                    advance(len(block))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise HeadwiseError(
            f"enwik8 cannot be downloaded from {url} ({reason}); "
            "get the file elsewhere and pass --data.path=FILE"
        ) from error


def _unpack(archive: Path, target: Path, size: int, sha256: str) -> None:
    digest, length = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(archive) as files, files.open("enwik8") as packed, target.open("wb") as file:
            while block := packed.read(1 << 20):
                digest.update(block)
                length += len(block)
                file.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise HeadwiseError(f"the download of enwik8 is damaged ({error}); run again") from error
    if length != size or digest.hexdigest() != sha256:
        raise HeadwiseError(
            f"the download is not enwik8: {length} bytes with sha256 {digest.hexdigest()[:12]}..., "
            f"expected {size} with {sha256[:12]}...; get the file elsewhere and pass --data.path=FILE"
        )
