"""Names that become folders or files, and links: nothing that a file or a user names leaves its folder."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from headwise.errors import HeadwiseError
from headwise.files import LONGEST, too_long

_SHOWN = 60
_HUB_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


def folder_name(name: object, what: str, *, reserved: Collection[str] = ()) -> str:
    """`name`, if it can be the name of one folder: not a path, not hidden, the same on every machine.

    Args:
        what: what has the name, for the message: `variant`, `--run-id`.
        reserved: names that are taken, compared without case.

    Raises:
        HeadwiseError: it cannot; says why.
    """
    if not isinstance(name, str):
        raise HeadwiseError(f"{what} {_shown(name)} is not a name; write it in quotes")
    if fault := _fault(name, reserved):
        raise HeadwiseError(f"{what} {_shown(name)} cannot name a folder: {fault}; choose another name")
    return name


def refuse_clash(names: Iterable[tuple[str, str]], what: str) -> None:
    """Refuse names of which two would be one folder where case or the form of accents does not count.

    Args:
        names: each name, and what it was made of, for the message.

    Raises:
        HeadwiseError: names both.
    """
    seen: dict[str, str] = {}
    for name, given in names:
        if (other := seen.get(_same(name))) is not None:
            raise HeadwiseError(
                f"{what} {_shown(other)} and {_shown(given)} would share the folder {_shown(name)}; "
                "rename one of them"
            )
        seen[_same(name)] = given


def cleaned(value: object) -> str:
    """The text of a value as a part of a folder's name: `/data/a.txt` becomes `_data_a.txt`."""
    text = unicodedata.normalize("NFC", f"{value}")
    return "".join("_" if letter in "/\\" or not letter.isprintable() else letter for letter in text)


def place_inside(folder: Path, name: object, what: str) -> Path:
    """`folder / name`, if that is below `folder`.

    Args:
        what: what names it, for the message.

    Raises:
        HeadwiseError: `name` is no relative path, or leads out of the folder.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    wrong = not parts or any(p in ("..", "/", "//") or set(p) & {"\0", "\\"} or too_long(p) for p in parts)
    if wrong or leads_out(folder, folder.joinpath(*parts)):
        raise HeadwiseError(f"{what} names {_shown(name)}, which is not a file inside {folder}")
    return folder.joinpath(*parts)


def leads_out(folder: Path, path: Path) -> Path | None:
    """Where `path`, or a link on the way to it, leads when that is outside `folder`; else None.

    The Hugging Face cache keeps a snapshot's files as links to its `blobs`: those are inside.
    """
    target = Path(os.path.realpath(path))
    home = Path(os.path.realpath(folder))
    homes = [home]
    homes += [up.parent / "blobs" for up in (home, *home.parents) if up.name == "snapshots"]
    return None if any(target.is_relative_to(place) for place in homes) else target


def hub_name(name: str, what: str = "the name") -> str:
    """`name`, if it is `owner/name` or `name` as the Hugging Face hub allows.

    Raises:
        HeadwiseError: it is not.
    """
    parts = name.split("/")
    whole = len(parts) <= 2 and all(_HUB_PART.fullmatch(part) for part in parts)
    if not whole or ".." in name or "--" in name or name.endswith(".git"):
        raise HeadwiseError(
            f"{what} {_shown(name)} is neither here nor a name on the Hugging Face hub, "
            "which has the form owner/name"
        )
    return name


def _fault(name: str, reserved: Collection[str]) -> str:
    if not name.strip():
        return "it is empty"
    if name.startswith("."):
        return "it begins with a dot"
    if name.startswith("~"):
        return "it begins with ~, which stands for the home folder"
    if any(letter in name for letter in "/\\"):
        return "it has a slash"
    if not name.isprintable():
        return "it has a character that cannot be printed"
    if name != name.strip() or name.endswith("."):
        return "it begins or ends with a space or ends with a dot"
    if too_long(name):
        return f"it is longer than {LONGEST} bytes"
    if _same(name) in {_same(other) for other in reserved}:
        return "a file or folder of the study has that name"
    return ""


def _same(name: str) -> str:
    """What names have in common that are one name to some file systems."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(str(name))} characters)"
