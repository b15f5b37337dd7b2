"""`model.attention`: the kind, and one section of options for each kind that has any."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from headwise.attention.base import attention_kind
from headwise.attention.selective.config import SelectiveConfig
from headwise.errors import HeadwiseError


@dataclass
class AttentionConfig:
    """Which attention, and how.

    Attributes:
        kind: a registered kind: mha, flash, flex, selective.
        dropout: share of attention weights dropped in training.
        selective: options of kind selective.
    """

    kind: str = "flash"
    dropout: float = 0.0
    selective: SelectiveConfig = field(default_factory=SelectiveConfig)

    def options(self) -> Any:
        """The options of the chosen kind, or None where it has none."""
        return getattr(self, self.kind, None)

    def validate(self, *, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        """Refuse what no kind can do with its options, and what the chosen kind cannot do.

        Raises:
            HeadwiseError: an unknown kind, a dropout outside [0, 1), or an unsupported combination.
        """
        supports = attention_kind(self.kind).supports
        for kind in dataclasses.fields(self):
            options = getattr(self, kind.name)
            if dataclasses.is_dataclass(options):
                options.validate_values()  # type: ignore[union-attr]
        if not 0 <= self.dropout < 1:
            raise HeadwiseError(f"model.attention.dropout is {self.dropout}; it is a share, 0 <= dropout < 1")
        if self.dropout and "dropout" not in supports:
            raise HeadwiseError(
                f"model.attention.dropout is {self.dropout}, but kind {self.kind!r} cannot drop weights; "
                "set it to 0 or choose mha or flash"
            )
        options = self.options()
        if options is not None:
            options.validate(n_heads=n_heads, head_dim=head_dim)
        if n_kv_heads != n_heads and "gqa" not in supports:
            raise HeadwiseError(
                f"model.n_kv_heads is {n_kv_heads}, but kind {self.kind!r} needs as many key/value heads "
                f"as query heads ({n_heads})"
            )
