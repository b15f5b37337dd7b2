"""Time of differential attention, forward and backward, beside softmax attention on the same kernels.

First checks every case against the definition in float64. `flash` has as many heads as version 2 and half as
many queries; `flash, 2H` has as many queries as version 2. Version 1 has half as many heads, twice as wide,
as in the paper's comparison. `version 1, two calls` needs no zeros in its queries, but they are then narrower
than its values, which fewer kernels support.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headwise.attention.base import AttentionShape
from headwise.attention.differential.config import DifferentialConfig
from headwise.attention.differential.layer import DifferentialAttention
from headwise.attention.flash import FlashAttention
from headwise.bench import harness
from headwise.bench.harness import Row, Table, beside, captured, extra_memory_mb, measure
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


CHECKED = (
    (4, 4, 257, 64, False), (6, 2, 130, 128, False), (4, 1, 1, 32, False), (4, 2, 96, 80, True),
    (2, 2, 64, 256, False),
)  # fmt: skip
"""Heads, of keys, tokens, width, and whether there is a mask."""


def check(
    heads: int, kv_heads: int, tokens: int, width: int, masked: bool, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """How far outputs and gradients are from the definition in float64, version by version."""
    torch.manual_seed(0)
    rows = []
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


NAMES = ("flash", "flash, 2H", "version 2", "version 1", "version 1, two calls")


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
    """`headwise bench differential`."""
    parser = harness.parser(
        "differential", __doc__, compiled=True, quick=True,
        lengths="tokens of a sequence (default: 1024 2048 4096)", widths="of heads (default: 64 128)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    checks = {
        f"check of H {of[0]} to {of[1]}, T {of[2]}, D {of[3]}": partial(check, *of, device, dtype)
        for of in CHECKED
    }
    batch, heads = (8, 16) if device.type == "cuda" else (1, 2 if arguments.quick else 4)
    rows = {
        f"{name}, T {tokens}, D {width}{', compiled' if compiled else ''}": partial(
            row_of, name, device, dtype, compiled, batch=batch, heads=heads, tokens=tokens, width=width
        )
        for compiled in harness.with_compiler(arguments, device)
        for tokens in arguments.lengths or ((64,) if arguments.quick else (1024, 2048, 4096))
        for width in arguments.widths or ((32,) if arguments.quick else (64, 128))
        for name in NAMES
        if not compiled or width <= 64 or arguments.compile
    }
    finish = partial(
        beside, column="both_ms", ratio="flash_x", base={"case": "flash"}, by=("tokens", "width", "compiled")
    )
    return harness.run(
        "differential", arguments, [Table(checks, checks=True), Table(rows, finish)], device=device
    )


def row_of(name: str, device: torch.device, dtype: torch.dtype, compiled: bool, **shape: int) -> Row:
    """The row of a case at one shape."""
    torch.manual_seed(0)
    torch.compiler.reset()
    run, given = cases(**shape, device=device, dtype=dtype)[name]
    run = torch.compile(run, dynamic=False, fullgraph=True) if compiled else run
    step = both_ways(run, given)
    with torch.no_grad():
        forward = measure(captured(partial(run, *given), device), device)
    row = {"case": name, **shape, "compiled": compiled, "forward_ms": forward}
    row |= {"both_ms": measure(captured(step, device), device)}
    return row | {"extra_mb": extra_memory_mb(step, device)}
