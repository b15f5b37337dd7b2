"""The index of a checkpoint in several files: every file that it names lies in the checkpoint's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.names import place_inside

INDEX = "*.safetensors.index.json"


class Index(TypedDict):
    """An index of weights."""

    weight_map: dict[str, str]


def refuse_outside(folder: Path) -> None:
    """Refuse a checkpoint whose index, or whose own files as links, lead out of its folder.

    Raises:
        HeadwiseError: that is so, or the index cannot be read.
    """
    for index in folder.glob(INDEX):
        try:
            found = reading.read_json(index, Index)["weight_map"]
            names = set(found.values())
        except reading.Unreadable as error:
            raise HeadwiseError(f"{index} cannot be read as an index of weights ({error.reason})") from error
        for name in sorted(names, key=str):
            place_inside(folder, name, str(index))
    for file in folder.glob("*.safetensors"):
        place_inside(folder, file.name, str(folder))
