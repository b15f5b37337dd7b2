"""How often the claims of a notebook are decided wrongly when one looks after every seed, and how many seeds
they need."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from headwise.analysis.claims import Claim, Value, decide
from headwise.bench import harness
from headwise.bench.harness import Table

Draw = Callable[[np.random.Generator, int], np.ndarray]
NOISE: dict[str, Draw] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "t, 3 degrees of freedom": lambda rng, n: rng.standard_t(3, n),
    "log-normal": lambda rng, n: np.exp(rng.standard_normal(n)),
    "uniform": lambda rng, n: rng.random(n),
    "normal, rounded to 0.5 std": lambda rng, n: np.round(2 * rng.standard_normal(n)) / 2,
}


def main(argv: list[str]) -> int:
    """Simulate, print the tables and write the JSON; returns the exit code."""
    parser = harness.parser("sequential", __doc__)
    parser.add_argument("--notebooks", type=int, default=1000, help="simulated notebooks a row")
    parser.add_argument("--seeds", type=int, default=64, help="seeds after which a notebook ends")
    parser.add_argument("--comparisons", type=int, default=3, help="claims of a notebook's section")
    arguments = parser.parse_args(argv)
    given = (arguments.notebooks, arguments.seeds)
    nulls = {noise: partial(null, noise, *given, arguments.comparisons) for noise in NOISE}
    powers = {
        f"{shift} std, {comparisons} claims": partial(power, shift, comparisons, *given)
        for comparisons in (1, arguments.comparisons)
        for shift in (1.0, 2.0, 3.0)
    }
    return harness.run("sequential", arguments, [Table(nulls), Table(powers)], device="cpu")


def null(noise: str, notebooks: int, seeds: int, comparisons: int) -> dict[str, Any]:
    """Notebooks whose variants are all the baseline: how many ever decide a claim, at any n from 2 on."""
    rng = np.random.default_rng(0)
    claims = [Claim(f"variant {i}", "baseline", "loss", "lower") for i in range(comparisons)]
    wrong = 0
    for _ in range(notebooks):
        columns = {f"variant {i}": NOISE[noise](rng, seeds) for i in range(comparisons)}
        columns["baseline"] = NOISE[noise](rng, seeds)
        wrong += first_decided(claims, columns, seeds) is not None
    return {
        "noise": noise, "claims": comparisons, "looks": f"every n from 2 to {seeds}",
        "notebooks": notebooks, "wrong": wrong, "error_rate": wrong / notebooks,
    }  # fmt: skip


def power(shift: float, comparisons: int, notebooks: int, seeds: int) -> dict[str, Any]:
    """Seeds until a claim is supported, of several of which the others are about nothing.

    Args:
        shift: the true difference, in standard deviations of the paired difference.
    """
    rng = np.random.default_rng(1)
    claims = [Claim(f"variant {i}", "baseline", "loss", "lower") for i in range(comparisons)]
    needed: list[float] = []
    for _ in range(notebooks):
        base = rng.standard_normal(seeds)
        columns = {f"variant {i}": base + rng.standard_normal(seeds) for i in range(comparisons)}
        columns["variant 0"] -= shift
        columns["baseline"] = base
        needed.append(first_decided(claims, columns, seeds, only=0) or float("inf"))
    share = {f"resolved_at_{n}": sum(x <= n for x in needed) / notebooks for n in (3, 5, 8, 16)}
    return {
        "true_difference_in_std": shift, "claims": comparisons, "notebooks": notebooks,
        "median_seeds": _whole(statistics.median(needed)),
        "seeds_for_80_percent": _whole(np.quantile(needed, 0.8)),
        **share,
    }  # fmt: skip


def first_decided(
    claims: Sequence[Claim], columns: dict[str, np.ndarray], seeds: int, only: int | None = None
) -> int | None:
    """The first n from 2 on at which a claim (the one numbered `only`, if given) is decided; None: never."""
    for n in range(2, seeds + 1):
        values = {
            (name, "loss"): [Value(seed, float(x)) for seed, x in enumerate(column[:n])]
            for name, column in columns.items()
        }
        decided = [d.decision != "not resolved" for d in decide(claims, values)]
        if decided[only] if only is not None else any(decided):
            return n
    return None


def _whole(value: float) -> int | None:
    return int(value) if np.isfinite(value) else None
