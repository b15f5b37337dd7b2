"""`search:` of a study: the keys that are searched, their values, the number of trials, and the seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, get_args

from headwise.config.run import keys as known_keys
from headwise.config.run import type_of
from headwise.errors import HeadwiseError, did_you_mean, in_range, one_of

SAMPLERS = ("grid", "random", "tpe")
EACH = ("variant", "study")
EXTRA = "pip install 'headwise[search]'"
MOST_TRIALS = 10_000
DIGITS = 4
"""Significant digits of a proposed number; few enough to type a trial again."""

PARTS = ("low", "high", "log", "step", "points")
SAME_DATA = "data.batch_size"
"""The only key of `data` that does not change the data on which the loss is measured."""


@dataclass(frozen=True)
class Choices:
    """A key that takes one of several values."""

    values: tuple[Any, ...]

    @property
    def size(self) -> int:
        """The number of values."""
        return len(self.values)

    def grid(self, points: int | None) -> list[Any]:
        """Every value."""
        return list(self.values)

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that are validated before anything starts: all."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A number between `low` and `high`, both included.

    Attributes:
        log: uniform on a logarithmic scale.
        whole: only whole numbers, `step` apart.
        points: the number of values in a grid; None for as many as the number of trials allows.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False
    step: int = 1
    points: int | None = None

    @property
    def size(self) -> float:
        """The number of values; infinite for real numbers."""
        return (self.high - self.low) // self.step + 1 if self.whole else math.inf

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that are validated before anything starts: low and high."""
        return (self.low, self.high)

    def grid(self, points: int | None) -> list[Any]:
        """`points` evenly spaced numbers from low to high; fewer if rounded whole numbers coincide."""
        count = int(min(self.points or points or 2, self.size))
        shares = [number / (count - 1) for number in range(count)]
        if self.log:
            found = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            found = [self.low + (self.high - self.low) * share for share in shares]
        return list(dict.fromkeys(self.rounded(value) for value in found))

    def rounded(self, value: float) -> Any:
        """The nearest value that a trial may have: a whole number, or one of four significant digits."""
        if self.whole:
            nearest = self.low + self.step * round((value - self.low) / self.step)
            return int(min(max(nearest, self.low), self.high))
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)


Space = dict[str, Choices | Range]


@dataclass
class Search:
    """A search for the best values of keys, before variants are compared.

    Attributes:
        keys: dotted key -> a list of values, or `{low, high, log, step, points}`.
        sampler: grid, or a sampler of Optuna: random, tpe.
        trials: the number of trials of each variant; for a grid its upper limit.
        by: the number that decides, one of `headwise.study.study.CRITERIA`.
        seeds: the seeds of every trial; its value is the mean over them.
        confirm_seeds: the seeds of the winner, which no trial has used. Only these runs are compared.
        each: `variant` for a search per variant, `study` for one setting for all variants.
        batch: the number of trials that tpe proposes at a time, independent of the number of workers.
        seed: the seed of the sampler.
        default: also run each variant without the values found, on the confirm seeds.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    sampler: str = "grid"
    trials: int | None = None
    by: str = "val_loss"
    seeds: list[int] = field(default_factory=lambda: [0])
    confirm_seeds: list[int] = field(default_factory=lambda: [100, 101, 102])
    each: str = "variant"
    batch: int = 4
    seed: int = 0
    default: bool = True

    def space(self) -> Space:
        """The values of each key.

        Raises:
            HeadwiseError: a key or a range that cannot be searched.
        """
        return {key: parsed(key, values) for key, values in self.keys.items()}

    def validate(self) -> None:
        """Refuse an invalid search.

        Raises:
            HeadwiseError: one line with the value received and a correction.
        """
        if not self.keys:
            raise HeadwiseError(
                "search.keys is empty; give the keys to search, such as training.lr: [1e-3, 1e-2]"
            )
        one_of("search.sampler", self.sampler, SAMPLERS)
        one_of("search.each", self.each, EACH)
        in_range("search.trials", self.trials, 1, MOST_TRIALS)
        in_range("search.batch", self.batch, 1, MOST_TRIALS)
        in_range("search.seed", self.seed, 0, 2**32 - 1)
        for name in ("seeds", "confirm_seeds"):
            _check_seeds(f"search.{name}", getattr(self, name))
        if shared := sorted(set(self.seeds) & set(self.confirm_seeds)):
            raise HeadwiseError(
                f"search.confirm_seeds and search.seeds share {shared}; the winner must be confirmed on "
                "seeds that no trial has used"
            )
        space = self.space()
        if self.sampler == "grid":
            self._check_grid(space)
        else:
            self._check_sampled(space)

    def most_trials(self) -> int:
        """The number of trials of one search."""
        if self.sampler != "grid":
            return self.trials or 0
        return math.prod(len(values) for values in self._axes(self.space()).values())

    def most_runs(self) -> int:
        """The most runs of one variant: its trials, its winner and its default."""
        confirmed = len(self.confirm_seeds) * (2 if self.default else 1)
        return self.most_trials() * len(self.seeds) + confirmed

    def _check_grid(self, space: Space) -> None:
        if self.trials is None and (
            open_ := [k for k, v in space.items() if isinstance(v, Range) and not v.points]
        ):
            raise HeadwiseError(
                f"search.keys.{open_[0]} is a range without points, and search.trials is not given; a grid "
                "needs one of them"
            )
        size = math.prod(len(values) for values in self._axes(space).values())
        if size > (self.trials or MOST_TRIALS):
            raise HeadwiseError(
                f"the grid of search.keys has {size:,} combinations, but search.trials allows only "
                f"{self.trials or MOST_TRIALS:,}; remove values, or use sampler: random"
            )

    def _check_sampled(self, space: Space) -> None:
        if self.trials is None:
            raise HeadwiseError(f"search.trials is not given; give the number of trials of {self.sampler}")
        for key, values in space.items():
            if isinstance(values, Range) and values.points:
                raise HeadwiseError(f"search.keys.{key}.points applies only to sampler: grid; remove it")
        size = math.prod(values.size for values in space.values())
        if size < self.trials:
            raise HeadwiseError(
                f"search.trials is {self.trials:,}, but search.keys has only {size:,.0f} combinations; "
                "lower it, or use sampler: grid"
            )
        if find_spec("optuna") is None:
            raise HeadwiseError(
                f"search.sampler: {self.sampler} needs the package optuna, which is not installed: {EXTRA}; "
                "sampler: grid works without it"
            )

    def grid(self, space: Space) -> Iterator[dict[str, Any]]:
        """Every combination of the grid of `space`."""
        axes = self._axes(space)
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def _axes(self, space: Space) -> dict[str, list[Any]]:
        """The values of a grid; ranges without points share the trials that the other keys leave."""
        taken = math.prod(one.points or 1 if isinstance(one, Range) else one.size for one in space.values())
        free = sum(isinstance(one, Range) and not one.points for one in space.values())
        share = (
            max(2, math.floor((max(1, (self.trials or 0) // taken) + 1e-9) ** (1 / free))) if free else None
        )
        return {key: one.grid(share) for key, one in space.items()}


def _check_seeds(name: str, seeds: list[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds):
        raise HeadwiseError(f"{name} is {seeds}; give a list of different seeds")
    for seed in seeds:
        in_range(name, seed, 0, 2**63 - 1)


def parsed(key: str, values: Any) -> Choices | Range:
    """The values of a key of `search.keys`.

    Raises:
        HeadwiseError: an unknown key, one that cannot be searched, or values that are no list and no range.
    """
    where = f"search.keys.{key}"
    if key not in known_keys():
        raise HeadwiseError(
            f"search.keys has the unknown key {key!r}{did_you_mean(key, known_keys())}; "
            "`headwise train --help` lists the keys of the configuration"
        )
    _refuse_meaningless(where, key)
    if isinstance(values, dict):
        return _range(where, values, type_of(key))
    if not isinstance(values, list) or len(values) < 2:
        raise HeadwiseError(f"{where} is {values!r}; give a list of two values or more, or low and high")
    if any(value in values[:n] for n, value in enumerate(values)):
        raise HeadwiseError(f"{where} is {values!r}; it contains a value twice")
    return Choices(tuple(values))


def _refuse_meaningless(where: str, key: str) -> None:
    reason = ""
    if key == "seed":
        reason = "the best of several seeds is luck; list the seeds of a trial in search.seeds"
    elif key == "model.attention.kind":
        reason = "kinds of attention are compared, not searched; make each a variant"
    elif key.startswith("data.") and key != SAME_DATA:
        reason = (
            f"it changes the data on which the loss is measured, and of data only {SAME_DATA} can be "
            "searched; "
            "use axes"
        )
    elif key.partition(".")[0] in ("measure", "out", "device", "expected_engine", "plugins"):
        reason = "it does not change the model that is trained"
    if reason:
        raise HeadwiseError(f"{where} cannot be searched: {reason}")


def _range(where: str, values: dict[str, Any], kind: Any) -> Range:
    for part in values:
        if part not in PARTS:
            raise HeadwiseError(f"{where} has the unknown key {part!r}{did_you_mean(str(part), PARTS)}")
    types = {kind, *get_args(kind)}
    if not {int, float} & types:
        raise HeadwiseError(f"{where} is not a number, so it has no range; give a list of values")
    whole = float not in types
    for part in ("low", "high"):
        if part not in values:
            raise HeadwiseError(f"{where} has no {part}; a range has low and high")
        _must_be_number(f"{where}.{part}", values[part], whole)
    low, high = (int(values[p]) if whole else float(values[p]) for p in ("low", "high"))
    if low >= high:
        raise HeadwiseError(f"{where}.low is {low} and .high is {high}; low must be less than high")
    log = values.get("log", False)
    if not isinstance(log, bool):
        raise HeadwiseError(f"{where}.log is {log!r}; give true or false")
    if log and low <= 0:
        raise HeadwiseError(f"{where}.low is {low}; a range with log: true must begin above 0")
    for part, least in (("step", 1), ("points", 2)):
        if (value := values.get(part)) is not None:
            _must_be_number(f"{where}.{part}", value, True)
            in_range(f"{where}.{part}", value, least, 2**31 if part == "step" else MOST_TRIALS)
    step = values.get("step")
    if step is not None and (log or not whole):
        raise HeadwiseError(f"{where}.step applies only to whole numbers without log; remove it")
    if step is not None and (high - low) % step:
        raise HeadwiseError(f"{where}.high is {high}, which steps of {step} from {low} do not reach")
    points = values.get("points")
    return Range(low, high, log, whole, int(step or 1), None if points is None else int(points))


def _must_be_number(where: str, value: Any, whole: bool) -> None:
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not right or abs(value) > 2**53 or (whole and value != int(value)):
        raise HeadwiseError(f"{where} is {value!r}; give a {'whole ' if whole else ''}number")
