"""Profiling against the plain forward pass: tokens per second with the table written, and its bytes.

On a CPU a model of GPT-2's shape (12 layers, 12 heads) at T 512; on CUDA the shape of Llama 3 8B in
bfloat16 at T 512 and 4096. Weights and tokens are random. `document 004` rows measure its four
columns; 64 contexts of 512 tokens on 32 x 32 heads are its whole job of 33,554,432 rows. Beside
them the same four by the usual ways: eager attention with `output_attentions`, and on a CPU
TransformerLens where a version below 4 is installed.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.bench import harness
from headwise.errors import HeadwiseError
from headwise.functional.head_stats import MASS
from headwise.questions.profile.config import ProfileConfig
from headwise.questions.profile.export import NEEDED
from headwise.questions.profile.measure import Profile
from headwise.training.distributed import find_device
from headwise.watch.load import Loaded
from headwise.watch.samples import Samples


@dataclass(frozen=True)
class Job:
    """One model at one length.

    Attributes:
        name: of the shape.
        build: makes the model.
        contexts, length: how many, of how many tokens.
        batch: contexts per forward pass.
        part: contexts per part of the table.
        eager: contexts for the usual ways, which are slow.
        rounds: of all ways in turns; the medians are shown.
        every: False leaves out the rows that tell little more at another length.
    """

    name: str
    build: Callable[[], nn.Module]
    contexts: int
    length: int
    batch: int
    part: int
    eager: int
    rounds: int = 3
    every: bool = True


def main(argv: list[str]) -> int:
    """`headwise bench profile`."""
    arguments = harness.parser("profile", __doc__, quick=True).parse_args(argv)
    device = find_device(arguments.device)
    jobs = _jobs(device, arguments.quick)
    cases = {f"{job.name}, T {job.length}": partial(_rows, job, device) for job in jobs}
    return harness.run("profile", arguments, [harness.Table(cases)], device=device)


def _jobs(device: torch.device, quick: bool) -> list[Job]:
    if quick:
        return [
            Job("2 layers, 4 heads", lambda: gpt2(2, 4, 64), contexts=4, length=64, batch=2, part=1, eager=2)
        ]
    if device.type == "cuda":
        model = llama_8b(device)
        shape = Job("Llama 3 8B shape", lambda: model, 64, 512, batch=8, part=2, eager=8, rounds=2)
        return [shape, replace(shape, contexts=16, length=4096, batch=2, part=1, eager=1, every=False)]
    return [
        Job(
            "12 layers, 12 heads", lambda: gpt2(12, 12, 768), contexts=4, length=512, batch=4, part=2, eager=2
        )
    ]


def gpt2(layers: int, heads: int, width: int) -> nn.Module:
    """transformers' GPT-2 of that shape with sharp enough random attention."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    shape = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, n_positions=512, initializer_range=0.04, use_cache=False
    )
    return GPT2Model(shape)


def llama_8b(device: torch.device) -> nn.Module:
    """Llama 3 8B's shape in bfloat16, without the output layer."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaModel(shape)
    finally:
        torch.set_default_dtype(before)


def _rows(job: Job, device: torch.device) -> list[harness.Row]:
    model = job.build().to(device).eval().requires_grad_(False)
    loaded = Loaded(job.name, model, None, lambda ids: model(input_ids=ids))
    tokens = np.random.default_rng(0).integers(loaded.vocab_size, size=(job.contexts, job.length))
    samples = Samples(tokens, np.arange(job.contexts), job.length, {"name": "random"})
    four = ProfileConfig(
        n_samples=job.contexts, context_length=job.length, measures=NEEDED, samples_per_part=job.part
    )
    ways: list[tuple[str, int, Callable[[int, Path], int | None]]] = [
        ("plain forward", job.contexts, lambda n, _: _plain(loaded, samples, n, job.batch, device)),
    ]
    all_measures = replace(four, measures=ProfileConfig().measures)
    profiles = [("profile, document 004", four), ("profile, all measures", all_measures)]
    if job.every:
        profiles[1:1] = [("profile, document 004, float16", replace(four, table_dtype="float16"))]
        profiles.append(("profile, all measures per head", replace(all_measures, aggregate=True)))
    for name, config in profiles:
        ways.append((name, job.contexts, partial(_profile, loaded, samples, config, job.batch)))
    ways.append(("eager, output_attentions", job.eager, lambda n, _: _eager(loaded, samples, n, device)))
    if device.type == "cpu" and not _has_transformer_lens():
        print("no row of TransformerLens: a version below 4 is not installed")
    elif device.type == "cpu":
        ways.append(("TransformerLens", job.eager, _transformer_lens(model, samples)))
    for _, contexts, work in ways:
        _timed(work, min(contexts, job.batch))  # warm up
    seconds: list[list[float]] = [[] for _ in ways]
    sizes: list[int | None] = [None] * len(ways)
    for _ in range(job.rounds):  # in turns, so that a machine that slows down slows them all
        for n, (_, contexts, work) in enumerate(ways):
            lasted, sizes[n] = _timed(work, contexts)
            seconds[n].append(lasted)
    rates = [w[1] * job.length / statistics.median(s) for w, s in zip(ways, seconds, strict=True)]
    return [
        {
            "job": job.name, "T": job.length, "contexts": contexts, "way": name,
            "seconds": statistics.median(taken), "tokens_per_sec": rate, "share_of_plain": rate / rates[0],
            "table_mb": size and size / 1e6,
        }
        for (name, contexts, _), taken, rate, size in zip(ways, seconds, rates, sizes, strict=True)
    ]  # fmt: skip


def _timed(work: Callable[[int, Path], int | None], contexts: int) -> tuple[float, int | None]:
    """Seconds, without those that deleting the table takes, and what the work returned."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = work(contexts, Path(folder))
        return time.perf_counter() - began, result


def _plain(loaded: Loaded, samples: Samples, contexts: int, batch: int, device: torch.device) -> None:
    with torch.inference_mode():
        for first in range(0, contexts, batch):
            loaded.forward(samples.batch(first, min(first + batch, contexts)).to(device))
    _wait(device)


def _profile(
    loaded: Loaded, samples: Samples, config: ProfileConfig, batch: int, contexts: int, folder: Path
) -> int:
    """A whole profile, correlations and all; returns the bytes of its table."""
    few = replace(samples, chosen=samples.chosen[:contexts])
    profile = Profile(folder / "out", replace(config, n_samples=contexts))
    return profile.run(loaded, few, batch_size=batch)["bytes"]


def _eager(loaded: Loaded, samples: Samples, contexts: int, device: torch.device) -> None:
    """Three of document 004's measures from the weights that eager attention returns."""
    model: Any = loaded.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            for n in range(contexts):
                ids = samples.batch(n, n + 1).to(device)
                for weights in model(input_ids=ids, output_attentions=True).attentions:
                    for measured in _usual(weights):
                        measured.cpu()
    except torch.OutOfMemoryError as error:
        raise HeadwiseError("eager attention is out of memory; lower Job.eager to leave it out") from error
    finally:
        model.set_attn_implementation(before)
    _wait(device)


def _has_transformer_lens() -> bool:
    """Whether a TransformerLens is there that still has HookedTransformer, which version 4 has not."""
    try:
        return int(importlib.metadata.version("transformer_lens").partition(".")[0]) < 4
    except importlib.metadata.PackageNotFoundError:
        return False


def _transformer_lens(model: Any, samples: Samples) -> Callable[[int, Path], None]:
    """The same from TransformerLens, on a model of the same shape."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = model.config
    lens = HookedTransformer(
        HookedTransformerConfig(
            n_layers=shape.n_layer, d_model=shape.n_embd, n_ctx=shape.n_positions, n_heads=shape.n_head,
            d_head=shape.n_embd // shape.n_head, d_mlp=4 * shape.n_embd, d_vocab=shape.vocab_size,
            act_fn="gelu_new", normalization_type="LN", device="cpu",
        )
    )  # fmt: skip

    def patterns(name: str) -> bool:
        return name.endswith("hook_pattern")

    def run(contexts: int, _: Path) -> None:
        with torch.inference_mode():
            for n in range(contexts):
                ids = samples.batch(n, n + 1)
                _, cache = lens.run_with_cache(ids, return_type=None, names_filter=patterns)
                for weights in cache.values():
                    _usual(weights)

    return run


def _usual(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, largest weight and k_eff of weights `(B, H, T, T)`, as they are usually computed."""
    p = weights.float()
    k_eff = (p.sort(dim=-1, descending=True).values.cumsum(-1) < MASS).sum(-1) + 1
    return -(p * (p + 1e-12).log()).sum(-1), p.amax(-1), k_eff


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
