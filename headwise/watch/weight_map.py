"""The index of a checkpoint in several files: every file that it names lies in the checkpoint's folder."""

from __future__ import annotations

import json
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.names import place_inside

INDEX = "*.safetensors.index.json"


def refuse_outside(folder: Path) -> None:
    """Refuse a checkpoint whose index, or whose own files as links, lead out of its folder.

    Raises:
        HeadwiseError: that is so, or the index cannot be read.
    """
    for index in folder.glob(INDEX):
        try:
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = set(found.values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise HeadwiseError(f"{index} cannot be read as an index of weights ({error})") from error
        for name in sorted(names, key=str):
            place_inside(folder, name, str(index))
    for file in folder.glob("*.safetensors"):
        place_inside(folder, file.name, str(folder))
