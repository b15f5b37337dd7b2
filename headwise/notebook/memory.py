"""`<notebook>.headwise.json`: the record of a notebook's runs and comparisons, complete or absent.

It records the identity of the run in each folder and the time at which each comparison was first seen. If the
file is lost, every comparison whose runs have ended counts as exploratory.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from headwise import reading
from headwise.files import write_json
from headwise.runs.folder import known_format

FORMAT = 1


Identity = Annotated[str, Meta(pattern="^[0-9a-f]{8}$")]
"""Part of a folder's name, where a run is put aside."""


class PastRun(TypedDict):
    """A run of a block: its folder relative to the notebook, its identity, its group and its seed."""

    path: str
    id: Identity
    group: str
    seed: Annotated[int, Meta(ge=0)]


class PastBlock(TypedDict):
    """A block as it was last planned: its checksums and the folders of its runs, verbs and study."""

    id: Identity
    code: str
    data: str
    commands: str
    configuration: str
    runs: list[PastRun]
    verbs: list[str]
    study: str | None


class Look(TypedDict):
    """A decision that was written: the number of pairs of seeds, and the time."""

    n: Annotated[int, Meta(ge=0, lt=2**31)]
    at: str


class PastCompare(TypedDict):
    """A `Compare:` line: the time it was first seen, whether its runs had ended by then, and its looks."""

    seen: str
    exploratory: bool
    looks: list[Look]


class _Content(TypedDict, total=False):
    blocks: dict[str, PastBlock]
    compares: dict[str, PastCompare]


@dataclass
class Memory:
    """The content of the file at `path`."""

    path: Path
    blocks: dict[str, PastBlock] = field(default_factory=dict)
    compares: dict[str, PastCompare] = field(default_factory=dict)

    @classmethod
    def read(cls, notebook: Path) -> Memory:
        """The record of a notebook; empty if there is no file.

        Raises:
            HeadwiseError: the file is damaged, or was written by a newer headwise.
        """
        path = notebook.with_name(f"{notebook.stem}.headwise.json")
        try:
            content: dict[str, Any] = reading.read_json(
                path, _Content, accept=known_format(path, known=FORMAT)
            )
        except reading.Missing:
            return cls(path)
        except reading.Unreadable as error:
            raise error.so("delete the file; every comparison then counts as exploratory") from error
        return cls(path, content.get("blocks", {}), content.get("compares", {}))

    def write(self) -> None:
        """Replace the file."""
        write_json(self.path, {"format": FORMAT, "blocks": self.blocks, "compares": self.compares})

    def identities(self) -> dict[str, str]:
        """Folder -> the recorded identity of its run."""
        return {run["path"]: run["id"] for block in self.blocks.values() for run in block["runs"]}


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
