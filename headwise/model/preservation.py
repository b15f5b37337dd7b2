"""Whether adding a head leaves a model's function as it was, told before anything is computed."""

from __future__ import annotations

import dataclasses
from typing import Any

from headwise.attention import NewHead, Preserved, attention_kind
from headwise.attention.modifiers import MODIFIERS
from headwise.model.config import ModelConfig
from headwise.model.surgery import Operation

FREE = ("n_heads", "n_kv_heads", "head_dim", "max_seq_len", "dropout", "init_std", "attention")
"""Keys of `model` that change no function of given weights, or that surgery itself sets."""


def preserved(operation: Operation) -> Preserved:
    """Whether the model computes after the operation what it did before."""
    changed = _differing(operation.before, operation.after)
    if changed:
        return Preserved(False, f"{' and '.join(f'model.{key}' for key in changed)} changed too")
    head = NewHead(
        operation.index,
        operation.before.n_heads,
        zero_output=operation.init in ("zero", "o_zero", "ko_zero"),
        zero_logits=operation.init in ("zero", "ko_zero", "k_zero"),
    )
    if not head.zero_output:
        return Preserved(False, "the new head adds its output to the residual stream")
    before, after = operation.before.attention, operation.after.attention
    differing = [name for name in MODIFIERS if getattr(before, name) != getattr(after, name)]
    if differing:
        keys = " and ".join(f"model.attention.{name}" for name in differing)
        return Preserved(False, f"{keys} changed too")
    was, becomes = attention_kind(before.kind), attention_kind(after.kind)
    if was.computes(before.options()) != becomes.computes(after.options()):
        return Preserved(False, f"kind {after.kind} computes another function than kind {before.kind}")
    if not becomes.heads_interact(after.options()):
        if was.heads_interact(before.options()):
            return Preserved(False, f"the masks of the {before.kind} model are gone")
        return Preserved(True, "the new head's output is 0")
    if not was.heads_interact(before.options()):
        return becomes.preserves(head, None, after.options())
    if was is not becomes:
        return Preserved(False, f"heads act on one another, and otherwise under {after.kind}")
    return becomes.preserves(head, before.options(), after.options())


def learns(operation: Operation) -> bool:
    """Whether any gradient can reach the new head."""
    return operation.init != "zero" or operation.shares_keys


def _differing(before: ModelConfig, after: ModelConfig) -> list[str]:
    """Keys of two models that differ, but for `FREE`; d_ff counts as the width it makes."""
    names = [field.name for field in dataclasses.fields(before) if field.name not in FREE]
    return [name for name in names if _value(before, name) != _value(after, name)]


def _value(config: Any, name: str) -> Any:
    return config.width_of_mlp() if name == "d_ff" else getattr(config, name)
