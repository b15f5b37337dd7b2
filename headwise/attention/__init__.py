"""Kinds of attention, exchangeable by name: those of this package, and those that other packages add."""

from headwise.attention import (
    differential,
    fla,
    flash,
    flex,
    holo,
    linear,
    mha,
    performer,
    selective,
    tropical,
    tt,
)
from headwise.attention.base import (
    Attention,
    AttentionShape,
    Carry,
    NewHead,
    Preserved,
    SoftmaxAttention,
)
from headwise.attention.config import AttentionConfig
from headwise.attention.kinds import KINDS, attention_kind, load_installed, register

load_installed()

__all__ = [
    "KINDS", "Attention", "AttentionConfig", "AttentionShape", "Carry", "NewHead", "Preserved",
    "SoftmaxAttention", "attention_kind", "differential", "fla", "flash", "flex", "holo", "linear", "mha",
    "performer", "register", "selective", "tropical", "tt",
]  # fmt: skip
