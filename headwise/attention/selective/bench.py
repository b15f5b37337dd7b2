"""Selective attention, forward and backward, against SDPA and the ways to do it without kernels.

Checks every case against the definition in float64 first, in the same command.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attention.base import AttentionShape, Carry
from headwise.attention.selective.config import SelectiveConfig
from headwise.attention.selective.layer import SelectiveAttention
from headwise.bench import harness
from headwise.bench.harness import Row, Table, captured, extra_memory_mb, measure
from headwise.bench.layouts import laid_out, poison
from headwise.functional.selective import (
    Protection,
    own_mask_attention,
    selection,
    selective_attention,
)
from headwise.training.distributed import find_device

CASES: dict[str, dict[str, Any]] = {
    "one mask": {},
    "one mask, unprotected": {"switches": {"protect_bos": False, "protect_self": False}},
    "two masks, 5 heads": {"masks": 2, "heads": 5},
    "grouped heads": {"kv_heads": 2},
    "leaky": {"switches": {"relu_leak": 0.25}},
    "relu moved": {"switches": {"relu_leak": 1.0, "relu_after_cumsum": True}},
    "wide selection, bias": {"select_width": 192, "bias": True},
    "latents": {"masks": 4, "select_width": 64, "shared_keys": True},
    "game, head two": {"protection": {"scale": 0.7, "bias": -0.05}, "guard": True},
    "game, leaky relu": {"protection": {"slope": -0.3, "offset": 0.1}, "guard": "own"},
    "game, constant": {"protection": {"slope": 0.0, "offset": 0.2}},
    "game, zero": {"protection": {"slope": 0.0}},
    "game, two masks, unprotected": {
        "masks": 2, "guard": True, "protection": {},
        "switches": {"protect_bos": False, "protect_self": False},
    },
    "mask in plain PyTorch": {"accumulate": "torch"},
    "own masks": {"own": True},
    "own masks of latents, grouped heads": {
        "own": True, "shared_keys": True, "select_width": 48, "bias": True, "kv_heads": 2,
        "switches": {"relu_leak": 0.25, "relu_after_cumsum": True, "protect_bos": False},
    },
    "width 80": {"width": 80},
    "width 128": {"width": 128},
    "width 32": {"width": 32},
}  # fmt: skip


def make(
    case: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int,
    tokens: int,
    heads: int,
    width: int,
) -> list[Tensor]:
    """q, k, v, selection queries and keys, bias and guard: random leaves of a graph, some empty."""
    heads, width = case.get("heads", heads), case.get("width", width)
    masks = heads if case.get("own") else case.get("masks", 1)
    kv_heads, select = case.get("kv_heads", heads), case.get("select_width", width)
    keys = 1 if case.get("shared_keys") else masks

    def leaf(*shape: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    made = [leaf(batch, n, tokens, width) for n in (heads, kv_heads, kv_heads)]
    made += [leaf(batch, masks, tokens, select, spread=2.0), leaf(batch, keys, tokens, select)]
    made.append(leaf(masks).detach().float().requires_grad_() if case.get("bias") else leaf(0))
    guard = case.get("guard") is True
    made += [leaf(batch, 1, tokens, width), leaf(batch, 1, tokens, width)] if guard else [leaf(0), leaf(0)]
    return made


def run(case: dict[str, Any], leaves: list[Tensor], *, fused: bool) -> tuple[Tensor, Tensor]:
    """The attention of the leaves, and F."""
    q, k, v, select_q, select_k, bias, guard_q, guard_k = leaves
    protection = None
    if "protection" in case:
        guards: tuple[Tensor | None, Tensor | None] = (None, None)
        if case.get("guard") == "own":
            guards = select_q, select_k
        elif case.get("guard"):
            guards = guard_q, guard_k
        width = (guards[0] if guards[0] is not None else q).shape[-1]
        protection = Protection(*guards, qk_scale=width**-0.5, **case["protection"])
    select_scale, biases = select_q.shape[-1] ** -0.5, bias if bias.numel() else None
    switches = case.get("switches", {})
    taken = selection(
        select_q, select_k, scale=select_scale, bias=biases, protection=protection,
        accumulate=case.get("accumulate", "fused") if fused else "torch", **switches,
    )  # fmt: skip
    if case.get("own"):
        y = own_mask_attention(
            q, k, v, select_q, select_k, scale=q.shape[-1] ** -0.5, select_scale=select_scale, bias=biases,
            fused=fused, **switches,
        )  # fmt: skip
        return y, taken
    return selective_attention(q, k, v, taken, fused=fused), taken


NAMES = ("q", "k", "v", "select_q", "select_k", "bias", "guard_q", "guard_k")
"""Of what `make` makes."""

VARIED = ("q", "select_q", "upstream")
"""Whose entries may repeat: with one key or value for all tokens gradients would be nothing but rounding."""


def errors(
    case: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    layouts: dict[str, str] | None = None,
    small: float = 0.0,
    **sizes: int,
) -> dict[str, float]:
    """Relative errors (norms) of y, F and every gradient against the definition in float64.

    Args:
        layouts: how tensors out of `NAMES`, and the gradient of y (`upstream`), lie in memory
            (`headwise.bench.layouts`); contiguous where not named.
        small: root mean square below which a gradient is but rounding.
    """
    leaves = make(case, device, dtype, **sizes)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    layouts = layouts or {}
    weights = torch.randn_like(leaves[0])
    found: list[dict[str, Tensor]] = []
    for tensors, fused in ((leaves, True), (exact, False)):
        views = [
            laid_out(tensor, layouts[name]) if name in layouts and tensor.numel() else tensor
            for name, tensor in zip(NAMES, tensors, strict=True)
        ]
        poison(device)
        y, taken = run(case, views, fused=fused)
        upstream = weights.to(y.dtype)
        y.backward(laid_out(upstream, layouts["upstream"]) if "upstream" in layouts else upstream)
        results = {"y": y.detach(), "F": taken.detach().tril()}
        gradients = {f"d_{name}": leaf.grad for name, leaf in zip(NAMES, tensors, strict=True)}
        found.append(results | {name: g for name, g in gradients.items() if g is not None and g.numel()})
    ours, true = found
    assert sorted(ours) == sorted(true)
    return {name: relative(ours[name], true[name], small if "d_" in name else 0.0) for name in true}


def relative(ours: Tensor, true: Tensor, small: float = 0.0) -> float:
    """Error relative to the root mean square of the truth, or to `small` where that is less."""
    size: float = true.double().norm().item()
    size = max(size, small * true.numel() ** 0.5, 1e-30)
    return float((ours.double() - true).norm().item()) / size


LIMITS = {torch.bfloat16: 0.02, torch.float32: 2e-4}
"""Largest relative error (of norms) of anything, by the dtype of the inputs."""


def check_case(name: str, device: str) -> list[dict[str, Any]]:
    """A case against float64 at two lengths and in two dtypes."""
    rows = []
    for dtype, limit in LIMITS.items():
        if dtype == torch.float32 and CASES[name].get("width", 64) > 64:
            continue
        for tokens in (333, 40):
            torch.manual_seed(0)
            found = errors(
                CASES[name], torch.device(device), dtype, batch=2, tokens=tokens, heads=4, width=64
            )
            worst = max(found, key=lambda key: found[key] if math.isfinite(found[key]) else math.inf)
            rows.append(
                {"case": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens,
                 "largest_error": found[worst], "of": worst, "error_of_F": found["F"],
                 "passed": found[worst] <= limit}
            )  # fmt: skip
    return rows


def check(device: torch.device) -> list[dict[str, Any]]:
    """Every case against float64, in processes side by side: compiling takes longer than computing."""
    jobs = min(len(CASES), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            found = pool.map(check_case, CASES, [str(device)] * len(CASES))
            return [row for rows in found for row in rows]
        except BaseException:  # the others would be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def both_ways(function: Callable[[], Tensor], leaves: list[Tensor], upstream: Tensor) -> Callable[[], None]:
    """Forward and backward of `function` as one call."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        function().backward(upstream)

    return step


def sizes_on(device: torch.device, tokens: int) -> dict[str, int]:
    """H12 D64 with 16k tokens in a batch; fewer on a CPU."""
    total = 16384 if device.type == "cuda" else 1024
    return {"batch": max(1, total // tokens), "tokens": tokens, "heads": 12, "width": 64}


def timed(ours: Callable[[], Tensor], leaves: list[Tensor], device: torch.device) -> dict[str, float | None]:
    """Milliseconds of forward and backward of SDPA and of `ours`, both as CUDA graphs, and its memory.

    Args:
        leaves: q, k, v, and whatever else has a gradient.
    """
    q, k, v = leaves[:3]
    upstream = torch.randn_like(q)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])

    step, plain = (both_ways(function, leaves, upstream) for function in (ours, sdpa))
    launched = measure(step, device)
    ms = {name: measure(captured(call, device), device) for name, call in (("ours", step), ("sdpa", plain))}
    with torch.no_grad():
        forward = [measure(captured(call, device), device) for call in (ours, sdpa)]
    return {
        "sdpa_ms": ms["sdpa"], "ours_ms": ms["ours"], "ours_x": ms["ours"] / ms["sdpa"],
        "forward_x": forward[0] / forward[1], "launched_ms": launched,
        "extra_mb": extra_memory_mb(step, device),
    }  # fmt: skip


def named(name: str, way: Callable[..., dict[str, float | None]], device: torch.device, tokens: int) -> Row:
    """The row of a way to do it."""
    return {"case": name, "tokens": tokens} | way(device, tokens=tokens)


def time_case(case: dict[str, Any], device: torch.device, *, tokens: int) -> dict[str, float | None]:
    """The row of a case, by its functions alone."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    leaves = make(case, device, dtype, **sizes_on(device, tokens))
    return timed(lambda: run(case, leaves, fused=True)[0], leaves, device)


def time_plain(device: torch.device, *, tokens: int) -> dict[str, float | None]:
    """The row of the definition: what selective attention costs without kernels."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    leaves = make({}, device, dtype, **sizes_on(device, tokens))
    return timed(lambda: run({}, leaves, fused=False)[0], leaves, device)


def time_latents(device: torch.device, *, tokens: int) -> dict[str, float | None]:
    """The row of 4 latent logits mapped to 12 masks, with the projection of the latents' head."""
    layer = SelectiveAttention(
        AttentionShape(768, 12, 12, 64), SelectiveConfig(source="latent", n_masks=4)
    ).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    leaves = make({}, device, dtype, **sizes_on(device, tokens))
    q, k, v = leaves[:3]
    x = torch.randn(q.shape[0], tokens, 768, device=device, dtype=dtype)

    def latents() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return layer.attend(x, q, k, v, mask=None, causal=True, rope=None, carry=Carry())

    return timed(latents, leaves[:3], device)


@torch.no_grad()
def sums(device: torch.device, *, tokens: int = 4096) -> list[dict[str, Any]]:
    """Errors of F against float64 by the way it is accumulated, on the same queries and keys."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, tokens, 64, device=device).unbind()
    exact = selection(q, k, scale=0.125, accumulate="float64").tril()
    rows = []
    for way in ("fused", "torch", "sequential"):
        error = (selection(q, k, scale=0.125, accumulate=way).tril().double() - exact).abs()
        rms = error.square().mean().sqrt().item()
        rows.append({"sum": way, "largest_F": exact.max().item(), "largest_error": error.max().item()})
        rows[-1] |= {"tokens": tokens, "rms_error": rms}
    return rows


TIMED: dict[str, dict[str, Any]] = {
    "selective": {},
    "attack and protect": {"protection": {}, "guard": True},
    "two masks": {"masks": 2},
}


def main(argv: list[str]) -> int:
    """`headwise bench selective`."""
    lengths = "tokens of a sequence (default: 1024 2048 4096)"
    arguments = harness.parser("selective", __doc__, lengths=lengths).parse_args(argv)
    device = find_device(arguments.device)
    ways: dict[str, Callable[..., dict[str, Any]]]
    ways = {name: partial(time_case, case) for name, case in TIMED.items()}
    ways |= {"4 latents to 12 masks": time_latents, "selective, the definition": time_plain}
    rows = {
        f"{name}, T {tokens}": partial(named, name, way, device, tokens)
        for tokens in arguments.lengths or (1024, 2048, 4096)
        for name, way in ways.items()
    }
    checks = {"checks": partial(check, device)} if device.type == "cuda" else {}
    tables = [Table(checks, checks=True), Table(rows), Table({"sums": partial(sums, device)})]
    return harness.run("selective", arguments, tables, device=device)
