"""At the last evaluation, the loss without each head on the fixed validation batch."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.data.base import IGNORE
from headwise.model.decoder import Decoder
from headwise.runs.folder import RunFolder
from headwise.watch.hooks import attention_layers
from headwise.watch.removal import leave_one_out


class ImportanceRecorder:
    """Measures the importance of every head once: the loss without the head minus the loss with all heads.

    Args:
        inputs, targets: `(B, T)` int64, the batch that fills the head table.
        last_step: the step whose evaluation is the last one.
        leads: whether this process measures; the others do nothing.

    Attributes:
        found: `loss` with all heads and `delta_loss` per layer and head, in nats per token; None before
            it is measured and where a loss is not finite.
        measured: whether it was measured.
        seconds: time spent measuring.
    """

    def __init__(
        self,
        model: Decoder,
        inputs: Tensor,
        targets: Tensor,
        last_step: int,
        folder: RunFolder,
        *,
        leads: bool,
    ) -> None:
        self.model, self.inputs, self.targets = model, inputs, targets
        self.last_step, self.folder, self.leads = last_step, folder, leads
        self.found: dict[str, Any] | None = None
        self.measured = False
        self.seconds = 0.0

    def __call__(self, step: int) -> None:
        """Measure if `step` is the last."""
        if step == self.last_step:
            self.measure()

    @torch.no_grad()
    def measure(self) -> None:
        """Measure now, in eval mode and without autocast, as the head table is."""
        self.measured = True
        if not self.leads:
            return
        began = time.perf_counter()
        training = self.model.training
        self.model.eval()
        layers = attention_layers(self.model, self.model.hidden, self.inputs)
        loss, rises = leave_one_out(layers, self._loss)
        self.model.train(training)
        self.seconds += time.perf_counter() - began
        if math.isfinite(loss) and all(math.isfinite(rise) for layer in rises for rise in layer):
            self.found = {"loss": loss, "delta_loss": rises, "tokens": self._counted()}
        else:
            self.folder.say("measure.importance: a loss is not finite, so no importance is recorded")

    def _loss(self) -> float:
        """Mean cross entropy over the targets that count, summed in float64."""
        total = 0.0
        for row, targets in zip(self.inputs.split(1), self.targets.split(1), strict=True):
            logits = self.model(row)[0].float()
            losses = F.cross_entropy(logits, targets[0], ignore_index=IGNORE, reduction="none")
            total += losses.double().sum().item()
        return total / max(1, self._counted())

    def _counted(self) -> int:
        return int((self.targets != IGNORE).sum())
