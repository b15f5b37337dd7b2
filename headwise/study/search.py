"""Searches: proposes trials, reads their results, and chooses the winners that are confirmed on fresh seeds.

Everything is computed anew from the study and its run folders, so that a search that was killed continues
with the proposals that it would have made. Trials of tpe come in batches of `search.batch`: the proposals of
a batch depend on the results of all earlier batches, and not on the number of workers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from headwise.analysis.choice import HIGHEST
from headwise.attention.config import AttentionConfig
from headwise.config.run import flatten
from headwise.errors import HeadwiseError
from headwise.runs.values import values_of
from headwise.study.configure import configure
from headwise.study.expand import Place, owner, places
from headwise.study.space import Choices, Range, Search, Space, parsed
from headwise.study.study import CRITERIA, KIND, Study

DRAWS = 100
"""After so many repeated proposals, the combinations left in a finite space are taken in order."""


@dataclass(frozen=True)
class Trial:
    """One combination of values.

    Attributes:
        values: key -> value.
        places: the variants that it runs as: one, or, if the whole study is searched, one per variant.
        value: mean over all its runs; None if one of them has no value or has not ended.
        ended: whether all its runs have ended.
        reason: the reason why it has no value.
        data: (variant, seed, checksum of the data) of its runs.
    """

    values: dict[str, Any]
    places: tuple[Place, ...]
    value: float | None
    ended: bool
    reason: str = ""
    data: frozenset[tuple[str, int, str]] = frozenset()


@dataclass(frozen=True)
class Followed:
    """The present state of one search.

    Attributes:
        units: the variants, at their combinations of the axes, for which one setting is searched.
        space: the values of each searched key.
        trials: the trials proposed so far, in order.
        planned: the number of trials of the whole search.
        complete: whether all trials have ended.
        winner: the best trial once all have ended; None if no trial has a value, or if the values are not
            comparable.
        problem: the reason why a complete search has no winner.
    """

    units: tuple[Place, ...]
    space: Space
    trials: list[Trial]
    planned: int
    complete: bool
    winner: Trial | None
    problem: str = ""

    @property
    def waits(self) -> str:
        """The reason why its variants cannot be confirmed yet; empty if they can."""
        if self.problem or self.winner:
            return self.problem
        ended = sum(trial.ended for trial in self.trials)
        return f"waits for its search: {ended} of {self.planned} trials have ended"


def follow_all(study: Study, root: Path) -> list[Followed]:
    """Every search of a study, read from its run folders; empty if the study has no search."""
    if study.search is None:
        return []
    units = places(study)
    groups = [tuple(units)] if study.search.each == "study" else [(unit,) for unit in units]
    return [_follow(study, study.search, root, group) for group in groups]


def search_places(study: Study, followed: Sequence[Followed]) -> list[Place]:
    """Everything that can run now: trials, and, of complete searches, the winners and the defaults."""
    search = study.search
    assert search is not None
    found = []
    for one in followed:
        found += [place for trial in one.trials for place in trial.places]
        for unit in one.units if one.winner else ():
            assert one.winner is not None
            found.append(_confirmed(study, search, unit, one.winner))
            if default := _default_place(study, search, unit, one.winner):
                found.append(default)
    return found


def _confirmed(study: Study, search: Search, unit: Place, winner: Trial) -> Place:
    """A variant with the values of its winner."""
    values = {key: value for key, value in winner.values.items() if key in _keys(study, search, unit)}
    return dataclasses.replace(unit, overrides=unit.overrides | values)


def record(study: Study, followed: Sequence[Followed]) -> dict[str, Any] | None:
    """The searches as written to `study.yaml`: the settings, and every variant's trials with their
    folders."""
    if study.search is None:
        return None
    units: dict[str, Any] = {}
    for one in followed:
        for at, unit in enumerate(one.units):
            keys = _keys(study, study.search, unit)
            trials = [
                {
                    "folder": trial.places[at].name if trial.places else None,
                    "values": {key: value for key, value in trial.values.items() if key in keys},
                    "reason": "" if trial.places else trial.reason,
                }
                for trial in one.trials
            ]
            default = one.winner and _default_place(study, study.search, unit, one.winner)
            units[unit.name] = {
                "planned": one.planned, "trials": trials, "default": default and default.name,
                "winner": one.trials.index(one.winner) if one.winner in one.trials else None,
            }  # fmt: skip
    return dataclasses.asdict(study.search) | {"best": CRITERIA[study.search.by], "units": units}


def _default_place(study: Study, search: Search, unit: Place, winner: Trial) -> Place | None:
    """A variant without the values of its winner; None if that is the winner itself, invalid, or turned
    off."""
    if not search.default:
        return None
    place = _trial(unit, "default", unit.overrides, search.confirm_seeds)
    try:
        same = configure(study, place) == configure(study, _confirmed(study, search, unit, winner))
    except HeadwiseError:
        return None
    return None if same else place


def to_come(followed: Sequence[Followed], search: Search | None) -> int:
    """The most runs that may still be planned."""
    if search is None:
        return 0
    runs = 0
    for one in followed:
        runs += (one.planned - len(one.trials)) * len(one.units) * len(search.seeds)
        if not one.winner and not one.problem:
            runs += len(one.units) * (search.most_runs() - search.most_trials() * len(search.seeds))
    return runs


def _trial(unit: Place, name: str, overrides: dict[str, Any], seeds: Sequence[int]) -> Place:
    return dataclasses.replace(
        unit, name=f"{unit.name}@trial={name}", given=f"{unit.given}@trial={name}", overrides=overrides,
        seeds=tuple(seeds), trial=True,
    )  # fmt: skip


def _keys(study: Study, search: Search, unit: Place) -> list[str]:
    """The searched keys that a variant has: options of one kind are not searched for variants of another."""
    kind = (dict(flatten(study.base)) | unit.overrides).get(KIND, AttentionConfig().kind)
    return [key for key in search.keys if owner(key) in (None, kind)]


def _follow(study: Study, search: Search, root: Path, units: tuple[Place, ...]) -> Followed:
    every = search.space()
    wanted = {key for unit in units for key in _keys(study, search, unit)}
    space = {key: values for key, values in every.items() if key in wanted}
    trials: list[Trial] = []
    planned = _planned(search, space)
    while len(trials) < planned and all(trial.ended for trial in trials):
        known = [(trial.values, trial.value) for trial in trials]
        batch = propose(search, space, known)
        if not batch:
            planned = len(trials)
        for values in batch:
            trials.append(_tried(study, search, root, units, values, f"{len(trials):03d}"))
        if batch and len(trials) == len(batch) and (reason := _impossible(trials)):
            raise HeadwiseError(f"no trial of the search of {units[0].name} can run: {reason}")
    complete = len(trials) >= planned and all(trial.ended for trial in trials)
    winner, problem = _winner(search, trials) if complete else (None, "")
    return Followed(units, space, trials, planned, complete, winner, problem)


def _impossible(trials: list[Trial]) -> str:
    """The reason why no trial is valid; empty if one of them is."""
    return "" if any(trial.places for trial in trials) else trials[0].reason


def _planned(search: Search, space: Space) -> int:
    if not space:
        return 0
    if search.sampler == "grid":
        return sum(1 for _ in search.grid(space))
    return int(min(search.trials or 0, math.prod(values.size for values in space.values())))


def _tried(
    study: Study, search: Search, root: Path, units: tuple[Place, ...], values: dict[str, Any], name: str
) -> Trial:
    found = []
    for unit in units:
        own = {key: value for key, value in values.items() if key in _keys(study, search, unit)}
        found.append(_trial(unit, name, unit.overrides | own, search.seeds))
    try:
        for place in found:
            configure(study, place)
    except HeadwiseError as error:
        return Trial(values, (), None, True, f"cannot run: {error}")
    ends = [values_of(root / study.name / place.name, place.seeds, search.by) for place in found]
    ended = all(end.ended(failed=True) for end in ends)
    reason = next((end.reason for end in ends if end.reason), "")
    means = [end.mean for end in ends if end.mean is not None]
    value = None if reason or not ended else sum(means) / len(means)
    data = frozenset(
        (unit.name, seed, checksum)
        for unit, end in zip(units, ends, strict=True) for seed, checksum in end.data.items()
    )  # fmt: skip
    return Trial(values, tuple(found), value, ended, reason if ended else "", data)


def _winner(search: Search, trials: list[Trial]) -> tuple[Trial | None, str]:
    """The best trial, the first of equal ones; or the reason why there is none."""
    if not trials:
        return Trial({}, (), None, True), ""  # no searched key belongs to this variant
    known = [trial for trial in trials if trial.value is not None]
    if not known:
        reasons = list(dict.fromkeys(trial.reason for trial in trials))
        more = f", and {len(reasons) - 1} other reasons" if len(reasons) > 1 else ""
        return None, f"has no winner: none of its {len(trials)} trials has a value ({reasons[0]}{more})"
    read = {one for trial in known for one in trial.data}
    if len(read) > len({(unit, seed) for unit, seed, _ in read}):
        return None, "has no winner: its trials read different data, so that their values are not comparable"
    sign = -1 if CRITERIA[search.by] == HIGHEST else 1
    return min(known, key=lambda trial: sign * (trial.value or 0.0)), ""


def propose(
    search: Search, space: Space, known: Sequence[tuple[dict[str, Any], float | None]]
) -> list[dict[str, Any]]:
    """The next trials after those that have ended, a pure function of its arguments.

    Args:
        known: values and result of every earlier trial; the result None, of a failed trial, counts as worst.
    """
    if search.sampler == "grid":
        return [] if known else list(search.grid(space))
    left = _planned(search, space) - len(known)
    count = left if search.sampler == "random" else min(left, search.batch)
    keys = json.dumps({key: search.keys[key] for key in space})
    return list(_drawn(search.sampler, search.seed, CRITERIA[search.by], keys, json.dumps(known), count))


@lru_cache(maxsize=1024)  # plans are made again and again
def _drawn(
    sampler: str, seed: int, end: str, keys: str, known: str, count: int
) -> tuple[dict[str, Any], ...]:
    import numpy as np
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: parsed(key, values) for key, values in json.loads(keys).items()}
    earlier = json.loads(known)
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    own_seed = int(np.random.SeedSequence([seed, len(earlier)]).generate_state(1)[0])
    study = optuna.create_study(
        sampler=samplers[sampler](seed=own_seed), direction="maximize" if end == HIGHEST else "minimize"
    )
    distributions = {key: _distribution(values) for key, values in space.items()}
    worst = -math.inf if end == HIGHEST else math.inf
    for values, value in earlier:
        study.add_trial(optuna.trial.create_trial(
            params={key: _inside(space[key], one) for key, one in values.items()},
            distributions=distributions, value=worst if value is None else value,
        ))  # fmt: skip
    found: list[dict[str, Any]] = []
    seen = {json.dumps(values) for values, _ in earlier}
    repeated = 0
    while len(found) < count and repeated < DRAWS:
        trial = study.ask(distributions)
        values = {key: _outside(space[key], trial.params[key]) for key in space}
        if (text := json.dumps(values)) in seen:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            repeated += 1
            continue
        seen.add(text)
        found.append(values)
    return (*found, *itertools.islice(_untried(space, seen), count - len(found)))


def _untried(space: Space, seen: set[str]) -> Iterator[dict[str, Any]]:
    """The combinations of a finite space that have not been tried; empty for an infinite space."""
    size = math.prod(values.size for values in space.values())
    for index in range(0 if math.isinf(size) else int(size)):
        values = {}
        for key, one in space.items():
            index, place = divmod(index, int(one.size))
            values[key] = one.values[place] if isinstance(one, Choices) else int(one.low) + place * one.step
        if json.dumps(values) not in seen:
            yield values


def _distribution(values: Choices | Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, Choices):
        return CategoricalDistribution(list(range(len(values.values))))
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=values.step)
    return FloatDistribution(values.low, values.high, log=values.log)


def _inside(values: Choices | Range, value: Any) -> Any:
    """A value as the sampler represents it: a value of a list by its index."""
    return values.values.index(value) if isinstance(values, Choices) else value


def _outside(values: Choices | Range, value: Any) -> Any:
    return values.values[value] if isinstance(values, Choices) else values.rounded(value)
