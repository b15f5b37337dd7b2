"""Differential attention, forward and backward, against softmax attention on the same kernels.

Checks every case against the definition in float64 first, in the same command. `flash` has the heads of
version 2, and half of its queries; `flash, 2H` has as many queries, and no difference. Version 1 has half as
many heads, twice as wide, as the paper compares it. `version 1, two calls` has no zeros in its queries, which
are narrower than its values then: fewer kernels take that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.attention.base import AttentionShape
from headwise.attention.differential.config import DifferentialConfig
from headwise.attention.differential.layer import DifferentialAttention
from headwise.attention.flash import FlashAttention
from headwise.bench.harness import captured, extra_memory_mb, measure, print_table, save
from headwise.functional.differential import differential_attention, fused_differential_attention
from headwise.training.distributed import find_device

Case = tuple[Callable[..., Tensor], list[Tensor]]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Of the norm of the difference from float64, of outputs and gradients, relative to the norm."""


def leaves(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random leaves of a graph."""
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def layer(version: int, heads: int, kv_heads: int, width: int) -> DifferentialAttention:
    """A layer whose core is measured; its parameters are not used."""
    shape = AttentionShape(d_model=8, n_heads=heads, n_kv_heads=kv_heads, head_dim=width)
    return DifferentialAttention(shape, DifferentialConfig(version=version)).eval()


def inputs(
    version: int, batch: int, heads: int, kv_heads: int, tokens: int, width: int,
    device: torch.device, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """q, k, v and λ of a version."""
    own = width // 2 if version == 1 else width
    keys = 2 * kv_heads if version == 1 else kv_heads
    q, k, v = leaves(
        device, dtype, (batch, 2 * heads, tokens, own), (batch, keys, tokens, own),
        (batch, kv_heads, tokens, width),
    )  # fmt: skip
    lam = torch.rand(batch, heads, tokens, device=device, dtype=dtype).requires_grad_()
    return [q, k, v, lam]


def fused(version: int, heads: int, kv_heads: int, width: int, mask: Tensor | None = None) -> Any:
    """Differential attention as the layer computes it."""
    softmax = partial(layer(version, heads, kv_heads, width).core, mask=mask, causal=True)
    return lambda q, k, v, lam: fused_differential_attention(q, k, v, lam, softmax)


def two_calls(heads: int, kv_heads: int, width: int) -> Any:
    """Version 1 by a softmax attention of queries of D/2 and values of D for each part."""
    softmax = partial(layer(1, heads, kv_heads, width).core, mask=None, causal=True)
    return lambda q, k, v, lam: fused_differential_attention(q, k, v, lam, softmax, apart=True)


def flash(heads: int, kv_heads: int, width: int) -> Any:
    """Softmax attention."""
    shape = AttentionShape(d_model=8, n_heads=heads, n_kv_heads=kv_heads, head_dim=width)
    return partial(FlashAttention(shape).eval().core, mask=None, causal=True)


def both_ways(run: Callable[..., Tensor], given: list[Tensor]) -> Callable[[], Any]:
    """One forward and backward pass."""
    out = run(*given)
    gradient = torch.randn_like(out)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*given), given, gradient)

    return step


def check(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """How far outputs and gradients are from the definition in float64, case by case."""
    rows = []
    for heads, kv_heads, tokens, width, masked in (
        (4, 4, 257, 64, False), (6, 2, 130, 128, False), (4, 1, 1, 32, False), (4, 2, 96, 80, True),
        (2, 2, 64, 256, False),
    ):  # fmt: skip
        mask = (torch.rand(2, tokens, tokens, device=device) < 0.7) if masked else None
        ways = {f"version {n}": (n, fused(n, heads, kv_heads, width, mask)) for n in (1, 2)}
        if not masked:
            ways["version 1, two calls"] = (1, two_calls(heads, kv_heads, width))
        for name, (version, run) in ways.items():
            given = inputs(version, 2, heads, kv_heads, tokens, width, device, dtype)
            error = error_of(run, given, mask)
            row = {"case": name, "heads": heads, "kv_heads": kv_heads, "tokens": tokens, "width": width}
            rows.append(row | {"masked": masked, "error": error, "passed": error < TOLERANCE[dtype]})
    return rows


def error_of(run: Callable[..., Tensor], given: list[Tensor], mask: Tensor | None) -> float:
    """The largest error of the output and the gradients, relative to their norms."""
    exact = [x.detach().double().requires_grad_() for x in given]
    reference, out = differential_attention(*exact, mask=mask), run(*given)
    gradient = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, given, gradient)]
    theirs = [reference, *torch.autograd.grad(reference, exact, gradient.double())]
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(ours, theirs, strict=True)]
    if out.shape[2] == 1:  # one key has the weight 1 whatever q and k are, whose gradients are 0
        del pairs[1:3]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def cases(
    batch: int, heads: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Case]:
    """What is timed: softmax attention, and both versions with the parameters and tokens it has."""
    make = partial(inputs, device=device, dtype=dtype)
    plain = leaves(device, dtype, *[(batch, heads, tokens, width)] * 3)
    twice = leaves(device, dtype, (batch, 2 * heads, tokens, width), *[(batch, heads, tokens, width)] * 2)
    second = make(2, batch, heads, heads, tokens, width)
    first = make(1, batch, heads // 2, heads // 2, tokens, 2 * width)
    half = (heads // 2, heads // 2, 2 * width)
    return {
        "flash": (flash(heads, heads, width), plain),
        "flash, 2H": (flash(2 * heads, heads, width), twice),
        "version 2": (fused(2, heads, heads, width), second),
        "version 1": (fused(1, *half), first),
        "version 1, two calls": (two_calls(*half), first),
    }


def main(argv: list[str]) -> int:
    """Print the tables and write the JSON; returns the exit code, 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="headwise bench differential", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it works")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    checks = check(device, dtype)
    print_table(checks)
    if not all(row["passed"] for row in checks):
        print("the fused form disagrees with the definition: nothing is timed")
        return 1
    rows: list[dict[str, Any]] = []
    on_cpu = device.type != "cuda"
    batch, heads = (1, 2 if arguments.quick else 4) if on_cpu else (8, 16)
    for tokens in (64,) if arguments.quick else (1024, 2048, 4096):
        for width in (32,) if arguments.quick else (64, 128):
            shape = {"batch": batch, "heads": heads, "tokens": tokens, "width": width}
            for compiled in (False,) if on_cpu or width > 64 else (False, True):
                chosen = cases(**shape, device=device, dtype=dtype)
                rows += timed(chosen, device, compiled, shape)
                save("differential", [*checks, *rows], arguments.out, device=str(device))  # what there is
    print_table(rows)
    return 0


def timed(
    chosen: dict[str, Case], device: torch.device, compiled: bool, shape: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a case, with times relative to the first."""
    rows = []
    for name, (run, given) in chosen.items():
        run = torch.compile(run, dynamic=False, fullgraph=True) if compiled else run
        step = both_ways(run, given)
        with torch.no_grad():
            forward = measure(captured(partial(run, *given), device), device)
        row = {"case": name, **shape, "compiled": compiled, "forward_ms": forward}
        row |= {"both_ms": measure(captured(step, device), device)}
        rows.append(row | {"extra_mb": extra_memory_mb(step, device)})
    return [row | {"flash_x": row["both_ms"] / rows[0]["both_ms"]} for row in rows]
