"""Run the kernels of selective attention in Triton's interpreter; print errors, a JSON line per case.

A program of its own because Triton reads TRITON_INTERPRET when it is imported; `test_selective.py`
starts it once.
"""

from __future__ import annotations

import json
import warnings

import torch

from headwise.attention.selective.bench import CASES, errors
from headwise.functional import selective
from headwise.functional.selective import kernel_masked as masked_attention

SKIPPED = ("game, zero", "width 128", "width 32", "leaky", "one mask, unprotected")
"""Covered by the other cases but for what only a GPU shows."""

BATCHED = ("mask in plain PyTorch", "own masks")

PAIRED = ("one mask", "grouped heads")


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # rows past the end divide 0 by 0
    selective.fits_kernel = lambda q, width=0: True  # on a CPU too
    cpu = torch.device("cpu")
    for pairs in (False, True):
        for name, case in CASES.items():
            if name in SKIPPED or (pairs and name not in PAIRED):
                continue
            if pairs:  # float32 goes head by head otherwise
                masked_attention.in_pairs = lambda q, masks, block_d: q.shape[1] % (2 * masks) == 0
            torch.manual_seed(0)
            heads = 4 if {"kv_heads", "masks"} & set(case) else 2
            batch = 2 if name in BATCHED else 1
            found = errors(case, cpu, torch.float32, batch=batch, tokens=70, heads=heads, width=16)
            print(json.dumps({"case": f"{name}{', in pairs' * pairs}", "errors": found}), flush=True)


if __name__ == "__main__":
    main()
