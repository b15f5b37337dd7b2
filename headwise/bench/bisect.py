"""How often a bisection over noisy commits finds the planted regression, and with how many runs."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from headwise.analysis.bisection import MOST_SEEDS, Found, next_step
from headwise.bench import harness
from headwise.bench.harness import Table

History = Callable[[np.random.Generator, int], tuple[np.ndarray, set[int], set[int]]]
"""Draws the levels of the commits, the right answers (none: no regression) and the commits that cannot
run."""


def step(size: float) -> History:
    """One regression somewhere."""

    def draw(rng: np.random.Generator, commits: int) -> tuple[np.ndarray, set[int], set[int]]:
        first = int(rng.integers(1, commits))
        return size * (np.arange(commits) >= first), {first}, set()

    return draw


def calm(rng: np.random.Generator, commits: int) -> tuple[np.ndarray, set[int], set[int]]:
    """No regression."""
    return np.zeros(commits), set(), set()


def recovered(rng: np.random.Generator, commits: int) -> tuple[np.ndarray, set[int], set[int]]:
    """A regression that a later commit takes back before the end."""
    first, back = sorted(rng.choice(np.arange(1, commits - 1), 2, replace=False).tolist())
    index = np.arange(commits)
    return 3.0 * ((index >= first) & (index < back)), set(), set()


def twice(rng: np.random.Generator, commits: int) -> tuple[np.ndarray, set[int], set[int]]:
    """A regression, taken back, and another: either is an answer."""
    first, back, again = sorted(rng.choice(np.arange(1, commits), 3, replace=False).tolist())
    index = np.arange(commits)
    return 3.0 * (((index >= first) & (index < back)) | (index >= again)), {first, again}, set()


def broken(rng: np.random.Generator, commits: int) -> tuple[np.ndarray, set[int], set[int]]:
    """One regression among commits a fifth of which cannot run; the range that holds it is an answer."""
    levels, right, _ = step(3.0)(rng, commits)
    return levels, right, {i for i in range(1, commits - 1) if rng.random() < 0.2}


HISTORIES: dict[str, History] = {
    "regression of 3 std": step(3.0),
    "regression of 2 std": step(2.0),
    "regression of 1.5 std": step(1.5),
    "no regression": calm,
    "regression of 3 std, recovered": recovered,
    "regression of 3 std, recovered, again": twice,
    "regression of 3 std, a fifth cannot run": broken,
}


def main(argv: list[str]) -> int:
    """Simulate, print the table and write the JSON; returns the exit code."""
    parser = harness.parser("bisect", __doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--commits", type=int, default=64)
    arguments = parser.parse_args(argv)
    cases = {
        f"{name}, shared noise {shared:g}": partial(row, name, shared, arguments.trials, arguments.commits)
        for name, shared in [(name, 0.0) for name in HISTORIES] + [("regression of 3 std", 2.0)]
    }
    return harness.run("bisect", arguments, [Table(cases)], device="cpu")


def row(name: str, shared: float, trials: int, commits: int) -> dict[str, Any]:
    """How bisections of drawn histories end.

    `found`: the commit; `range`: several candidates with the commit among them; `says_none`: no regression;
    `wrong`: another commit, or one where there is none.

    Args:
        shared: standard deviation of what all runs of one seed have in common, in that of the rest.
    """
    rng = np.random.default_rng(0)
    ends: Counter[str] = Counter()
    runs = []
    for _ in range(trials):
        levels, answers, dead = HISTORIES[name](rng, commits)
        found = bisect(levels, rng, shared, dead)
        runs.append(found.runs)
        if not found.candidates:
            ends["says_none"] += 1
        elif answers & set(found.candidates):
            ends["found" if found.first_bad is not None else "range"] += 1
        else:
            ends["wrong"] += 1
    return {
        "history": name, "commits": commits, "shared_by_seed_std": shared, "trials": trials,
        **{end: ends[end] / trials for end in ("found", "range", "says_none", "wrong")},
        "median_runs": int(statistics.median(runs)),
        "runs_of_90_percent": math.ceil(float(np.quantile(runs, 0.9))),
        "most_seeds": MOST_SEEDS,
    }  # fmt: skip


def bisect(levels: np.ndarray, rng: np.random.Generator, shared: float, dead: set[int]) -> Found:
    """Run one bisection on drawn values."""
    measured: dict[tuple[int, int], float | None] = {}
    of_seed = shared * rng.standard_normal(MOST_SEEDS)
    while True:
        step = next_step(measured, len(levels), unrunnable=dict.fromkeys(dead, "does not build"))
        if step.found is not None:
            return step.found
        for index, seed in step.measure:
            measured[index, seed] = float(levels[index] + of_seed[seed] + rng.standard_normal())
