"""Run the kernel of `turns` in Triton's interpreter; print a JSON line per case.

A program of its own because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json

import torch

from headwise.functional import budget
from headwise.functional.selective import selection

CASES = {
    "uneven": ((2, 3, 37), 9, True), "one key": ((1, 1, 64), 1, False), "all fit": ((2, 1, 17), 17, True),
    "two keys": ((1, 2, 50), 2, True), "unprotected": ((2, 2, 40), 13, False),
}  # fmt: skip
"""Shape of F without its last axis, keys held, and whether key 0 stays."""


def main() -> None:
    for name, ((batch, masks, tokens), keys, protected) in CASES.items():
        torch.manual_seed(0)
        queries = torch.randn(2, batch, masks, tokens, 16)
        graded = selection(*queries, scale=0.25, protect_bos=protected)
        for label, taken in ((name, graded), (f"{name}, ties", graded.round())):
            expected = budget.turns(taken, keys, protect_bos=protected)
            budget.fits_kernel = lambda *_: True
            found = budget.turns(taken, keys, protect_bos=protected)
            budget.fits_kernel = lambda *_: False
            print(json.dumps({"case": label, "same": torch.equal(found, expected)}), flush=True)


if __name__ == "__main__":
    main()
