"""Tensor-train projections against dense ones: the layer and a whole training step, time and peak memory.

Checks every case against the dense matrix in float64 first, in the same command. Memory and speed stand
beside `mha` and beside `flash`, which is the engine that `tt` runs on.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attention import KINDS, AttentionConfig, AttentionShape
from headwise.attention.tt.config import TensorTrainConfig
from headwise.attention.tt.trains import layer_sizes
from headwise.bench.harness import extra_memory_mb, measure, print_table, save
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
    """`headwise bench tt`: print the tables and write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="headwise bench tt", description=__doc__)
    add = parser.add_argument
    add("--device", default="auto")
    add("--out", type=Path, default=Path("benchmarks/results"))
    add("--tokens", type=int, default=1024, help="length of a sequence")
    add("--batch", type=int, default=8, help="sequences")
    add("--layers", type=int, default=4, help="layers of the model whose step is measured")
    add("--quick", action="store_true", help="small shapes, to see that it works")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    shape = AttentionShape(768, 12, 12, 64)
    if arguments.quick:
        shape, arguments.tokens, arguments.batch, arguments.layers = AttentionShape(64, 4, 4, 16), 64, 2, 2
    checks = [
        check(name, shape, dtype, device) for name in CASES for dtype in LIMITS if name.startswith("tt")
    ]
    print_table(checks)
    if not all(row["passed"] for row in checks):
        print("the contraction disagrees with the dense matrix: nothing is timed")
        return 1
    size = {"device": device, "tokens": arguments.tokens, "batch": arguments.batch}
    layers = [{"layer": name} | time_layer(name, shape, **size) for name in CASES]
    beside(layers, ("forward_backward_ms", "extra_mb"))
    print_table(layers)
    steps = [{"step": name} | time_step(name, shape, arguments.layers, **size) for name in CASES]
    for name in COMPILED if device.type == "cuda" else ():
        found = time_step(name, shape, arguments.layers, compiled=True, **size)
        steps.append({"step": f"{name}, compiled"} | found)
    beside(steps, ("step_ms", "peak_mb"))
    print_table(steps)
    save("tt", [*checks, *layers, *steps], arguments.out, device=str(device))
    return 0


def check(name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
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
        "case": name, "dtype": str(dtype).removeprefix("torch."), "largest_error": worst,
        "passed": worst <= LIMITS[dtype],
    }  # fmt: skip


def config_of(name: str) -> AttentionConfig:
    """The attention of a case."""
    kind, options = CASES[name]
    config = AttentionConfig(kind)
    for key, value in options.items():
        setattr(config.options(), key, value)
    return config


def time_layer(
    name: str, shape: AttentionShape, *, device: torch.device, tokens: int, batch: int
) -> dict[str, float | None]:
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
        "parameters": sum(p.numel() for p in layer.parameters()),
        "forward_ms": measure(forward, device),
        "forward_backward_ms": measure(both, device),
        "kept_mb": kept_mb(forward),
        "extra_mb": extra_memory_mb(both, device),
    }


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
) -> dict[str, float | None]:
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
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_ms": milliseconds,
        "tokens_per_s": 1e3 * batch * tokens / milliseconds,
        "peak_mb": (torch.cuda.max_memory_allocated(device) - held) / 1e6 if on_device else None,
    }


def beside(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Add each row's ratios to `mha` and to `flash`."""
    for base in rows[:2]:
        of = next(iter(base.values()))
        for row in rows:
            for column in columns:
                known = row[column] is not None and base[column]
                row[f"{column.rpartition('_')[0]}_x_{of}"] = row[column] / base[column] if known else None
