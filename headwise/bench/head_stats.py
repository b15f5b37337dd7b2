"""Head statistics against SDPA and the eager way, with a check against float64 in the same command.

`python -m headwise.bench head-stats --device cuda --out benchmarks/results` needs torch, triton and
numpy alone. Every row is one causal shape; times are medians of the work on the device (a CUDA graph
replayed, so that launching from Python does not count), ratios are against one
`scaled_dot_product_attention` forward of the same shape in the same run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.bench import harness
from headwise.functional import head_stats
from headwise.functional.head_stats import MASS
from headwise.functional.head_stats.reference import k_eff_by_sorting
from headwise.training.distributed import find_device

TOKENS = {"cuda": (1024, 2048, 4096, 8192, 16384), "cpu": (256, 512, 1024)}
QUICK = {"cuda": (1024, 2048), "cpu": (128, 256)}
# Heads and head width of the shapes timed: TARGETS' row on a GPU, GPT-2's on a CPU.
SHAPES = {"cuda": (32, 128, torch.bfloat16), "cpu": (12, 64, torch.float32)}
EAGER_MB = 100_000
# What the check allows: relative to 1 + |value|, and rows whose k largest weights meet the mass this closely.
TOLERANCE = 2e-5


def definition(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    q_scales: list[float] | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    sink: Tensor | None = None,
    offset: int | str | None = "end",
    mass: float = MASS,
    rows: slice = slice(None),
) -> dict[str, Tensor]:
    """The measures as written down, in float64 over whole `(T, T)` tensors; arguments of `head_stats`.

    `rows` measures these queries only, so that long texts fit into memory.

    `k_eff_near` marks rows whose sum of largest weights meets `mass` within NEAR for some number of keys.
    """
    q, k = q.double(), k.double()
    tokens, width = k.shape[-2:]
    first = tokens - q.shape[-2] if offset == "end" else int(offset or 0)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    factors = torch.tensor(q_scales or [1.0], dtype=torch.float64, device=q.device).view(-1, 1, 1, 1, 1)
    n_queries = q.shape[-2]
    q = q[..., rows, :]
    s = q @ k.mT * (width**-0.5 if scale is None else scale) * factors
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    j = torch.arange(tokens, device=q.device)
    at = torch.arange(first, first + n_queries, device=q.device)[rows]
    i = at.unsqueeze(-1)
    visible = torch.ones(len(i), tokens, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (j <= i)
    if window is not None:
        visible = visible & ((i - j).abs() < window)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    same = (
        torch.ones_like(visible)
        if documents is None
        else documents[:, None, at, None] == documents[:, None, None]
    )
    visible = visible & same
    logits = s
    if bias is not None:
        bias = bias[..., rows, :]
        visible = visible & (bias > torch.finfo(bias.dtype).min / 2)
        logits = s + bias.double()
    real = torch.ones_like(same) if key_mask is None else key_mask[:, None, None] & torch.ones_like(same)
    first_keys = (same & real) & ((same & real).cumsum(-1) == 1)
    visible = visible.expand_as(s)
    n = visible.sum(-1)
    p = torch.where(visible, logits, -torch.inf).softmax(-1)
    k_eff, near = k_eff_by_sorting(p, mass)
    mean = torch.where(visible, s, 0).sum(-1) / n
    spread = torch.where(visible, s - mean.unsqueeze(-1), 0).square().sum(-1) / n
    own, before = ((p * (j == i - back)).sum(-1) for back in (0, 1))
    stats = {
        "entropy": torch.special.entr(p).sum(-1),
        "max_weight": p.amax(-1),
        "k_eff": k_eff,
        "logit_mean": mean,
        "logit_std": spread.sqrt(),
        "logit_max": torch.where(visible, s, -torch.inf).amax(-1),
        "log_sum_exp": torch.where(visible, s, -torch.inf).logsumexp(-1),
        "sink_weight": (p * first_keys).sum(-1),
        "self_weight": own,
        "previous_weight": before,
        "mean_distance": (p * (i - j).abs()).sum(-1),
    }
    stats = {name: value.masked_fill(n == 0, torch.nan) for name, value in stats.items()}
    stats["query_norm"] = factors[..., 0].abs() * torch.linalg.vector_norm(q, dim=-1)
    stats["k_eff_near"] = near
    total = torch.where(visible, logits, -torch.inf).logsumexp(-1)
    stats["log_total"] = total
    if sink is not None:
        sink = sink[:, None] if sink.dim() == 1 else sink[..., rows]
        stats["null_weight"] = torch.sigmoid(sink.double() - total)
    return stats if q_scales else {name: value[0] for name, value in stats.items()}


def errors(stats: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each measure relative to 1 + |truth|; of k_eff the number of rows that are wrong.

    A measure that is NaN in one and not in the other is wrong without bound.
    """
    found: dict[str, float] = {}
    for name, value in stats.items():
        right = truth[name]
        if name == "k_eff":
            allowed = truth["k_eff_near"] * 1.0
            wrong = (value - right).abs() > allowed
            wrong |= value.isnan() != right.isnan()
            found[name] = float(wrong.sum())
        elif not torch.equal(value.isnan(), right.isnan()):
            found[name] = float("inf")
        else:
            off = (value.double() - right).abs() / (1 + right.abs())
            found[name] = float(off.nan_to_num(0.0).max())
    return found


def eager(q: Tensor, k: Tensor, *, k_eff: bool) -> list[Tensor]:
    """How it is done without a kernel: whole weights, and a sort of every row."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ k.mT).float().mul_(q.shape[-1] ** -0.5).masked_fill_(hidden, -torch.inf)
    weights = logits.softmax(-1)
    measured = [torch.special.entr(weights).sum(-1), weights.amax(-1), logits.logsumexp(-1)]
    visible = logits.masked_fill(hidden, 0.0)
    measured += [visible.sum(-1), visible.square().sum(-1)]
    if k_eff:
        gathered = weights.sort(-1, descending=True).values.cumsum(-1)
        measured.append((gathered < MASS).sum(-1) + 1)
    return measured


def check(device: torch.device, tokens: int = 300) -> list[dict[str, Any]]:
    """One row per way to call `head_stats`: its largest error against float64 and wrong rows of k_eff."""
    torch.manual_seed(0)
    blocked = torch.rand(1, 4, tokens, tokens, device=device) < 0.3
    bias = torch.randn(1, 4, tokens, tokens, device=device).masked_fill(blocked, -torch.inf)
    ways: dict[str, dict[str, Any]] = {
        "causal": {},
        "full": {"causal": False},
        "window": {"window": 100},
        "window, full": {"window": 100, "causal": False},
        "softcap": {"softcap": 2.0},
        "bias": {"bias": bias},
        "bias, softcap, full": {"bias": bias, "softcap": 3.0, "causal": False},
        "padding": {"key_mask": torch.rand(2, tokens, device=device) < 0.6},
        "documents": {"documents": torch.arange(2 * tokens, device=device).view(2, -1) // 71},
        "documents, window, full": {
            "documents": torch.arange(2 * tokens, device=device).view(2, -1) // 71,
            "window": 40,
            "causal": False,
        },
        "scales": {"q_scales": [0.0, 0.5, 1.0, 3.0]},
    }
    shapes = [(128, torch.bfloat16, way) for way in ways]
    shapes += [(width, torch.bfloat16, "causal") for width in (16, 64, 80, 96, 256)]
    shapes += [(64, torch.float16, "causal"), (64, torch.float32, "causal"), (256, torch.float32, "full")]
    rows = []
    for (width, dtype, way), sharp in itertools.product(shapes, (1.0, 4.0)):
        q = (sharp * torch.randn(2, tokens, 4, width, device=device)).to(dtype).transpose(1, 2)
        k = torch.randn(2, 2, tokens, width, device=device).to(dtype)
        if sharp > 1:
            k[:, :, 0] *= 2  # a sink
        found = errors(head_stats(q, k, **ways[way]).columns(), definition(q, k, **ways[way]))
        wrong = found.pop("k_eff")
        worst = max(found, key=lambda name: found[name])
        rows.append(
            {
                "check": way,
                "head_dim": width,
                "dtype": str(dtype).removeprefix("torch."),
                "queries": "sharp, sink" if sharp > 1 else "plain",
                "largest_error": found[worst],
                "of": worst,
                "k_eff_wrong": int(wrong),
                "passed": found[worst] <= TOLERANCE and wrong == 0,
            }
        )
    return rows


def time_row(tokens: int, device: torch.device) -> dict[str, Any]:
    """Times, ratios and extra memory of one causal sequence of `tokens`."""
    heads, width, dtype = SHAPES[device.type]
    q, k, v = (torch.randn(1, heads, tokens, width, device=device, dtype=dtype) for _ in range(3))
    ours, with_k_eff = partial(head_stats, q, k, k_eff=False), partial(head_stats, q, k)
    row: dict[str, Any] = {"tokens": tokens, "heads": heads, "head_dim": width}
    sdpa = device_ms(partial(scaled_dot_product_attention, q, k, v, is_causal=True), device)
    row |= {"sdpa_ms": sdpa}
    ways: dict[str, Callable[[], Any]] = {"ours": ours, "ours_k_eff": with_k_eff}
    if 24e-6 * heads * tokens**2 < EAGER_MB:
        ways |= {f"eager{name}": partial(eager, q, k, k_eff=bool(name)) for name in ("", "_k_eff")}
    for name in ("ours", "ours_k_eff", "eager", "eager_k_eff"):
        row[f"{name}_ms"] = row[f"{name}_x"] = row[f"{name}_extra_mb"] = None
        if name in ways:
            row[f"{name}_extra_mb"] = harness.extra_memory_mb(ways[name], device)
            row[f"{name}_ms"] = device_ms(ways[name], device)
            row[f"{name}_x"] = row[f"{name}_ms"] / sdpa
    return row


def device_ms(function: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of a call's work on the device; on a GPU of a replayed CUDA graph."""
    if device.type != "cuda":
        return harness.measure(function, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return harness.measure(graph.replay, device)


def sweep(tokens: int, device: torch.device) -> list[dict[str, Any]]:
    """Ratios against SDPA for tile shapes beside the ones that `block_sizes` chose (GPU only)."""
    from headwise.functional.head_stats.kernel import block_sizes
    from headwise.functional.head_stats.kernel import head_stats as kernel

    heads, width, dtype = SHAPES["cuda"]
    q, k, v = (torch.randn(1, heads, tokens, width, device=device, dtype=dtype) for _ in range(3))
    sdpa = device_ms(partial(scaled_dot_product_attention, q, k, v, is_causal=True), device)
    chosen = block_sizes(width, dtype)
    options: dict[str, Any] = {"causal": True, "window": None, "softcap": None, "mass": MASS}
    rows = []
    for m, n, warps, stages, registers in SWEEP:
        shape: dict[str, int] = {"BLOCK_M": m, "BLOCK_N": n, "EDGE_N": min(m, n), "BLOCK_D": width}
        shape |= {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
        row: dict[str, Any] = {"tokens": tokens, "shape": f"{m}x{n} w{warps} s{stages} r{registers or '-'}"}
        for name, blocks in (("ours_x", (shape, chosen[1])), ("ours_k_eff_x", (chosen[0], shape))):
            call = partial(
                kernel, q, k, width**-0.5, [1.0], None, None, k_eff="k_eff" in name, blocks=blocks, **options
            )
            try:
                row[name] = device_ms(call, device) / sdpa
            except Exception as error:  # a shape that does not fit this GPU is a line, not an end
                row[name] = type(error).__name__
        rows.append(row)
    return rows


# Queries and keys of a tile, warps, pipeline stages, register limit.
SWEEP = (
    (64, 128, 4, 2, 0), (64, 128, 4, 2, 168), (64, 64, 4, 2, 128), (64, 64, 4, 3, 128),
    (64, 64, 4, 3, 168), (128, 64, 8, 2, 128), (128, 64, 8, 3, 128), (128, 128, 8, 2, 128),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """`headwise bench head-stats`."""
    parser = harness.parser(
        "head-stats", __doc__, quick=True, lengths="tokens (default: 1024 to 16384, on a CPU 256 to 1024)"
    )
    parser.add_argument("--sweep", type=int, nargs="*", metavar="T", help="time tile shapes at these lengths")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    if arguments.sweep is not None:
        for tokens in arguments.sweep or (4096,):
            harness.print_table(sweep(tokens, device))
        return 0
    tokens = 100 if arguments.quick or device.type == "cpu" else 300
    lengths = arguments.lengths or (QUICK if arguments.quick else TOKENS)[device.type]
    tables = [
        harness.Table({"checks": partial(check, device, tokens)}, checks=True),
        harness.Table({f"T {length}": partial(time_row, length, device) for length in lengths}),
    ]
    return harness.run("head-stats", arguments, tables, device=device)
