"""Run the head statistics kernels in Triton's interpreter and print their errors, a JSON line per case.

A program of its own because Triton reads TRITON_INTERPRET when it is imported; `test_head_stats.py`
starts it once. The interpreter has no bf16 products: float16 and float32 stand for it here.
"""

from __future__ import annotations

import json
import sys
import warnings

import torch

from headwise.bench.head_stats import definition, errors
from headwise.functional.head_stats import document_starts
from headwise.functional.head_stats import kernel as kernels

TOKENS = 29
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "EDGE_N": 16, "num_warps": 1, "num_stages": 1}


def holes(*shape: int) -> torch.Tensor:
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -torch.inf)


def packed(*lengths: int) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def cases() -> dict[str, dict]:
    """What each case changes: `width`, `tokens`, `dtype`, `pool`, a way to make keys, options."""
    plain = {
        "causal": {},
        "full": {"causal": False},
        "window": {"window": 5},
        "full window": {"window": 12, "causal": False},
        "softcap": {"softcap": 3.0},
        "scales": {"q_scales": [0.5, 0.0, 2.0]},
        "bias": {"bias": holes(1, 2, TOKENS, TOKENS)},
        "bias, softcap, full": {"bias": holes(1, 1, TOKENS, TOKENS), "softcap": 2.0, "causal": False},
        "padding": {"key_mask": torch.rand(1, TOKENS) < 0.6},
        "left padding": {"key_mask": torch.arange(TOKENS)[None] > 4},
        "documents": {"documents": packed(3, 1, 17, 8)},
        "documents, padding, window": {
            "documents": packed(1, 14, 1, 13),
            "window": 6,
            "key_mask": torch.rand(1, TOKENS) < 0.7,
        },
        "documents, full, bias": {
            "documents": packed(20, 9),
            "causal": False,
            "bias": holes(1, 1, TOKENS, TOKENS),
        },
    }
    found = {name: {"options": options} for name, options in plain.items()}
    found |= {
        "wide window": {"tokens": 47, "options": {"window": 40}},
        "one token": {"tokens": 1},
        "float16, width 80": {"dtype": torch.float16, "width": 80},
        # A pool of 4 keys a row makes every way to close in on k_eff run.
        "small pool": {"pool": 4, "tokens": 47},
        "flat": {"pool": 4, "sharp": 0.1},
        "sharp, half the mass": {"pool": 4, "sharp": 6.0, "options": {"mass": 0.5}},
        "equal weights": {"pool": 4, "sharp": 0.0},
        "three kinds of keys": {"pool": 4, "keys": "three"},
        "two sinks": {"pool": 4, "keys": "sinks"},
        "nan": {"pool": 4, "keys": "nan"},
    }
    return found


def measure(case: dict) -> dict[str, float]:
    """Errors of one case, as `headwise.bench.head_stats.errors` counts them."""
    tokens, width = case.get("tokens", TOKENS), case.get("width", 24)
    q = case.get("sharp", 2.0) * torch.randn(1, tokens, 2, width).transpose(1, 2)
    k = torch.randn(1, 1, tokens, width)
    kind = case.get("keys")
    if kind == "three":
        k = k[:, :, torch.randint(0, 3, (tokens,))]
    elif kind == "sinks":
        q[..., 0] += 4.0
        k[:, :, :2] = 3.0 * torch.eye(1, width)
    elif kind == "nan":
        k[:, :, 20] = torch.nan
    q, k = (x.to(case.get("dtype", torch.float32)) for x in (q, k))
    options = case.get("options", {})
    blocks = {**SMALL, "BLOCK_D": max(16, 1 << (width - 1).bit_length())}
    arguments = {"causal": True, "window": None, "softcap": None, "mass": 0.9} | options
    factors = arguments.pop("q_scales", None)
    masks = [arguments.pop(name, None) for name in ("bias", "key_mask")]
    masks.append(document_starts(arguments.pop("documents", None)))
    stats = kernels.head_stats(
        q, k, width**-0.5, factors or [1.0], *masks, k_eff=True, blocks=(blocks, blocks),
        pool=case.get("pool", 16), **arguments,
    )  # fmt: skip
    if factors is None:
        stats = {name: value[0] for name, value in stats.items()}
    return errors(stats, definition(q, k, **options))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    for name, case in cases().items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            print(json.dumps({"case": name, "errors": measure(case)}), flush=True)


if __name__ == "__main__":
    main()
