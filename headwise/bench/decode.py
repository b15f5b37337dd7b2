"""Decoding at a long context: a cache of a share of the keys against the full one, and against `flash`.

Every row decodes many sequences at once with caches filled with random keys, as after that much text: a
step reads a token of each, drops a key of each layer and head where selection says so, and writes the
new one into its slot. On a GPU the step is compiled and replayed as a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headwise.attention import KINDS, AttentionConfig
from headwise.bench import harness
from headwise.functional.budget import keys_of_share, slot_attention
from headwise.model.cache import Cache
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.model.generate import decode_step, make_cache
from headwise.training.distributed import find_device

SHAPE = ModelConfig(d_model=768, n_layers=12, n_heads=12, vocab_size=50304)
SMALL = ModelConfig(d_model=64, n_layers=2, n_heads=4, vocab_size=512)
SHARES = (1.0, 0.25, 0.125)


def main(argv: list[str]) -> int:
    """`headwise bench decode`."""
    parser = harness.parser("decode", __doc__, quick=True)
    parser.add_argument("--context", type=int, default=8192, help="tokens read before (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="no compiler and no CUDA graph")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    batch, context, shape = arguments.batch, arguments.context, SHAPE
    if arguments.quick:
        batch, context, shape = 4, 256, SMALL
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"error of the kernel's attention: {kernel_error(device, dtype):.2g}")
    cases = [("flash", 1.0), *((name, s) for name, kind in KINDS.items() if kind.inspector for s in SHARES)]
    rows = {
        f"{kind}, {share:g} of the keys": partial(
            measure, kind, share, shape, batch, context, device, dtype, eager=arguments.eager
        )
        for kind, share in cases
    }
    return harness.run("decode", arguments, [harness.Table(rows, _beside_full)], device=device)


def _beside_full(rows: list[harness.Row]) -> list[harness.Row]:
    """Beside the full cache of the same kind; `flash` beside that of the first kind that can drop keys."""
    first = next((row["kind"] for row in rows[1:]), None)
    by_kind = [row | {"_of": first if row["kind"] == "flash" else row["kind"]} for row in rows]
    for column, ratio in (("tokens_per_sec", "speed_vs_full"), ("cache_mb", "bytes_vs_full")):
        full = {row["kind"]: row[column] for row in reversed(rows) if row["budget"] == 1.0}
        for row in by_kind:
            row[ratio] = row[column] / full[row["_of"]] if row["_of"] in full else None
    return [{name: value for name, value in row.items() if name != "_of"} for row in by_kind]


@torch.no_grad()
def measure(
    kind: str,
    share: float,
    shape: ModelConfig,
    batch: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    eager: bool = False,
) -> dict[str, Any]:
    """A row: one kind with a share of the context in its cache."""
    torch.manual_seed(0)
    model = (
        Decoder(dataclasses.replace(shape, attention=AttentionConfig(kind)), context).to(device, dtype).eval()
    )
    slots = keys_of_share(share, context, model.deciding().keeps_first)
    cache = make_cache(model, batch, context, slots)
    fill(cache, context)
    tokens = torch.randint(shape.vocab_size or 1, (batch,), device=device)
    step = stepper(model, cache, tokens, eager=eager)
    milliseconds = harness.measure(step, device, seconds=0.2)
    nbytes = cache.nbytes
    row = {
        "kind": kind, "budget": share, "context": context, "keys": slots, "batch": batch,
        "step_ms": milliseconds, "tokens_per_sec": 1e3 * batch / milliseconds, "cache_mb": nbytes / 1e6,
        "cache_gb_per_sec": nbytes / milliseconds / 1e6,
    }  # fmt: skip
    del step, cache, model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def fill(cache: Cache, context: int) -> None:
    """Make a cache look as after `context` tokens: random keys of all of them, every slot in use."""
    for layer in cache.layers:
        layer.fill(context)
    cache.position.fill_(context - 1)


def stepper(model: Decoder, cache: Cache, tokens: Tensor, *, eager: bool) -> Callable[[], Any]:
    """A call that decodes one token of every sequence, again and again at the same position."""

    def step() -> Tensor:
        cache.position.fill_(cache.layers[0].length - 1)
        return decode_step(model, cache, tokens)

    if eager or not tokens.is_cuda:
        return step
    torch._dynamo.reset()  # every row has shapes of its own
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            compiled()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compiled()
    return graph.replay


@torch.no_grad()
def kernel_error(device: torch.device, dtype: torch.dtype) -> float:
    """Relative error of `slot_attention` against its definition in float64, over some shapes."""
    worst = 0.0
    for heads, ratio, width, slots in ((12, 1, 64, 2048), (4, 3, 64, 1000), (2, 1, 128, 77)):
        torch.manual_seed(0)
        q = torch.randn(2, heads, ratio, width, device=device, dtype=dtype)
        k, v = torch.randn(2, 2, heads, slots, width, device=device, dtype=dtype).unbind(0)
        f = 3 * torch.rand(2, 1, 1, slots, device=device).expand(2, heads, ratio, slots)
        found = slot_attention(q, k, v, f, scale=0.2).double()
        expected = slot_attention(q.double(), k.double(), v.double(), f.double(), scale=0.2)
        worst = max(worst, ((found - expected).norm() / expected.norm()).item())
    return worst
