"""The default text: sources of Python's standard library, on every machine without a network.

Left out is what differs between machines that run the same Python: build configuration, site
customisation, and packages that a distribution may install apart (idlelib, tkinter, ...); and
test folders, which a distribution may strip. What remains is about 10 MB in Python 3.11.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from headwise import reading
from headwise.data.text import file_facts
from headwise.errors import HeadwiseError

_NOT_EVERYWHERE = {
    "distutils", "ensurepip", "idlelib", "lib2to3", "site-packages", "dist-packages", "tkinter",
    "turtledemo", "__pycache__",
}  # fmt: skip
_TESTS = {"test", "tests", "idle_test"}
_SITE_FILES = ("_sysconfigdata", "_distutils_system_mod", "sitecustomize", "usercustomize")


def standard_library(folder: Path | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """The sources one after the other in the order of their paths, uint8 `(n,)`, and facts of them.

    Raises:
        HeadwiseError: this Python comes without its sources.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    names = source_files(folder)
    if not names:
        raise HeadwiseError(
            f"Python's standard library at {folder} has no .py files; use data.name=text with data.path"
        )
    try:
        whole = b"".join((folder / name).read_bytes() for name in names)
    except OSError as error:
        raise reading.Unreadable(folder, error.strerror or str(error)) from error
    facts = {**file_facts(names), "python": platform.python_version()}
    return np.frombuffer(whole, dtype=np.uint8), facts


def source_files(folder: Path) -> list[str]:
    """Paths below `folder` of the sources that belong to the text, sorted."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if name not in _NOT_EVERYWHERE | _TESTS and not name.startswith("config-")
        ]
        found += [
            (Path(place) / name).relative_to(folder).as_posix()
            for name in names
            if name.endswith(".py") and not name.startswith(_SITE_FILES)
        ]
    return sorted(found)
