"""`headwise budget`: validation loss against the share of the context that is kept, over runs and seeds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headwise.analysis.parity import parity
from headwise.analysis.statistics import paired, summarize
from headwise.attention import Attention
from headwise.attention.selective import SelectiveAttention
from headwise.config import Config, load
from headwise.data import Batch, open_data
from headwise.data.base import Data
from headwise.errors import HeadwiseError
from headwise.functional.budget import keys_of_share
from headwise.lab.greedy_budget import greedy_shares
from headwise.lab.runs import Run, find_runs
from headwise.lab.weights import find_checkpoint, load_model
from headwise.model.budget import full_context_only, protects_bos, selects, within_budget
from headwise.storage.run_folder import RunFolder
from headwise.training.distributed import World, find_device
from headwise.training.loss import TokenLoss, evaluate

SCORES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Scores `(B, H, T, T)` of one forward pass at most: half a gigabyte in float32, or four on a GPU."""

KEPT, WINDOW, READMITTED, GREEDY = "kept", "window", "chosen afresh", "per layer"
"""How keys are chosen."""

Layers = dict[float, list[float]]
"""Mean share -> share of each layer."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        shares: of the context, in (0, 1].
        sequences: validation sequences to measure on, evenly spread over the split.
        readmit: add the curve of document 002, in which every query chooses among all keys anew.
        greedy: add the curve with a budget for each layer.
        calibration: validation sequences that choose the budgets of layers.
        device: where it computes.
    """

    shares: tuple[float, ...]
    sequences: int = 128
    readmit: bool = False
    greedy: bool = False
    calibration: int = 16
    device: str = "auto"

    def validate(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            HeadwiseError: a budget outside (0, 1], or no sequences.
        """
        if not self.shares:
            raise HeadwiseError("--budgets is empty; give shares of the context, as 1.0 0.5 0.25")
        for share in self.shares:
            if not 0 < share <= 1:
                raise HeadwiseError(
                    f"a budget of {share:g} is no share of the context; it must be above 0 and at most 1"
                )
        for name in ("sequences", "calibration"):
            if getattr(self, name) < 1:
                raise HeadwiseError(f"--{name} is {getattr(self, name)}; it must be at least 1")


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
    points: dict[int, dict[float, float]] = field(default_factory=dict)
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
    measurements = _Measurements(options, notes, say)
    for run in (run for group in found.values() for run in group):
        measurements.check(run)
    for variant, group in found.items():
        for run in group:
            measurements.add(run, variant, with_full=variant == reference)
    series = list(measurements.series.values())
    if reference is None:
        reference = next((one.variant for one in series if one.kind == "flash"), None)
    return _summary(series, options, reference, measurements.setting, notes)


def variants(paths: Sequence[str | Path]) -> dict[str, list[Run]]:
    """Runs by the name of their variant: the folder above `seed_<n>`, or the run's own.

    Raises:
        HeadwiseError: a path is no folder, or holds no run.
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
        for run in runs:
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


class _Measurements:
    """Curves of runs on the same sequences, and what is to be said about them."""

    def __init__(self, options: Options, notes: list[str], say: Callable[[str], None]) -> None:
        self.options, self.notes, self.say = options, notes, say
        self.series: dict[str, Series] = {}
        self.setting: dict[str, Any] = {}
        self.data: dict[Path, Data] = {}

    def check(self, run: Run) -> None:
        """Refuse a run that cannot be compared with those before, without reading its weights."""
        config = load(RunFolder(run.path).config)
        self.data[run.path] = open_data(config.data, config.seed)
        self._check_comparable(run, config, self.data[run.path])

    def add(self, run: Run, variant: str, *, with_full: bool) -> None:
        """Measure one run that was checked; `with_full` adds the full context to the budgets."""
        began = time.perf_counter()
        world = World(0, 1, find_device(self.options.device))
        model, config = load_model(run.path, world.device)
        data = self.data[run.path]
        measured_on, calibration = self._sequences(data)
        length = config.data.seq_len
        room = SCORES["cuda" if world.device.type == "cuda" else "cpu"]
        size = max(1, min(config.data.batch_size, room // (config.model.n_heads * length**2)))
        batches, chosen_on = (_batches(data, indices, size) for indices in (measured_on, calibration))
        attention = model.attentions()[0]
        has_f = selects(attention)
        shares = sorted({*self.options.shares, *([] if has_f and not with_full else [1.0])}, reverse=True)
        if reason := full_context_only(attention):
            shares = [1.0]
            self.note(f"{variant} is measured with its full context alone: {reason}")

        def loss(batches: Sequence[Batch], share: float | Sequence[float], readmit: bool = False) -> float:
            autocast = world.autocast(config.training.precision)
            with within_budget(model, share, readmit=readmit):
                return evaluate(TokenLoss(model), batches, world, autocast).loss

        def record(method: str, at: dict[float, float], layers: Layers | None = None) -> None:
            series = Series(variant, config.model.attention.kind, method)
            series = self.series.setdefault(series.name, series)
            seed = config.seed if run.seed is None else run.seed
            if seed in series.points:
                raise HeadwiseError(f"{variant} has two runs of seed {seed}; {run.path} is the second")
            series.points[seed] = at
            series.keys |= {share: keys_of_share(share, length, protects_bos(attention)) for share in shares}
            if layers is not None:
                series.layers[seed] = layers

        at = {share: loss(batches, share) for share in shares}
        record(KEPT if has_f else WINDOW, at)
        if has_f and self.options.readmit:
            record(READMITTED, {share: loss(batches, share, readmit=True) for share in shares})
        if has_f and self.options.greedy:
            least = (1 + protects_bos(attention)) / length
            layers = greedy_shares(config.model.n_layers, shares, least, lambda each: loss(chosen_on, each))
            record(GREEDY, {share: loss(batches, each) for share, each in layers.items()}, layers)
        self._note_switches(attention, variant)
        losses = ", ".join(f"{at[share]:.4f} at {share:g}" for share in shares)
        self.say(f"{run.path}: loss {losses} ({time.perf_counter() - began:.0f} s)")

    def note(self, line: str) -> None:
        """Say something once."""
        if line not in self.notes:
            self.notes.append(line)

    def _check_comparable(self, run: Run, config: Config, data: Data) -> None:
        """All runs read the same sequences, or their losses say nothing about each other."""
        mine = {
            "seq_len": config.data.seq_len, "data": str(data.identity.get("name")),
            "checksum": str(data.identity.get("checksum"))[:16],
        }  # fmt: skip
        first = self.setting.setdefault("first", str(run.path))
        for name, value in mine.items():
            if self.setting.setdefault(name, value) != value:
                raise HeadwiseError(
                    f"{run.path} has {name} {value}, and {first} has {self.setting[name]}; "
                    "budgets are compared on the same sequences"
                )

    def _sequences(self, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """Validation sequences to measure on, and others to choose budgets of layers by."""
        total = data.n_sequences("val")
        assert total is not None
        everything = np.arange(total, dtype=np.int64)
        measured_on = _spread(everything, self.options.sequences)
        self.setting["sequences"] = len(measured_on)
        if not self.options.greedy:
            return measured_on, measured_on[:0]
        others = np.setdiff1d(everything, measured_on)
        calibration = _spread(others if len(others) else everything, self.options.calibration)
        self.setting["calibration"] = len(calibration)
        if not len(others):
            self.note("budgets of layers were chosen on sequences that are measured too: there are no others")
        return measured_on, calibration

    def _note_switches(self, attention: Attention, variant: str) -> None:
        if isinstance(attention, SelectiveAttention) and attention.config.mask_layernorm:
            self.note(
                f"{variant} normalises F over all keys of a query (mask_layernorm), dropped ones too, and "
                "by queries still to come: no cache can follow its curve"
            )


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    count = min(count, len(indices))
    return indices[np.arange(count) * len(indices) // count]


def _batches(data: Data, indices: np.ndarray, size: int) -> list[Batch]:
    return [data.batch("val", indices[at : at + size]) for at in range(0, len(indices), size)]


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
        "sequences": setting["sequences"], "calibration": setting.get("calibration"),
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
