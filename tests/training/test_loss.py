"""The loss counts what counts, and its evaluation is a mean over tokens, however they are batched."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor, nn

from headwise.data.base import IGNORE, Batch
from headwise.training.distributed import World
from headwise.training.loss import Evaluation, TokenLoss, evaluate

ALONE = World(0, 1, torch.device("cpu"))


class Tiny(nn.Sequential):
    """A model without attention, called as a decoder is."""

    def forward(self, tokens: Tensor, carry: object = None) -> Tensor:
        return super().forward(tokens)


def batches() -> tuple[nn.Module, list[Batch]]:
    """Batches of unequal size with unequal numbers of targets, and a model with dropout."""
    torch.manual_seed(0)
    model = Tiny(nn.Embedding(7, 16), nn.Dropout(0.5), nn.Linear(16, 7))
    made = []
    for size, share in ((3, 0.9), (1, 0.2), (2, 0.5)):
        inputs, targets = torch.randint(7, (2, size, 5))
        made.append(Batch(inputs, targets.where(torch.rand(size, 5) < share, torch.tensor(IGNORE))))
    return model, made


def test_evaluation_is_the_mean_over_all_targets_that_count() -> None:
    model, made = batches()
    loss = TokenLoss(model)
    found = evaluate(loss, made, ALONE, contextlib.nullcontext(), bytes_per_token=2.0)
    assert loss.training  # as it was before

    model.eval()
    log_p = torch.cat([model(b.inputs).double().log_softmax(-1).flatten(0, 1) for b in made])
    targets = torch.cat([b.targets.flatten() for b in made])
    kept = targets != IGNORE
    direct = -log_p[kept, targets[kept]]
    assert found.tokens == int(kept.sum()) == sum(b.counted for b in made)
    assert found.loss == pytest.approx(direct.mean().item(), rel=1e-6)
    assert found.accuracy == (log_p.argmax(-1) == targets)[kept].double().mean().item()
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 2)


def test_nothing_to_evaluate_is_no_number() -> None:
    model, _ = batches()
    found = evaluate(TokenLoss(model), [], ALONE, contextlib.nullcontext())
    assert math.isnan(found.loss)
    assert found.tokens == 0
    assert found.bits_per_byte is None


def test_perplexity_of_a_hopeless_model_does_not_overflow() -> None:
    assert Evaluation(1e4, 0.0, 1).perplexity == math.inf
