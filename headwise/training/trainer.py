"""The training loop. It composes parts that know nothing of each other: data, loss, optimizer, schedule,
telemetry, checkpoints. What is measured beside the loss comes in as functions called at each evaluation."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.config import Config
from headwise.data.base import Batch, Data
from headwise.data.loader import eval_batches, train_loader
from headwise.model.count import training_flops_per_token
from headwise.model.decoder import Decoder
from headwise.storage.run_folder import HEARTBEAT_S, RunFolder
from headwise.training import checkpoint
from headwise.training.debug import NonFiniteOutput, checked_outputs
from headwise.training.distributed import World
from headwise.training.loss import Evaluation, TokenLoss, evaluate
from headwise.training.optim import make_optimizer, step_if_finite
from headwise.training.profiler import StepProfiler
from headwise.training.progress import Progress, Silent
from headwise.training.schedule import learning_rate
from headwise.training.telemetry import Readings, Telemetry, peak_memory_mb, reset_peak_memory
from headwise.training.trackers import Tracker


@dataclass
class Trainer:
    """One run.

    Attributes:
        config: validated.
        model: on the world's device.
        data: as `headwise.data` opens it.
        folder: a claimed run folder.
        on_evaluation: called with the step at each evaluation, on every process.
        should_stop: asked after each step; a True ends the run as interrupted, with a checkpoint.
    """

    config: Config
    model: Decoder
    data: Data
    world: World
    folder: RunFolder
    progress: Progress = field(default_factory=Silent)
    trackers: Sequence[Tracker] = ()
    on_evaluation: Sequence[Callable[[int], None]] = ()
    should_stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        training, data = self.config.training, self.config.data
        tokens = training.total_batch_tokens or data.batch_size * data.seq_len
        self.sequences = tokens // data.seq_len
        self.flops_per_token = training_flops_per_token(self.model, data.seq_len)
        self.telemetry = Telemetry(training.smoothing, tokens, self.flops_per_token * tokens)
        self.max_steps = self._max_steps(tokens)
        self.optimizer = make_optimizer(self.model, training)
        self.plain = TokenLoss(self.model)
        self.compiled: nn.Module = torch.compile(self.plain) if training.compile else self.plain  # type: ignore[assignment]
        self.loss = self.world.wrap(self.compiled)
        self.readings = Readings()
        self.step = 0
        self.best_loss = math.inf
        self.last: Evaluation | None = None
        self._evaluated_at = -1
        self._heartbeat = 0.0

    @property
    def autocast(self) -> torch.autocast:
        """bf16 where the configuration or the device says so."""
        device = self.world.device.type
        precision = self.config.training.precision
        on = precision == "bf16" or (
            precision == "auto" and device == "cuda" and torch.cuda.is_bf16_supported()
        )
        return torch.autocast(device, torch.bfloat16, enabled=on)

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint of this run."""
        checkpoint.load_weights(self.model, saved.model, f"checkpoint of {self.folder.path}")
        checkpoint.restore_optimizer(self.model, self.optimizer, saved.optimizer)
        self.step = saved.state["step"]
        self.best_loss = saved.state["best_loss"]
        self.telemetry.restore(saved.state["telemetry"])

    def run(self) -> tuple[str, str]:
        """Train to the end, or until something stops it.

        Returns:
            The state (finished, interrupted, timed_out, diverged) and the reason.
        """
        self.progress.start(self.step, self.max_steps)
        batches = self._batches()
        started = time.monotonic() - self.telemetry.trained_s
        timeout = self.config.training.timeout_s or math.inf
        state, reason = "finished", f"{self.max_steps} steps"
        try:
            if self.step == 0:
                self._evaluate()
            self.telemetry.restart_clock()
            with StepProfiler(self.config.training.profile_steps, self.folder.path, self.world) as profiler:
                while self.step < self.max_steps:
                    self._train_step(batches)
                    profiler.step()
                    self._after_step()
                    if self.telemetry.nonfinite_in_a_row >= self.config.training.max_nonfinite:
                        state, reason = "diverged", self._divergence()
                    elif self.world.any(self.should_stop()):
                        state, reason = "interrupted", f"stopped at step {self.step}"
                    elif self.world.any(time.monotonic() - started > timeout):
                        state, reason = "timed_out", f"{timeout:g} s passed at step {self.step}"
                    else:
                        continue
                    break
            self._settle(all_of_them=True)
            if state in ("finished", "timed_out"):
                self._evaluate()
            if state != "diverged":
                self._save()
        except NonFiniteOutput as error:
            state, reason = "diverged", str(error)
        finally:
            self.progress.stop()
            batches.close()
        return state, reason

    def _max_steps(self, tokens: int) -> int:
        training = self.config.training
        limits = [
            limit
            for limit in (
                training.max_steps,
                training.max_tokens and training.max_tokens // tokens,
                training.max_flops and int(training.max_flops // (tokens * self.flops_per_token)),
            )
            if limit is not None
        ]
        return max(1, min(limits))

    def _batches(self) -> Iterator[Batch]:
        data = self.config.data
        return train_loader(
            self.data,
            self.sequences,
            data.batch_size // self.world.size,
            start_step=self.step,
            rank=self.world.rank,
            world_size=self.world.size,
            num_workers=data.num_workers,
            pin_memory=data.pin_memory and self.world.device.type == "cuda",
        )

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over `sequences` sequences of all processes."""
        training = self.config.training
        waiting = time.perf_counter()
        passes = [next(batches) for _ in range(self.sequences // self.config.data.batch_size)]
        wait = time.perf_counter() - waiting
        seed_step(self.config.seed, self.step, self.world.rank)
        lr = learning_rate(self.step, self.max_steps, training)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = self._counted(passes)
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for index, batch in enumerate(passes):
            loss += self._backward(batch, total, last=index == len(passes) - 1)
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if training.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, training.grad_clip, norm)
        loss = self.world.sum(loss)
        step_if_finite(self.optimizer, torch.isfinite(norm) & torch.isfinite(loss))
        self.step += 1
        self.readings.send(loss, norm, step=self.step, lr=lr, wait_s=wait)

    def _backward(self, batch: Batch, total: Tensor | int, *, last: bool) -> Tensor:
        """Add one pass to the gradient; returns its share of the step's mean loss."""
        device = self.world.device
        inputs = batch.inputs.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        debug = self.step < self.config.training.debug_steps
        model = self.plain if debug and self.world.size == 1 else self.loss
        skip_sync = model.no_sync() if self.world.size > 1 and not last else contextlib.nullcontext()
        check = checked_outputs(self.model, self.step + 1) if debug else contextlib.nullcontext()
        with skip_sync, check:
            with self.autocast:
                summed, _ = model(inputs, targets)
            # DDP averages gradients over processes; the loss is a mean over the tokens of all of them.
            (summed * (self.world.size / total)).backward()
        return summed.detach().double() / total

    def _counted(self, passes: list[Batch]) -> Tensor | int:
        """Targets that count in this step over all processes."""
        if not self.data.predictable:
            return self.sequences * self.data.seq_len
        counted = torch.tensor(float(sum(batch.counted for batch in passes)), device=self.world.device)
        return self.world.sum(counted).clamp(min=1)

    def _after_step(self) -> None:
        training = self.config.training
        self._settle()
        due = {
            name: every and self.step % every == 0 and self.step < self.max_steps
            for name, every in (("evaluate", training.eval_every), ("save", training.checkpoint_every))
        }
        if due["evaluate"] or (due["save"] and training.keep_best):
            self._settle(all_of_them=True)
            self._evaluate()
        if due["save"]:
            self._settle(all_of_them=True)
            self._save()
        if any(due.values()):
            self.telemetry.restart_clock()
        self._breathe()

    def _settle(self, *, all_of_them: bool = False) -> None:
        """Take in the numbers of finished steps, and log those that are due."""
        for step in self.readings.receive(all_of_them=all_of_them):
            self.telemetry.add(step)
            if step.step % self.config.training.log_every == 0 or step.step == self.max_steps:
                self._log(
                    "train",
                    step.step,
                    loss=step.loss,
                    grad_norm=step.grad_norm,
                    lr=step.lr,
                    smooth_loss=self.telemetry.smooth_loss,
                    vram_mb=peak_memory_mb(self.world.device),
                    **self.telemetry.speed(),
                )
        self.progress.update(self.step, self._numbers())

    def _numbers(self) -> dict[str, Any]:
        return {
            "smooth_loss": self.telemetry.smooth_loss,
            "val_loss": self.last.loss if self.last else None,
            "tokens_per_sec": self.telemetry.speed()["tokens_per_sec"],
        }

    def _log(self, split: str, step: int, **values: Any) -> None:
        totals = {
            "tokens": step * self.telemetry.tokens_per_step,
            "flops": step * self.telemetry.flops_per_step,
        }
        if self.world.leads:
            self.folder.append_metrics([{"step": step, "split": split} | values | totals])
            for tracker in self.trackers:
                numbers = {f"{split}/{k}": v for k, v in values.items() if v is not None}
                tracker.log(step, numbers)

    def _evaluate(self) -> None:
        """Validation loss, the same task at other lengths, and whatever is measured beside."""
        if self._evaluated_at == self.step:
            return
        self._evaluated_at = self.step
        self.last = self.evaluation("val")
        self._log("val", self.step, vram_mb=peak_memory_mb(self.world.device), **self.last.row())
        if self.step == self.max_steps:
            for length in self.config.data.eval_seq_lens:
                longer = self.evaluation("val", seq_len=length)
                self._log(f"val@{length}", self.step, **longer.row())
        for measure in self.on_evaluation:
            measure(self.step)
        reset_peak_memory(self.world.device)
        self.progress.update(self.step, self._numbers())
        self._breathe()

    def evaluation(self, split: str, *, seq_len: int | None = None) -> Evaluation:
        """Exact loss over `data.eval_fraction` of a split, at the training length or another."""
        data = self.data if seq_len is None else self.data.at_length(seq_len)
        size = max(1, self.config.data.batch_size * self.data.seq_len // data.seq_len)
        known = data.bytes_per_token
        return evaluate(
            self.plain if seq_len else self.compiled,
            eval_batches(
                data,
                split,
                size,
                fraction=self.config.data.eval_fraction,
                rank=self.world.rank,
                world_size=self.world.size,
            ),
            self.world,
            self.autocast,
            bytes_per_token=known[split] if known else None,
        )

    def _save(self) -> None:
        loss = self.last.loss if self.last and self._evaluated_at == self.step else math.inf
        better = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        if self.world.leads:
            saved = checkpoint.Checkpoint(
                {name: parameter.detach() for name, parameter in self.model.named_parameters()},
                checkpoint.optimizer_tensors(self.model, self.optimizer),
                {
                    "step": self.step,
                    "best_loss": self.best_loss,
                    "telemetry": self.telemetry.state(),
                },
            )
            path = checkpoint.save(self.folder.checkpoints, saved)
            if better and self.config.training.keep_best:
                checkpoint.mark_best(self.folder.checkpoints, path, loss)
            checkpoint.prune(self.folder.checkpoints, self.config.training.keep_checkpoints)
        self.world.wait()

    def _breathe(self) -> None:
        now = time.monotonic()
        if self.world.leads and now - self._heartbeat > HEARTBEAT_S:
            self._heartbeat = now
            self.folder.write_status(
                "running", step=self.step, max_steps=self.max_steps, **self.telemetry.speed()
            )

    def _divergence(self) -> str:
        count = self.telemetry.nonfinite_in_a_row
        return (
            f"{count} steps in a row had a non-finite loss or gradient, the last at step {self.step}; "
            "lower training.lr, or find the module with training.debug_steps"
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of a step a function of (seed, step, rank): a resume restores no state."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))
