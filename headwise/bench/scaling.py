"""How the time of attention grows with T: forward and backward, beside PyTorch's fused softmax attention.

For each way: milliseconds and memory by T, the slope of log time against log T (1 = linear, 2 = quadratic),
and the T at which it becomes faster than the baseline, interpolated between the lengths that were measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.bench.harness import extra_memory_mb, measure, print_table, save
from headwise.training.distributed import find_device

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v `(B, H, T, D)` to y, causal."""

BASELINE = "flash"
HEADS, WIDTH = 12, 64
LENGTHS = {"cuda": [1024, 2048, 4096, 8192, 16384, 32768], "cpu": [128, 256, 512]}
LIMITS = {torch.bfloat16: 0.03, torch.float32: 1e-3}
"""Largest relative error of y and of gradients (norms), by the dtype of q, k and v.

Spectra of modulus 1 have gradients that grow as 1 over the modulus: a few entries decide their error.
"""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The baseline."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def leaves(device: torch.device, tokens: int, dtype: torch.dtype, batch: int) -> list[Tensor]:
    """Random q, k and v that have gradients."""
    heads = HEADS if device.type == "cuda" else 2
    made = torch.randn(3, batch, heads, tokens, WIDTH, device=device, dtype=dtype)
    return [x.clone().requires_grad_() for x in made]


def both_ways(way: Way, inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y and the gradients of v, q and k of a fixed sum, whose factors are numbers of `dtype`."""
    y = way(*inputs)
    upstream = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float32).view(y.shape).to(dtype)
    q, k, v = torch.autograd.grad(y, list(inputs), upstream.to(y.dtype))
    return y, v, q, k


def check(name: str, way: Way, exact: Way, device: torch.device) -> list[dict[str, Any]]:
    """Relative errors (norms) of `way` against its definition in float64, by length and dtype."""
    rows = []
    dtypes = LIMITS if device.type == "cuda" else {torch.float32: LIMITS[torch.float32]}
    for dtype, limit in dtypes.items():
        for tokens in (1, 77, 300):
            torch.manual_seed(0)
            inputs = leaves(device, tokens, dtype, 2)
            true = both_ways(exact, [x.detach().double().requires_grad_() for x in inputs], dtype)
            ours = both_ways(way, inputs, dtype)
            # one key has the weight 1 whatever q and k are, whose gradients are rounding then
            pairs = list(zip(ours, true, strict=True))[: 2 if tokens == 1 else 4]
            found = [_relative(a, b) for a, b in pairs]
            row = {"case": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
            rows.append(row | {"largest_error": max(found), "passed": max(found) <= limit})
    return rows


def _relative(ours: Tensor, true: Tensor) -> float:
    return ((ours.double() - true).norm() / true.norm()).item()


def times(ways: Mapping[str, Way], device: torch.device, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Forward and backward of every way at every length, in bfloat16 on a GPU: the same tokens in a batch."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for tokens in lengths:
        for name, way in ways.items():
            torch.manual_seed(0)
            inputs = leaves(device, tokens, dtype, 1)
            upstream = torch.randn_like(inputs[2])

            def step(way: Way = way, inputs: list[Tensor] = inputs, upstream: Tensor = upstream) -> None:
                torch.autograd.grad(way(*inputs).to(upstream.dtype), inputs, upstream)

            try:
                spent = {"ms": measure(step, device, seconds=0.2, least=3)}
                spent["extra_mb"] = extra_memory_mb(step, device)  # type: ignore[assignment]
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                spent = {"ms": math.nan, "extra_mb": math.nan}
            rows.append({"way": name, "tokens": tokens} | spent)
    return rows


def slope(tokens: Sequence[float], ms: Sequence[float]) -> float | None:
    """The slope of log time against log T by least squares; None where fewer than two were measured."""
    known = [(math.log(t), math.log(m)) for t, m in zip(tokens, ms, strict=True) if math.isfinite(m)]
    if len(known) < 2:
        return None
    x, y = zip(*known, strict=True)
    return float(np.polyfit(x, y, 1)[0])


def crossing(tokens: Sequence[float], ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The T from which on `ours` is faster, interpolated in log-log; None where it is not at the longest T.

    The shortest T where it is faster at all lengths.
    """
    ratio = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    if not math.isfinite(ratio[-1]) or ratio[-1] >= 0:
        return None
    last = max((at for at, value in enumerate(ratio) if not value < 0), default=None)
    if last is None:
        return float(tokens[0])
    if not math.isfinite(ratio[last]):
        return float(tokens[last + 1])
    low, high = math.log(tokens[last]), math.log(tokens[last + 1])
    return math.exp(low + (high - low) * ratio[last] / (ratio[last] - ratio[last + 1]))


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Slope and crossing point of every way. The slope is of the longer half: launches hide the rest."""
    by_way: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        known = by_way.setdefault(row["way"], {"tokens": [], "ms": []})
        known["tokens"].append(row["tokens"])
        known["ms"].append(row["ms"])
    base, found = by_way[BASELINE], []
    for name, known in by_way.items():
        half = len(known["tokens"]) // 2
        speedup = base["ms"][-1] / known["ms"][-1]
        faster_from = None if name == BASELINE else crossing(known["tokens"], known["ms"], base["ms"])
        found.append(
            {"way": name, "slope": slope(known["tokens"][half - 1 :], known["ms"][half - 1 :]),
             "faster_from_T": faster_from,
             "speedup_at_longest": speedup}
        )  # fmt: skip
    return found


def run(
    argv: list[str], name: str, description: str | None, ways: Mapping[str, tuple[Way, Way]],
    unchecked: Mapping[str, Way] | None = None,
) -> int:  # fmt: skip
    """A benchmark: check every way against its definition, then time all of them; returns the exit code.

    Args:
        ways: by name, the way and its definition.
        unchecked: others to time, such as a way compiled.
    """
    parser = argparse.ArgumentParser(prog=f"headwise bench {name}", description=description)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tokens", type=int, nargs="*", help="T, ascending; at least two")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    checks = [row for way, (ours, exact) in ways.items() for row in check(way, ours, exact, device)]
    print_table(checks)
    if not all(row["passed"] for row in checks):
        print("not what the definition gives: nothing is timed")
        return 1
    timed = {BASELINE: sdpa} | {way: ours for way, (ours, _) in ways.items()} | dict(unchecked or {})
    rows = times(timed, device, sorted(arguments.tokens or LENGTHS[device.type]))
    print_table(rows)
    found = summary(rows)
    print_table(found)
    save(name, [*checks, *rows, *found], arguments.out, device=str(device))
    return 0
