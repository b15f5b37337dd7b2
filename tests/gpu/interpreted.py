"""Run the first cases of every family in Triton's interpreter, tiny and on a CPU; print a JSON line per case.

Every address that a kernel touches is looked at (`tests.gpu.addresses`). The last line names the kernels.

A program of its own because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from typing import Any

import torch

from headwise.bench import head_stats as stats
from headwise.functional import budget, head_stats, selective, tropical
from headwise.functional.dispatch import DTYPES
from headwise.watch import rotation
from tests.gpu.addresses import addresses_watched
from tests.gpu.families import FAMILIES, STATS_LIMIT, Outcome, outcome, worst
from tests.gpu.long import far_apart

CASES = {"selection and attention under it": 6, "head statistics": 2, "NaN moves nothing else": 2}
"""How many of a family, where not 3."""


def show(found: Outcome) -> None:
    print(json.dumps(asdict(found) | {"passed": found.passed}), flush=True)


def past_blocks() -> Outcome:
    """Head statistics of documents with padding and of keys ahead; texts and widths that fill no block."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 70, 24).unbind()
    ways: list[dict[str, Any]] = [
        {"documents": torch.arange(70)[None] // 33, "key_mask": torch.rand(1, 70) < 0.7},
        {"causal": False, "window": 5, "bias": torch.randn(1, 1, 70, 70)},
    ]
    errors: dict[str, float] = {}
    for way in ways:
        for name, error in stats.errors(
            head_stats(q, k, **way).columns(), stats.definition(q, k, **way)
        ).items():
            errors[name] = max(errors.get(name, 0.0), error)
    name, error = worst(errors)
    return Outcome("head statistics", f"{name} past blocks", error, STATS_LIMIT)


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # rows past the end divide 0 by 0
    for module in (selective, budget, sys.modules[head_stats.__module__], rotation, tropical):  # on a CPU too
        module.fits_kernel = lambda x, width=128: x.dtype in DTYPES and x.shape[-1] <= width and x.numel() > 0
    with addresses_watched() as watched:
        for family in FAMILIES:
            for index in range(CASES.get(family, 3)):
                show(outcome(family, index, seed=0, device="cpu"))
        show(past_blocks())
        for dimension in range(2):
            show(far_apart(torch.device("cpu"), dimension, in_place=True, tokens=33, width=16))
    print(json.dumps({"kernels": sorted(watched.kernels), "accesses": watched.accesses}))


if __name__ == "__main__":
    main()
