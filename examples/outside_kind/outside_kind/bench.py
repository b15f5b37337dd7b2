"""Attention to nothing against PyTorch's fused softmax attention, with a check against float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from headwise.bench.harness import Table, measure, parser, run
from headwise.training.distributed import find_device
from outside_kind.functional import nothing_attention


def main(argv: list[str]) -> int:
    """Print the table and write the JSON; returns the exit code."""
    arguments = parser("nothing", __doc__, lengths="tokens (default: 1024 2048 4096)").parse_args(argv)
    device = find_device(arguments.device)
    lengths = arguments.lengths or (1024, 2048, 4096)
    table = Table({f"T {tokens}": partial(_row, tokens, device) for tokens in lengths})
    return run("nothing", arguments, [table], device=device)


@torch.no_grad()
def _row(tokens: int, device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = torch.randn(3, 1, 12, tokens, 64, device=device, dtype=dtype)
    offset = torch.randn(12, device=device)
    few = slice(0, min(tokens, 512))
    exact = nothing_attention(*(x[:, :, few].double() for x in (q, k, v)), offset.double())
    error = (nothing_attention(q, k, v, offset)[:, :, few].double() - exact).norm() / exact.norm()
    ours = measure(lambda: nothing_attention(q, k, v, offset), device)
    sdpa = measure(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), device)
    return {"tokens": tokens, "ms": ours, "sdpa_ms": sdpa, "sdpa_x": ours / sdpa, "error": error.item()}
