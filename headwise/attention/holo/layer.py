"""`holo`: holographic attention in two forms.

`boundary` is softmax attention with four switches (attention variant study):

    q_h ← sigmoid(r_h) · q_h                          radial gate
    s[i,j] = scale · q_i·k_j, or -d(q_i, k_j)         products, or distances in a Poincaré ball (poincare)
    y_i = Σ_j softmax_j(τ_h · (s[i,j] - max_j s[i,j]) + mask) v_j      tropical temperature τ_h, else 1
    out ← out + W_b x                                 boundary residual

Without `poincare` gate and temperature are factors on the query, and the attention is that of `flash`.

`hrr` superposes holographic reduced representations (Plate 1995; Alam et al. 2023) in O(T·D log D):

    S_i = Σ_{j<=i} k_j ⊛ v_j      v̂_i = q_i ⊛⁻¹ S_i      spectra of q and k have modulus 1
    retrieve: y_i = v̂_i / rms(v̂_i)
    reweight: y_i = w_i v_i,  w_i = exp(τ_h·cos(v_i, v̂_i)) / Σ_{j<=i} exp(τ_h·cos(v_j, v̂_j))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headwise.attention.base import AttentionShape, Carry, Rope
from headwise.attention.cache import LayerCache
from headwise.attention.flash import FlashAttention
from headwise.attention.holo.cache import BoundaryCache, SuperpositionCache
from headwise.attention.holo.config import HoloConfig
from headwise.attention.kinds import register
from headwise.attention.observation import Observation, Values
from headwise.functional.holographic import (
    cosine,
    normalised,
    own_weight,
    poincare_attention,
    poincare_weights,
    precise,
    retrieve,
    reweighted,
)
from headwise.functional.softmax_attention import zero_rows
from headwise.measures.spec import Measure

BOUNDARY = frozenset({"causal", "full", "padding", "additive_mask", "gqa", "dropout", "cpu_training"})
HRR = BOUNDARY - {"additive_mask", "dropout"}
"""A superposition has no weights that a mask could add to or dropout could drop; it can leave pairs out."""


@register("holo")
class HoloAttention(FlashAttention):
    """Holographic attention."""

    options = HoloConfig
    supports = BOUNDARY
    engine_family = "holo"
    measures = (
        Measure("retrieval_cosine", "Retrieval cosine", "cos(v_i, v̂_i)", source="layer"),
        Measure(
            "own_weight", "Own weight", "exp(τ·a_i) / Σ_j exp(τ·a_j), a_i = cos(v_i, v̂_i)",
            source="layer",
        ),
    )  # fmt: skip
    benchmarks: ClassVar[Mapping[str, str]] = {"holo": "headwise.attention.holo.bench"}

    def __init__(self, shape: AttentionShape, options: HoloConfig | None = None) -> None:
        super().__init__(shape, options)
        self.config = config = options or HoloConfig()
        boundary = config.form == "boundary"
        heats = config.tropical_temperature if boundary else config.read == "reweight"

        def per_head(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape.n_heads)) if wanted else None

        self.radial = per_head(boundary and config.radial_gate)
        """r_h."""
        self.log_temperature = per_head(heats)
        """log τ_h."""
        self.log_curvature = nn.Parameter(torch.empty(())) if config.has_distances else None
        """log c."""
        self.boundary = nn.Linear(shape.d_model, shape.d_model, bias=False) if config.has_boundary else None
        """W_b."""
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Gates at 1/2, temperatures at 1, the curvature as given, and W_b = 0."""
        for parameter in (self.radial, self.log_temperature):
            if parameter is not None:
                parameter.zero_()
        if self.log_curvature is not None:
            self.log_curvature.fill_(math.log(self.config.curvature))
        if self.boundary is not None:
            self.boundary.weight.zero_()

    @classmethod
    def supported(cls, options: Any) -> frozenset[str]:
        """A superposition takes masks that hide pairs, and no others."""
        return HRR if options is not None and options.form == "hrr" else BOUNDARY

    @classmethod
    def declining(cls, options: Any) -> Mapping[str, str]:
        """A superposition has no weights."""
        if options is None or options.form == "boundary":
            return cls.declines
        return {
            "sink": "a superposition has no softmax whose denominator a sink could join",
            "windows": "it sums all pairs of a key and a value in one vector, which none can leave",
        }

    @classmethod
    def shift_invariant(cls, options: Any) -> bool:
        """Not for hrr: a rotation acts on pairs of channels, but convolution mixes all channels."""
        return options is None or options.form == "boundary"

    @classmethod
    def extra_parameters(cls, shape: AttentionShape, options: Any) -> int:
        """W_b."""
        config = options or HoloConfig()
        return shape.d_model**2 if config.has_boundary and config.match_parameters else 0

    def record_engine(self, name: str) -> None:
        """`holo-` and the engine under it."""
        super().record_engine(f"holo-{name}")

    def temperature(self) -> Tensor:
        """τ of each head, `(H,)`."""
        assert self.log_temperature is not None
        return precise(self.log_temperature).exp()

    def curvature(self) -> Tensor:
        """c, a scalar."""
        assert self.log_curvature is not None
        return precise(self.log_curvature).exp()

    def gated(self, q: Tensor) -> Tensor:
        """q `(B, H, T, D)` times what stands before the scores of its head; in float32, then as q."""
        factor = None if self.radial is None else precise(self.radial).sigmoid()
        if self.log_temperature is not None and not self.config.has_distances:
            factor = self.temperature() if factor is None else factor * self.temperature()
        return q if factor is None else (q * factor[:, None, None]).to(q.dtype)

    def with_boundary(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output with W_b x, where there is a W_b."""
        return y if self.boundary is None else y + self.boundary(x)

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        causal: bool = True,
        rope: Rope | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        """As of every kind; the boundary residual reaches a query that may attend to nothing, too."""
        y = super().forward(x, attn_mask=attn_mask, causal=causal, rope=rope, carry=carry)
        return self.with_boundary(y, x)

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        config = self.config
        if config.form == "hrr":
            self.record_engine("fft")
            return self._superposed(q, k, v, mask, causal).to(v.dtype)
        q = self.gated(q)
        if not config.poincare:
            return super().core(q, k, v, mask=mask, causal=causal)
        self.record_engine("plain")
        return poincare_attention(q, k, v, dropout=self.dropout(), **self._distances(mask, causal))

    def _distances(self, mask: Tensor | None, causal: bool) -> dict[str, Any]:
        temperature = 1.0 if self.log_temperature is None else self.temperature()
        how = {"curvature": self.curvature(), "temperature": temperature, "eps": self.config.eps}
        return how | {"mask": mask, "causal": causal}

    def _superposed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        found = retrieve(q, k, v, mask=mask, causal=causal, eps=self.config.eps)
        if self.config.read == "retrieve":
            return normalised(found, self.config.eps)
        similarity = cosine(v, found, self.config.eps)
        return reweighted(v, own_weight(similarity, self.temperature(), mask=mask, causal=causal))

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
        """Softmax scores, explicit weights of distances, or what a superposition retrieves."""
        if self.config.form == "hrr":
            similarity = cosine(v, retrieve(q, k, v, mask=mask, causal=causal, eps=self.config.eps))
            found = {"retrieval_cosine": similarity}
            if self.config.read == "reweight":
                found["own_weight"] = own_weight(similarity, self.temperature(), mask=mask, causal=causal)
            return Values(found)
        if self.config.poincare:
            weights, empty = poincare_weights(self.gated(q), k, **self._distances(mask, causal))
            return self.explicit_weights(zero_rows(weights, empty), mask=mask, causal=causal)
        return self.softmax_scores(self.gated(q), k, self.gated(q_pre), k_pre, mask=mask, causal=causal)

    def cache(self, batch: int, slots: int, length: int, like: Tensor) -> LayerCache:
        """Keys and values of the last tokens, or the superposition of all."""
        kind = SuperpositionCache if self.config.form == "hrr" else BoundaryCache
        return kind(self, batch, slots, length, like)

    def whole_context_only(self) -> str | None:
        """A sum holds every key or none."""
        if self.config.form == "hrr":
            return "form hrr sums all pairs in one vector of fixed size, from which no pair can be dropped"
        return super().whole_context_only()

    def fallback(self, batch: int, tokens: int) -> str | None:
        """Distances are computed in plain PyTorch."""
        if self.engine != "holo-plain":
            return None
        each = 4e-6 * batch * self.shape.n_heads * tokens**2
        return (
            "attention runs on holo-plain: there is no fused kernel for Poincaré distances. A layer saves "
            f"several T x T tensors per head for the backward pass ({each:,.1f} MB each in float32)"
        )

    @classmethod
    def computes(cls, options: Any) -> str:
        """Its own, gated and with a residual."""
        return f"{cls.kind} {options or HoloConfig()}"

    @classmethod
    def head_ranges(cls, leaf: str, index: int, options: Any) -> dict[int, list[tuple[int, int]]]:
        """A head has one entry of `radial` and of `log_temperature`; c and W_b are the layer's."""
        return {0: [(index, index + 1)]} if leaf in ("radial", "log_temperature") else {}

    @classmethod
    def flops_per_token(cls, shape: AttentionShape, options: Any, seq_len: int) -> int:
        """Scores and values over all keys; for hrr its Fourier transforms and products of spectra.

        A transform of D real numbers counts 2.5·D·log2 D, half of what is usual for complex ones; a product
        of two complex numbers 6 and a sum 2. W_b is counted with the layer's matrices.
        """
        if options is None or options.form == "boundary":
            return super().flops_per_token(shape, options, seq_len)
        width, heads, kv_heads = shape.head_dim, shape.n_heads, shape.n_kv_heads
        frequencies = width // 2 + 1
        transform = 2.5 * width * math.log2(width)
        of_keys = kv_heads * (2 * transform + 8 * frequencies)  # of k and v, bound and added
        of_queries = heads * (2 * transform + 6 * frequencies)  # of q and back, unbound
        return round(of_keys + of_queries)
