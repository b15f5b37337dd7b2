"""Cases that need a GPU's memory: long texts, offsets beyond 2^31 numbers, more programs than a grid is high.

The oracle of long texts goes through blocks of queries in float64, since a (T, T) tensor of 66,001 tokens
takes 35 GB. `test_long.py` compares it with autograd on short ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from unittest.mock import patch

import torch
from torch import Tensor

from headwise.attention.selective.bench import relative
from headwise.bench import head_stats as stats
from headwise.bench.layouts import laid_out, poison
from headwise.functional import head_stats, layout, own_mask_attention, selection, selective_attention
from tests.gpu.families import LIMITS, STATS_LIMIT, Outcome, reason_of, worst

Check = Callable[[], Outcome]

LONGEST = 66_001
NAMES = ("q", "k", "v", "select_q", "select_k")


def selective_in_blocks(
    tensors: tuple[Tensor, ...], upstream: Tensor, scale: float, select_scale: float, rows: int
) -> dict[str, Tensor]:
    """y and every gradient of selective attention with one head, in float64, `rows` queries at a time.

    Args:
        tensors: q, k, v, select_q, select_k, each `(T, D)`.
        upstream: the gradient of y.
    """
    q, k, v, select_q, select_k = (x.double() for x in tensors)
    upstream, tokens = upstream.double(), len(q)
    key = torch.arange(tokens, device=q.device)
    done, states = torch.zeros(tokens, dtype=torch.float64, device=q.device), []
    starts = range(0, tokens, rows)
    y = torch.empty_like(v)

    def block(start: int) -> tuple[slice, Tensor, Tensor, Tensor]:
        """Queries; where they attack and how much; the weights of keys."""
        at = slice(start, min(start + rows, tokens))
        query = key[at, None]
        attack = (select_q[at] @ select_k.mT * select_scale).relu_()
        attack *= (key < query) & (key > 0)
        scores = q[at] @ k.mT * scale - (states[start // rows] + attack.cumsum(0) - attack)
        return at, attack > 0, attack, scores.masked_fill_(key > query, -torch.inf).softmax(-1)

    for start in starts:
        states.append(done)
        at, _, attack, weights = block(start)
        y[at] = weights @ v
        done = done + attack.sum(0)
        del attack, weights
    grads = {name: torch.zeros_like(x) for name, x in zip(NAMES, (q, k, v, select_q, select_k), strict=True)}
    later = torch.zeros_like(done)
    for start in reversed(starts):
        at, attacks, attack, weights = block(start)
        del attack
        slope = upstream[at] @ v.mT
        slope = weights * (slope - (upstream[at] * y[at]).sum(-1, keepdim=True))
        grads["q"][at] = slope @ k * scale
        grads["k"] += slope.mT @ q[at] * scale
        grads["v"] += weights.mT @ upstream[at]
        total = -slope.sum(0)
        behind = (later + total + slope.cumsum(0)) * attacks  # what later queries' F asks of this one
        grads["select_q"][at] = behind @ select_k * select_scale
        grads["select_k"] += behind.mT @ select_q[at] * select_scale
        later = later + total
        del weights, slope, behind
    return {"y": y} | {f"d_{name}": grad for name, grad in grads.items()}


def long_selective(
    device: torch.device, tokens: int, dtype: torch.dtype, own: bool, rows: int = 1024
) -> Outcome:
    """Selective attention with one head over a long text, its tensors transposed, and every gradient."""
    torch.manual_seed(tokens)
    width = 32
    flat = [torch.randn(tokens, width, device=device).to(dtype) for _ in range(6)]
    flat[3] = (flat[3] * 0.2).to(dtype)
    leaves = [x[None, None].clone().requires_grad_() for x in flat[:5]]
    q, k, v, select_q, select_k = (laid_out(x, "width outside") for x in leaves)
    poison(device, 4096)
    if own:
        y = own_mask_attention(q, k, v, select_q, select_k, scale=0.2, select_scale=0.1)
    else:
        y = selective_attention(q, k, v, selection(select_q, select_k, scale=0.1), scale=0.2)
    y.backward(laid_out(flat[5][None, None], "width outside"))
    ours = {"y": y.detach()[0, 0]}
    ours |= {f"d_{name}": leaf.grad[0, 0] for name, leaf in zip(NAMES, leaves, strict=True)}
    del y
    true = selective_in_blocks(tuple(flat[:5]), flat[5], 0.2, 0.1, rows)
    name, error = worst({key: relative(ours[key], true[key]) for key in true})
    what = "masks of its own" if own else "F kept whole"
    return Outcome("long texts", f"{name} of selective, {what}, T={tokens} {dtype}", error, 2 * LIMITS[dtype])


def long_head_stats(device: torch.device, tokens: int, dtype: torch.dtype, rows: int = 1024) -> Outcome:
    """Head statistics over a long text, every block of queries."""
    torch.manual_seed(tokens)
    q = laid_out(2 * torch.randn(1, 1, tokens, 64, device=device).to(dtype), "every second")
    k = laid_out(torch.randn(1, 1, tokens, 64, device=device).to(dtype), "width outside")
    poison(device, 4096)
    ours = head_stats(q, k).columns()
    found: dict[str, float] = {}
    for start in range(0, tokens, rows):
        at = slice(start, min(start + rows, tokens))
        true = stats.definition(q, k, rows=at)
        true["mean_distance"] = true["mean_distance"] / tokens  # in float32 it is off by T · 2^-24
        few = {name: value[..., at] for name, value in ours.items()}
        few["mean_distance"] = few["mean_distance"] / tokens
        # Sums of that many weights round by more than the lightest keys weigh: 1 key and 0.1% are free.
        off = (few["k_eff"] - true["k_eff"]).abs() - 1
        counted = (0.1 * off.clamp(min=0) / true["k_eff"]).max().item()
        for name, error in (stats.errors(few, true) | {"k_eff": counted}).items():
            found[name] = max(found.get(name, 0.0), error)
        del true
    name, error = worst(found)
    return Outcome("long texts", f"{name} of head statistics, T={tokens}", error, STATS_LIMIT)


def far_apart(
    device: torch.device, dimension: int, in_place: bool = False, tokens: int = 200, width: int = 64
) -> Outcome:
    """Tensors whose batches, heads or tokens lie more than 2^31 numbers from the first to the last.

    Args:
        in_place: kernels read them where they are, as those that are too large to copy; rows are copied.
    """
    torch.manual_seed(dimension)
    shape = (2, 2, tokens, width)
    area = tokens * width
    steps = ([0, area, width, 1], [area, 0, width, 1], [2 * width, width, 0, 1])[dimension]
    steps[dimension] = ((1 << 31) + 4096) // (shape[dimension] - 1) // 16 * 16 + 16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    near = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    room = sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1
    far = []
    for x in near:
        far.append(torch.empty(room, dtype=x.dtype, device=device).as_strided(shape, steps).copy_(x))
    if in_place:
        with patch.object(layout, "REACH", 1 << 62):
            found = _far_and_near(far, near)
    else:
        found = _far_and_near(far, near)
    name, error = worst(found)
    case = f"{name}, strides {steps}{', in place' if in_place else ''}"
    return Outcome("large offsets", case, error, 1e-5)


def _far_and_near(far: list[Tensor], near: list[Tensor]) -> dict[str, float]:
    """Errors of results of q, k far apart, relative to those of the same numbers side by side."""
    measured, expected = (head_stats(*pair).columns() for pair in (far, near))
    found = {key: relative(measured[key], expected[key].double()) for key in expected}
    pairs = ((far[0], far[1]), (near[0], near[1]))
    taken = [selection(q, k, scale=0.1).tril() for q, k in pairs]
    found["F"] = relative(taken[0], taken[1].double())
    y = [selective_attention(q, k, k, taken[1]) for q, k in pairs]
    found["y"] = relative(y[0], y[1].double())
    y = [own_mask_attention(q, k, k, q, k, scale=0.1, select_scale=0.1) for q, k in pairs]
    found["own y"] = relative(y[0], y[1].double())
    return found


def many_heads(device: torch.device, batch: int = 16_500) -> Outcome:
    """More masks than a grid is high (65,535), each checked against the first batch, which it repeats."""
    torch.manual_seed(0)
    once = torch.randn(6, 1, 4, 5, 16, device=device)

    def gradients(count: int) -> list[Tensor]:
        leaves = [x.expand(count, -1, -1, -1).detach().requires_grad_() for x in once[:5]]
        q, k, v, select_q, select_k = leaves
        y = selective_attention(q, k, v, selection(select_q, select_k, scale=0.3))
        y = y + own_mask_attention(q, k, v, select_q, select_k, scale=0.3, select_scale=0.2)
        upstream = once[5].expand(count, -1, -1, -1)
        measured = head_stats(q.detach(), k.detach()).columns()
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream), *measured.values()]

    pairs = zip(gradients(batch), gradients(1), strict=True)
    error = max(relative(many, one.double().expand_as(many)) for many, one in pairs)
    return Outcome("large grids", f"{batch} x 4 masks", error, 1e-5)


def checks(device: torch.device) -> list[tuple[str, Check]]:
    """Every case of this file by its family."""
    found: list[tuple[str, Check]] = []
    for tokens in (LONGEST, 8_191):
        for own in (True, False):
            for dtype in (torch.bfloat16, torch.float32):
                if tokens == LONGEST and dtype == torch.float32 and not own:
                    continue  # F, its transpose and its gradient take the room
                found.append(("long texts", partial(long_selective, device, tokens, dtype, own)))
        found.append(("long texts", partial(long_head_stats, device, tokens, torch.bfloat16)))
    for dimension, in_place in ((0, False), (1, False), (2, False), (0, True), (1, True)):
        found.append(("large offsets", partial(far_apart, device, dimension, in_place)))
    return [*found, ("large grids", partial(many_heads, device))]


def attempt(family: str, check: Check, device: torch.device) -> Outcome:
    """A case; an exception is an infinite error."""
    try:
        found = check()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as problem:
        return Outcome(family, reason_of(problem), float("inf"), 0.0)
    return found


def alone(family: str, check: Check, device: torch.device) -> Outcome:
    """`attempt` in a process of its own: an illegal access breaks all that follows in its process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(attempt, family, check, device).result()
        except BrokenProcessPool as problem:
            return Outcome(family, f"its process ended: {reason_of(problem)}", float("inf"), 0.0)


def run(device: torch.device, cases: list[tuple[str, Check]] | None = None) -> Iterator[Outcome]:
    """All of them (or `cases`) one after another, each as soon as it is known."""
    for family, check in checks(device) if cases is None else cases:
        began = time.perf_counter()
        found = alone(family, check, device)
        print(f"{family}: {found} in {time.perf_counter() - began:.0f} s", flush=True)
        yield found
