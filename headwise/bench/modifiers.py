"""Time of each modifier of attention, forward and backward, relative to the same attention without it.

First checks sinks and windows against their definition in float64. Then times two levels: `core` computes the
heads' outputs from queries, keys and values; `layer` is the whole layer, with its projections, the rotation
and the projection of a gate. On a GPU both are timed with and without torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headwise.attention import AttentionShape, Carry, attention_kind
from headwise.attention.modifiers import Modifiers
from headwise.bench import harness
from headwise.bench.harness import Row, Table, beside, captured, extra_memory_mb, measure
from headwise.bench.layouts import poison
from headwise.functional.fused_attention import fused_attention, takes
from headwise.functional.mixing import gated
from headwise.functional.softmax_attention import softmax_attention
from headwise.model.rope import Rope
from headwise.training.distributed import find_device

D_MODEL = 768
WINDOW = 256
KIND = "flash"
LIMITS = {torch.bfloat16: 0.02, torch.float32: 2e-4}
"""Largest relative error (of norms) of anything, by the dtype of the inputs."""

CHECKS: dict[str, dict[str, Any]] = {
    "sink": {"sink": True},
    "sink, grouped heads": {"sink": True, "kv_heads": 2},
    "sink, full": {"sink": True, "causal": False},
    "sink, masked": {"sink": True, "masked": True},
    "window": {"window": 37},
    "window, grouped heads": {"window": 37, "kv_heads": 2},
    "sink and window": {"sink": True, "window": 37},
    "sink and window, full": {"sink": True, "window": 37, "causal": False},
}
CASES: dict[str, Modifiers] = {
    "none": Modifiers(),
    "qk_norm": Modifiers(qk_norm=True),
    "sink zero": Modifiers(sink="zero"),
    "sink learned": Modifiers(sink="learned"),
    "gate head": Modifiers(output_gate="head"),
    "gate element": Modifiers(output_gate="element"),
    "value_residual": Modifiers(value_residual=True),
    f"window {WINDOW}": Modifiers(window=WINDOW),
    f"sink learned, window {WINDOW}": Modifiers(sink="learned", window=WINDOW),
    "all": Modifiers(True, "learned", "element", True, WINDOW),
}

Call = tuple[Callable[[], Tensor], list[Tensor]]
"""Something to run, and the leaves that it has gradients for."""


def check(name: str, device: torch.device) -> list[Row]:
    """A case against float64: results and gradients, at several lengths and widths and in two dtypes."""
    torch.manual_seed(0)
    case, rows = CHECKS[name], []
    for dtype, limit in LIMITS.items():
        for tokens, width in ((333, 64), (64, 128), (1, 64)):
            window = case.get("window")
            window = None if window is None or window >= tokens else window
            q = torch.randn(2, 4, tokens, width, device=device, dtype=dtype)
            if takes(q, None, window=window):
                found = _errors(case | {"window": window}, q)
                worst = max(found, key=lambda key: found[key] if found[key] == found[key] else 1e9)
                rows.append({
                    "check": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens,
                    "width": width, "largest_error": found[worst], "of": worst,
                    "passed": found[worst] <= limit,
                })  # fmt: skip
    return rows


def _errors(case: dict[str, Any], q: Tensor) -> dict[str, float]:
    batch, heads, tokens, width = q.shape
    k, v = torch.randn(2, batch, case.get("kv_heads", heads), tokens, width, device=q.device, dtype=q.dtype)
    sink = torch.randn(heads, device=q.device)
    bias = q.new_empty(batch, 1, tokens, tokens).normal_() if case.get("masked") else None
    causal = case.get("causal", True) and bias is None
    how: dict[str, Any] = {"causal": causal, "scale": width**-0.5, "window": case["window"]}
    upstream, results = torch.randn_like(q), []
    for exact in (False, True):
        leaves = [(x.double() if exact else x).detach().requires_grad_() for x in (q, k, v, sink)]
        leaves = leaves if case.get("sink") else leaves[:3]
        ours_q, ours_k, ours_v = leaves[:3]
        how["sink"] = leaves[3] if case.get("sink") else None
        poison(q.device)
        if exact:
            mask = None if bias is None else bias[:, 0].double()
            y = softmax_attention(ours_q, ours_k, ours_v, mask=mask, **how)
        else:
            y = fused_attention(ours_q, ours_k, ours_v, bias=bias, **how)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))])
    names = ("y", "d_q", "d_k", "d_v", "d_sink")
    found = {}
    for name, ours, true in zip(names, *results, strict=False):
        least = 0.0 if name == "y" else 0.25 / tokens**0.5 * true.numel() ** 0.5
        found[name] = ((ours.double() - true).norm() / max(true.norm().item(), least, 1e-30)).item()
    if "d_sink" in found:
        found["d_sink"] /= 4  # a number a head, and a sum over all queries whose terms cancel
    return found


def _layer(modifiers: Modifiers, width: int, device: torch.device, dtype: torch.dtype) -> Any:
    heads = D_MODEL // width
    shape = AttentionShape(D_MODEL, heads, heads, width, layer=1, n_layers=2, modifiers=modifiers)
    return attention_kind(KIND)(shape).to(device, dtype)


def core(
    modifiers: Modifiers, batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> Call:
    """From queries, keys and values, and a gate's logits, to heads' outputs."""
    layer, heads = _layer(modifiers, width, device, dtype), D_MODEL // width
    q, k, v, first = (
        torch.randn(batch, tokens, heads, width, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(4)
    )
    gates = 1 if modifiers.output_gate == "head" else width
    logits = torch.randn(batch, tokens, heads, gates, device=device, dtype=dtype).transpose(1, 2)
    logits.requires_grad_()

    def run() -> Tensor:
        queries, keys, values = q, k, v
        if layer.modifiers is not None:
            queries, keys = layer.rotated(q, k, None)
            values = layer.modifiers.values(v, Carry(values=first))
        y: Tensor = layer.core(queries, keys, values, mask=None, causal=True)
        return y if modifiers.output_gate == "none" else gated(y, logits)

    leaves = [q, k, v, *(layer.modifiers.parameters() if layer.modifiers is not None else ())]
    leaves += [first] if modifiers.value_residual else []
    return run, leaves + ([logits] if modifiers.output_gate != "none" else [])


def whole(
    modifiers: Modifiers, batch: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> Call:
    """The layer with its projections and its rotation."""
    layer, rope = _layer(modifiers, width, device, dtype), Rope(width, length=tokens).to(device)
    x = torch.randn(batch, tokens, D_MODEL, device=device, dtype=dtype, requires_grad=True)
    first = torch.randn(batch, D_MODEL // width, tokens, width, device=device, dtype=dtype)
    first.requires_grad_()

    def run() -> Tensor:
        y: Tensor = layer(x, rope=rope, carry=Carry(values=first))
        return y

    return run, [x, *layer.parameters(), *([first] if modifiers.value_residual else [])]


LEVELS = {"core": core, "layer": whole}


def timed(call: Call, device: torch.device, *, compiled: bool) -> dict[str, float | None]:
    """Milliseconds of forward and backward as a CUDA graph and launched one by one, and memory."""
    run, leaves = call
    function = torch.compile(run, dynamic=False, fullgraph=True) if compiled else run
    upstream = torch.randn_like(run())

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        function().backward(upstream)

    launched = measure(step, device, seconds=0.15)
    ms = measure(captured(step, device), device, seconds=0.15)
    return {"ms": ms, "launched_ms": launched, "extra_mb": extra_memory_mb(step, device)}


def row_of(name: str, device: torch.device, *, level: str, tokens: int, width: int, compiled: bool) -> Row:
    """The row of a case at one shape."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    batch = max(1, (16384 if cuda else 1024) // tokens)
    torch.manual_seed(0)
    torch.compiler.reset()
    call = LEVELS[level](CASES[name], batch, tokens, width, device, dtype)
    shape = {"level": level, "modifier": name, "tokens": tokens, "width": width, "compiled": compiled}
    return shape | timed(call, device, compiled=compiled)


def main(argv: list[str]) -> int:
    """`headwise bench modifiers`."""
    parser = harness.parser(
        "modifiers", __doc__, compiled=True, lengths="tokens of a sequence (default: 1024 2048 4096)",
        widths=f"of heads, of a model of {D_MODEL} (default: 64 128)",
    )  # fmt: skip
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--modifiers", nargs="+", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    cases = {
        f"{level}, T {tokens}, D {width}, {name}{', compiled' if compiled else ''}": partial(
            row_of, name, device, level=level, tokens=tokens, width=width, compiled=compiled
        )
        for compiled in harness.with_compiler(arguments, device)
        for level in arguments.levels
        for tokens in arguments.lengths or (1024, 2048, 4096)
        for width in arguments.widths or (64, 128)
        for name in CASES
        if name == "none" or name in arguments.modifiers
    }
    alike = ("level", "tokens", "width", "compiled")
    tables = [
        Table({f"check of {name}": partial(check, name, device) for name in CHECKS}, checks=True),
        Table(cases, partial(beside, column="ms", ratio="x", base={"modifier": "none"}, by=alike)),
    ]
    return harness.run("modifiers", arguments, tables, device=device)
