"""Optional trackers behind one small interface: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from headwise.errors import HeadwiseError


class Tracker(Protocol):
    """Where numbers go beside metrics.csv."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record named numbers at a step."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoard:
    """Event files below the run folder's `tensorboard/`."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        """One scalar a name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class HostedRun:
    """A run of a service with the interface of Weights & Biases, which trackio shares."""

    def __init__(self, package: str, folder: Path, config: dict[str, Any]) -> None:
        self.module = importlib.import_module(package)
        self.module.init(project="headwise", name=str(folder), config=config)

    def log(self, step: int, values: dict[str, float]) -> None:
        """All names at once."""
        self.module.log(values, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self.module.finish()


def open_trackers(names: Sequence[str], folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """The trackers called `names`.

    Raises:
        HeadwiseError: a tracker's package is not installed; says which extra brings it.
    """
    refuse_missing(names)
    return [
        TensorBoard(folder, config) if name == "tensorboard" else HostedRun(name, folder, config)
        for name in names
    ]


def refuse_missing(names: Sequence[str]) -> None:
    """Refuse a tracker before a run begins; a tracker's package has the tracker's name.

    Raises:
        HeadwiseError: as `open_trackers`.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise HeadwiseError(
                f"tracker {name!r} needs the package {name!r}, which is not installed: "
                "pip install 'headwise[trackers]'"
            )
