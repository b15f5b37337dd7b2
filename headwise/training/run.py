"""One training run from its configuration: checks, composes, runs, sums up."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from headwise.attention import attention_kind
from headwise.attention.kinds import resolve
from headwise.config.run import Config, flatten, load, to_dict, to_yaml
from headwise.data import open_data
from headwise.data.base import Data
from headwise.errors import HeadwiseError
from headwise.files import sweep, write_json
from headwise.model.count import attention_block, forward_flops_by_part, parameters_by_part
from headwise.model.decoder import Decoder
from headwise.runs import checkpoint
from headwise.runs import operation as new_head
from headwise.runs.environment import environment
from headwise.runs.folder import RunFolder, state_of
from headwise.runs.weights import initialise_from
from headwise.training import distributed
from headwise.training.entanglement import EntanglementRecorder
from headwise.training.heads import HeadRecorder
from headwise.training.importance import ImportanceRecorder
from headwise.training.memory import OutOfMemory, is_out_of_memory, refuse_too_large
from headwise.training.progress import Progress, Silent
from headwise.training.telemetry import peak_memory_mb, peak_rss_mb
from headwise.training.trackers import open_trackers, refuse_missing
from headwise.training.trainer import Trainer

SAME_RUN = (
    "out", "device", "plugins", "data.num_workers", "data.pin_memory", "data.cache", "data.path",
    "training.timeout_s",
)  # fmt: skip
"""Keys that a resume may change; what is read is compared by its checksum instead."""

MONITORS = ("sums",)
"""Keys of `measure` that turn on what a kind logs at every evaluation."""

SAME_PRESS_S = 1.0
"""Seconds within which a second Ctrl-C is the first one's echo: torchrun hands on what the terminal sends."""


def train(
    config: Config,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    attempt: int | None = None,
) -> dict[str, Any]:
    """Run one configuration to its end and return its summary.

    Args:
        config: validated, with `out` set.
        resume: continue the run in `config.out` exactly.
        attempt: this worker's number, as `RunFolder.take` gave it.

    Raises:
        HeadwiseError: whatever makes the run impossible, before any work is lost.
        Outdated: another worker was given the run meanwhile.
        OutOfMemory: memory ran out, then or later.
    """
    if config.out is None:
        raise ValueError("config.out is not set")
    folder = RunFolder(Path(config.out), attempt)
    world = distributed.join(config.device)
    try:
        refuse_device(config, world.device)
        refuse_missing(config.training.trackers)
        _refuse_running(folder) if resume else folder.refuse_taken()
        torch.manual_seed(config.seed)
        data = open_data(config.data, config.seed)
        config = with_vocabulary(config, data)
        if resume:
            refuse_other_run(folder, config, data)
            sweep(folder.path)
            if folder.read_status()["state"] == "finished":
                return folder.read_summary() | {"reason": "the run had already ended; nothing is left to do"}
        refuse_too_large(config, world)
        model = Decoder(config.model, config.data.seq_len).to(world.device)
        trainer = Trainer(config, model, data, world, folder, progress=progress or Silent())
        if not world.leads:
            trainer.progress = Silent()
        about: dict[str, Any] = {"engine": _engine(trainer), "data": data.identity}
        _check_engine(config, about["engine"])
        saved = _last_checkpoint(folder) if resume else None
        stayed: list[str] = []
        if config.init_from and saved is None:
            optimizer = trainer.optimizer if config.training.keep_optimizer else None
            stayed = initialise_from(config.init_from, model, optimizer)
        _claim(trainer, saved, resume=resume, about=about)
        _say_fallback(trainer)
        if config.init_from and saved is None and world.leads:
            folder.say(f"first weights from {config.init_from}{_own_init(stayed)}")
            new_head.carry(Path(config.init_from), folder.path)
        return _run(trainer, saved, about)
    except Exception as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
            raise
        raise _out_of_memory(config, world) from error
    finally:
        distributed.leave()


def _out_of_memory(config: Config, world: distributed.World) -> OutOfMemory:
    """What ran out, and what would need less."""
    tokens = config.training.total_batch_tokens or config.data.batch_size * config.data.seq_len
    return OutOfMemory(
        f"out of memory on {world.device} at data.batch_size={config.data.batch_size} and "
        f"data.seq_len={config.data.seq_len}: try data.batch_size={max(1, config.data.batch_size // 2)} "
        f"(training.total_batch_tokens={tokens} keeps the step the same)",
        peak_memory_mb(world.device),
    )


def refuse_device(config: Config, device: torch.device) -> None:
    """Refuse a kind that cannot be trained on this device.

    Raises:
        HeadwiseError: it has no backward pass there, or needs another device or a package.
    """
    kind, options = config.model.attention.kind, config.model.attention.options()
    if reason := attention_kind(kind).unavailable(device.type):
        raise HeadwiseError(reason)
    if device.type == "cpu" and "cpu_training" not in attention_kind(kind).supported(options):
        raise HeadwiseError(
            f"attention kind {kind!r} cannot be trained on a CPU: it has no backward pass there; "
            "use --device cuda, or model.attention.kind=flash"
        )


def with_vocabulary(config: Config, data: Data) -> Config:
    """`config` with the data's vocabulary where it names none.

    Raises:
        HeadwiseError: it names one that is too small.
    """
    size = config.model.vocab_size or data.vocab_size
    if size < data.vocab_size:
        raise HeadwiseError(f"model.vocab_size is {size}, but the data has {data.vocab_size} tokens")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _own_init(stayed: list[str]) -> str:
    """What the log says of parameters that the attention kind adds to those of the source."""
    if not stayed:
        return ""
    leaves = dict.fromkeys(name.partition(".attention.")[2] for name in stayed)
    return f"; the kind adds attention.{{{', '.join(leaves)}}}, which keep their own init"


def _run(trainer: Trainer, saved: checkpoint.Checkpoint | None, about: dict[str, Any]) -> dict[str, Any]:
    config, folder, world = trainer.config, trainer.folder, trainer.world
    if saved is not None:
        trainer.resume(saved)
    recorder = HeadRecorder(config, trainer.model, trainer.data, world, folder)
    trainer.on_evaluation = [recorder]
    if world.leads:
        trainer.on_evaluation += _monitors(trainer, recorder.tokens)
    importance = ImportanceRecorder(
        trainer.model, recorder.tokens, recorder.targets, trainer.max_steps, folder, leads=world.leads
    )
    if config.measure.importance:
        trainer.on_evaluation.append(importance)
    entanglement = (
        EntanglementRecorder(
            config,
            trainer.model,
            recorder.tokens,
            trainer.max_steps,
            folder,
            lambda: trainer.telemetry.trained_s,
        )
        if config.measure.entanglement.enabled
        else None
    )
    if entanglement is not None and world.leads:
        trainer.on_evaluation.append(entanglement)
    try:
        if world.leads:
            trainer.trackers = open_trackers(config.training.trackers, folder.path, to_dict(config))
            _start_log(trainer, saved)
        with _signals(trainer) as came:
            state, reason = trainer.run()
            if config.measure.importance and state == "finished" and not importance.measured:
                importance.measure()  # resumed after the last evaluation: the weights are the same
    except KeyboardInterrupt:
        if world.leads:
            folder.write_status("interrupted", reason=f"left at once, after step {trainer.step}")
        raise
    except BaseException as error:
        if world.leads:
            state = "out_of_memory" if is_out_of_memory(error) else "failed"
            folder.write_status(state, reason=_one_line(error), finished=time.time())
        raise
    finally:
        for tracker in trainer.trackers:
            tracker.close()
    summary = summarise(trainer, state, reason, about) | {"measure_s": recorder.seconds + importance.seconds}
    if config.measure.importance:
        summary["importance"] = importance.found
    if entanglement is not None:
        summary["measure_s"] += entanglement.seconds
        summary["entanglement"] = entanglement.cost()
        if world.leads:
            folder.say(entanglement.line())
    if world.leads:
        if state != "interrupted":
            folder.write_summary(summary)
        else:
            summary["signal"] = came[0] if came else signal.SIGINT
        folder.write_status(
            state, reason=reason, step=trainer.step, max_steps=trainer.max_steps, finished=time.time()
        )
        folder.say(f"{state}: {reason}")
    return summary


class Monitor(Protocol):
    """What a kind logs at every evaluation, where a key of `measure` turns it on (`Attention.monitors`)."""

    def __init__(self, model: Decoder, tokens: Tensor, autocast: torch.autocast, folder: RunFolder) -> None:
        """Of a model in training, and a fixed validation batch `(B, T)`."""

    def __call__(self, step: int) -> None:
        """Write to the log."""


def _monitors(trainer: Trainer, tokens: Tensor) -> list[Callable[[int], None]]:
    kind = attention_kind(trainer.config.model.attention.kind)
    found: list[Callable[[int], None]] = []
    for key in MONITORS:
        if not getattr(trainer.config.measure, key):
            continue
        if key in kind.monitors:
            make = resolve(kind.monitors[key])
            found.append(make(trainer.model, tokens, trainer.autocast, trainer.folder))
        else:
            trainer.folder.say(f"measure.{key}: attention kind {kind.kind} has nothing to log there")
    return found


def summarise(trainer: Trainer, state: str, reason: str, about: dict[str, Any]) -> dict[str, Any]:
    """The final numbers of a run."""
    config, model, last = trainer.config, trainer.model, trainer.last
    parts = parameters_by_part(model)
    vram = [float(row["vram_mb"]) for row in trainer.folder.read_metrics() if row["vram_mb"]]
    return {
        "state": state,
        "reason": reason,
        "step": trainer.step,
        "max_steps": trainer.max_steps,
        **trainer.telemetry.totals(),
        **trainer.telemetry.speed(),
        "data_wait": trainer.telemetry.totals()["data_wait"],
        "wall_s": trainer.telemetry.trained_s,
        "val_step": trainer.evaluated_at,
        "val_loss": last.loss if last else None,
        "val_bits_per_byte": last.bits_per_byte if last else None,
        "val_perplexity": last.perplexity if last else None,
        "val_accuracy": last.accuracy if last else None,
        "val_tokens": last.tokens if last else None,
        "best_val_loss": trainer.best_loss if math.isfinite(trainer.best_loss) else None,
        "chance_loss": math.log(trainer.data.vocab_size),
        "vocab_size": trainer.data.vocab_size,
        "kind": config.model.attention.kind,
        "engine": about["engine"],
        "expected_engine": config.expected_engine,
        "seed": config.seed,
        "device": str(trainer.world.device),
        "params": parts,
        "params_total": sum(parts.values()),
        "flops_per_token": trainer.flops_per_token,
        "flops_parts": forward_flops_by_part(model, config.data.seq_len),
        "peak_vram_mb": max(vram, default=None),
        "peak_rss_mb": peak_rss_mb(),
        "data_checksum": trainer.data.identity["checksum"],
        "n_layers": config.model.n_layers,
        "n_heads": config.model.n_heads,
        "n_kv_heads": config.model.kv_heads(),
        "heads_by_layer": config.model.heads_by_layer,
        "head_dim": config.model.width_of_head(),
        "d_model": config.model.d_model,
        "seq_len": config.data.seq_len,
        "batch_size": trainer.sequences,
    }


def _refuse_running(folder: RunFolder) -> None:
    if not folder.holds_run():
        raise HeadwiseError(f"{folder.path} holds no run to resume; leave --resume out to start one there")
    folder.refuse_newer()
    status = folder.read_status()
    pid, host = status.get("pid"), status.get("host")
    if state_of(status) == "running" and pid != os.getpid():  # a restarted container reuses ids
        raise HeadwiseError(f"{folder.path} is running in process {pid} of {host}; stop it first")


def _last_checkpoint(folder: RunFolder) -> checkpoint.Checkpoint | None:
    path = checkpoint.latest(folder.checkpoints)
    return checkpoint.load(path) if path else None


def _claim(
    trainer: Trainer, saved: checkpoint.Checkpoint | None, *, resume: bool, about: dict[str, Any]
) -> None:
    """Start the folder, or set it back to the checkpoint; the first process does, when all are here."""
    folder, world = trainer.folder, trainer.world
    world.wait()
    step = saved.state["step"] if saved else 0
    if world.leads:
        if resume:
            folder.drop_after(step if saved else -1)
        else:
            folder.start(to_yaml(trainer.config))
        write_json(folder.environment, environment(str(world.device)) | about)
        folder.write_status(
            "running", step=step, max_steps=trainer.max_steps, started=time.time(), finished=None, reason=None
        )
    world.wait()


def refuse_other_run(folder: RunFolder, config: Config, data: Data) -> None:
    """Refuse to continue a run under another configuration or on other data.

    Raises:
        HeadwiseError: names the first key that differs.
    """
    before, now = (dict(flatten(to_dict(c))) for c in (load(folder.config), config))
    for key, value in before.items():
        if key not in SAME_RUN and now.get(key) != value:
            raise HeadwiseError(
                f"{folder.path} holds a run with {key}={value}, and this command says {now.get(key)}; "
                "resume it as it was, or start a new run with another --out"
            )
    if not folder.environment.exists():  # killed before it could say
        return
    checksum = folder.read_environment().get("data", {}).get("checksum")
    if checksum not in (None, data.identity["checksum"]):
        raise HeadwiseError(
            f"{folder.path} was trained on other data (checksum {checksum[:12]}, "
            f"here {data.identity['checksum'][:12]}); give it the same data, or another --out"
        )


def _start_log(trainer: Trainer, saved: checkpoint.Checkpoint | None) -> None:
    parts = parameters_by_part(trainer.model)
    trainer.folder.say(
        f"{'resumed at step ' + str(trainer.step) if saved else 'started'}: "
        f"{sum(parts.values()):,} parameters {parts}, {trainer.flops_per_token:,} FLOPs a token, "
        f"{trainer.max_steps} steps of {trainer.telemetry.tokens_per_step} tokens"
    )
    trainer.folder.say(f"attention block: {attention_block(trainer.config.model)}")


@torch.no_grad()
def _engine(trainer: Trainer) -> str:
    """Which engine computes the attention: what a first batch ran on."""
    config = trainer.config
    size = max(1, config.data.batch_size // trainer.world.size)
    tokens = trainer.data.batch("train", trainer.data.train_indices(0, size)).inputs
    with trainer.autocast:
        trainer.model(tokens.to(trainer.world.device))
    return trainer.model.deciding().engine or "unknown"


def _say_fallback(trainer: Trainer) -> None:
    """Say it when the attention is slower than its kind can be."""
    data = trainer.config.data
    batch = max(1, data.batch_size // trainer.world.size)
    line = trainer.model.deciding().fallback(batch, data.seq_len)
    if line and trainer.world.leads:
        trainer.folder.say(line)
        trainer.progress.say(line)


def _check_engine(config: Config, engine: str) -> None:
    expected = config.expected_engine
    if expected and expected not in (engine, engine.partition("-")[0]):
        raise HeadwiseError(
            f"attention ran on engine {engine!r}, but expected_engine is {expected!r}; "
            "choose the kind that uses it, or leave expected_engine out"
        )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, HeadwiseError) else f"{type(error).__name__}: {text}"[:500]


@contextmanager
def _signals(trainer: Trainer) -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM end the run after the step in progress; a second Ctrl-C ends it at once.

    Yields the signals that came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    asked_at = math.inf

    def stop(number: int, frame: Any) -> None:
        nonlocal asked_at
        came.append(number)
        if time.monotonic() - asked_at > SAME_PRESS_S:
            raise KeyboardInterrupt
        if asked_at == math.inf:
            asked_at = time.monotonic()
            trainer.progress.say("finishing this step, then saving; press Ctrl-C again to leave at once")

    trainer.should_stop = lambda: asked_at < math.inf
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
