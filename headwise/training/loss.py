"""The loss of a language model, and its exact evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.attention import Carry
from headwise.data.base import IGNORE, Batch
from headwise.training.distributed import World


class TokenLoss(nn.Module):
    """A model together with its loss: what is compiled, and what several processes wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Summed cross entropy in nats, how many targets were the likeliest token, and penalties.

        Args:
            inputs, targets: `(B, T)` int64; a target of -100 does not count.

        Returns:
            Three scalars. The second is 0 in training mode, where nobody asks; the third is what the
            layers add to the mean loss (a penalty on the context that is kept).
        """
        carry = Carry()
        logits = self.model(inputs, carry=carry).flatten(0, 1).float()
        targets = targets.flatten()
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        penalty = loss.new_zeros(()) + carry.penalty
        if self.training:
            return loss, loss.new_zeros(()), penalty
        return loss, (logits.argmax(-1) == targets).sum(), penalty


@dataclass(frozen=True)
class Evaluation:
    """Token-weighted results over a split or a stated part of it.

    Attributes:
        loss: mean cross entropy, nats per token.
        accuracy: share of targets that were the likeliest token.
        tokens: number of targets.
        bytes_per_token: for bits per byte; None where not known.
    """

    loss: float
    accuracy: float
    tokens: int
    bytes_per_token: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """loss in bits, per byte of the text; None where the bytes are not known."""
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    def row(self) -> dict[str, Any]:
        """As columns of metrics.csv."""
        return {
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    autocast: AbstractContextManager[Any],
    *,
    bytes_per_token: float | None = None,
) -> Evaluation:
    """Mean loss over every target that the processes have in their `batches`.

    Args:
        model: a `TokenLoss`, compiled or not.
        batches: this process's share, possibly none.
    """
    training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in batches:
        inputs, targets = batch.inputs.to(world.device), batch.targets.to(world.device)
        with autocast:
            loss, correct, _ = model(inputs, targets)
        total += torch.stack((loss.double(), correct.double(), (targets != IGNORE).sum().double()))
    model.train(training)
    loss, correct, tokens = world.sum(total).tolist()
    if tokens == 0:
        return Evaluation(math.nan, math.nan, 0, bytes_per_token)
    return Evaluation(loss / tokens, correct / tokens, int(tokens), bytes_per_token)
