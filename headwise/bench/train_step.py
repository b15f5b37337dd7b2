"""Whole training steps: this project's loop against transformers' GPT-2 in the same process.

The rows of this project come from `Trainer.run` itself, with its clipping, telemetry and data loader,
on random tokens. The other row is transformers' GPT-2, compiled, with SDPA, fused AdamW, clipping
and bf16 autocast, on the same batch shape.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from headwise.attention.config import AttentionConfig
from headwise.bench import harness
from headwise.bench.harness import Row, Table, beside
from headwise.config.run import Config
from headwise.config.training import TrainingConfig
from headwise.data.config import DataConfig
from headwise.data.corpus import Corpus
from headwise.model.config import ModelConfig
from headwise.model.count import training_flops_per_token
from headwise.model.decoder import Decoder
from headwise.runs.folder import RunFolder
from headwise.training.distributed import World, find_device
from headwise.training.trainer import Trainer

STEPS = 70
"""Of which the last 50 are timed."""

GPT2 = ModelConfig(
    d_model=768, n_layers=12, n_heads=12, vocab_size=50304, norm="layernorm", mlp="gelu_tanh",
    position="learned", bias=True, attention=AttentionConfig("flash"),
)  # fmt: skip
"""The 124M shape, its vocabulary padded to a multiple of 64."""

SMALL = ModelConfig(
    d_model=384, n_layers=8, n_heads=6, vocab_size=8192, mlp="swiglu", attention=AttentionConfig("flash")
)
"""A model of about 20M parameters."""


def main(argv: list[str]) -> int:
    """`headwise bench train-step`."""
    arguments = harness.parser("train-step", __doc__, quick=True).parse_args(argv)
    device = find_device(arguments.device)
    table = Table(_jobs(device, quick=arguments.quick), _beside_first)
    return harness.run("train-step", arguments, [table], device=device)


def _jobs(device: torch.device, *, quick: bool) -> dict[str, harness.Case]:
    batch, seq_len = (4, 64) if quick else (32, 1024)
    gpt2, small = GPT2, SMALL
    if quick:
        gpt2 = ModelConfig(d_model=64, n_layers=2, n_heads=4, vocab_size=512, position="learned")
        small = ModelConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=512)
    without = dataclasses.replace(gpt2, bias=False)
    jobs = {
        FIRST: partial(ours, gpt2, batch, seq_len, device),
        "headwise, the same without biases": partial(ours, without, batch, seq_len, device),
        "transformers GPT-2, compiled, SDPA": partial(theirs, gpt2, batch, seq_len, device),
        "headwise, 20M": partial(ours, small, 2 * batch, seq_len, device),
    }
    return {name: partial(_row, name, measured) for name, measured in jobs.items()}


FIRST = "headwise, GPT-2 124M shape"


def _beside_first(rows: list[Row]) -> list[Row]:
    for column, ratio in (("tflop_per_sec", "flops_vs_first"), ("tokens_per_sec", "tokens_vs_first")):
        rows = beside(rows, column, ratio, base={"job": FIRST})
    return rows


def ours(model: ModelConfig, batch: int, seq_len: int, device: torch.device) -> dict[str, float]:
    """Tokens and FLOPs a second of the trainer's own loop."""
    assert model.vocab_size is not None
    config = Config(
        model=model,
        data=DataConfig(name="pystdlib", seq_len=seq_len, batch_size=batch, num_workers=0),
        training=TrainingConfig(
            max_steps=STEPS, compile=True, eval_every=0, checkpoint_every=0, log_every=STEPS, keep_best=False
        ),
    )
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=(1, 40 * batch * seq_len))
    few = tokens[:, : batch * seq_len + 1]
    data = Corpus(
        {"train": tokens, "val": few, "test": few},
        seq_len=seq_len,
        seed=0,
        vocab_size=model.vocab_size,
        identity={"name": "random", "checksum": ""},
    )
    torch.manual_seed(0)
    decoder = Decoder(model, seq_len).to(device)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        run.start("")
        trainer = Trainer(config, decoder, data, World(0, 1, device), run)
        trainer.run()
    speed = trainer.telemetry.speed()
    return {
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "tokens_per_sec": speed["tokens_per_sec"] or 0.0,
        "step_ms": speed["step_time_ms"] or 0.0,
        "flops_per_token": trainer.flops_per_token,
        "data_wait": speed["data_wait"] or 0.0,
    }


def theirs(model: ModelConfig, batch: int, seq_len: int, device: torch.device) -> dict[str, float]:
    """The same for transformers' GPT-2 of the same shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=model.vocab_size or 1, n_positions=seq_len, n_embd=model.d_model, n_layer=model.n_layers,
        n_head=model.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    shape._attn_implementation = "sdpa"
    network: torch.nn.Module = GPT2LMHeadModel(shape)
    network.to(device).train()
    compiled = torch.compile(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    batches = torch.randint(model.vocab_size or 1, (4, batch, seq_len), device=device)

    def step(number: int) -> None:
        tokens = batches[number % len(batches)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for number in range(STEPS - 50):
        step(number)
    _wait(device)
    began = time.perf_counter()
    for number in range(50):
        step(number)
    _wait(device)
    seconds = (time.perf_counter() - began) / 50
    with torch.device("meta"):
        flops = training_flops_per_token(Decoder(model, seq_len), seq_len)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "tokens_per_sec": batch * seq_len / seconds,
        "step_ms": 1e3 * seconds,
        "flops_per_token": flops,
        "data_wait": 0.0,
    }


def _row(name: str, job: Callable[[], dict[str, float]]) -> Row:
    measured = job()
    rate = measured["tokens_per_sec"] * measured["flops_per_token"] / 1e12
    return {"job": name} | measured | {"tflop_per_sec": rate}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
