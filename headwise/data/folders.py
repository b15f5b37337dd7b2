"""The files of a folder of data, without what headwise itself wrote there; no link leads out of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.names import leads_out

OURS = {
    "config.yaml": ("\ntraining:\n", "\nmeasure:\n"), "status.json": ('"heartbeat"', '"pid"'),
    "study.yaml": ("\nvariants:\n", "\nseeds:"), "report.json": ('"run_id"', '"comparisons"'),
    "profile.json": ('"samples_per_part"', '"n_samples"'), "manifest.json": ('"shard_sequences"', '"length"'),
    ".unfinished.npz": (),
}  # fmt: skip
"""Files that show that headwise wrote a folder, and text in them that no other program's file has."""

_HEAD = 1 << 20


def is_ours(folder: Path) -> bool:
    """Whether headwise wrote the folder: a run, a study, a report, a profile or shards."""
    return any(_holds(folder / name, words) for name, words in OURS.items())


def files_of(folder: Path, found: Iterable[Path], cache: Path | None = None) -> list[Path]:
    """Of the files `found` in `folder`, sorted, those that are data.

    A run whose folder lies within its own data would otherwise read other data when it is resumed. The folder
    itself may be one of ours, for it was named.

    Args:
        cache: the cache's folder, whose files are not data either.

    Raises:
        HeadwiseError: a link leads out of the folder.
    """
    ours: dict[Path, bool] = {folder: False}
    kept = []
    for path in sorted(found):
        if path == folder or _below_ours(path.parent, ours, cache) or not path.is_file():
            continue
        if target := leads_out(folder, path):
            raise HeadwiseError(
                f"the folder {folder} has a link {str(path.relative_to(folder))!r} that leads out of it, "
                f"to {target}; put the file itself there, or give the folder that holds it"
            )
        kept.append(path)
    return kept


def walk(folder: Path) -> list[Path]:
    """Every file below `folder` that is not hidden, nor in a hidden folder."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return found


def _below_ours(place: Path, known: dict[Path, bool], cache: Path | None) -> bool:
    if place not in known:
        is_cache = cache is not None and place.absolute() == cache.absolute()
        known[place] = is_cache or _below_ours(place.parent, known, cache) or is_ours(place)
    return known[place]


def _holds(path: Path, words: Iterable[str]) -> bool:
    if not path.is_file():
        return False
    if not words:
        return True
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD).decode(errors="replace")
    except OSError:
        return False
    return all(word in head for word in words)
