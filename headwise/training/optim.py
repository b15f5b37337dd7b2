"""AdamW as language models use it: decay on matrices only, fused where the device has it."""

from __future__ import annotations

import torch
from torch import nn

from headwise.training.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with two groups: matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def step_if_finite(optimizer: torch.optim.AdamW, finite: torch.Tensor) -> None:
    """Take one step, or none where `finite` (a bool tensor on the device) is False.

    The fused kernel reads the flag on the device, the way torch's own GradScaler hands it over, so
    that nothing waits for the host.
    """
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
