"""`headwise budget`: validation loss against the share of the context that is kept, over runs and seeds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise.analysis.parity import parity
from headwise.analysis.statistics import paired, summarize
from headwise.errors import HeadwiseError
from headwise.questions.budget.one_run import KEPT, WINDOW, Layers, Losses, Measurable, Options
from headwise.runs.folder import RunFolder
from headwise.runs.read import Run, Study, find_runs
from headwise.runs.weights import find_checkpoint


@dataclass
class Series:
    """One curve: a variant under one way of choosing keys, over its seeds.

    Attributes:
        points: seed -> share -> loss, nats per token.
        layers: seed -> share -> share of each layer, where they differ.
        keys: share -> keys a layer holds.
    """

    variant: str
    kind: str
    method: str
    points: dict[int, Losses] = field(default_factory=dict)
    layers: dict[int, Layers] = field(default_factory=dict)
    keys: dict[float, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As figures and tables call it."""
        return self.variant if self.method == KEPT else f"{self.variant}, {self.method}"


def measure(
    runs: Sequence[str | Path],
    options: Options,
    *,
    baseline: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure every run and return all that the report says, as one JSON-able mapping.

    Args:
        runs: run folders, or folders with runs below them; `variant/seed_<n>` folders are seeds of a
            variant.
        baseline: the same, of the model to compare with; otherwise a variant of kind flash among `runs`.
        say: hears a line about each run.

    Raises:
        HeadwiseError: nothing to measure, a budget outside (0, 1], or runs that cannot be compared.
    """
    options.validate()
    notes: list[str] = []
    found = {name: _with_checkpoint(group, notes) for name, group in variants([*runs]).items()}
    reference = None
    if baseline is not None:
        named = variants([baseline])
        if len(named) > 1:
            raise HeadwiseError(f"--baseline {baseline} holds {len(named)} variants; name one of them")
        reference, group = next(iter(named.items()))
        known = {run.path.resolve() for runs in found.values() for run in runs}
        if not {run.path.resolve() for run in group} <= known:
            while reference in found:
                reference = f"{reference} (baseline)"
            found = {reference: _with_checkpoint(group, notes)} | found
    found = {name: group for name, group in found.items() if group}
    if not found:
        raise HeadwiseError(f"nothing to measure: {'; '.join(notes)}")
    with_full = dataclasses.replace(options, shares=(*options.shares, 1.0))
    measurable = [
        (Measurable(run, with_full if variant == reference else options), variant)
        for variant, group in found.items()
        for run in group
    ]
    curves = _Curves(notes, say)
    for run, _ in measurable:
        curves.compare(run)
    for run, variant in measurable:
        curves.add(run, variant)
    series = list(curves.series.values())
    if reference is None:
        reference = next((one.variant for one in series if one.kind == "flash"), None)
    return _summary(series, options, reference, curves.setting, notes)


def variants(paths: Sequence[str | Path]) -> dict[str, list[Run]]:
    """Runs by the name of their variant: the folder above `seed_<n>`, or the run's own.

    A study's variants come in its plan's order, then other runs by path.

    Raises:
        HeadwiseError: a path is no folder, or holds no run, or a study's plan is damaged.
    """
    folders: dict[Path, list[Run]] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise HeadwiseError(f"no folder {str(path)!r}: give a run folder, or a folder with runs below it")
        runs = find_runs(path)
        if not runs and RunFolder(path).holds_run():
            runs = [Run(path)]
        if not runs:
            raise HeadwiseError(f"no runs below {str(path)!r}: a run is a folder with a config.yaml")
        planned = Study.read(path).variants if (path / "study.yaml").is_file() else {}
        place_of = {name: place for place, name in enumerate(planned)}
        for run in sorted(runs, key=lambda run: place_of.get(str(run.variant), len(place_of))):
            place = run.path.resolve()
            folder = place.parent if place.name.startswith("seed_") else place
            known = folders.setdefault(folder, [])
            if all(other.path.resolve() != place for other in known):
                known.append(run)
    names = [folder.name for folder in folders]
    return {
        folder.name if names.count(folder.name) == 1 else "/".join(folder.parts[-2:]): runs
        for folder, runs in folders.items()
    }


def _with_checkpoint(runs: list[Run], notes: list[str]) -> list[Run]:
    kept = []
    for run in runs:
        try:
            find_checkpoint(RunFolder(run.path))
        except HeadwiseError as error:
            notes.append(f"left out: {error}")
            continue
        if run.state != "finished":
            notes.append(f"{run.path} is {run.state}: its checkpoint is measured, but it is not the last")
        kept.append(run)
    return kept


class _Curves:
    """Curves of runs on the same sequences, and what is to be said about them."""

    def __init__(self, notes: list[str], say: Callable[[str], None]) -> None:
        self.notes, self.say = notes, say
        self.series: dict[str, Series] = {}
        self.setting: dict[str, Any] = {}
        self.first: Path | None = None

    def compare(self, run: Measurable) -> None:
        """Refuse a run that reads other sequences than those before: its loss would say nothing."""
        if self.first is None:
            self.setting, self.first = run.setting, run.path
        for name, value in run.setting.items():
            if self.setting[name] != value:
                raise HeadwiseError(
                    f"{run.path} has {name} {value}, and {self.first} has {self.setting[name]}; "
                    "budgets are compared on the same sequences"
                )

    def add(self, run: Measurable, variant: str) -> None:
        """Measure one run, or read what its folder remembers."""
        began = time.perf_counter()
        found, known = run.measured()
        for method, at in found.losses.items():
            series = Series(variant, found.kind, method)
            series = self.series.setdefault(series.name, series)
            if run.seed in series.points:
                raise HeadwiseError(f"{variant} has two runs of seed {run.seed}; {run.path} is the second")
            series.points[run.seed] = at
            series.keys |= found.keys
            if method in found.layers:
                series.layers[run.seed] = found.layers[method]
        for remark in found.remarks:
            note = f"{variant} {remark}"
            if note not in self.notes:
                self.notes.append(note)
        curve = next(iter(found.losses.values()))
        losses = ", ".join(f"{loss:.4f} at {share:g}" for share, loss in curve.items())
        spent = "measured before" if known else f"{time.perf_counter() - began:.0f} s"
        self.say(f"{run.path}: loss {losses} ({spent})")


def _summary(
    series: list[Series],
    options: Options,
    reference: str | None,
    setting: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    full: dict[int, float] = {}
    for one in series:
        if one.variant == reference and one.method in (KEPT, WINDOW):
            full = {seed: at[1.0] for seed, at in one.points.items() if 1.0 in at}
    rows = [_series(one, reference, full) for one in series]
    return {
        "title": "Loss against the context kept",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "budgets": sorted(set(options.shares), reverse=True),
        "data": setting["data"], "checksum": setting["checksum"], "seq_len": setting["seq_len"],
        "sequences": setting["sequences"], "calibration": setting["calibration"],
        "baseline": None if reference is None else _reference(reference, full),
        "series": rows,
        "notes": notes,
    }  # fmt: skip


def _reference(name: str, full: dict[int, float]) -> dict[str, Any]:
    return {"name": name, "losses": _by_seed(full), **_statistics(full)}


def _series(one: Series, reference: str | None, full: dict[int, float]) -> dict[str, Any]:
    shares = sorted({share for at in one.points.values() for share in at}, reverse=True)
    points = []
    for share in shares:
        at = {seed: found[share] for seed, found in one.points.items()}
        point: dict[str, Any] = {
            "budget": share, "keys": one.keys[share], "losses": _by_seed(at), **_statistics(at),
        }  # fmt: skip
        if full:
            against = paired(full, at)
            point["difference"] = dataclasses.asdict(against.difference) | {"p": against.p_t}
        if one.layers:
            point["layers"] = {str(seed): shares[share] for seed, shares in one.layers.items()}
        points.append(point)
    found = None
    if full and one.variant != reference:
        found = parity(one.points, full)
    text = None if found is None else f"{one.name}: {found.text(str(reference), min(shares))}"
    return {
        "name": one.name, "variant": one.variant, "kind": one.kind, "method": one.method,
        "seeds": sorted(one.points), "points": points,
        "parity": None if found is None else dataclasses.asdict(found) | {"text": text},
    }  # fmt: skip


def _statistics(at: dict[int, float]) -> dict[str, Any]:
    summary = summarize(at.values())
    return {"n": summary.n, "mean": summary.mean, "std": summary.std, "ci95": summary.ci95}


def _by_seed(at: dict[int, float]) -> dict[str, float]:
    return {str(seed): loss for seed, loss in sorted(at.items())}
