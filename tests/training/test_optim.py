"""AdamW: decay on matrices alone, and a step that is not finite never happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headwise.config.training import TrainingConfig
from headwise.training.optim import make_optimizer, step_if_finite


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3, bias=False))


def test_matrices_decay_norms_and_biases_do_not() -> None:
    net = model()
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = make_optimizer(net, TrainingConfig(weight_decay=0.3)).param_groups
    decays = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {
        "0.weight": 0.3, "1.weight": 0.3, "3.weight": 0.3, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(first: bool) -> None:
    """Neither weights nor moments nor the count of steps, be it the first step or a later one."""
    net, plain = model(), model()
    optimizer, reference = (make_optimizer(m, TrainingConfig(lr=0.1)) for m in (net, plain))

    def backward(m: nn.Module, scale: float) -> None:
        (m(torch.arange(5)).square().sum() * scale).backward()

    steps = [float("nan"), 1.0, 2.0] if first else [1.0, float("inf"), float("nan"), 2.0]
    for scale in steps:
        backward(net, scale)
        finite = torch.tensor(scale == scale and abs(scale) < float("inf"))
        step_if_finite(optimizer, finite)
        assert all(p.grad is None for p in net.parameters())
    for scale in (1.0, 2.0):
        backward(plain, scale)
        reference.step()
        reference.zero_grad()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for slot, value in reference.state[theirs].items():
            assert torch.equal(optimizer.state[ours][slot], value), slot
