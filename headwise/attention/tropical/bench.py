"""Time and memory of tropical attention beside its naive form and SDPA, after a check of its definition.

Tensor cores compute no maxima, so SDPA is shown for scale and is not a target. The naive form holds two
tensors of shape `(B, H, T, T, D)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.bench import harness
from headwise.bench.harness import Row, Table, beside, captured, extra_memory_mb, measure
from headwise.bench.layouts import laid_out, poison
from headwise.functional.tropical import definition, tropical_attention
from headwise.training.distributed import find_device

NAIVE = {"cuda": (2, 4, 512, 64), "cpu": (1, 2, 128, 32)}
"""B, H, T and D of the forward pass that is compared with the naive form."""

SIZES = {"cuda": (2, 4, (1024, 2048, 4096), 64), "cpu": (1, 2, (256, 512), 32)}
"""B, H, lengths and D of the passes forward and backward."""

CHECKED: tuple[dict[str, Any], ...] = (
    {}, {"causal": False}, {"kv_heads": 2, "centre": True}, {"width": 16}, {"width": 80},
    {"width": 128, "centre": True}, {"width": 256}, {"dtype": torch.bfloat16, "centre": True},
)  # fmt: skip
TOKENS = {"cuda": (1, 17, 333), "cpu": (17,)}

Gradients = dict[str, Tensor]


def grid(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random multiples of 1/32 within 4: sums of a few are exact in every dtype, and many are equal."""
    return (torch.randint(-128, 128, shape, device=device) / 32).to(dtype)


def errors(
    device: torch.device,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    tokens: int,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    causal: bool = True,
    centre: bool = False,
    layouts: dict[str, str] | None = None,
) -> dict[str, float]:
    """Largest errors against the definition in float64, relative to the largest number.

    On a grid every sum is exact and ties are many: y, γ and winners must agree to the bit, and gradients to
    rounding. A wrong winner moves a gradient by at least the grid.

    Args:
        layouts: how q, k, v and `upstream` lie in memory (`headwise.bench.layouts`).
    """
    made = partial(grid, device=device, dtype=dtype)
    leaves = [made(batch, n, tokens, width).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = made(batch, heads, tokens, width)
    layouts = layouts or {}

    def spread(x: Tensor, name: str) -> Tensor:
        return laid_out(x, layouts[name]) if name in layouts else x

    views, true = (
        [spread(x, name) for x, name in zip(tensors, "qkv", strict=True)] for tensors in (leaves, exact)
    )
    poison(device)
    ours = tropical_attention(*views, causal=causal, centre=centre, margin=True)
    y, margin = definition(*true, causal=causal, centre=centre)
    ours.y.backward(spread(upstream, "upstream"))
    y.backward(spread(upstream, "upstream").double())
    assert ours.margin is not None
    found = {"y": relative(ours.y, y), "margin": relative(ours.margin, margin)}
    for name, leaf, right in zip("qkv", leaves, exact, strict=True):
        assert leaf.grad is not None
        assert right.grad is not None
        found[f"d_{name}"] = relative(leaf.grad, right.grad)
    return found


def relative(ours: Tensor, true: Tensor) -> float:
    """The largest error over the largest number, or over 1; infinite where infinities differ."""
    infinite = true.isinf()
    if not torch.equal(ours.isinf(), infinite):
        return float("inf")
    ours, true = (x.detach().double().masked_fill(infinite, 0.0) for x in (ours, true))
    return float((ours - true).abs().max() / true.abs().max().clamp(min=1.0))


def check(case: dict[str, Any], shown: str, device: torch.device) -> list[Row]:
    """One row a length: the largest error of anything, and whether two backward passes agree."""
    rows = []
    for tokens in TOKENS[device.type]:
        torch.manual_seed(0)
        found = errors(device, tokens=tokens, **case)
        worst = max(found, key=lambda name: found[name])
        same = same_twice(device, tokens, **case)
        half = case.get("dtype") == torch.bfloat16
        rows.append({
            "case": shown, "tokens": tokens, "largest_error": found[worst], "of": worst, "same_twice": same,
            "passed": found[worst] <= (2.0**-8 if half else 1e-6) and same,
        })  # fmt: skip
    return rows


def named(case: dict[str, Any]) -> str:
    """A case as the table shows it."""
    shown = {key: str(value).removeprefix("torch.") for key, value in case.items()}
    return " ".join(f"{key}={value}" for key, value in shown.items()) or "usual"


def same_twice(
    device: torch.device,
    tokens: int,
    *,
    kv_heads: int = 4,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> bool:
    """Whether the gradients of two equal passes have the same bits."""
    leaves = [
        torch.randn(2, heads, tokens, width, device=device).to(dtype).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]
    upstream = torch.randn_like(leaves[0])
    one, two = (
        torch.autograd.grad(tropical_attention(*leaves, **options).y, leaves, upstream) for _ in range(2)
    )
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def against_naive(device: torch.device) -> list[Row]:
    """Forward alone: the naive form, SDPA, and ours without winners, with them, and with γ."""
    batch, heads, tokens, width = NAIVE[device.type]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, tokens, width, device=device).unbind()
    kept = [x.clone().requires_grad_() for x in (q, k, v)]
    ways: dict[str, Callable[[], Any]] = {
        "naive": partial(naive, q, k, v),
        "sdpa": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True),
        "ours": partial(tropical_attention, q, k, v),
        "ours, margins": partial(tropical_attention, q, k, v, margin=True),
        "ours, winners kept": partial(tropical_attention, *kept),
    }
    rows: list[Row] = []
    for name, way in ways.items():
        began = time.perf_counter()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize()
        first = 1e3 * (time.perf_counter() - began)
        ms = measure(captured(way, device), device)
        rows.append({
            "forward": name, "B": batch, "H": heads, "T": tokens, "D": width, "ms": ms,
            "extra_mb": extra_memory_mb(way, device), "first_call_ms": first,
        })  # fmt: skip
    return [row | {"naive_x": rows[0]["ms"] / row["ms"]} for row in rows]


@torch.no_grad()
def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """How it is written down: every sum in memory."""
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    score = (q[:, :, :, None] + k[:, :, None]).amax(-1).masked_fill(hidden, -torch.inf)
    return (score[..., None] + v[:, :, None]).amax(-2)


def both_passes(name: str, device: torch.device, tokens: int, width: int) -> Row:
    """Forward and backward of a way, in float32 where it is not named otherwise: time and memory."""
    batch, heads = SIZES[device.type][:2]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    tensors = [
        torch.randn(batch, heads, tokens, width, device=device).to(dtype).requires_grad_() for _ in range(3)
    ]
    function, upstream = BOTH[name], torch.randn_like(tensors[0])

    def step() -> None:
        for leaf in tensors:
            leaf.grad = None
        function(*tensors).backward(upstream)

    with torch.no_grad():
        forward = measure(captured(partial(function, *tensors), device), device)
    return {
        "both": name, "B": batch, "H": heads, "T": tokens, "D": width, "forward_ms": forward,
        "ms": measure(captured(step, device), device), "launched_ms": measure(step, device),
        "extra_mb": extra_memory_mb(step, device),
    }  # fmt: skip


BOTH: dict[str, Callable[..., Tensor]] = {
    "sdpa, bfloat16": partial(F.scaled_dot_product_attention, is_causal=True),
    "sdpa": partial(F.scaled_dot_product_attention, is_causal=True),
    "ours": lambda *x: tropical_attention(*x).y,
    "ours, centred": lambda *x: tropical_attention(*x, centre=True).y,
}
"""What is timed forward and backward."""


def main(argv: list[str]) -> int:
    """`headwise bench tropical`."""
    parser = harness.parser(
        "tropical", __doc__, lengths="of the passes forward and backward (default: 1024 2048 4096)",
        widths="of heads (default: 64)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    _, _, lengths, width = SIZES[device.type]
    both = {
        f"{name}, T {tokens}, D {wide}": partial(both_passes, name, device, tokens, wide)
        for tokens in arguments.lengths or lengths
        for wide in arguments.widths or [width]
        for name in BOTH
    }
    checks = {f"check of {named(case)}": partial(check, case, named(case), device) for case in CHECKED}
    tables = [
        Table({"against the naive form": partial(against_naive, device)}),  # first: its first calls are
        Table(checks, checks=True),
        Table(both, partial(beside, column="ms", ratio="sdpa_x", base={"both": "sdpa"}, by=("T", "D"))),
    ]
    return harness.run("tropical", arguments, tables, device=device)
