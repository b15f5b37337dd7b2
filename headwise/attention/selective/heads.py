"""A head added to selective attention: where it lies in the learned combinations, and what it changes."""

from __future__ import annotations

import dataclasses

from headwise.attention.base import NewHead, Preserved
from headwise.attention.selective.config import SelectiveConfig
from headwise.functional.sharing import mask_of_head

FREE_SWITCHES = (
    "combination_init", "combination_lr", "latent_init", "accumulate", "memory_penalty", "enabled",
)  # fmt: skip
"""Switches that change how selection learns, or only its rounding."""


def head_ranges(leaf: str, index: int, config: SelectiveConfig) -> dict[int, list[tuple[int, int]]]:
    """Where a head lies in a parameter of selection; see `Attention.head_ranges`."""
    head = [(index, index + 1)]
    latent = config.source == "latent"
    if leaf == "combination":
        return {0: head} if latent else {1: head}
    if leaf == "protection_combination":
        return {1: head}
    if leaf == "combination_bias" and latent:
        return {0: head}
    if leaf == "residual" and latent:
        return {0: head, 1: head}
    return {}


def preserves(head: NewHead, before: SelectiveConfig | None, after: SelectiveConfig) -> Preserved:
    """Whether a head whose output is 0 leaves the masks of the others as they were."""
    return _into(head, after) if before is None else _among(head, before, after)


def _into(head: NewHead, after: SelectiveConfig) -> Preserved:
    head_zero = after.source == "head_zero" or (
        after.source == "linear_combo" and after.combination_init != "normal"
    )
    if not head_zero:
        return Preserved(False, f"source {after.source} begins with weights of its own, which mask keys")
    if head.index:
        return Preserved(False, "head 0, whose logits select, is one that was trained for something else")
    if not head.zero_logits:
        return Preserved(
            False, "the new head's logits select, and they are not 0: it masks keys for all heads"
        )
    return Preserved(True, "the new head's output is 0, and its logits are 0, so that it masks nothing")


def _among(head: NewHead, before: SelectiveConfig, after: SelectiveConfig) -> Preserved:
    names = [field.name for field in dataclasses.fields(before) if field.name not in FREE_SWITCHES]
    changed = [name for name in names if getattr(before, name) != getattr(after, name)]
    if changed:
        return Preserved(False, f"switches of selective attention changed too: {', '.join(changed)}")
    start = head.index == 0
    if start and after.source == "head_zero":
        return Preserved(False, "the new head takes the place of head 0, and the trained mask is lost")
    if start and after.protection.kind == "head_two":
        return Preserved(False, "the second head, whose logits protect, is another one now")
    if after.source == "latent" and (after.mask_layernorm or after.residual_logits):
        return Preserved(False, "the new head's mask enters those of the others")
    if after.source != "latent" and _masks_move(head, after.n_masks):
        return Preserved(False, f"heads share {after.n_masks} masks, and some get another one now")
    if not head.zero_logits and _enters_combination(after, head.index):
        return Preserved(False, "the new head's logits enter the learned combination")
    return Preserved(True, "the new head's output is 0, and the masks of the others stay")


def _masks_move(head: NewHead, masks: int) -> bool:
    if masks == 1:
        return False
    was = list(mask_of_head(head.n_heads, masks))
    now = list(mask_of_head(head.n_heads + 1, masks))
    now.pop(head.index)
    return was != now


def _enters_combination(switches: SelectiveConfig, index: int) -> bool:
    """Whether the new head's column of a learned combination starts at anything but 0."""
    if switches.source == "linear_combo" and (switches.combination_init == "normal" or index == 0):
        return True
    kind = switches.protection.kind
    return kind == "linear_combo" or (kind == "linear_combo_head_two" and index == 1)
