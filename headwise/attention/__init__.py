"""Kinds of attention, exchangeable by name. A new kind adds its file and one line here."""

from headwise.attention import flash, flex, mha
from headwise.attention.base import KINDS, Attention, AttentionShape, Carry, attention_kind, register
from headwise.attention.config import AttentionConfig
from headwise.attention.selective import layer as selective

__all__ = [
    "KINDS", "Attention", "AttentionConfig", "AttentionShape", "Carry", "attention_kind",
    "flash", "flex", "mha", "register", "selective",
]  # fmt: skip
