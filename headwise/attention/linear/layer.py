"""`linear`: attention whose weights are products of features (Katharopoulos et al. 2020).

    w[i,j] = φ(q_i)·φ(k_j) / Σ_l φ(q_i)·φ(k_l)    φ(x) = elu(x) + 1    y_i = Σ_j w[i,j] v_j

Time and memory are linear in T: causal sums go block by block, and decoding holds one state. There is no
scale on q·k. A mask that hides the same keys from all queries, as padding does, leaves these keys out; under
any other, and under any in compiled code, every weight is in memory. A kind with other features derives from
`FeatureAttention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from headwise.attention.base import Attention, AttentionShape
from headwise.attention.cache import LayerCache
from headwise.attention.kinds import register
from headwise.attention.observation import Observation, Unmeasured
from headwise.attention.state import StateCache
from headwise.functional.linear_attention import (
    BLOCK,
    elu_features,
    linear_attention,
    linear_weights,
    real_keys,
)

MOST_WEIGHTS = 2**28
"""Weights of a layer that an observer may hold at once: 1 GB in float32."""


class FeatureAttention(Attention):
    """What kinds share whose weights are products of positive features; they give `queries` and `keys`."""

    supports = frozenset({"causal", "full", "padding", "gqa", "cpu_training"})
    declines: ClassVar[Mapping[str, str]] = {
        "sink": "its weights are products of features, without a logit beside which a sink's could stand",
        "windows": "it sums all keys in one state, which no key can leave",
    }

    def queries(self, q: Tensor) -> Tensor:
        """φ(q) `(B, H, T, F)` of q `(B, H, T, D)`, positive."""
        raise NotImplementedError

    def keys(self, k: Tensor) -> Tensor:
        """φ(k) `(B, K, T, F)` of k `(B, K, T, D)`, positive."""
        raise NotImplementedError

    @classmethod
    def n_features(cls, shape: AttentionShape, options: Any) -> int:
        """F."""
        raise NotImplementedError

    @classmethod
    def feature_flops(cls, shape: AttentionShape, options: Any) -> int:
        """FLOPs of the features of one token's queries and keys."""
        return 0

    @classmethod
    def shift_invariant(cls, options: Any) -> bool:
        """Features of rotated vectors see the positions themselves."""
        return False

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        real = None
        if (
            mask is not None and not torch.compiler.is_compiling()
        ):  # whether it is padding waits for the device
            real = real_keys(mask, causal=causal)
            mask = mask if real is None else None
        self.record_engine(f"{self.kind}-blocks" if mask is None else f"{self.kind}-plain")
        phi_q, phi_k = self.queries(q), self.keys(k)
        return linear_attention(phi_q, phi_k, v, real=real, mask=mask, causal=causal).to(v.dtype)

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
        """The weights, which are positive and sum to 1, as long as they fit."""
        batch, heads, tokens, _ = q.shape
        if batch * heads * tokens**2 > MOST_WEIGHTS:
            return Unmeasured(
                f"measuring kind {self.kind!r} needs its weights in memory, and {batch} x {heads} x {tokens} "
                f"x {tokens} weights are too many; measure fewer sequences at a time, or shorter ones"
            )
        with torch.autocast(q.device.type, enabled=False):
            weights = linear_weights(self.queries(q), self.keys(k), mask=mask, causal=causal)
        return self.explicit_weights(weights, mask=mask, causal=causal)

    def whole_context_only(self) -> str | None:
        """A sum holds every key or none."""
        return (
            f"kind {self.kind!r} sums all keys in one state of fixed size, from which no key can be dropped"
        )

    def undecodable(self) -> str | None:
        """Nothing speaks against it."""
        return None

    def cache(self, batch: int, slots: int, length: int, like: Tensor) -> LayerCache:
        """S and z."""
        return FeatureCache(self, batch, slots, length, like)

    def fallback(self, batch: int, tokens: int) -> str | None:
        """A mask other than padding needs every weight in memory."""
        if self.engine != f"{self.kind}-plain":
            return None
        each = 4e-6 * batch * self.shape.n_heads * tokens**2
        return (
            f"attention runs on {self.engine}, not on {self.kind}-blocks: its mask does not hide the same "
            f"keys from all queries. A layer keeps T x T tensors per head ({each:,.1f} MB each in float32)"
        )

    @classmethod
    def flops_per_token(cls, shape: AttentionShape, options: Any, seq_len: int) -> int:
        """Products inside a block, with the state of those before it, and the features.

        The last block is padded to a whole one. Its padding is counted, and the sum rounded up.
        """
        features, width, block = cls.n_features(shape, options), shape.head_dim, min(BLOCK, seq_len)
        inside = 2 * block * shape.n_heads * (features + width)
        states = 2 * shape.n_heads * features * (width + 1) + 2 * shape.n_kv_heads * features * width
        computed = (inside + (states if seq_len > BLOCK else 0)) * math.ceil(seq_len / block) * block
        return math.ceil(computed / seq_len) + cls.feature_flops(shape, options)


class FeatureCache(StateCache):
    """S `(B, K, F, D)` and z `(B, K, F)`, however long the text is."""

    attention: FeatureAttention

    def __init__(
        self, attention: FeatureAttention, batch: int, slots: int, length: int, like: Tensor
    ) -> None:
        super().__init__(attention, batch, slots, length, like)
        shape = attention.shape
        with torch.no_grad():
            probe = torch.zeros(1, 1, 1, shape.head_dim, dtype=self.dtype, device=self.device)
            features = attention.keys(probe).shape[-1]
        size = (batch, shape.n_kv_heads, features, shape.head_dim)
        self.state = torch.zeros(size, dtype=self.dtype, device=self.device)
        self.total = torch.zeros(size[:3], dtype=self.dtype, device=self.device)

    def parts(self) -> Iterator[Tensor]:
        """The sums."""
        yield from (self.state, self.total)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add a key and its value, and read."""
        phi_q = self.attention.queries(q).to(self.dtype).unflatten(1, (k.shape[1], -1))[:, :, :, 0]
        phi_k = self.attention.keys(k).to(self.dtype)
        self.state.add_(phi_k.transpose(-2, -1) * v.to(self.dtype))
        self.total.add_(phi_k[:, :, 0])
        with torch.autocast(q.device.type, enabled=False):
            y: Tensor = phi_q @ self.state / (phi_q @ self.total[..., None])
        return y.flatten(1, 2)[:, :, None]


@register("linear")
class LinearAttention(FeatureAttention):
    """Attention with features elu(x) + 1."""

    engine_family = "linear"
    benchmarks: ClassVar[Mapping[str, str]] = {"linear": "headwise.attention.linear.bench"}

    def queries(self, q: Tensor) -> Tensor:
        """elu(q) + 1."""
        return elu_features(q)

    def keys(self, k: Tensor) -> Tensor:
        """elu(k) + 1."""
        return elu_features(k)

    @classmethod
    def n_features(cls, shape: AttentionShape, options: Any) -> int:
        """As many as channels."""
        return shape.head_dim
