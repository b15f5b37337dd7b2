"""Time and peak memory of tensor-train projections beside dense ones: of a layer and of a training step.

First checks every case against the dense matrix in float64. Ratios are to `mha` and to `flash`, which is the
engine that `tt` runs on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attention import KINDS, AttentionConfig, AttentionShape
from headwise.attention.tt.config import TensorTrainConfig
from headwise.attention.tt.trains import layer_sizes
from headwise.bench import harness
from headwise.bench.harness import Row, Table, extra_memory_mb, measure
from headwise.errors import HeadwiseError
from headwise.functional.tensor_train import reconstruct, tensor_train_linear
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.training.distributed import find_device

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Largest relative error (of norms) of anything, by the dtype of the inputs."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("mha", {}),
    "flash": ("flash", {}),
    "tt rank 8": ("tt", {"rank": 8}),
    "tt rank 16": ("tt", {"rank": 16}),
    "tt rank 32": ("tt", {"rank": 32}),
    "tt rank 16, three factors": ("tt", {"rank": 16, "n_factors": 3}),
    "tt rank 16, shared by q, k, v": ("tt", {"rank": 16, "share_cores": "qkv"}),
    "tt rank 16 on mha": ("tt", {"rank": 16, "engine": "mha"}),
}
COMPILED = ("flash", "tt rank 16")
"""Cases whose step is measured compiled too."""


def main(argv: list[str]) -> int:
    """`headwise bench tt`."""
    parser = harness.parser(
        "tt", __doc__, compiled=True, quick=True, lengths="tokens of a sequence (default: 1024)",
        widths="d_model, of heads of 64 (default: 768)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, help="sequences (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the model whose step is measured")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    head, layers, batch = (16, 2, 2) if arguments.quick else (64, arguments.layers, arguments.batch)
    lengths = arguments.lengths or ((64,) if arguments.quick else (1024,))
    widths = arguments.widths or ((64,) if arguments.quick else (768,))
    if wrong := [width for width in widths if width % head]:
        raise HeadwiseError(
            f"--widths {wrong[0]} is no d_model of whole heads of {head}; give multiples of it"
        )
    shapes = [AttentionShape(width, width // head, width // head, head) for width in widths]
    sizes = [(shape, tokens) for shape in shapes for tokens in lengths]
    checks = {
        f"check of {name}, d_model {shape.d_model}, {dtype}": partial(check, name, shape, dtype, device)
        for shape in shapes
        for name in CASES
        if name.startswith("tt")
        for dtype in LIMITS
    }
    of_layer = {
        f"layer, {name}, d_model {shape.d_model}, T {tokens}": partial(
            time_layer, name, shape, device=device, tokens=tokens, batch=batch
        )
        for shape, tokens in sizes
        for name in CASES
    }
    steps = {
        f"step, {name}{', compiled' if compiled else ''}, d_model {shape.d_model}, T {tokens}": partial(
            time_step, name, shape, layers, device=device, tokens=tokens, batch=batch, compiled=compiled
        )
        for compiled in harness.with_compiler(arguments, device)
        for shape, tokens in sizes
        for name in (COMPILED if compiled else CASES)
    }
    tables = [
        Table(checks, checks=True),
        Table(of_layer, partial(beside, of="layer", columns=("forward_backward_ms", "extra_mb"))),
        Table(steps, partial(beside, of="step", columns=("step_ms", "peak_mb"))),
    ]
    return harness.run("tt", arguments, tables, device=device)


def check(name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Row:
    """W_Q of a case, forward and backward, against the dense matrix in float64."""
    torch.manual_seed(0)
    options = TensorTrainConfig(**CASES[name][1])
    sizes = layer_sizes(shape, options).qkv[0]
    cores = [torch.randn(core, device=device).to(dtype).requires_grad_() for core in sizes.cores()]
    x = torch.randn(2, 333, shape.d_model, device=device).to(dtype).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *cores)]
    y = tensor_train_linear(x, cores, sizes.out_features)
    true = exact[0] @ reconstruct(exact[1:])[: sizes.out_features, : sizes.in_features].T
    upstream = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, [x, *cores], upstream)]
    wanted = [true, *torch.autograd.grad(true, exact, upstream.double())]
    worst = max(
        ((ours.double() - theirs).norm() / theirs.norm()).item()
        for ours, theirs in zip(found, wanted, strict=True)
    )
    return {
        "case": name, "d_model": shape.d_model, "dtype": str(dtype).removeprefix("torch."),
        "largest_error": worst, "passed": worst <= LIMITS[dtype],
    }  # fmt: skip


def config_of(name: str) -> AttentionConfig:
    """The attention of a case."""
    kind, options = CASES[name]
    config = AttentionConfig(kind)
    for key, value in options.items():
        setattr(config.options(), key, value)
    return config


def time_layer(name: str, shape: AttentionShape, *, device: torch.device, tokens: int, batch: int) -> Row:
    """Forward and backward of one attention layer under autocast, and what it keeps in between."""
    torch.manual_seed(0)
    config = config_of(name)
    layer = KINDS[config.kind](shape, config.options()).to(device).train()
    x = torch.randn(batch, tokens, shape.d_model, device=device, requires_grad=True)
    upstream = torch.randn_like(x)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            y: Tensor = layer(x)
        return y

    def both() -> None:
        y = forward()
        y.backward(upstream.to(y.dtype))
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return {
        "layer": name, "d_model": shape.d_model, "tokens": tokens,
        "parameters": sum(p.numel() for p in layer.parameters()),
        "forward_ms": measure(forward, device),
        "forward_backward_ms": measure(both, device),
        "kept_mb": kept_mb(forward),
        "extra_mb": extra_memory_mb(both, device),
    }  # fmt: skip


def kept_mb(forward: Callable[[], Tensor]) -> float:
    """Memory that a forward pass keeps for its backward pass, in MB; parameters that it keeps count too."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storages.values()) / 1e6


def time_step(
    name: str,
    shape: AttentionShape,
    n_layers: int,
    *,
    device: torch.device,
    tokens: int,
    batch: int,
    compiled: bool = False,
) -> Row:
    """A whole training step: forward, loss, backward, AdamW. The peak counts parameters and optimizer too."""
    gc.collect()
    held = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=shape.d_model, n_layers=n_layers, n_heads=shape.n_heads, vocab_size=8192, mlp="gelu",
        attention=config_of(name),
    )  # fmt: skip
    model = Decoder(config, tokens).to(device).train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    text = torch.randint(8192, (batch, tokens + 1), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = run(text[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    milliseconds = measure(step, device, seconds=2.0 if device.type == "cuda" else 0.5, least=3)
    on_device = device.type == "cuda"
    return {
        "step": f"{name}, compiled" if compiled else name, "d_model": shape.d_model, "tokens": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_ms": milliseconds,
        "tokens_per_s": 1e3 * batch * tokens / milliseconds,
        "peak_mb": (torch.cuda.max_memory_allocated(device) - held) / 1e6 if on_device else None,
    }  # fmt: skip


def beside(rows: list[Row], *, of: str, columns: tuple[str, ...]) -> list[Row]:
    """Rows with their ratios to `mha` and to `flash` of the same size."""
    for base in ("mha", "flash"):
        for column in columns:
            ratio = f"{column.rpartition('_')[0]}_x_{base}"
            rows = harness.beside(rows, column, ratio, base={of: base}, by=("d_model", "tokens"))
    return rows
