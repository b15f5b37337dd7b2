"""The best run of a report, and its appendix: the shared keys of all configurations and the differences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from headwise import reading
from headwise.report.compare import Material, number
from headwise.report.scaling import flat
from headwise.runs.read import Run, Unreadable
from headwise.runs.schemas import Best

NOT_SHOWN = ("seed", "out", "device")
"""Keys that differ between the runs of any variant."""


def best_runs(material: Material) -> list[dict[str, Any]]:
    """The run with the lowest final loss for each data set with at least two runs.

    Returns:
        `{variant, seed, final_loss, data, path, checkpoint}`; `checkpoint` is None where the run kept none.
    """
    by_data: dict[str | None, list[tuple[float, str, Run]]] = {}
    for name in material.variants:
        for run in material.usable(name):
            if (loss := number(run, "final_loss")) is not None:
                by_data.setdefault(run.get("data_checksum"), []).append((loss, name, run))
    found = []
    for checksum, rows in by_data.items():
        loss, name, run = min(rows, key=lambda row: row[0])
        if len(rows) > 1:
            checkpoint = _checkpoint(run)
            found.append({
                "variant": name, "seed": run.seed, "final_loss": loss, "of": len(rows),
                "data": checksum if len(by_data) > 1 else None, "path": str(run.path.absolute()),
                "checkpoint": checkpoint and str(checkpoint.absolute()),
            })  # fmt: skip
    return found


def _checkpoint(run: Run) -> Path | None:
    """The checkpoint with the lowest validation loss, else the last one."""
    folder = run.path / "checkpoints"
    try:
        return folder / str(reading.read_json(folder / "best.json", Best)["checkpoint"])
    except reading.Unreadable:
        steps = [path for path in folder.glob("step_*") if re.fullmatch(r"step_[0-9]{1,18}", path.name)]
        return max(steps, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def appendix(variants: dict[str, list[Run]]) -> dict[str, Any]:
    """The configurations: `shared` keys and values, and the other keys and values of each variant."""
    configs: dict[str, dict[str, Any]] = {}
    for name, runs in variants.items():
        for run in runs:
            try:
                values = dict(flat(run.config))
            except Unreadable:
                continue
            if values:
                configs[name] = {k: v for k, v in values.items() if k not in NOT_SHOWN}
                break
    if not configs:
        return {}
    first = next(iter(configs.values()))
    shared = {
        key: value
        for key, value in first.items()
        if all(key in one and one[key] == value for one in configs.values())
    }
    own = {name: {k: v for k, v in one.items() if k not in shared} for name, one in configs.items()}
    return {"shared": shared, "variants": own}
