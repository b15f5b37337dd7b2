"""`differential`: each head is the difference of two softmaxes (Ye et al. 2024, arXiv 2410.05258).

    y = (A1 - λ A2) v

Version 2 (Differential Transformer V2, 2026): a head has two queries of width D on one key/value head, shared
as in grouped attention, and λ = sigmoid(W_λ x) for each head and token. It has H·D more rows of queries than
softmax attention at the same H, K and D, and W_λ, `(H, d_model)`: (H·D + H) · d_model parameters more.

Version 1 (the paper): a head of width D has queries and keys q1, q2, k1, k2 of width D/2 and a value of D, so
that its matrices are those of softmax attention at the same H, K and D. λ is one number a layer,

    λ = exp(λq1·λk1) - exp(λq2·λk2) + λ_init,    λ_init = 0.8 - 0.6 exp(-0.3 · layer)

and each head's output passes an RMSNorm, whose weight all heads share, and the factor 1 - λ_init. It has 3·D
parameters more: four vectors of D/2 and the norm's weight. The paper compares H heads of softmax attention of
width D with H/2 of these, of width 2D.

Both are one call of `scaled_dot_product_attention` with 2H query heads on K key/value heads. On a GPU and
without a mask version 1 makes two calls of H query heads instead, which is faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwise.attention.base import Attention, AttentionShape, Carry, Rope
from headwise.attention.cache import LayerCache
from headwise.attention.differential.cache import DifferentialCache
from headwise.attention.differential.config import DifferentialConfig
from headwise.attention.flash import BACKENDS
from headwise.attention.kinds import register
from headwise.attention.observation import Extra, Observation, Parts, Values
from headwise.functional.differential import (
    fused_differential_attention,
    head_norm,
    negative_weight,
)
from headwise.functional.softmax_attention import additive_mask, zero_rows
from headwise.measures.spec import Measure

LAMBDA_STD = 0.1
"""Of the vectors that make λ in version 1."""


@register("differential")
class DifferentialAttention(Attention):
    """Differential attention, versions 1 and 2."""

    options = DifferentialConfig
    supports = frozenset({"causal", "full", "padding", "additive_mask", "gqa", "dropout", "cpu_training"})
    declines: ClassVar[Mapping[str, str]] = {
        "sink": "a head has two softmaxes, and none of its definitions says which of them a sink joins"
    }
    engine_family = "sdpa"
    measures = (
        Measure(
            "negative_weight", "Negative weight", "Σ_j max(λ A2[i,j] - A1[i,j], 0), the weight below 0 of "
            "A1 - λ A2", source="layer", absent=float("nan"),
            remark="of the weights that the layer attends with, whatever `scores`",
        ),
        Measure("lambda", "λ", "factor on the second softmax", source="layer", absent=float("nan")),
    )  # fmt: skip
    attached = ("observer", "seen")
    benchmarks: ClassVar[Mapping[str, str]] = {"differential": "headwise.attention.differential.bench"}

    def __init__(self, shape: AttentionShape, options: DifferentialConfig | None = None) -> None:
        config = options or DifferentialConfig()
        super().__init__(shape, config)
        self.config = config
        self.seen: Tensor | None = None
        """λ of the last pass, while there is an observer."""
        self.scale = self.rotated_width(shape.head_dim, config) ** -0.5
        if config.version == 2:
            self.lam = nn.Linear(shape.d_model, shape.n_heads, bias=False)
        else:
            self.start = config.start(shape.layer)
            self.lambda_q = nn.Parameter(torch.empty(shape.head_dim))
            self.lambda_k = nn.Parameter(torch.empty(shape.head_dim))
            self.norm = nn.Parameter(torch.empty(shape.head_dim))
        self.initialise()

    def initialise(self) -> None:
        """Draw what makes λ in version 1, which starts near λ_init."""
        if self.config.version == 1:
            nn.init.normal_(self.lambda_q, std=LAMBDA_STD)
            nn.init.normal_(self.lambda_k, std=LAMBDA_STD)
            nn.init.ones_(self.norm)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `(B, 2H, T, W)`, k `(B, K or 2K, T, W)`, v `(B, K, T, D)`; W = D/2 and 2K under version 1."""
        shape = self.shape
        width = self.rotated_width(shape.head_dim, self.config)
        own = shape.n_kv_heads * shape.head_dim
        q, k, v = self.qkv(x).split((2 * shape.n_heads * width, own, own), dim=-1)
        split = ((q, width), (k, width), (v, shape.head_dim))
        q, k, v = (part.unflatten(-1, (-1, wide)).transpose(1, 2) for part, wide in split)
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
        """The difference of both softmaxes, `(B, H, T, D)`."""
        lam = self.factor(x)
        if self.observer is not None:
            self.seen = lam.detach()
        softmax = partial(self.core, mask=mask, causal=causal)
        # two narrower calls are faster and take less memory on a GPU; with a mask no fused kernel takes them
        apart = q.is_cuda and mask is None
        return self.after(fused_differential_attention(q, k, v, lam, softmax, apart=apart))

    def factor(self, x: Tensor) -> Tensor:
        """λ: `(B, H, T)` of `x (B, T, d_model)`, or `(1, H, 1)` where it is one number."""
        if self.config.version == 2:
            of_token: Tensor = self.lam(x).sigmoid().transpose(1, 2)
            return of_token
        precise = torch.promote_types(self.lambda_q.dtype, torch.float32)
        first, second = (self.lambda_q * self.lambda_k).to(precise).unflatten(0, (2, -1)).sum(-1).exp()
        of_layer: Tensor = first - second + self.start
        return of_layer.expand(1, self.shape.n_heads, 1)

    def after(self, y: Tensor) -> Tensor:
        """What a head's output `(…, D)` passes before the output projection: version 1's norm."""
        return y if self.config.version == 2 else head_norm(y, self.norm, 1 - self.start)

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        """Softmax attention of all 2H queries on K key/value heads, `(B, 2H, T, D)`."""
        bias = empty = None
        if mask is not None:
            bias, empty = additive_mask(mask, causal=causal, length=q.shape[-2], like=q)
        arguments = {
            "attn_mask": bias,
            "dropout_p": self.dropout(),
            "is_causal": causal and bias is None,
            "scale": self.scale,
            "enable_gqa": True,
        }
        if not q.is_cuda:
            self.record_engine("sdpa")
            return zero_rows(F.scaled_dot_product_attention(q, k, v, **arguments), empty)
        if q.dtype == torch.float32:  # no fused float32 kernel shares keys
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            arguments["enable_gqa"] = False
        with sdpa_kernel(BACKENDS, set_priority=True):
            if not torch.compiler.is_compiling():
                choice = SDPBackend(torch._fused_sdp_choice(q, k, v, **arguments))
                self.record_engine(f"sdpa-{choice.name.split('_')[0].lower()}")
            return zero_rows(F.scaled_dot_product_attention(q, k, v, **arguments), empty)

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
        """Both softmaxes as parts 1 and 2, and λ and the negative weight of the whole head."""
        assert self.seen is not None
        lam, self.seen = self.seen, None
        keys = 2 if self.config.version == 1 else 1
        parts = {}
        for part in (0, 1):
            own = slice(part % keys, None, keys)
            queries = (x[:, part::2] for x in (q, q_pre))
            (now, before), (key, key_pre) = queries, (k[:, own], k_pre[:, own])
            parts[str(part + 1)] = self.softmax_scores(now, key, before, key_pre, mask=mask, causal=causal)

        def below_zero() -> Tensor:
            return negative_weight(
                q, k, lam, n_kv_heads=self.shape.n_kv_heads, causal=causal, mask=mask, scale=self.scale
            )

        extra: Extra = {"negative_weight": below_zero, "lambda": lam.expand(len(q), -1, q.shape[2])}
        seen = parts["1"]
        return Parts(parts, Values(extra, key_mask=seen.key_mask, documents=seen.documents))

    def undecodable(self) -> str | None:
        """Nothing speaks against it."""
        return None

    def cache(self, batch: int, slots: int, length: int, like: Tensor) -> LayerCache:
        """Keys and values of the last tokens."""
        return DifferentialCache(self, batch, slots, length, like)

    @classmethod
    def query_width(cls, head_dim: int, options: Any) -> int:
        """Two queries of W."""
        return 2 * cls.rotated_width(head_dim, options)

    @classmethod
    def rotated_width(cls, head_dim: int, options: Any) -> int:
        """W: D/2 under version 1, D under version 2."""
        return head_dim // 2 if options is not None and options.version == 1 else head_dim

    @classmethod
    def head_ranges(cls, leaf: str, index: int, options: Any) -> dict[int, list[tuple[int, int]]]:
        """A row of W_λ; the vectors and the norm of version 1 are shared by all heads."""
        return {0: [(index, index + 1)]} if leaf == "lam.weight" else {}

    @classmethod
    def flops_per_token(cls, shape: AttentionShape, options: Any, seq_len: int) -> int:
        """Two products of scores, of width W, and two with values: `4·T·H·(W + D)`."""
        width = cls.rotated_width(shape.head_dim, options)
        return 4 * seq_len * shape.n_heads * (width + shape.head_dim)

    def padded_flops_per_token(self, seq_len: int) -> int:
        """Version 1's zeros: queries and keys are 2W wide, except on a GPU without a mask."""
        if self.config.version == 2 or self.norm.device.type != "cpu":
            return 0
        return 4 * seq_len * self.shape.n_heads * self.rotated_width(self.shape.head_dim, self.config)
