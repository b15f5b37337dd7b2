"""Run the kernel of `slot_attention` in Triton's interpreter; print a JSON line per case.

A program of its own because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import json

import torch

from headwise.functional import budget

CASES = {
    "one head each": (4, 1, 32, 150), "grouped heads": (2, 3, 16, 150), "narrow": (2, 2, 8, 64),
    "more parts than blocks": (1, 1, 32, 1030), "few slots": (2, 1, 32, 3),
}  # fmt: skip
"""K, R, D, S."""


def main() -> None:
    for name, (heads, ratio, width, slots) in CASES.items():
        torch.manual_seed(0)
        q = torch.randn(2, heads, ratio, width)
        k, v = torch.randn(2, 2, heads, slots, width).unbind(0)
        f = 3 * torch.rand(2, heads, ratio, slots)
        f[..., slots // 2 :] = torch.where(torch.rand(slots - slots // 2) > 0.5, budget.GONE, 0.2)
        f[1] = budget.GONE
        f[1, ..., 1] = 0.7  # all but one slot empty, so whole parts are
        shared = f[:, :1, :1].expand_as(f)
        for label, taken in ((name, f), (f"{name}, shared F", shared)):
            expected = budget.slot_attention(q.double(), k.double(), v.double(), taken.double(), scale=0.3)
            budget.fits_kernel = lambda q: True
            found = budget.slot_attention(q, k, v, taken, scale=0.3)
            budget.fits_kernel = lambda q: False
            error = (found - expected).norm() / expected.norm()
            print(json.dumps({"case": label, "error": error.item()}), flush=True)


if __name__ == "__main__":
    main()
