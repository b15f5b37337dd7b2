"""Run the first cases of every family in Triton's interpreter, tiny and on a CPU; print a JSON line per case.

A program of its own because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict

from headwise.functional import budget, head_stats, selective
from headwise.functional.dispatch import DTYPES
from headwise.watch import rotation
from tests.gpu.families import FAMILIES, outcome

CASES = {"selection and attention under it": 6, "head statistics": 2, "NaN moves nothing else": 2}
"""How many of a family, where not 3."""


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # rows past the end divide 0 by 0
    for module in (selective, budget, sys.modules[head_stats.__module__], rotation):  # on a CPU too
        module.fits_kernel = lambda x, width=128: x.dtype in DTYPES and x.shape[-1] <= width and x.numel() > 0
    for family in FAMILIES:
        for index in range(CASES.get(family, 3)):
            found = outcome(family, index, seed=0, device="cpu")
            print(json.dumps(asdict(found) | {"passed": found.passed}), flush=True)


if __name__ == "__main__":
    main()
