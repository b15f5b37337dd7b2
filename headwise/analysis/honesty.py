"""Honesty checks: what a reader must know before believing a comparison.

Plain facts about runs in, flags out; every flag is one sentence with its numbers. Which runs may
be averaged is decided here too, so that a table and a flag never disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from headwise.analysis.verdict import NONFINITE_SHARE, SPIKE_SHARE

CHANCE_MARGIN = 0.01
PARAMETER_MARGIN = 0.02
DATA_WAIT_LIMIT = 0.05
MIN_STEPS = 50  # throughput and the smoothed loss look back over the last 50 steps
SEVERITIES = ("error", "warning", "note")
SHORT = {
    "parameters": "other number of parameters", "data_wait": "waits for data",
    "at_a_time": "runs side by side", "nonfinite": "non-finite steps", "spikes": "gradient spikes",
    "choice_in_noise": "choice within the noise", "search_end": "best at an end of what was searched",
    "untrained": "learned nothing", "nonfinite_loss": "non-finite loss",
}  # fmt: skip
CUT_SHORT = {"diverged": "error", "timed_out": "error", "failed": "error", "out_of_memory": "warning",
             "interrupted": "warning", "running": "warning",
             "skipped": "note", "planned": "note"}  # fmt: skip


@dataclass(frozen=True)
class RunFacts:
    """What the checks need of one run; None = not recorded.

    `batch_size` is that of a pass, and `wanted_batch` the planned one, where memory did not suffice for it.
    `loss` is the final one, `start_loss` the same measured before the first step; `time` is when it
    began and ended, in seconds. `repeats`: an earlier run of this variant has its seed, and is usable.
    """

    variant: str
    seed: int | None
    state: str
    reason: str = ""
    loss: float | None = None
    chance_loss: float | None = None
    start_loss: float | None = None
    engine: str | None = None
    expected_engine: str | None = None
    data_checksum: str | None = None
    params_total: int | None = None
    step: int | None = None
    data_wait: float | None = None
    nonfinite_share: float | None = None
    spike_share: float | None = None
    device: str | None = None
    version: str | None = None
    host: str | None = None
    time: tuple[float, float] | None = None
    repeats: bool = False
    batch_size: int | None = None
    wanted_batch: int | None = None

    @property
    def usable(self) -> bool:
        """Whether the run may enter an average: finished, finite, on the right engine, its seed's first."""
        finished = self.state == "finished" and _finite(self.loss)
        return finished and not self.other_engine and not self.repeats

    @property
    def other_engine(self) -> bool:
        """Whether the run used another engine than its variant asked for.

        An engine's name may carry its own choice behind a dash: `sdpa` is met by `sdpa-flash`.
        """
        if self.engine is None or self.expected_engine is None:
            return False
        return self.expected_engine not in (self.engine, self.engine.partition("-")[0])

    @property
    def at_chance(self) -> bool:
        """Whether the final loss is within 1% of ln(vocabulary), or above it."""
        if self.loss is None or self.chance_loss is None:
            return False
        return self.loss >= (1 - CHANCE_MARGIN) * self.chance_loss

    @property
    def untrained(self) -> bool:
        """Whether the final loss is within 1% of the loss before the first step, or above it."""
        if self.loss is None or self.start_loss is None:
            return False
        return self.loss >= (1 - CHANCE_MARGIN) * self.start_loss


@dataclass(frozen=True)
class Flag:
    """One thing to know. `code` is stable, for scripts; `text` is one sentence for people.

    `variants` names those that it concerns where they are several; all, where neither says.
    """

    severity: str
    code: str
    text: str
    variant: str | None = None
    variants: tuple[str, ...] = ()

    @property
    def about(self) -> tuple[str, ...]:
        """The variants it concerns; empty where it concerns all."""
        return self.variants or (() if self.variant is None else (self.variant,))

    @property
    def short(self) -> str:
        """The flag in a word or two, for a list of what to distrust."""
        return SHORT.get(self.code, self.code.replace("_", " "))


def mark_repeats(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """The same, where all usable runs of one variant and seed but the first are marked as repeats."""
    seen: set[tuple[str, int]] = set()
    marked = []
    for run in runs:
        if run.usable and run.seed is not None:
            key = (run.variant, run.seed)
            run = replace(run, repeats=key in seen)
            seen.add(key)
        marked.append(run)
    return marked


def check(
    runs: Sequence[RunFacts], baseline: str | None = None, references: Mapping[str, str] | None = None
) -> list[Flag]:
    """All flags of a set of runs, the gravest first.

    Args:
        baseline: of the study.
        references: variant -> what it is compared with, where that is not always the baseline.
    """
    against = {run.variant: str(baseline) for run in runs} | dict(references or {})
    flags = [
        *_each_variant(runs),
        *_identical_variants(runs),
        *_shrunk(runs),
        *_different_data(runs, against if baseline else {}),
        *_parameters(runs, against),
        *_other_seeds(runs, against),
        *_different_machines(runs),
        *_at_a_time(runs),
    ]
    return sorted(flags, key=lambda flag: SEVERITIES.index(flag.severity))


def _each_variant(runs: Sequence[RunFacts]) -> Iterable[Flag]:
    for name in dict.fromkeys(run.variant for run in runs):
        mine = [run for run in runs if run.variant == name]
        yield from _at_chance(name, mine)
        yield from _untrained(name, mine)
        yield from _identical_seeds(name, mine)
        yield from _left_out(name, mine)
        yield from _repeated(name, mine)
        yield from _few_seeds(name, mine)
        yield from _short(name, mine)
        yield from _unsteady(name, mine)


def _at_chance(name: str, runs: list[RunFacts]) -> Iterable[Flag]:
    stuck = [run for run in runs if run.state == "finished" and run.at_chance]
    if not stuck:
        return
    losses, chance = [run.loss for run in stuck if run.loss is not None], stuck[0].chance_loss
    assert chance is not None
    where = "is within 1% of" if max(losses) <= (1 + CHANCE_MARGIN) * chance else "is not below"
    yield Flag(
        "error", "at_chance",
        f"{name} ({_seeds(stuck)}) ended at chance: nothing was learned; final loss "
        f"{_span(losses)} {where} ln(vocabulary) = {chance:.4f}.", name,
    )  # fmt: skip


def _untrained(name: str, runs: list[RunFacts]) -> Iterable[Flag]:
    stuck = [run for run in runs if run.state == "finished" and run.untrained and not run.at_chance]
    if stuck:
        after = _span([run.loss for run in stuck if run.loss is not None])
        before = _span([run.start_loss for run in stuck if run.start_loss is not None])
        yield Flag(
            "error", "untrained",
            f"{name} ({_seeds(stuck)}) did not learn: final loss {after} is no more than 1% below "
            f"the untrained model's {before}.", name,
        )  # fmt: skip


def _identical_seeds(name: str, runs: list[RunFacts]) -> Iterable[Flag]:
    usable = sorted((run for run in runs if run.usable), key=lambda run: _key(run.loss))
    for loss, group in groupby(usable, key=lambda run: _key(run.loss)):
        same = list(group)
        if len({run.seed for run in same}) > 1:
            yield Flag(
                "error", "identical_losses",
                f"{name}: {_seeds(same)} end on the identical loss {loss:.6f}; "
                "different seeds should differ, so these are not independent runs.", name,
            )  # fmt: skip


def _left_out(name: str, runs: list[RunFacts]) -> Iterable[Flag]:
    order = sorted((r for r in runs if r.state in CUT_SHORT), key=lambda r: (r.state, r.reason))
    for (state, reason), group in groupby(order, key=lambda run: (run.state, run.reason)):
        out = list(group)
        why = f": {reason.rstrip('.')}" if reason else ""
        yield Flag(
            CUT_SHORT[state], state,
            f"{name} ({_seeds(out)}) {state.replace('_', ' ')}{why}; not in any average.", name,
        )  # fmt: skip
    finished = [run for run in runs if run.state == "finished"]
    unreal = [run for run in finished if not _finite(run.loss)]
    if unreal:
        yield Flag(
            "error", "nonfinite_loss",
            f"{name} ({_seeds(unreal)}) finished without a finite loss; not in any average.", name,
        )  # fmt: skip
    swapped = [run for run in finished if run.other_engine]
    if swapped:
        yield Flag(
            "error", "other_engine",
            f"{name} ({_seeds(swapped)}) ran on engine {swapped[0].engine!r} where "
            f"{swapped[0].expected_engine!r} was expected; not in any average.", name,
        )  # fmt: skip


def _repeated(name: str, runs: list[RunFacts]) -> Iterable[Flag]:
    again = [run for run in runs if run.repeats]
    if again:
        yield Flag(
            "warning", "repeated_seed",
            f"{name} ({_seeds(again)}) has more than one run of a seed; these are not independent, so only "
            "the first is in an average.", name,
        )  # fmt: skip


def _few_seeds(name: str, runs: list[RunFacts]) -> Iterable[Flag]:
    n = sum(run.usable for run in runs)
    if n == 1:
        yield Flag("warning", "one_seed", f"{name}: n = 1, so there is no interval.", name)
    elif n == 0 and any(run.state == "finished" for run in runs):
        yield Flag("error", "no_usable_run", f"{name}: no run may be averaged (n = 0).", name)


def _other_seeds(runs: Sequence[RunFacts], against: Mapping[str, str]) -> Iterable[Flag]:
    """Variants whose averages are over other seeds than their baseline's."""
    averaged: dict[str, set[int | None]] = {}
    for run in runs:
        if run.usable and run.seed is not None:
            averaged.setdefault(run.variant, set()).add(run.seed)
    apart = [name for name, seeds in averaged.items() if seeds != averaged.get(against[name], seeds)]
    for baseline in dict.fromkeys(against[name] for name in apart):
        names = [name for name in apart if against[name] == baseline]
        yield Flag(
            "note", "other_seeds",
            f"{', '.join(names)} and {baseline} were not averaged over the same seeds: compare them by their "
            "paired differences, not by their means.", variants=tuple(names),
        )  # fmt: skip


def _short(name: str, runs: list[RunFacts]) -> Iterable[Flag]:
    short = [run for run in runs if run.usable and run.step is not None and run.step < MIN_STEPS]
    if short:
        steps = _span([float(run.step) for run in short if run.step is not None], "g")
        yield Flag(
            "warning", "few_steps",
            f"{name} ({_seeds(short)}) trained for {steps} step{'' if steps == '1' else 's'} only"
            f"{_progress(short)}; fewer than {MIN_STEPS} say little about a kind of attention.", name,
        )  # fmt: skip


def _progress(runs: list[RunFacts]) -> str:
    """`, from loss 5.36 untrained to 5.20`: what so few steps did; empty where it is not known."""
    known = [(run.start_loss, run.loss) for run in runs]
    before, after = ([pair[i] for pair in known if pair[i] is not None] for i in (0, 1))
    if not before or len(before) != len(after):
        return ""
    return f", from loss {_span(before)} untrained to {_span(after)}"  # type: ignore[arg-type]


def _unsteady(name: str, runs: list[RunFacts]) -> Iterable[Flag]:
    checks: list[tuple[str, Callable[[RunFacts], float | None], float, str]] = [
        ("nonfinite", lambda run: run.nonfinite_share, NONFINITE_SHARE, "of steps had non-finite values"),
        ("spikes", lambda run: run.spike_share, SPIKE_SHARE, "of steps were gradient-norm spikes"),
        ("data_wait", lambda run: run.data_wait, DATA_WAIT_LIMIT, "of the time went to waiting for data"),
    ]  # fmt: skip
    for code, read, limit, what in checks:
        high = [run for run in runs if (share := read(run)) is not None and share > limit]
        if high:
            worst = max(share for run in high if (share := read(run)) is not None)
            yield Flag(
                "warning", code,
                f"{name} ({_seeds(high)}): up to {worst:.1%} {what} (limit {limit:.1%}).", name,
            )  # fmt: skip


def _identical_variants(runs: Sequence[RunFacts]) -> Iterable[Flag]:
    losses: dict[tuple, list[str]] = {}
    for name in dict.fromkeys(run.variant for run in runs):
        ends = {run.seed: _key(run.loss) for run in runs if run.variant == name and run.usable}
        if ends:
            losses.setdefault(tuple(sorted(ends.items(), key=str)), []).append(name)
    for names in losses.values():
        if len(names) > 1:
            yield Flag(
                "warning", "identical_variants",
                f"{' and '.join(names)} end on identical losses on every seed; "
                "check that they compute different things.", variants=tuple(names),
            )  # fmt: skip


def different_data(runs: Sequence[RunFacts], against: Mapping[str, str]) -> list[str]:
    """The variants whose runs read other data than those of their baseline."""
    read: dict[str, set[str]] = {}
    for run in runs:
        if run.data_checksum:
            read.setdefault(run.variant, set()).add(run.data_checksum)
    return [
        name
        for name, data in read.items()
        if len(data) > 1 or data != read.get(against.get(name, name), data)
    ]


def _shrunk(runs: Sequence[RunFacts]) -> Iterable[Flag]:
    for name in dict.fromkeys(run.variant for run in runs):
        mine = [run for run in runs if run.variant == name and run.wanted_batch and run.batch_size]
        changed = [run for run in mine if run.state == "finished" and run.batch_size != run.wanted_batch]
        if changed:
            first = changed[0]
            yield Flag(
                "note", "batch_shrunk",
                f"{name} ({_seeds(changed)}): the batch of {first.wanted_batch} sequences did not fit into "
                f"memory, so that a pass had {first.batch_size}; a step had as many tokens as planned.", name,
            )  # fmt: skip


def _different_data(runs: Sequence[RunFacts], against: Mapping[str, str]) -> Iterable[Flag]:
    apart = different_data(runs, against)
    checksums: dict[str, list[str]] = {}
    for run in runs:
        if run.data_checksum:
            names = checksums.setdefault(run.data_checksum, [])
            if run.variant not in names:
                names.append(run.variant)
    if len(checksums) > 1 and (apart or not against):
        listed = "; ".join(f"{key[:12]}: {', '.join(names)}" for key, names in checksums.items())
        yield Flag(
            "error", "different_data",
            f"The runs read {len(checksums)} different data sets (checksums {listed}); "
            "only runs on the same data are compared.", variants=tuple(apart),
        )  # fmt: skip


def _parameters(runs: Sequence[RunFacts], against: Mapping[str, str]) -> Iterable[Flag]:
    sizes = {run.variant: run.params_total for run in runs if run.params_total}
    for name, size in sizes.items():
        baseline = against[name]
        reference = sizes.get(baseline)
        if not reference:
            continue
        ratio = size / reference - 1
        if abs(ratio) > PARAMETER_MARGIN:
            yield Flag(
                "warning", "parameters",
                f"{name} has {size:,} parameters, {ratio:+.1%} against {baseline} "
                f"({reference:,}); a fair comparison keeps within 2%.", name,
            )  # fmt: skip


def _different_machines(runs: Sequence[RunFacts]) -> Iterable[Flag]:
    devices = list(dict.fromkeys(run.device for run in runs if run.device))
    if len(devices) > 1:
        yield Flag(
            "warning", "different_devices",
            f"The runs used different devices ({', '.join(devices)}): "
            "do not compare their throughput or memory.",
        )  # fmt: skip
    versions = list(dict.fromkeys(run.version for run in runs if run.version))
    if len(versions) > 1:
        yield Flag(
            "note", "different_versions",
            f"The runs come from different versions of the code ({', '.join(versions)}).",
        )  # fmt: skip


def _at_a_time(runs: Sequence[RunFacts]) -> Iterable[Flag]:
    """Runs of one machine that overlap in time: each took from the others what it ran on."""
    most = 0
    for host in {run.host for run in runs if run.host}:
        times = [run.time for run in runs if run.host == host and run.time]
        most = max([most, *(sum(began <= start < ended for began, ended in times) for start, _ in times)])
    if most > 1:
        yield Flag(
            "note", "at_a_time",
            f"Up to {most} runs ran at a time on one machine: tokens per second and step times compare what "
            "else ran beside them too.",
        )  # fmt: skip


def _seeds(runs: list[RunFacts]) -> str:
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    if not seeds:
        return "no seed recorded"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _span(values: list[float], style: str = ".4f") -> str:
    low, high = format(min(values), style), format(max(values), style)
    return low if low == high else f"{low} to {high}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _key(loss: float | None) -> float:
    """Losses that agree to 7 digits are the same number to float32 and to any reader."""
    return float(f"{loss:.7g}") if loss is not None else math.nan
