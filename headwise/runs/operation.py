"""What a run folder keeps of an operation: `surgery.json`, and how its new head began.

    surgery.json               what was done, whether it preserves the function, validation loss either side
    surgery_start.safetensors  `<layer>.<part>`: the new head's weights before training

Runs that start from such a run take both along, so that the report can tell what became of the head.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import replacing, write_json
from headwise.runs.schemas import Operation

RECORD = "surgery.json"
START = "surgery_start.safetensors"
PARTS = ("q", "k", "v", "o")


class Piece(NamedTuple):
    """Where one part of the new head lies: `name[start:stop]` along `axis`."""

    layer: int
    part: str
    name: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Movement:
    """How one part of the new head changed in training.

    Attributes:
        moved: share of its weights that are not what they were.
        nonzero: share of its weights that are not 0.
        norm_start, norm_end: Frobenius norms.
    """

    layer: int
    part: str
    moved: float
    nonzero: float
    norm_start: float
    norm_end: float


def write(folder: Path, record: dict[str, Any], start: dict[str, np.ndarray]) -> None:
    """Write both files into a run folder."""
    from safetensors.numpy import save_file

    with replacing(folder / START) as draft:
        save_file({name: np.ascontiguousarray(value) for name, value in start.items()}, draft)
    write_json(folder / RECORD, record)


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a run that began with an operation, or None.

    Raises:
        HeadwiseError: it is damaged.
    """
    try:
        record = reading.read_json(folder / RECORD, Operation)
    except reading.Missing:
        return None
    return record if record["pieces"] and record["val_loss"] else None


def carry(source: Path, folder: Path) -> None:
    """Take the record of the run `source`, where it has a whole one, along to a run that starts from it."""
    try:
        record = read(source)
    except HeadwiseError:  # what became of the head cannot be told then; the run needs none of it
        return
    if record is None or not (source / START).is_file():
        return
    with replacing(folder / START) as draft:
        shutil.copyfile(source / START, draft)
    write_json(folder / RECORD, record | {"operated_in": record.get("operated_in") or str(source)})


def movement(folder: Path) -> tuple[int, list[Movement]]:
    """What became of the new head at the last checkpoint: its step, and each part of each layer.

    Raises:
        HeadwiseError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from headwise.runs.checkpoint import latest

    record = read(folder) or {}
    checkpoint = latest(folder / "checkpoints")
    if checkpoint is None:
        raise HeadwiseError(f"{folder} has no checkpoint")
    try:
        reading.read_tensor_headers(folder / START)
        start = load_file(folder / START)
        found = []
        for piece, end in _pieces(checkpoint / "model.safetensors", record):
            begun = start[f"{piece.layer}.{piece.part}"].astype(np.float64)
            found.append(
                Movement(
                    piece.layer, piece.part, float((end != begun).mean()), float((end != 0).mean()),
                    float(np.linalg.norm(begun)), float(np.linalg.norm(end)),
                )
            )  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise HeadwiseError(f"{folder}: the new head cannot be read ({reading.first_line(error)})") from error
    return int(checkpoint.name.removeprefix("step_")), found


def _pieces(weights: Path, record: dict[str, Any]) -> Iterator[tuple[Piece, np.ndarray]]:
    """Every part of the new head in a file of weights."""
    from safetensors import safe_open

    reading.read_tensor_headers(weights)
    with safe_open(weights, framework="np") as file:
        for values in record.get("pieces", []):
            piece = Piece(**values)
            whole = file.get_slice(piece.name)
            part = slice(piece.start, piece.stop)
            yield piece, (whole[:, part] if piece.axis else whole[part]).astype(np.float64)


def statement(step: int, found: list[Movement]) -> str:
    """Whether every weight of the new head moved, in a sentence."""
    if step == 0:
        return "the new head is not trained yet"
    still = [f"L{m.layer} {m.part} ({m.moved:.1%} moved)" for m in found if m.moved < 1]
    zero = sum(m.nonzero < 1 for m in found)
    if not any(m.moved for m in found):
        return f"no weight of the new head moved in {step} steps"
    if not still:
        ends = "none is 0" if not zero else f"{zero} of {len(found)} parts hold weights that are 0"
        return f"every weight of the new head moved in {step} steps, and {ends}"
    shown = ", ".join(still[:4]) + (f" and {len(still) - 4} more" if len(still) > 4 else "")
    return f"not every weight of the new head moved in {step} steps: {shown}"


def as_rows(found: list[Movement]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(m) for m in found]
