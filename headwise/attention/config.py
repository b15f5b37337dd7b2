"""`model.attention`: the kind, and one section of options for each kind that has any."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from headwise.attention.base import Attention
from headwise.attention.kinds import KINDS, attention_kind, on_registration
from headwise.attention.modifiers import MODIFIERS, Modifiers, window_of
from headwise.attention.modifiers.options import check
from headwise.errors import HeadwiseError


@dataclass
class AttentionConfig:
    """Which attention, and how.

    Every kind with options has a section of its own here, a field with the kind's name that appears when the
    kind is registered.

    Attributes:
        kind: a registered kind, of this package or of another; `headwise train --help` lists them.
        dropout: share of attention weights dropped in training.
        head_dropout: probability with which each head's output is dropped for a sequence in training; the
            others are scaled by 1 / (1 - head_dropout).
        qk_norm: whether each head's queries and keys are normalised before their rotation.
        sink: one more logit in the softmax's denominator: none, zero, or learned by each head.
        output_gate: heads' outputs times a sigmoid of the layer's input: none, one number a head, or one
            an element.
        value_residual: whether later layers mix the first layer's values into their own.
        windows: numbers of keys that a query sees, or full, for each layer in turn, repeated; such as
            [256, 256, full].
    """

    kind: str = "flash"
    dropout: float = 0.0
    head_dropout: float = 0.0
    qk_norm: bool = False
    sink: str = "none"
    output_gate: str = "none"
    value_residual: bool = False
    windows: list[int | str] | None = None

    def options(self) -> Any:
        """The options of the chosen kind, or None where it has none."""
        return getattr(self, self.kind, None)

    def rotated_width(self, head_dim: int) -> int:
        """Width of the queries and keys that the chosen kind rotates, of heads of width `head_dim`."""
        return attention_kind(self.kind).rotated_width(head_dim, self.options())

    def chosen(self) -> dict[str, Any]:
        """The kind with its own options as plain values, and the modifiers that are on; other kinds decide
        nothing."""
        own = {"kind": self.kind, "dropout": self.dropout}
        own |= {name: value for name in MODIFIERS if (value := getattr(self, name)) != _OWN[name].default}
        options = self.options()
        return own if options is None else own | {self.kind: dataclasses.asdict(options)}

    def modifiers(self, layer: int) -> Modifiers:
        """The modifiers of a layer."""
        return Modifiers(
            qk_norm=self.qk_norm, sink=self.sink, output_gate=self.output_gate,
            value_residual=self.value_residual, window=window_of(self.windows, layer),
        )  # fmt: skip

    def validate(self, *, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        """Refuse what no kind can do with its options, and what the chosen kind cannot do.

        Raises:
            HeadwiseError: an unknown kind, a dropout outside [0, 1), an unknown value of a modifier, or an
                unsupported combination.
        """
        chosen = attention_kind(self.kind)
        supports = chosen.supported(self.options())
        check(self.sink, self.output_gate, self.windows)
        for kind in dataclasses.fields(self):
            options = getattr(self, kind.name)
            if hasattr(options, "validate_values"):
                options.validate_values()
        if not 0 <= self.dropout < 1:
            raise HeadwiseError(f"model.attention.dropout is {self.dropout}; it is a share, 0 <= dropout < 1")
        if not 0 <= self.head_dropout < 1:
            raise HeadwiseError(
                f"model.attention.head_dropout is {self.head_dropout}; it is a probability, 0 <= "
                "head_dropout < 1"
            )
        if self.dropout and "dropout" not in supports:
            raise HeadwiseError(
                f"model.attention.dropout is {self.dropout}, but kind {self.kind!r} cannot drop weights; "
                "set it to 0 or choose flash"
            )
        for name in MODIFIERS:
            value = getattr(self, name)
            if value != _OWN[name].default and (reason := chosen.why_not(name, self.options())):
                raise HeadwiseError(f"model.attention.{name} is {value}, but {reason}")
        options = self.options()
        if hasattr(options, "validate"):
            options.validate(n_heads=n_heads, head_dim=head_dim)
        if n_kv_heads != n_heads and "gqa" not in supports:
            raise HeadwiseError(
                f"model.n_kv_heads is {n_kv_heads}, but kind {self.kind!r} needs as many key/value heads "
                f"as query heads ({n_heads})"
            )


_OWN = {known.name: known for known in dataclasses.fields(AttentionConfig)}
_DOC = AttentionConfig.__doc__


@on_registration
def declare_sections(registered: type[Attention] | None = None) -> None:
    """Make the options of every kind in `KINDS` a field of `AttentionConfig`, as if written there.

    The class stays the same, since others hold it: its fields are declared anew, and `dataclass` writes its
    methods again.
    """
    own = {name: dataclasses.field(default=known.default) for name, known in _OWN.items()}
    sections = {name: kind.options for name, kind in KINDS.items() if kind.options is not None}
    types = {name: known.type for name, known in _OWN.items()} | sections
    fields = own | {name: dataclasses.field(default_factory=options) for name, options in sections.items()}
    for written in ("__init__", "__repr__", "__eq__", "__match_args__"):
        delattr(AttentionConfig, written)
    AttentionConfig.__annotations__ = types
    for name, declared in fields.items():
        setattr(AttentionConfig, name, declared)
    lines = "".join(f"    {name}: options of kind {name}.\n    " for name in sections)
    AttentionConfig.__doc__ = f"{_DOC}{lines}"
    dataclass(AttentionConfig)
