"""The training loop. It composes parts that know nothing of each other: data, loss, optimizer, schedule,
telemetry, checkpoints. What is measured beside the loss comes in as functions called at each evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise import reading
from headwise.config.run import Config
from headwise.data.base import Batch, Data
from headwise.data.loader import eval_batches, train_loader
from headwise.errors import HeadwiseError
from headwise.model.count import training_flops_per_token
from headwise.model.decoder import Decoder
from headwise.runs import checkpoint
from headwise.runs.folder import RunFolder
from headwise.runs.schemas import TrainingState
from headwise.training.debug import NonFiniteOutput, checked_outputs
from headwise.training.distributed import World
from headwise.training.feed import Feed
from headwise.training.heartbeat import beating
from headwise.training.loss import Evaluation, TokenLoss, evaluate
from headwise.training.optim import make_optimizer, set_learning_rate, step_if_finite
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
        if data.batch_size % self.world.size:
            raise HeadwiseError(
                f"data.batch_size {data.batch_size} cannot be shared equally by {self.world.size} processes; "
                f"make it a multiple of {self.world.size}"
            )
        for length in data.eval_seq_lens:
            self.data.at_length(length)  # refuses what is too long now, rather than after training
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
        self.best: str | None = None
        self.last: Evaluation | None = None
        self._evaluated_at = self._saved_at = -1
        self._speed = self.telemetry.speed()
        self._ends_at = math.inf

    @property
    def autocast(self) -> torch.autocast:
        """bf16 where the configuration or the device says so."""
        return self.world.autocast(self.config.training.precision)

    @property
    def evaluated_at(self) -> int | None:
        """The step that `last` belongs to."""
        return self._evaluated_at if self.last else None

    def resume(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            HeadwiseError: it is of another model, or lacks what a run goes on with.
        """
        try:
            reading.check(saved.state, TrainingState)
        except reading.Unreadable as error:
            raise HeadwiseError(
                f"the last checkpoint of {self.folder.path} is damaged (state.json: {error.reason}); "
                "delete it to resume from the one before"
            ) from error
        checkpoint.load_weights(self.model, saved.model, f"checkpoint of {self.folder.path}")
        checkpoint.restore_optimizer(self.model, self.optimizer, saved.optimizer)
        self.step = self._saved_at = saved.state["step"]
        self.best_loss, self.best = saved.state["best_loss"], saved.state["best"]
        if self.best and self.world.leads:  # a run killed between saving and marking has not marked it
            checkpoint.mark_best(self.folder.checkpoints, self.best, self.best_loss)
        if self.world.leads:  # nor one killed then has deleted older ones
            checkpoint.prune(self.folder.checkpoints, self.config.training.keep_checkpoints)
        if saved.state["evaluation"]:
            self.last = Evaluation(**saved.state["evaluation"])
            self._evaluated_at = saved.state["evaluated_at"]
        self.telemetry.restore(saved.state["telemetry"])

    def run(self) -> tuple[str, str]:
        """Train to the end, or until something stops it.

        Returns:
            The state (finished, interrupted, timed_out, diverged) and the reason.
        """
        self.progress.start(self.step, self.max_steps)
        timeout = self.config.training.timeout_s or math.inf
        self._ends_at = time.monotonic() + timeout - self.telemetry.trained_s
        feed = Feed(self._batches(), self.sequences // self.config.data.batch_size, self.world.device)
        try:
            with beating(self.folder, self._about) if self.world.leads else contextlib.nullcontext():
                return self._run(feed)
        except NonFiniteOutput as error:
            return "diverged", str(error)
        finally:
            self.progress.stop()
            feed.close()

    def _run(self, feed: Feed) -> tuple[str, str]:
        if self.step == 0:
            self._evaluate()
        self.telemetry.restart_clock()
        state, reason = "finished", f"{self.max_steps} step{'s' * (self.max_steps != 1)}"
        with StepProfiler(self.config.training.profile_steps, self.folder.path, self.world) as profiler:
            while self.step < self.max_steps:
                self._train_step(feed)
                profiler.step()
                self._after_step()
                if stopped := self._stopped():
                    state, reason = stopped
                    break
        self._settle(all_of_them=True)
        if state in ("finished", "timed_out"):
            self._evaluate()
        if state != "diverged":
            self._save()
        return state, reason

    def _stopped(self) -> tuple[str, str] | None:
        """The state and the reason of a run that ends before its last step."""
        if self.telemetry.nonfinite_in_a_row >= self.config.training.max_nonfinite:
            return "diverged", self._divergence()
        if self.world.any(self.should_stop()):
            return "interrupted", f"stopped at step {self.step}"
        timeout = self.config.training.timeout_s
        if timeout and self.world.any(time.monotonic() > self._ends_at):
            return "timed_out", f"{timeout:g} s passed at step {self.step}"
        return None

    def _about(self) -> dict[str, Any]:
        """What status.json says of a run in progress."""
        return {"step": self.step, "max_steps": self.max_steps} | self._speed

    def _max_steps(self, tokens: int) -> int:
        training = self.config.training
        limits = []
        if training.max_steps is not None:
            limits.append(training.max_steps)
        if training.max_tokens is not None:
            limits.append(training.max_tokens // tokens)
        if training.max_flops is not None:
            limits.append(int(training.max_flops // (tokens * self.flops_per_token)))
        return max(1, min(limits))

    def _batches(self) -> Generator[Batch]:
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

    def _train_step(self, feed: Feed) -> None:
        """One optimizer step over `sequences` sequences of all processes."""
        training = self.config.training
        passes = feed.take()
        seed_step(self.config.seed, self.step, self.world.rank)
        lr = learning_rate(self.step, self.max_steps, training)
        set_learning_rate(self.optimizer, lr)
        total = self._counted(passes.counted)
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with self._checked():
            for index, batch in enumerate(passes.batches, 1):
                sums += self._backward(batch, total, len(passes.batches), last=index == len(passes.batches))
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if training.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, training.grad_clip, norm)
        loss, penalty = self.world.sum(sums)
        step_if_finite(self.optimizer, torch.isfinite(norm) & torch.isfinite(loss))
        self.step += 1
        self.readings.send(loss, norm, penalty, step=self.step, lr=lr, wait_s=passes.wait_s)
        if self.step < self.max_steps:
            feed.prefetch()

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """In the first `debug_steps` steps, stop at the first module whose output is not finite."""
        if self.step >= self.config.training.debug_steps:
            yield
            return
        with checked_outputs(self.model) as found:
            yield
        for rank, first in enumerate(self.world.gather(found[0] if found else None)):
            if first:
                where = f" in process {rank}" if self.world.size > 1 else ""
                raise NonFiniteOutput(f"step {self.step + 1}{where}: {first}")

    def _backward(self, batch: Batch, total: Tensor | int, passes: int, *, last: bool) -> Tensor:
        """Add one of `passes` to the gradient; returns its share of the step's mean loss and penalty."""
        device = self.world.device
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        debug = self.step < self.config.training.debug_steps
        model = self.plain if debug and self.world.size == 1 else self.loss
        together = isinstance(model, nn.parallel.DistributedDataParallel)
        with model.no_sync() if together and not last else contextlib.nullcontext():  # type: ignore[operator]
            with self.autocast:
                summed, _, penalty = model(inputs, targets)
            # DDP averages gradients over processes; the loss is a mean over the tokens of all of them.
            (summed * (self.world.size / total) + penalty / passes).backward()
        shares = (summed.detach().double() / total, penalty.detach().double() / (passes * self.world.size))
        return torch.stack(shares)

    def _counted(self, counted: int) -> Tensor | int:
        """Targets that count in this step over all processes, of which `counted` are here."""
        if self.world.size == 1:
            return max(1, counted)
        return self.world.sum(torch.tensor(float(counted), device=self.world.device)).clamp(min=1)

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

    def _settle(self, *, all_of_them: bool = False) -> None:
        """Take in the numbers of finished steps, and log those that are due."""
        for step in self.readings.receive(all_of_them=all_of_them):
            self.telemetry.add(step)
            self._speed = self.telemetry.speed()
            if step.step % self.config.training.log_every == 0 or step.step == self.max_steps:
                self._log(
                    "train",
                    step.step,
                    loss=step.loss,
                    grad_norm=step.grad_norm,
                    lr=step.lr,
                    smooth_loss=self.telemetry.smooth_loss,
                    penalty=step.penalty or None,
                    vram_mb=peak_memory_mb(self.world.device),
                    **self._speed,
                )
        self.progress.update(self.step, self._numbers())

    def _numbers(self) -> dict[str, Any]:
        return {
            "smooth_loss": self.telemetry.smooth_loss,
            "val_loss": self.last.loss if self.last else None,
            "tokens_per_sec": self._speed["tokens_per_sec"],
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

    def evaluation(self, split: str, *, seq_len: int | None = None) -> Evaluation:
        """Exact loss over `data.eval_fraction` of a split, at the training length or another."""
        data = self.data if seq_len is None else self.data.at_length(seq_len)
        known = data.bytes_per_token
        return evaluate(
            self.plain if seq_len else self.compiled,
            eval_batches(
                data,
                split,
                self.config.data.batch_size_at(data.seq_len),
                fraction=self.config.data.eval_fraction,
                rank=self.world.rank,
                world_size=self.world.size,
            ),
            self.world,
            self.autocast,
            bytes_per_token=known[split] if known else None,
        )

    def _save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self._saved_at == self.step:
            return
        self._saved_at = self.step
        loss = self.last.loss if self.last and self._evaluated_at == self.step else math.inf
        better = loss < self.best_loss
        if better:
            self.best_loss = loss
            self.best = checkpoint.folder_name(self.step) if self.config.training.keep_best else None
        if self.world.leads:
            saved = checkpoint.Checkpoint(
                {name: parameter.detach() for name, parameter in self.model.named_parameters()},
                checkpoint.optimizer_tensors(self.model, self.optimizer),
                self._state(),
            )
            self.folder.refuse_outdated()
            checkpoint.save(self.folder.checkpoints, saved)
            if better and self.best:
                checkpoint.mark_best(self.folder.checkpoints, self.best, loss)
            checkpoint.prune(self.folder.checkpoints, self.config.training.keep_checkpoints)
        self.world.wait()

    def _state(self) -> dict[str, Any]:
        """The plain values of a checkpoint."""
        return {
            "step": self.step,
            "best": self.best,
            "best_loss": self.best_loss,
            "evaluation": dataclasses.asdict(self.last) if self.last else None,
            "evaluated_at": self._evaluated_at,
            "telemetry": self.telemetry.state(),
        }

    def _divergence(self) -> str:
        count = self.telemetry.nonfinite_in_a_row
        return (
            f"{count} steps in a row had a non-finite loss or gradient, the last at step {self.step}; "
            "lower training.lr, or find the module with training.debug_steps"
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of a step a function of (seed, step, rank): a resume restores no state."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)
