"""Whether adding a head leaves a model's function as it was: what is said before anything is computed."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from headwise.attention.selective.config import SelectiveConfig
from headwise.functional.selective import mask_of_head
from headwise.model.config import ModelConfig
from headwise.model.surgery import Operation

FREE = ("n_heads", "n_kv_heads", "head_dim", "max_seq_len", "dropout", "init_std", "attention")
"""Keys of `model` that change no function of given weights, or that surgery itself sets."""

FREE_SWITCHES = (
    "combination_init", "combination_lr", "latent_init", "accumulate", "memory_penalty", "enabled",
)  # fmt: skip
"""Switches of selective attention that change how it learns, or only its rounding."""


class Preserved(NamedTuple):
    """Whether the function is preserved to rounding, and why (not)."""

    holds: bool
    why: str


def preserved(operation: Operation) -> Preserved:
    """Whether the model computes after the operation what it did before."""
    before, after = operation.before, operation.after
    changed = _differing(before, after, FREE)
    if changed:
        return Preserved(False, f"{' and '.join(f'model.{key}' for key in changed)} changed too")
    if operation.init not in ("zero", "o_zero", "ko_zero"):
        return Preserved(False, "the new head adds its output to the residual stream")
    if not _selects(before) and not _selects(after):
        return Preserved(True, "the new head's output is 0")
    if not _selects(after):
        return Preserved(False, "the masks of the selective model are gone")
    return _into_selective(operation) if not _selects(before) else _among_selective(operation)


def learns(operation: Operation) -> bool:
    """Whether any gradient can reach the new head."""
    return operation.init != "zero" or operation.shares_keys


def _into_selective(operation: Operation) -> Preserved:
    switches = operation.after.attention.selective
    head_zero = switches.source == "head_zero" or (
        switches.source == "linear_combo" and switches.combination_init != "normal"
    )
    if not head_zero:
        return Preserved(False, f"source {switches.source} begins with weights of its own, which mask keys")
    if operation.place == "end":
        return Preserved(False, "head 0, whose logits select, is one that was trained for something else")
    if not _logits_are_zero(operation):
        return Preserved(
            False, "the new head's logits select, and they are not 0: it masks keys for all heads"
        )
    return Preserved(True, "the new head's output is 0, and its logits are 0, so that it masks nothing")


def _among_selective(operation: Operation) -> Preserved:
    before, after = operation.before.attention.selective, operation.after.attention.selective
    changed = _differing(before, after, FREE_SWITCHES)
    if changed:
        return Preserved(False, f"switches of selective attention changed too: {', '.join(changed)}")
    start = operation.place == "start"
    if start and after.source == "head_zero":
        return Preserved(False, "the new head takes the place of head 0, and the trained mask is lost")
    if start and after.protection.kind == "head_two":
        return Preserved(False, "the second head, whose logits protect, is another one now")
    if after.source == "latent" and (after.mask_layernorm or after.residual_logits):
        return Preserved(False, "the new head's mask enters those of the others")
    if after.source != "latent" and _masks_move(operation):
        return Preserved(False, f"heads share {after.n_masks} masks, and some get another one now")
    if not _logits_are_zero(operation) and _enters_combination(after, operation.index):
        return Preserved(False, "the new head's logits enter the learned combination")
    return Preserved(True, "the new head's output is 0, and the masks of the others stay")


def _selects(config: ModelConfig) -> bool:
    return config.attention.kind == "selective" and config.attention.selective.enabled


def _logits_are_zero(operation: Operation) -> bool:
    return operation.init in ("zero", "ko_zero", "k_zero")


def _masks_move(operation: Operation) -> bool:
    masks = operation.after.attention.selective.n_masks
    if masks == 1:
        return False
    was = list(mask_of_head(operation.before.n_heads, masks))
    now = list(mask_of_head(operation.after.n_heads, masks))
    now.pop(operation.index)
    return was != now


def _enters_combination(switches: SelectiveConfig, index: int) -> bool:
    """Whether the new head's column of a learned combination starts at anything but 0."""
    if switches.source == "linear_combo" and (switches.combination_init == "normal" or index == 0):
        return True
    kind = switches.protection.kind
    return kind == "linear_combo" or (kind == "linear_combo_head_two" and index == 1)


def _differing(before: Any, after: Any, free: tuple[str, ...]) -> list[str]:
    """Fields of two dataclasses that differ, but for `free`; d_ff counts as the width it makes."""
    names = [field.name for field in dataclasses.fields(before) if field.name not in free]
    return [name for name in names if _value(before, name) != _value(after, name)]


def _value(config: Any, name: str) -> Any:
    return config.width_of_mlp() if name == "d_ff" else getattr(config, name)
