"""AdamW as language models use it: decay on matrices only, fused where the device has it."""

from __future__ import annotations

import torch
from torch import nn

from headwise.attention import Attention
from headwise.config.training import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW whose matrices decay; norms, biases and parameters with a rate of their own do not.

    A group's `lr_multiplier` is the factor on the scheduled rate (`set_learning_rate`).
    """
    own: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            multipliers = module.lr_multipliers()
            own |= {getattr(module, name): factor for name, factor in multipliers.items()}
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and parameter not in own
            group = (config.weight_decay if decays else 0.0, own.get(parameter, 1.0))
            members.setdefault(group, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_multiplier": factor}
            for (decay, factor), parameters in members.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Give each group `lr` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def step_if_finite(optimizer: torch.optim.AdamW, finite: torch.Tensor) -> None:
    """Take one step, or none where `finite` (a bool tensor on the device) is False.

    The fused kernel reads the flag on the device, the way torch's own GradScaler hands it over, so
    that nothing waits for the host.
    """
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
