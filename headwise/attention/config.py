"""`model.attention`: the kind, and one section of options for each kind that has any."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from headwise.attention.base import Attention
from headwise.attention.kinds import attention_kind, on_registration
from headwise.errors import HeadwiseError


@dataclass
class AttentionConfig:
    """Which attention, and how.

    Every kind with options has a section of its own here, a field with the kind's name that appears when the
    kind is registered.

    Attributes:
        kind: a registered kind: mha, flash, flex, selective, or one of another package.
        dropout: share of attention weights dropped in training.
    """

    kind: str = "flash"
    dropout: float = 0.0

    def options(self) -> Any:
        """The options of the chosen kind, or None where it has none."""
        return getattr(self, self.kind, None)

    def validate(self, *, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        """Refuse what the chosen kind cannot do.

        Raises:
            HeadwiseError: an unknown kind, a dropout outside [0, 1), or an unsupported combination.
        """
        supports = attention_kind(self.kind).supports
        if not 0 <= self.dropout < 1:
            raise HeadwiseError(f"model.attention.dropout is {self.dropout}; it is a share, 0 <= dropout < 1")
        if self.dropout and "dropout" not in supports:
            raise HeadwiseError(
                f"model.attention.dropout is {self.dropout}, but kind {self.kind!r} cannot drop weights; "
                "set it to 0 or choose mha or flash"
            )
        options = self.options()
        if hasattr(options, "validate"):
            options.validate(n_heads=n_heads, head_dim=head_dim)
        if n_kv_heads != n_heads and "gqa" not in supports:
            raise HeadwiseError(
                f"model.n_kv_heads is {n_kv_heads}, but kind {self.kind!r} needs as many key/value heads "
                f"as query heads ({n_heads})"
            )


@on_registration
def _add_section(kind: type[Attention]) -> None:
    """Make the options of a kind a field of `AttentionConfig`, as if it had been written there.

    The class is kept, since others hold it: its fields are declared again with the new one among them, and
    `dataclass` writes its methods anew.
    """
    if kind.options is None:
        return
    for known in dataclasses.fields(AttentionConfig):
        default = dataclasses.field(default=known.default, default_factory=known.default_factory)
        setattr(AttentionConfig, known.name, default)
    AttentionConfig.__annotations__[kind.kind] = kind.options
    setattr(AttentionConfig, kind.kind, dataclasses.field(default_factory=kind.options))
    for written in ("__init__", "__repr__", "__eq__", "__match_args__"):
        delattr(AttentionConfig, written)
    AttentionConfig.__doc__ = f"{AttentionConfig.__doc__}    {kind.kind}: options of kind {kind.kind}.\n    "
    dataclass(AttentionConfig)
