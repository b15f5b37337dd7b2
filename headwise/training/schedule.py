"""Learning rate over training: warm-up, then cosine, stable with a late decay, or constant."""

from __future__ import annotations

import math

from headwise.config.training import TrainingConfig


def learning_rate(step: int, max_steps: int, config: TrainingConfig) -> float:
    """The learning rate of step `step` (from 0) of `max_steps`: a pure function, a resume needs no state.

    Warm-up rises linearly and reaches `config.lr` at step `warmup_steps`; what follows ends at
    `min_lr_share · lr` on the last step.
    """
    warmup = min(config.warmup_steps, max_steps - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    floor = config.min_lr_share
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, max_steps - 1 - warmup)
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    decay_steps = max(1, round(config.decay_share * max_steps))
    left = (max_steps - 1 - step) / decay_steps
    return config.lr * (floor + (1 - floor) * min(1.0, max(0.0, left)))
