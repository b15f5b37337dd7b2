"""Run the kernels of tropical attention in Triton's interpreter; print a JSON line per case."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

from headwise.attention.tropical.bench import errors
from headwise.functional import tropical
from headwise.functional.tropical import kernel, op

CPU = torch.device("cpu")

CASES: dict[str, dict[str, Any]] = {
    "grouped, centred": {"heads": 2, "kv_heads": 1, "tokens": 17, "width": 16, "centre": True},
    "full": {"tokens": 7, "width": 20, "causal": False},
    "one token": {"tokens": 1, "width": 16, "centre": True},
    "odd width, cut": {
        "tokens": 5, "width": 5, "layouts": {"q": "cut", "k": "every second", "v": "width outside"},
    },
    "wide": {"tokens": 2, "width": 256},
    "repeated gradient": {"tokens": 5, "width": 16, "layouts": {"upstream": "one number", "q": "one token"}},
    "bfloat16": {"tokens": 5, "width": 16, "dtype": torch.bfloat16},
    "float16, full": {"tokens": 6, "width": 16, "dtype": torch.float16, "causal": False},
}  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # a second of -inf less a best of -inf
    tropical.fits_kernel = lambda x, width=128: x.shape[-1] <= width
    for name, case in CASES.items():
        torch.manual_seed(0)
        sizes = {"batch": 1, "heads": 1, "kv_heads": 1} | case
        print(json.dumps({"case": name, "errors": errors(CPU, **sizes)}), flush=True)
    q, k, v = torch.randn(3, 1, 1, 6, 16).unbind()
    q[..., 1, 3] = k[..., 3, 3] = v[..., 4, 3] = torch.nan
    ours = kernel.forward(q, k, v, causal=True, keep=True, margin=True)
    plain = op.forward(q, k, v, None, True, True, True, False)
    same = [torch.equal(a.isnan(), b.isnan()) for a, b in zip(ours[:2], plain[:2], strict=True)]
    print(json.dumps({"case": "NaN", "errors": {"y": float(not same[0]), "top": float(not same[1])}}))
    leaf = torch.randn(1, 1, 4, 16, requires_grad=True)
    y = tropical.tropical_attention(leaf, leaf, leaf).y
    upstream = torch.randn_like(y)
    upstream[..., 2, 5] = torch.inf
    (gradient,) = torch.autograd.grad(y, leaf, upstream)
    print(json.dumps({"case": "infinite gradient", "errors": {"finite": float(gradient.isfinite().all())}}))
    assert "headwise.functional.tropical.kernel_backward" in sys.modules


if __name__ == "__main__":
    main()
