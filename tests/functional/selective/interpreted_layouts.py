"""Run the kernels of selective attention in Triton's interpreter on tensors in other memory layouts.

Prints a JSON line per case. A program of its own because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json
import random
import warnings

import torch

from headwise.bench.layouts import LAYOUTS, drawn
from headwise.bench.selective import CASES, NAMES, errors
from headwise.functional import selective
from headwise.functional.dispatch import DTYPES

KINDS = ("one mask", "own masks of latents, grouped heads", "game, two masks, unprotected")
"""One case for each set of kernels; together they read every tensor."""


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # rows past the end divide 0 by 0
    selective.fits_kernel = lambda x, width=128: x.dtype in DTYPES and x.shape[-1] <= width  # on a CPU too
    generator = random.Random(0)
    names = [*NAMES, "upstream"]
    for kind in KINDS:
        choices = [dict.fromkeys(names, layout) for layout in LAYOUTS]
        choices += [dict(zip(names, drawn(generator, len(names)), strict=True)) for _ in range(3)]
        for layouts in choices:
            torch.manual_seed(0)
            case = CASES[kind] | ({"bias": True} if kind == "one mask" else {})
            found = errors(
                case, torch.device("cpu"), torch.float32, layouts, batch=2, tokens=21, heads=4, width=16
            )
            print(json.dumps({"case": f"{kind}: {layouts}", "errors": found}), flush=True)


if __name__ == "__main__":
    main()
