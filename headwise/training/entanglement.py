"""During training, the entanglement entropy of every head on the same windows, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwise.config.run import Config
from headwise.errors import HeadwiseError
from headwise.measures import table as head_table
from headwise.model.decoder import Decoder
from headwise.runs.folder import RunFolder
from headwise.watch.windows import draw_windows, measure_windows


class EntanglementRecorder:
    """Fills `entanglement/` of a run folder at every `measure.entanglement.every`-th evaluation.

    Args:
        tokens: `(B, T)` int64, the batch that fills the head table; windows are drawn from it.
        last_step: the step whose evaluation is the last one, which is always measured.
        trained_s: seconds of training so far.

    Attributes:
        evaluations: measured so far, in this process.
        seconds: time spent measuring, in this process.
    """

    def __init__(
        self,
        config: Config,
        model: Decoder,
        tokens: Tensor,
        last_step: int,
        folder: RunFolder,
        trained_s: Callable[[], float],
    ) -> None:
        self.options, self.eval_every = config.measure.entanglement, config.training.eval_every
        self.model, self.last_step, self.folder, self.trained_s = model, last_step, folder, trained_s
        self.windows = draw_windows(tokens, self.options.window, self.options.n_windows, config.seed)
        self.evaluations, self.seconds, self._began = 0, 0.0, trained_s()
        self._said = False

    def __call__(self, step: int) -> None:
        """Measure, where it is the turn of this evaluation."""
        number = step // self.eval_every if self.eval_every else 0
        if step != self.last_step and number % self.options.every:
            return
        began = time.perf_counter()
        training = self.model.training
        self.model.eval()
        self._measure(step)
        self.model.train(training)
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def _measure(self, step: int) -> None:
        try:
            found, reasons = measure_windows(
                self.model, self.model.hidden, self.windows, n_regions=self.options.n_regions
            )
        except HeadwiseError as error:
            self._say_once(f"measure.entanglement: {error}")
            return
        if reasons:
            layer, why = next(iter(reasons.items()))
            self._say_once(f"measure.entanglement: layer {layer} is not measured: {why}")
        columns: dict[str, Any] = {**found, "run": str(self.folder.path), "step": step}
        head_table.write_part(self.folder.entanglement, f"step_{step:08d}", columns)
        self.evaluations += 1

    def cost(self) -> dict[str, Any]:
        """What was measured, how often, and what share of the time of training that took."""
        trained = self.trained_s() - self._began
        options = self.options
        return {
            "window": options.window, "n_windows": options.n_windows, "n_regions": options.n_regions,
            "every": options.every, "evaluations": self.evaluations, "seconds": self.seconds,
            "share": self.seconds / trained if trained > 0 else None,
        }  # fmt: skip

    def line(self) -> str:
        """The interval and the cost, for the log."""
        cost = self.cost()
        each = self.seconds / max(1, self.evaluations)
        share = "" if cost["share"] is None else f", {cost['share']:.1%} of the time of training"
        return (
            f"measure.entanglement: {self.evaluations} measurements, one at 1 in {self.options.every} "
            f"evaluations, of {self.options.n_windows} windows of {self.options.window} tokens; "
            f"{each:.3f} s each{share}"
        )

    def _say_once(self, line: str) -> None:
        if not self._said:
            self._said = True
            self.folder.say(line)
