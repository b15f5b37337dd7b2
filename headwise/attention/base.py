"""The contract that every kind of attention keeps.

A kind is one file: a subclass of `Attention` with its `core`, what it supports, its options as a
dataclass, and `@register`. The base class owns what all kinds share: projections, heads,
rotation, the output projection, and the place where an observer looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headwise.attention.observation import Observation, Observer, Scores, Unmeasured, read_mask
from headwise.errors import one_of

Rope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

FEATURES = ("causal", "full", "padding", "additive_mask", "gqa", "dropout", "cpu_training")


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer.

    Attributes:
        d_model: width of the residual stream.
        n_heads: query heads H.
        n_kv_heads: key/value heads K; H % K == 0.
        head_dim: D; H·D need not equal d_model.
        bias: whether projections have biases.
        dropout: share of attention weights dropped in training.
        layer: index of the layer, from 0.
        n_layers: layers of the model.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    bias: bool = False
    dropout: float = 0.0
    layer: int = 0
    n_layers: int = 1


@dataclass
class Carry:
    """What the layers of one forward pass hand to the next layer and to the loss.

    Attributes:
        logits: selection logits of the previous layer, `(B, M, T, T)`.
        penalty: what layers so far add to the loss, a scalar.
    """

    logits: Tensor | None = None
    penalty: Tensor | float = 0.0


class Attention(nn.Module):
    """One attention layer: `y = forward(x, attn_mask=…, causal=…, rope=…)`, `x, y (B, T, d_model)`.

    Subclasses set `supports` (names out of `FEATURES`), `engine_family` and implement `core`.
    """

    kind: ClassVar[str]
    options: ClassVar[type | None] = None
    supports: ClassVar[frozenset[str]] = frozenset()
    engine_family: ClassVar[str]

    def __init__(self, shape: AttentionShape, options: Any = None) -> None:
        super().__init__()
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        heads = shape.n_heads + 2 * shape.n_kv_heads
        self.qkv = nn.Linear(shape.d_model, heads * shape.head_dim, bias=shape.bias)
        self.out = nn.Linear(shape.n_heads * shape.head_dim, shape.d_model, bias=shape.bias)
        self.observer: Observer | None = None
        self.engine: str | None = None
        """The engine that computed the last forward pass outside of compiled code."""

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        causal: bool = True,
        rope: Rope | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: `(B, T, d_model)`.
            attn_mask: `(B or 1, T, T)`, bool (True = may attend) or additive float.
            causal: query i sees keys j <= i only; combines with `attn_mask`.
            rope: rotates q and k before the core.
            carry: what passes between the layers of this forward pass.

        Returns:
            `(B, T, d_model)`; a query that may attend to nothing contributes zeros.

        Raises:
            ValueError: x or a mask of another shape or dtype, or a form that this kind does not support.
        """
        self._check(x, attn_mask, causal)
        q_pre, k_pre, v = self.heads(x)
        q, k = rope(q_pre, k_pre) if rope is not None else (q_pre, k_pre)
        y = self.attend(x, q, k, v, mask=attn_mask, causal=causal, rope=rope, carry=carry or Carry())
        if self.observer is not None:
            self.observer(self.observation(q, k, v, q_pre, k_pre, mask=attn_mask, causal=causal))
        return self.out(y.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project `x (B, T, d_model)` to q `(B, H, T, D)` and k, v `(B, K, T, D)`."""
        shape = self.shape
        heads = self.qkv(x).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
        q, k, v = heads.split((shape.n_heads, shape.n_kv_heads, shape.n_kv_heads), dim=1)
        return q, k, v

    def attend(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        causal: bool,
        rope: Rope | None,
        carry: Carry,
    ) -> Tensor:
        """The core; a kind that also reads x, or hands something on, does it here."""
        return self.core(q, k, v, mask=mask, causal=causal)

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        """What the kind is: q `(B, H, T, D)`, k and v `(B, K, T, D)` to y `(B, H, T, D)`."""
        raise NotImplementedError

    def observation(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_pre: Tensor,
        k_pre: Tensor,
        *,
        mask: Tensor | None,
        causal: bool,
    ) -> Observation:
        """What this layer offers to be measured; nothing, until its kind declares what its weights are."""
        return Unmeasured(f"attention kind {self.kind!r} does not declare what its weights are")

    def softmax_scores(
        self, q: Tensor, k: Tensor, q_pre: Tensor, k_pre: Tensor, *, mask: Tensor | None, causal: bool
    ) -> Scores:
        """The observation of a kind whose weights are a softmax of `scale · q·k` under `mask`."""
        if mask is None:
            return Scores(q, k, self.scale, causal=causal, q_pre=q_pre, k_pre=k_pre)
        seen = read_mask(mask[:, None], q.shape[0], causal=causal)
        return Scores(
            q, k, self.scale, causal=seen.causal, bias=seen.bias, window=seen.window,
            key_mask=seen.key_mask, documents=seen.documents, q_pre=q_pre, k_pre=k_pre,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not observed, and has its class's methods where this layer's are replaced for a block."""
        state = super().__getstate__()
        own = {name: value for name, value in state.items() if not _replaces_method(self, name, value)}
        return own | {"observer": None}

    def initialise(self) -> None:
        """Draw parameters that do not start as the model's matrices do."""

    def lr_multipliers(self) -> dict[str, float]:
        """Learning-rate multipliers by name of parameters with one of their own; they do not decay."""
        return {}

    def dropout(self) -> float:
        """The share of weights to drop now: none outside of training."""
        return self.shape.dropout if self.training else 0.0

    def record_engine(self, name: str) -> None:
        """Remember which engine computed; skipped inside compiled code, where it would be a side effect."""
        if not torch.compiler.is_compiling():
            self.engine = name

    def fallback(self, batch: int, tokens: int) -> str | None:
        """Why the last pass was not on the kind's fastest engine, and what that costs; None where it was.

        Args:
            batch: B of that pass.
            tokens: T.
        """
        return None

    @classmethod
    def flops_per_token(cls, shape: AttentionShape, seq_len: int) -> int:
        """Forward FLOPs of the core for one token; scores and values over all `seq_len` keys."""
        return 4 * seq_len * shape.n_heads * shape.head_dim

    def _check(self, x: Tensor, attn_mask: Tensor | None, causal: bool) -> None:
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.shape.d_model:
            expected = f"(B, T, {self.shape.d_model}) with T >= 1"
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {expected}")
        form = "causal" if causal else "full"
        if form not in self.supports:
            raise ValueError(f"attention kind {self.kind!r} does not support {form}; it got causal={causal}")
        if attn_mask is None:
            return
        batch, length = x.shape[0], x.shape[1]
        if tuple(attn_mask.shape) not in ((1, length, length), (batch, length, length)):
            expected = f"({batch} or 1, {length}, {length})"
            raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}; expected {expected}")
        is_bool = attn_mask.dtype == torch.bool
        if not is_bool and not attn_mask.is_floating_point():
            raise ValueError(f"attn_mask is {attn_mask.dtype}; expected bool (True = may attend) or float")
        feature = "padding" if is_bool else "additive_mask"
        if feature not in self.supports:
            raise ValueError(f"attention kind {self.kind!r} does not support {feature}; pass attn_mask=None")


def _replaces_method(layer: Attention, name: str, value: Any) -> bool:
    return callable(value) and callable(getattr(type(layer), name, None))


KINDS: dict[str, type[Attention]] = {}


def register(kind: str) -> Callable[[type[Attention]], type[Attention]]:
    """Make a subclass of `Attention` known as `model.attention.kind = kind`."""

    def add(cls: type[Attention]) -> type[Attention]:
        unknown = cls.supports - set(FEATURES)
        if unknown:
            raise ValueError(f"attention kind {kind!r} declares unknown features {sorted(unknown)}")
        cls.kind = kind
        KINDS[kind] = cls
        return cls

    return add


def attention_kind(kind: str) -> type[Attention]:
    """The class registered as `kind`.

    Raises:
        HeadwiseError: there is none; names the nearest.
    """
    return KINDS[one_of("model.attention.kind", kind, KINDS)]
