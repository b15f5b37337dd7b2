"""Which text a configuration names, and where it is: a file, a folder, or one of the known texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from headwise.data.config import DataConfig
from headwise.data.enwik8 import enwik8
from headwise.data.folders import files_of, walk
from headwise.data.stdlib import standard_library
from headwise.data.text import (
    Text,
    blocks,
    file_facts,
    files_checksum,
    is_binary,
    map_bytes,
    only_one,
    split_90_5_5,
)
from headwise.data.wikitext import open_wikitext
from headwise.errors import HeadwiseError
from headwise.files import local, replacing


def open_text(config: DataConfig) -> Text:
    """The text that `config` names, limited to `config.bytes`.

    Raises:
        HeadwiseError: it is missing, unreadable, empty, not text, or cannot be downloaded.
    """
    if config.name == "wikitext103":
        return open_wikitext(config)
    if config.name == "pystdlib":
        whole, facts = standard_library()
    elif config.name == "enwik8" and config.path is None:
        whole, facts = map_bytes(enwik8(config.cache_folder)), {"files": 1}
    else:
        assert config.path is not None  # DataConfig.validate
        whole, facts = open_path(local(config.path), config.cache_folder)
    return Text(split_90_5_5(whole[: config.bytes]), facts)


def open_path(path: Path, cache: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The bytes of a text file, or of all text files of a folder in the order of their paths.

    Hidden files are left out, and so are a folder's binary files (their number is recorded).
    """
    if not path.exists():
        raise HeadwiseError(f"data.path={str(path)!r} does not exist; give a text file or a folder")
    if not path.is_dir():
        if is_binary(path):
            raise HeadwiseError(
                f"data.path={str(path)!r} is not text (it has a NUL byte); give a text file, unpacked"
            )
        return map_bytes(path), {"files": 1}
    found = files_of(path, walk(path), cache)
    files = [file for file in found if not is_binary(file)]
    if not files:
        raise HeadwiseError(f"data.path={str(path)!r} is a folder without text files; give another")
    names = [file.relative_to(path).as_posix() for file in files]
    facts = {**file_facts(names), "files_skipped": len(found) - len(files)}
    return map_bytes(_joined(files, cache)), facts


def _joined(files: list[Path], cache: Path) -> Path:
    """One file with the contents of `files`, kept in the cache under their checksum."""
    checksum = files_checksum(files)
    target = cache / "text" / f"{checksum}.txt"
    with only_one(target):
        if not target.exists() or files_checksum([target]) != checksum:
            with replacing(target) as draft, draft.open("wb") as file:
                file.writelines(blocks(files))
    return target
