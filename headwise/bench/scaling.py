"""How the time of attention, forward and backward, grows with T, beside PyTorch's fused softmax attention.

For each way: milliseconds and memory for each T, the slope of log time against log T (1 = linear, 2 =
quadratic), and the T from which it is faster than the baseline, interpolated between the measured lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.bench import harness
from headwise.bench.harness import Row, Table, extra_memory_mb, measure
from headwise.training.distributed import find_device

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v `(B, H, T, D)` to y, causal."""

BASELINE = "flash"
D_MODEL = {"cuda": 768, "cpu": 128}
WIDTH = 64
LENGTHS = {"cuda": [1024, 2048, 4096, 8192, 16384, 32768], "cpu": [128, 256, 512]}
LIMITS = {torch.bfloat16: 0.03, torch.float32: 1e-3}
"""Largest relative error of y and of gradients (norms), by the dtype of q, k and v.

Spectra of modulus 1 have gradients that grow as 1 over the modulus: a few entries decide their error.
"""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The baseline."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def leaves(
    device: torch.device, tokens: int, dtype: torch.dtype, batch: int, width: int = WIDTH
) -> list[Tensor]:
    """Random q, k and v that have gradients, of as many heads as a model of D_MODEL has."""
    heads = max(1, D_MODEL[device.type] // width)
    made = torch.randn(3, batch, heads, tokens, width, device=device, dtype=dtype)
    return [x.clone().requires_grad_() for x in made]


def both_ways(way: Way, inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y and the gradients of v, q and k of a fixed sum, whose factors are numbers of `dtype`."""
    y = way(*inputs)
    upstream = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float32).view(y.shape).to(dtype)
    q, k, v = torch.autograd.grad(y, list(inputs), upstream.to(y.dtype))
    return y, v, q, k


def check(name: str, way: Way, exact: Way, device: torch.device, width: int = WIDTH) -> list[Row]:
    """Relative errors (norms) of `way` against its definition in float64, by length and dtype."""
    rows = []
    dtypes = LIMITS if device.type == "cuda" else {torch.float32: LIMITS[torch.float32]}
    for dtype, limit in dtypes.items():
        for tokens in (1, 77, 300):
            torch.manual_seed(0)
            inputs = leaves(device, tokens, dtype, 2, width)
            true = both_ways(exact, [x.detach().double().requires_grad_() for x in inputs], dtype)
            ours = both_ways(way, inputs, dtype)
            # one key has the weight 1 whatever q and k are, whose gradients are rounding then
            pairs = list(zip(ours, true, strict=True))[: 2 if tokens == 1 else 4]
            found = [_relative(a, b) for a, b in pairs]
            row = {"case": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "width": width}
            rows.append(row | {"largest_error": max(found), "passed": max(found) <= limit})
    return rows


def _relative(ours: Tensor, true: Tensor) -> float:
    return ((ours.double() - true).norm() / true.norm()).item()


def time_way(name: str, way: Way, device: torch.device, tokens: int, width: int) -> Row:
    """Forward and backward of a way, in bfloat16 on a GPU; NaN where memory does not suffice."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    inputs = leaves(device, tokens, dtype, 1, width)
    upstream = torch.randn_like(inputs[2])

    def step() -> None:
        torch.autograd.grad(way(*inputs).to(upstream.dtype), inputs, upstream)

    row: Row = {"way": name, "tokens": tokens, "width": width}
    try:
        return row | {
            "ms": measure(step, device, seconds=0.2, least=3),
            "extra_mb": extra_memory_mb(step, device),
        }
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return row | {"ms": math.nan, "extra_mb": math.nan}


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


def summary(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Slope and crossing point of every way, for each width: over the lengths that were measured of it.

    The slope is of the longer half: launches hide the rest. A way is compared with the baseline at the
    lengths that both have.
    """
    by_way: dict[tuple[int, str], dict[int, float]] = {}
    for row in rows:
        by_way.setdefault((row["width"], row["way"]), {})[row["tokens"]] = row["ms"]
    found = []
    for (width, name), known in by_way.items():
        tokens, ms = list(known), list(known.values())
        later = slice(max(0, len(tokens) // 2 - 1), None)
        base = by_way.get((width, BASELINE), {})
        both = [t for t in tokens if t in base]
        faster_from = speedup = None
        if both:
            ours, theirs = [known[t] for t in both], [base[t] for t in both]
            speedup = theirs[-1] / ours[-1]
            faster_from = None if name == BASELINE else crossing(both, ours, theirs)
        row = {"way": name, "width": width, "slope": slope(tokens[later], ms[later])}
        found.append(row | {"faster_from_T": faster_from, "speedup_at_longest": speedup})
    return found


def run(
    argv: list[str], name: str, description: str | None, ways: Mapping[str, tuple[Way, Way]],
    compiled: Mapping[str, Way] | None = None,
) -> int:  # fmt: skip
    """A benchmark: check every way against its definition, then time all of them; returns the exit code.

    Args:
        ways: by name, the way and its definition.
        compiled: ways to time under torch.compile too.
    """
    parser = harness.parser(
        name, description, compiled=True,
        lengths="tokens of a sequence; a slope needs two (default: " + ", ".join(
            f"{' '.join(map(str, lengths))} on {device}" for device, lengths in LENGTHS.items()) + ")",
        widths=f"of heads (default: {WIDTH})",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    lengths = sorted(arguments.lengths or LENGTHS[device.type])
    widths = arguments.widths or [WIDTH]
    timed = {BASELINE: sdpa} | {way: ours for way, (ours, _) in ways.items()}
    if True in harness.with_compiler(arguments, device):
        timed |= {f"{way}, compiled": torch.compile(f, dynamic=False) for way, f in (compiled or {}).items()}
    checks = {
        f"check of {way}, D {width}": partial(check, way, ours, exact, device, width)
        for width in widths
        for way, (ours, exact) in ways.items()
    }
    cases = {
        f"{way}, T {tokens}, D {width}": partial(time_way, way, function, device, tokens, width)
        for tokens in lengths
        for width in widths
        for way, function in timed.items()
    }
    tables = [Table(checks, checks=True), Table(cases, lambda rows: [*rows, *summary(rows)])]
    return harness.run(name, arguments, tables, device=device)
