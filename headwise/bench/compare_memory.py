"""Kinds of attention side by side: 100 training steps of one shape on one device, in the trainer's own loop.

Peak memory holds weights, gradients, optimizer and activations. On a GPU it is the peak of PyTorch's
allocator over all steps. On a CPU it is the sum of PyTorch's allocations over two further steps, which a
profiler adds up; the speed there is that of the steps without it.
"""

from __future__ import annotations

import gc
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwise.attention import KINDS, attention_kind
from headwise.bench import harness
from headwise.config.run import Config, from_dict, keys
from headwise.data.corpus import Corpus
from headwise.errors import HeadwiseError, did_you_mean
from headwise.model.decoder import Decoder
from headwise.runs.folder import RunFolder
from headwise.training.distributed import World, find_device
from headwise.training.memory import MEASURED_BY, OutOfMemory, is_out_of_memory, training_peak
from headwise.training.run import refuse_device
from headwise.training.telemetry import WINDOW
from headwise.training.trainer import Trainer

VOCABULARY = 256


def main(argv: list[str]) -> int:
    """Print the table and write the JSON; returns the exit code."""
    parser = harness.parser(
        "compare-memory",
        __doc__,
        usage="headwise bench compare-memory --kinds KIND [KIND ...] [options] [--SECTION.KEY=VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="default: every kind")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-len", type=int, help="default: 1024, on a CPU 256")
    parser.add_argument("--batch-size", type=int, help="default: 8, on a CPU 4")
    parser.add_argument("--d-model", type=int, help="default: 512, on a CPU 128")
    parser.add_argument("--n-layers", type=int, help="default: 8, on a CPU 2")
    parser.add_argument("--n-heads", type=int, help="default: 8, on a CPU 4")
    arguments, flags = parser.parse_known_args(argv)
    for kind in arguments.kinds:
        attention_kind(kind)
    device = find_device(arguments.device)
    sizes = {"seq_len": (1024, 256), "batch_size": (8, 4), "d_model": (512, 128), "n_layers": (8, 2),
             "n_heads": (8, 4)}  # fmt: skip
    shape = {
        name: getattr(arguments, name) or default[device.type == "cpu"] for name, default in sizes.items()
    }
    shared = _shared(shape, arguments.steps, str(device)) | _options(flags)
    about = {"measured_by": MEASURED_BY[device.type], "steps": arguments.steps, **shape}
    print(f"{shape} on {device}; peak memory of {MEASURED_BY[device.type]}")
    cases = {kind: partial(row_of, kind, shared, device, about) for kind in arguments.kinds}
    return harness.run("compare-memory", arguments, [harness.Table(cases, _beside_first)], device=device)


def row_of(kind: str, shared: dict[str, Any], device: torch.device, about: dict[str, Any]) -> harness.Row:
    """The row of a kind; one that cannot run has the reason.

    Args:
        shared: dotted keys of the configuration that all kinds have.
        about: columns that all rows have.
    """
    gc.collect()
    row: harness.Row = {"kind": kind} | dict.fromkeys(
        ("engine", "parameters", "peak_mb", "tokens_per_sec", "step_ms")
    )
    try:
        config = from_dict(shared | {"model.attention.kind": kind})
        refuse_device(config, device)
        return row | measure(config, device) | {"reason": None} | about
    except HeadwiseError as error:
        return row | {"reason": str(error)} | about


def _beside_first(rows: list[harness.Row]) -> list[harness.Row]:
    """As ratios to the first that ran."""
    first = next((row["kind"] for row in rows if row["peak_mb"]), None)
    for column in ("peak_mb", "tokens_per_sec"):
        rows = harness.beside(rows, column, f"{column}_vs_first", base={"kind": first})
    return rows


def measure(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak memory and speed of one kind.

    Raises:
        HeadwiseError: it cannot run, or memory ran out.
    """
    steps, sequences, length = config.training.max_steps or 1, config.data.batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(1, (steps + 1) * sequences * length + 1))
    few = tokens[:, : sequences * length + 1]
    about = {"name": "random", "checksum": ""}
    data = Corpus(
        {"train": tokens, "val": few, "test": few},
        seq_len=length,
        seed=0,
        vocab_size=VOCABULARY,
        identity=about,
    )
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated(device)
            run = RunFolder(Path(folder) / "run")
            run.start("")
            decoder = Decoder(config.model, length).to(device)
            trainer = Trainer(config, decoder, data, World(0, 1, device), run)
            peaks = _Peaks(device)
            trainer.on_evaluation = [peaks]
            trainer.run()
            engine = decoder.attentions()[0].engine
        speed = trainer.telemetry.speed()
        parameters = sum(p.numel() for p in decoder.parameters())
        peak = peaks.most - before if device.type == "cuda" else training_peak(config, device)
    except Exception as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
            raise
        raise HeadwiseError(f"out of memory on {device}") from None
    return {
        "engine": engine, "parameters": parameters, "peak_mb": peak / 1e6,
        "tokens_per_sec": speed["tokens_per_sec"], "step_ms": speed["step_time_ms"],
    }  # fmt: skip


class _Peaks:
    """The highest peak of a GPU's memory; the trainer starts a new peak at each evaluation."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.most = device, 0

    def __call__(self, step: int) -> None:
        if self.device.type == "cuda" and step:
            self.most = max(self.most, torch.cuda.max_memory_allocated(self.device))


def _shared(shape: dict[str, int], steps: int, device: str) -> dict[str, Any]:
    return {
        "model.d_model": shape["d_model"], "model.n_layers": shape["n_layers"],
        "model.n_heads": shape["n_heads"], "model.vocab_size": VOCABULARY, "data.seq_len": shape["seq_len"],
        "data.batch_size": shape["batch_size"], "training.max_steps": steps, "training.eval_every": 0,
        "training.checkpoint_every": 0, "training.log_every": max(1, min(steps, WINDOW)),
        "training.keep_best": False, "device": device,
    }  # fmt: skip


def _options(flags: list[str]) -> dict[str, str]:
    """`--model.attention.KIND.OPTION=VALUE` and other keys of the configuration.

    Raises:
        HeadwiseError: it is no such key.
    """
    found = {}
    for flag in flags:
        key, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not equals or key not in keys():
            hint = did_you_mean(key, keys())
            raise HeadwiseError(f"{flag!r} is no --KEY=VALUE of the configuration{hint}")
        found[key] = value
    return found
