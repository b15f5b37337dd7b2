"""Random cases of every public function that has a kernel, each against its definition in float64.

A case is drawn from a seed: sizes, dtypes, switches, and for every tensor a memory layout of its own. Where
no kernel takes what was drawn (a wide head), the plain form runs, and is compared all the same.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.attention.selective import bench as selective
from headwise.attention.tropical import bench as tropical
from headwise.bench import head_stats as stats
from headwise.bench.layouts import KEEPING, LAYOUTS, drawn, laid_out, poison
from headwise.functional import (
    attack_and_protect,
    head_stats,
    own_mask_attention,
    selection,
    selective_attention,
    tropical_attention,
    weights_stats,
)
from headwise.functional import budget as budgets
from headwise.functional.dispatch import WIDEST_HEAD
from headwise.functional.fused_attention import fused_attention, takes
from headwise.functional.mixing import gated, mixed
from headwise.functional.rotation import EPSILON, rotated
from headwise.functional.softmax_attention import softmax_attention
from headwise.watch.rotation import LAYOUTS as ROTATIONS
from headwise.watch.rotation import Convention, Form, Tables, _unrotate

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""The most that rounding to nearest moves a number, relative to it."""

LIMITS = {torch.bfloat16: 12 * 2.0**-8, torch.float16: 12 * 2.0**-11, torch.float32: 2e-4}
"""Largest relative error (of norms) of results and gradients of attention.

Weights, gradients of scores and outputs are each rounded to the dtype of the inputs, some four times in a
row, and the difference dP - delta in the gradient loses more than a bit: 12 roundings. In float32 what
counts is F, a sum of up to T numbers that is rounded to 2^-24 of itself, and then an exponent.
"""

STATS_LIMIT = 1e-4
"""Of head statistics, relative to 1 + |value|: inputs are exact, sums in float32 whatever their dtype."""


@dataclass(frozen=True)
class Outcome:
    """How a case came out: the largest relative error of anything, and what is allowed."""

    family: str
    case: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # not where it is NaN


def tokens_of(draw: random.Random, device: torch.device, most: int = 1100) -> int:
    """T: often at the edge of a block, sometimes anything; few on a CPU."""
    if device.type == "cpu":
        return draw.choice((1, 2, 7, 17))
    edges = [n for n in (1, 2, 31, 33, 63, 64, 65, 129, 257, 513, 1025) if n <= most]
    return draw.choice((*edges, draw.randint(1, most), draw.randint(1, most)))


def dtype_of(draw: random.Random, device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else draw.choice(tuple(LIMITS))


def worst(found: dict[str, float]) -> tuple[str, float]:
    """The largest error and of what; NaN is the largest."""
    name = max(found, key=lambda key: found[key] if found[key] == found[key] else float("inf"))
    return name, found[name]


def of_attention(draw: random.Random, device: torch.device, case: dict[str, Any]) -> tuple[str, float, float]:
    """A case of `headwise.attention.selective.bench` in random sizes and layouts, with every gradient."""
    tiny = device.type == "cpu"
    dtype, tokens = dtype_of(draw, device), tokens_of(draw, device)
    width = draw.choice((16,) if tiny else (16, 24, 64, 64, 80, 128, 160, 256))
    heads, kv_heads = draw.choice(((2, 1), (2, 2)) if tiny else ((1, 1), (4, 2), (6, 2), (5, 5), (3, 1)))
    case = case | {"kv_heads": kv_heads, "heads": heads}
    if case.get("masks", 1) > heads:
        case = case | {"masks": heads}
    if "select_width" in case:
        case = case | {"select_width": draw.choice((16, 40) if tiny else (16, 40, 128, 192))}
    layouts = drawn(draw, (*selective.NAMES, "upstream"), selective.VARIED)
    found = selective.errors(
        case, device, dtype, layouts, small=0.25 / tokens**0.5,
        batch=draw.choice((1, 2)), tokens=tokens, heads=heads, width=width,
    )  # fmt: skip
    if "d_bias" in found:
        found["d_bias"] /= 4  # a number a mask, and a sum over all queries and keys whose terms cancel
    name, error = worst(found)
    limit = LIMITS[dtype] * (2 if width > WIDEST_HEAD else 1)  # the plain form rounds scores as well
    return f"{name} of {case} {dtype} T={tokens} D={width} {layouts}", error, limit


SWITCHES: tuple[dict[str, Any], ...] = (
    {}, {}, {"relu_leak": 0.25}, {"relu_leak": 1.0, "relu_after_cumsum": True},
    {"protect_bos": False, "protect_self": False},
)  # fmt: skip


def one_or_more_masks(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    case: dict[str, Any] = {"masks": draw.choice((1, 2, 3)), "switches": draw.choice(SWITCHES)}
    case |= draw.choice(({}, {"bias": True}, {"select_width": 0, "shared_keys": True}))
    return of_attention(draw, device, case | draw.choice(({}, {}, {"accumulate": "torch"})))


def own_masks(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    case: dict[str, Any] = {"own": True, "switches": draw.choice(SWITCHES), "bias": draw.random() < 0.5}
    return of_attention(draw, device, case | draw.choice(({}, {"select_width": 0, "shared_keys": True})))


def game(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    case: dict[str, Any] = draw.choice((
        {"protection": {"scale": 0.7, "bias": -0.05}, "guard": True},
        {"protection": {"slope": -0.3, "offset": 0.1}, "guard": "own"},
        {"protection": {"slope": 0.0, "offset": 0.2}}, {"masks": 2, "protection": {}, "guard": True},
    ))  # fmt: skip
    return of_attention(draw, device, case | {"switches": draw.choice((SWITCHES[0], SWITCHES[-1]))})


def head_statistics(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    dtype, tokens = dtype_of(draw, device), tokens_of(draw, device, 700)
    width = draw.choice((16,) if device.type == "cpu" else (16, 24, 64, 80, 128, 256, 320))
    heads, kv_heads = draw.choice(((1, 1), (2, 1), (4, 2)))
    batch = draw.choice((1, 2))
    layouts = drawn(draw, ("q", "k", "bias", "key_mask"), {draw.choice(("q", "k", "bias"))})
    q = laid_out(2 * torch.randn(batch, heads, tokens, width, device=device).to(dtype), layouts["q"])
    k = laid_out(torch.randn(batch, kv_heads, tokens, width, device=device).to(dtype), layouts["k"])
    options: dict[str, Any] = {"causal": draw.random() < 0.7, "mass": draw.choice((0.5, 0.9))}
    options |= draw.choice(({}, {}, {"window": draw.choice((1, 5, 100))}))
    options |= draw.choice(({}, {}, {"softcap": 3.0}))
    options |= draw.choice(({}, {}, {"q_scales": [0.5, 1.0, 0.0]}))
    if draw.random() < 0.4:
        shape = draw.choice((1, batch)), draw.choice((1, heads)), tokens, tokens
        hidden = torch.rand(shape, device=device) < 0.3
        bias = torch.randn(shape, device=device).masked_fill(hidden, -torch.inf).to(dtype)
        options["bias"] = laid_out(bias, layouts["bias"])
    if draw.random() < 0.3:
        layout = layouts["key_mask"]
        options["key_mask"] = laid_out(torch.rand(batch, tokens, device=device) < 0.6, layout)
    if draw.random() < 0.3:
        options["sink"] = torch.randn(draw.choice(((heads,), (batch, heads, tokens))), device=device)
    poison(device)
    found = stats.errors(head_stats(q, k, **options).columns(), stats.definition(q, k, **options))
    name, error = worst(found)
    shown = {key: value for key, value in options.items() if not isinstance(value, Tensor)}
    return f"{name} {dtype} {tuple(q.shape)} {shown} {sorted(options)} {layouts}", error, STATS_LIMIT


def weights_statistics(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    tokens, layout = tokens_of(draw, device, 300), draw.choice(LAYOUTS[:-1])
    weights = laid_out((4 * torch.randn(2, 2, tokens, tokens, device=device)).tril().softmax(-1), layout)
    exact = weights.double().contiguous()
    position = torch.arange(tokens, device=device)
    entropy = torch.special.entr(exact).sum(-1)
    distance = (exact * (position[:, None] - position).abs()).sum(-1)
    poison(device)
    ours = weights_stats(weights)
    found = {"entropy": ours.entropy - entropy, "mean_distance": (ours.mean_distance - distance) / tokens}
    found |= {"self_weight": ours.self_weight - exact.diagonal(dim1=-2, dim2=-1)}
    found |= {"max_weight": ours.max_weight - exact.amax(-1), "sink_weight": ours.sink_weight - exact[..., 0]}
    name, error = worst({key: value.abs().max().item() for key, value in found.items()})
    return f"{name} {layout} T={tokens}", error, STATS_LIMIT


def attacks_and_protections(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    """The scan alone, which is plain PyTorch, against its turns one by one in float64."""
    tokens = tokens_of(draw, device, 200)
    layouts = drawn(draw, ("attack", "protection"), ())
    made = torch.randn(2, 2, 2, tokens, tokens, device=device).relu().tril().unbind()
    attack, protection = (laid_out(x, layout) for x, layout in zip(made, layouts.values(), strict=True))
    attack.requires_grad_()
    a, p = (x.detach().double().contiguous() for x in (attack, protection))
    a.requires_grad_()
    left = taken = torch.zeros_like(a[..., 0, :])
    rows = []
    for turn in range(tokens):
        taken = taken + (a[..., turn, :] - left).clamp(min=0)
        left = (left - a[..., turn, :]).clamp(min=0) + p[..., turn, :]
        rows.append(taken)
    upstream = torch.randn(2, 2, tokens, tokens, device=device)
    exact = torch.stack(rows, -2)
    (true,) = torch.autograd.grad(exact, a, upstream.double())
    poison(device)
    ours = attack_and_protect(attack, protection)
    (gradient,) = torch.autograd.grad(ours, attack, laid_out(upstream, draw.choice(KEEPING)))
    found = {"F": selective.relative(ours, exact)}
    counts = attack > 0  # where attack and protection are both 0 the slope is a choice
    found["d_attack"] = selective.relative(gradient * counts, true * counts, 0.1)
    name, error = worst(found)
    return f"{name} {layouts} T={tokens}", error, LIMITS[torch.float32]


def leaving(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    tokens, layout = tokens_of(draw, device, 400), draw.choice(LAYOUTS)
    taken = laid_out(torch.randn(2, 2, tokens, tokens, device=device).relu(), layout)
    taken = taken.to(dtype_of(draw, device))
    keys = draw.randint(min(2, tokens), tokens)
    poison(device)
    ours = budgets.turns(taken, keys)
    wrong = (ours != budgets.turns(taken.double().contiguous(), keys)).sum().item()
    return f"T={tokens} {layout} {taken.dtype} m={keys}", float(wrong), 0.0


def slots(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    tiny = device.type == "cpu"
    dtype = dtype_of(draw, device)
    width, ratio = draw.choice((16, 20) if tiny else (16, 64, 80, 128, 192)), draw.choice((1, 3, 8))
    held = draw.choice((1, 3, 70) if tiny else (1, 3, 64, 65, 1000, 5000))
    layouts = drawn(draw, ("q", "k", "v", "f"), {"q", "k", "f"})
    q = torch.randn(2, 2, ratio, width, device=device).to(dtype)
    k, v = torch.randn(2, 2, 2, held, width, device=device).to(dtype).unbind()
    f = 3 * torch.rand(2, 2, ratio, held, device=device)
    f[..., : held // 2] = budgets.GONE
    made = [laid_out(x, layout) for x, layout in zip((q, k, v, f), layouts.values(), strict=True)]
    poison(device)
    ours = budgets.slot_attention(*made, scale=0.3)
    true = budgets.slot_attention(*(x.double() for x in made), scale=0.3)
    error = selective.relative(ours, true)
    return f"{dtype} D={width} R={ratio} S={held} {layouts}", error, LIMITS[dtype]


def rotations(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    dtype, tokens = dtype_of(draw, device), tokens_of(draw, device, 300)
    pairs, start = draw.choice(((12, 0), (6, 0), (6, 12), (1, 3)))
    layouts = drawn(draw, ("x", "cos", "sin"), {"x", "cos", "sin"})
    x = laid_out(torch.randn(2, 3, tokens, 24, device=device).to(dtype), layouts["x"])
    cos, sin = torch.randn(2, draw.choice((1, 2)), 1, tokens, pairs, device=device).unbind()
    tables = Tables(laid_out(cos, layouts["cos"]), laid_out(sin, layouts["sin"]), Form("once", False))
    exact = Tables(tables.cos.double(), tables.sin.double(), tables.form)
    convention = Convention(0, draw.choice(ROTATIONS), start)
    poison(device)
    ours = _unrotate(x, tables, convention)
    error = selective.relative(ours, _unrotate(x.double(), exact, convention))
    return f"{dtype} T={tokens} {convention} {layouts}", error, max(2 * ROUNDING[dtype], 1e-6)


def compared(
    leaves: list[Tensor], run: Callable[..., Tensor], true: Callable[..., Tensor], layouts: dict[str, str]
) -> dict[str, float]:
    """Relative errors of a result and its gradients against those of `true` in float64.

    Args:
        layouts: of the leaves, by name, and of `upstream`.
    """
    names, found = [name for name in layouts if name != "upstream"], []
    upstream = torch.randn_like(leaves[0])
    for function, own in ((run, leaves), (true, [x.detach().double() for x in leaves])):
        own = [x.detach().requires_grad_() for x in own]
        views = [laid_out(x, layouts[name]) for x, name in zip(own, names, strict=True)]
        poison(leaves[0].device)
        y = function(*views)
        gradients = torch.autograd.grad(y, own, laid_out(upstream.to(y.dtype), layouts["upstream"]))
        found.append({"y": y.detach(), **{f"d_{name}": g for name, g in zip(names, gradients, strict=True)}})
    ours, exact = found
    small = 0.25 / leaves[0].shape[-2] ** 0.5
    return {name: selective.relative(ours[name], exact[name], small * (name != "y")) for name in exact}


def sinks_and_windows(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    """PyTorch's kernels under a sink, within a window, under a mask, or several of these."""
    tiny = device.type == "cpu"
    dtype, tokens = dtype_of(draw, device), tokens_of(draw, device)
    width = draw.choice((16,) if tiny else (16, 24, 64, 64, 80, 128, 256))
    heads, kv_heads = draw.choice(((2, 1), (2, 2)) if tiny else ((1, 1), (4, 2), (6, 2), (5, 5), (3, 1)))
    q = torch.randn(2, heads, tokens, width, device=device).to(dtype)
    k, v = torch.randn(2, 2, kv_heads, tokens, width, device=device).to(dtype).unbind()
    sink = 2 * torch.randn(heads, device=device)
    causal, window, masked = draw.random() < 0.7, draw.choice((None, 1, 5, 64)), draw.random() < 0.3
    window = None if window is None or window >= tokens or masked else window
    window = window if takes(q, None, window=window) else None
    bias = torch.randn(2, 1, tokens, tokens, device=device).to(dtype) if masked else None
    causal = causal and bias is None
    sunk = window is None or draw.random() < 0.5

    def run(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        y = fused_attention(
            q, k, v, causal=causal, scale=0.2, bias=bias, sink=c if sunk else None, window=window
        )
        return y if sunk else y + 0 * c.sum().to(y.dtype)

    def true(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        mask = None if bias is None else bias[:, 0].double()
        y = softmax_attention(
            q, k, v, causal=causal, mask=mask, scale=0.2, sink=c if sunk else None, window=window
        )
        return y if sunk else y + 0 * c.sum()

    layouts = drawn(draw, ("q", "k", "v", "sink", "upstream"), ("q", "upstream"))
    found = compared([q, k, v, sink], run, true, layouts)
    found["d_sink"] /= 4  # a number a head, and a sum over all queries whose terms cancel
    name, error = worst(found)
    shown = f"causal={causal} window={window} masked={masked} sink={sunk}"
    return f"{name} {shown} {dtype} {tuple(q.shape)} K={kv_heads} {layouts}", error, LIMITS[dtype]


def selection_under_a_sink(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    tiny = device.type == "cpu"
    dtype, tokens = dtype_of(draw, device), tokens_of(draw, device, 600)
    width, masks = draw.choice((16,) if tiny else (16, 64, 80, 128)), draw.choice((1, 2))
    q, k, v = torch.randn(3, 2, 2, tokens, width, device=device).to(dtype).unbind()
    taken = torch.randn(2, masks, tokens, tokens, device=device).relu().tril()
    sink = 2 * torch.randn(2, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, taken: Tensor, c: Tensor) -> Tensor:
        return selective_attention(q, k, v, taken.tril(), scale=0.2, sink=c)

    layouts = drawn(draw, ("q", "k", "v", "taken", "sink", "upstream"), ("q", "upstream"))
    found = compared([q, k, v, taken, sink], run, run, layouts)
    found["d_sink"] /= 4
    name, error = worst(found)
    return f"{name} M={masks} {dtype} T={tokens} D={width} {layouts}", error, LIMITS[dtype]


def sinks_own_pass(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    """What a sink does to an output, and its gradient, apart from any attention."""
    from headwise.functional.fused_attention.kernel import apply_sink, sink_gradient

    dtype, tokens = dtype_of(draw, device), tokens_of(draw, device)
    width = draw.choice((16, 20) if device.type == "cpu" else (16, 20, 64, 128, 256))
    layouts = drawn(draw, ("y", "grad"), ("y", "grad"))
    made = torch.randn(2, 2, 3, tokens, width, device=device).to(dtype).unbind()
    y, grad = (laid_out(x, layout) for x, layout in zip(made, layouts.values(), strict=True))
    lse, sink = 3 * torch.randn(2, 3, tokens, device=device), 3 * torch.randn(3, device=device)
    poison(device)
    out, total = apply_sink(y, lse, sink)
    own = sink_gradient(out, grad, total, sink)
    exact = torch.logaddexp(lse.double(), sink.double()[:, None])
    kept = y.double() * (lse.double() - exact).exp()[..., None]
    slope = -((sink.double()[:, None] - exact).exp() * (out.double() * grad.double()).sum(-1)).sum((0, 2))
    found = {"y": selective.relative(out, kept), "lse": selective.relative(total, exact)}
    found["d_sink"] = selective.relative(own, slope, 0.1)
    name, error = worst(found)
    return f"{name} {dtype} {tuple(y.shape)} {layouts}", error, max(2 * ROUNDING[dtype], 1e-5)


def nothing_else_moves(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    """A NaN query moves no other row; a NaN key, or what a NaN query takes, no earlier one."""
    dtype, tokens = dtype_of(draw, device), max(2, tokens_of(draw, device, 300))
    at, width = draw.randrange(tokens), draw.choice((16, 64))
    q, k, v, select_q, select_k = torch.randn(5, 1, 2, tokens, width, device=device).to(dtype).unbind()
    upto = torch.arange(tokens, device=device)
    others, before = upto != at, upto < at
    leak = draw.choice((0.0, 0.25))

    def run(**changed: Tensor) -> dict[str, Tensor]:
        given = {"q": q, "k": k, "select_q": select_q} | changed
        poison(device)
        taken = selection(given["select_q"], select_k, scale=0.2, relu_leak=leak).tril()
        measured = head_stats(given["q"], given["k"]).columns()
        kept = selection(select_q, select_k, scale=0.2, relu_leak=leak)
        return {name: x.squeeze(0)[..., None] for name, x in measured.items()} | {
            "F": taken[0],
            "y": selective_attention(given["q"], given["k"], v, kept)[0],
            "maxima": tropical_attention(given["q"], given["k"], v).y[0],
            "own": own_mask_attention(
                given["q"], given["k"], v, given["select_q"], select_k, scale=0.1, select_scale=0.2,
                relu_leak=leak,
            )[0],
        }  # fmt: skip

    def broken(x: Tensor) -> Tensor:
        return x.index_fill(2, torch.tensor([at], device=device), torch.nan)

    was, wrong = run(), []
    for name, x, rows in (("q", q, others), ("k", k, before), ("select_q", select_q, before)):
        for measure, value in run(**{name: broken(x)}).items():
            if not torch.equal(value[:, rows], was[measure][:, rows]):
                wrong.append(f"{measure} by {name}")
    return f"{wrong} {dtype} T={tokens} at {at} D={width} leak={leak}", float(len(wrong)), 0.0


def maxima(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    """Tropical attention on a grid, where sums are exact and ties are many: only gradients are rounded."""
    dtype, tokens = dtype_of(draw, device), tokens_of(draw, device, 200)
    width = draw.choice((16, 20) if device.type == "cpu" else (16, 24, 32, 64, 64, 80, 128, 160, 256))
    heads, kv_heads = draw.choice(
        ((2, 1), (1, 1)) if device.type == "cpu" else ((1, 1), (4, 2), (6, 2), (3, 1))
    )
    options = {"causal": draw.random() < 0.7, "centre": draw.random() < 0.5}
    layouts = drawn(draw, (*"qkv", "upstream"), ("q", "upstream"))
    if options["centre"]:  # the gradients of all of q, and of all of k, sum to 0: one number has none
        layouts |= {name: "contiguous" for name in "qk" if layouts[name] == "one number"}
    found = tropical.errors(
        device, batch=draw.choice((1, 2)), heads=heads, kv_heads=kv_heads, tokens=tokens, width=width,
        dtype=dtype, layouts=layouts, **options,
    )  # fmt: skip
    name, error = worst(found)
    limit = max(2 * ROUNDING[dtype], 1e-6)
    return f"{name} {dtype} T={tokens} D={width} H={heads}/{kv_heads} {options} {layouts}", error, limit


def against_definition(
    draw: random.Random, device: torch.device, named: dict[str, Tensor], ours: Callable, exact: Callable
) -> tuple[str, float]:
    """The largest relative error of a result and of the gradients of `named`, by a definition in float64."""
    poison(device)
    results = []
    for function, precise in ((ours, False), (exact, True)):
        leaves = {name: (x.double() if precise else x).detach().requires_grad_() for name, x in named.items()}
        y = function(**leaves)
        upstream = (
            results[0][1]
            if precise
            else laid_out(torch.randn_like(y), draw.choice(("contiguous", "heads inside", "cut")))
        )
        grads = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
        results.append(((y, *grads), upstream))
    found = {
        name: selective.relative(a, b, 0.1 if b.numel() < 300 else 0.0)
        for name, a, b in zip(("y", *named), results[0][0], results[1][0], strict=True)
    }
    return worst(found)


def norms_and_rotations(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    """Queries or keys normalised, rotated, or both, with every gradient."""
    from headwise.functional.rotation.kernel_apply import apply

    dtype, tokens = dtype_of(draw, device), tokens_of(draw, device)
    width = draw.choice((16, 20) if device.type == "cpu" else (16, 20, 64, 64, 96, 128, 256))
    batch, heads = draw.choice((1, 2)), draw.choice((1, 2, 3, 5))
    rotate, norm = draw.choice(((True, True), (True, False), (False, True)))
    layouts = drawn(draw, ("x",), ("x",))
    named = {"x": laid_out(torch.randn(batch, heads, tokens, width, device=device).to(dtype), layouts["x"])}
    if norm:
        named["weight"] = torch.randn(width, device=device).to(draw.choice((dtype, torch.float32)))
    tables = tuple(torch.randn(2, tokens, width, device=device)) if rotate else None
    exact = None if tables is None else (tables[0].double(), tables[1].double())
    name, error = against_definition(
        draw, device, named,
        lambda x, weight=None: apply(x, tables, weight, EPSILON),
        lambda x, weight=None: rotated(x, exact, weight),
    )  # fmt: skip
    return (
        f"{name} {dtype} {(batch, heads, tokens, width)} {layouts} {rotate=} {norm=}",
        error,
        max(2 * ROUNDING[dtype], 1e-5),
    )


def mixes_and_gates(draw: random.Random, device: torch.device) -> tuple[str, float, float]:
    """Values mixed with others by learned weights, and outputs under gates, with every gradient."""
    from headwise.functional.mixing.kernel import gate, mix

    dtype, tokens = dtype_of(draw, device), tokens_of(draw, device)
    width = draw.choice((16, 20) if device.type == "cpu" else (16, 20, 64, 64, 96, 128, 256))
    shape = (draw.choice((1, 2)), draw.choice((1, 2, 3, 5)), tokens, width)
    gate_width = draw.choice((1, width))
    layouts = drawn(draw, ("a", "b"), ("a", "b"))
    a = laid_out(torch.randn(shape, device=device).to(dtype), layouts["a"])
    if draw.random() < 0.5:
        other = torch.randn(*shape[:3], gate_width, device=device).to(dtype)
        name, error = against_definition(
            draw, device, {"y": a, "logits": laid_out(other, layouts["b"])}, gate, gated
        )  # fmt: skip
    else:
        b = laid_out(torch.randn(shape, device=device).to(dtype), layouts["b"])
        named = {
            "own": a,
            "other": b,
            "by": torch.randn((), device=device),
            "by_other": torch.randn((), device=device),
        }
        name, error = against_definition(draw, device, named, mix, mixed)
        if name in ("by", "by_other"):
            error /= 4  # one number, and a sum over all whose terms cancel
    return f"{name} {dtype} {shape} {gate_width=} {layouts}", error, max(2 * ROUNDING[dtype], 1e-5)


Family = Callable[[random.Random, torch.device], tuple[str, float, float]]

FAMILIES: dict[str, tuple[Family, int]] = {
    "selection and attention under it": (one_or_more_masks, 40),
    "masks of their own": (own_masks, 24),
    "attack and protection": (game, 18),
    "head statistics": (head_statistics, 40),
    "statistics of weights": (weights_statistics, 20),
    "scan of attacks and protections": (attacks_and_protections, 12),
    "turns of a budget": (leaving, 30),
    "attention to slots": (slots, 30),
    "undone rotations": (rotations, 30),
    "norms and rotations": (norms_and_rotations, 48),
    "mixed and gated values": (mixes_and_gates, 48),
    "maxima of sums": (maxima, 40),
    "sinks and windows": (sinks_and_windows, 48),
    "selection under a sink": (selection_under_a_sink, 16),
    "a sink's own pass": (sinks_own_pass, 16),
    "NaN moves nothing else": (nothing_else_moves, 8),
}
"""Every family, and how many cases of it run on a GPU."""


def reason_of(problem: BaseException) -> str:
    """What was raised, and where in this project."""
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [frame for frame in frames if "headwise" in frame.filename or "tests" in frame.filename]
    place = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(ours))
    message = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {message[0][:300]} at {place}"


def outcome(family: str, index: int, seed: int, device: str) -> Outcome:
    """Run one case; an exception is an infinite error, and its place is in the case's text."""
    draw = random.Random(f"{seed} {family} {index}")
    try:
        torch.manual_seed(draw.randrange(1 << 30))
        case, error, limit = FAMILIES[family][0](draw, torch.device(device))
        if device != "cpu":
            torch.cuda.synchronize()
    except Exception as problem:
        return Outcome(family, f"{index}: {reason_of(problem)}", float("inf"), 0.0)
    return Outcome(family, f"{index}: {case}", error, limit)
