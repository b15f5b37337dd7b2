"""At every evaluation, the log says how far the running sums of selective attention are off float64."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.attention.selective.sums import sum_errors
from headwise.model.decoder import Decoder
from headwise.runs.folder import RunFolder


class SumRecorder:
    """Writes a line for every selecting layer to log.txt each time it is called.

    Args:
        tokens: `(B, T)` int64, of which the first sequence is measured.
        autocast: of training, so that selection queries and keys are what they are there.
    """

    def __init__(self, model: Decoder, tokens: Tensor, autocast: torch.autocast, folder: RunFolder) -> None:
        self.model, self.tokens, self.autocast, self.folder = model, tokens[:1], autocast, folder

    def __call__(self, step: int) -> None:
        """Measure and log."""
        training = self.model.training
        self.model.eval()
        with self.autocast:
            errors = sum_errors(self.model, self.tokens)
        self.model.train(training)
        for error in errors:
            self.folder.say(f"step {step}, {error}")
        if not errors and step == 0:
            self.folder.say("measure.sums: no layer selects, so there are no running sums")
