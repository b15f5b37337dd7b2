"""`tropical`: attention in the max-plus semiring (per-head metrics study).

    score[i,j] = max_d (q[i,d] + k[j,d]),   minus its maximum over j if scores are centred
    y[i,d]     = max_j (score[i,j] + v[j,d])

A head has no weights: each channel of y is one key's value plus a score. The measure is the margin γ_i
instead: if every value changes by less than γ/2, no winner changes.

A rotation of both vectors preserves their dot product, but not the maximum of their sum: with RoPE a score
depends on the positions of query and key, and not only on their distance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from headwise.attention.base import Attention, AttentionShape
from headwise.attention.cache import LayerCache
from headwise.attention.kinds import register
from headwise.attention.observation import Margins, Observation, read_mask
from headwise.attention.tropical.cache import TropicalCache
from headwise.attention.tropical.config import TropicalConfig
from headwise.functional.dispatch import HAS_KERNELS
from headwise.functional.tropical import FLOP_FORMULAS, WIDEST, takes_kernel, tropical_attention
from headwise.measures.spec import Measure

EPSILON = 1e-6

MARGIN = Measure(
    "margin", "Tropical margin", "γ_i = min_d (best - second best over j of score[i,j] + v[j,d])",
    source="margins", absent=torch.inf, remark="+inf with fewer than two visible keys, which means leave out",
    table=("tropical margin gamma (per head)", "gamma"),
)  # fmt: skip
LEAST = Measure(
    "margin_min", "Smallest tropical margin", "min_i γ_i", source="margins", absent=torch.inf,
    remark="over the tokens of all samples; in tables of heads alone", least_of="margin",
)  # fmt: skip


@register("tropical")
class TropicalAttention(Attention):
    """Max-plus attention."""

    options = TropicalConfig
    supports = frozenset({"causal", "full", "padding", "additive_mask", "gqa", "cpu_training"})
    declines: ClassVar[Mapping[str, str]] = {
        "sink": "a maximum over keys has no denominator that a sink could join"
    }
    engine_family = "tropical"
    measures = (MARGIN, LEAST)
    flop_formulas: ClassVar[Mapping[Any, Callable[..., int]]] = FLOP_FORMULAS
    sections = ("headwise.attention.tropical.section:MARGINS",)
    benchmarks: ClassVar[Mapping[str, str]] = {"tropical": "headwise.attention.tropical.bench"}
    attached = (*Attention.attached, "margin")

    def __init__(self, shape: AttentionShape, options: TropicalConfig | None = None) -> None:
        super().__init__(shape, options)
        self.config = options or TropicalConfig()
        self.margin: Tensor | None = None
        """γ of the last forward pass, kept only for an attached observer."""
        self.masked = False
        """Whether the last forward pass had a mask."""

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        """As `Attention.forward`, less the output's maximum over d_model under `gauge`."""
        return self.finished(super().forward(x, **given))

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        q, k, v = self.prepared(q, k, v)
        watched = self.observer is not None
        found = tropical_attention(
            q, k, v, causal=causal, mask=mask, centre=self.config.centre, margin=watched
        )  # fmt: skip
        self.record_engine("tropical-fused" if takes_kernel(q, mask) else "tropical-plain")
        if not torch.compiler.is_compiling():
            self.margin, self.masked = found.margin, mask is not None
        return self.finished(found.y)

    def prepared(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as they enter the core, in float32 or better."""
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
        if self.config.normalise:
            q, k = normalised(q), normalised(k)
        return (gauged(q), gauged(k), gauged(v)) if self.config.gauge else (q, k, v)

    def finished(self, y: Tensor) -> Tensor:
        """y as it enters the output projection `(…, D)`, or what that gives `(…, d_model)`."""
        return gauged(y) if self.config.gauge else y

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
        """The margins of the pass that was just made."""
        assert self.margin is not None
        margin, self.margin = self.margin, None
        if mask is None:
            return Margins(margin)
        seen = read_mask(mask[:, None], q.shape[0], causal=causal)
        return Margins(margin, key_mask=seen.key_mask, documents=seen.documents)

    def undecodable(self) -> str | None:
        """Nothing speaks against decoding."""
        return None

    def cache(self, batch: int, slots: int, length: int, like: Tensor) -> LayerCache:
        """Keys and values of the last tokens."""
        return TropicalCache(self, batch, slots, length, like)

    def fallback(self, batch: int, tokens: int) -> str | None:
        """Why the last pass was not on the kernel."""
        if self.engine != "tropical-plain":
            return None
        if not self.out.weight.is_cuda:
            reason = "no CUDA device"
        elif self.masked:
            reason = "the kernel takes no mask"
        elif not HAS_KERNELS:
            reason = "kernels are off: no Triton, or HEADWISE_KERNELS=0"
        elif self.shape.head_dim > WIDEST:
            reason = f"heads of width {self.shape.head_dim} exceed the kernel's {WIDEST}"
        else:
            reason = "the kernel does not support this dtype"
        sums = batch * self.shape.n_heads * tokens**2 * self.shape.head_dim
        return (
            f"attention runs on tropical-plain, not tropical-fused: {reason}. A layer then computes "
            f"{2 * sums:.2g} sums in memory, a block of queries at a time, and is many times slower"
        )

    @classmethod
    def shift_invariant(cls, options: Any) -> bool:
        """A maximum over channels sees the positions themselves: a rotation keeps sums over pairs alone."""
        return False

    @classmethod
    def flops_per_token(cls, shape: AttentionShape, options: TropicalConfig | None, seq_len: int) -> int:
        """Sums and maxima of scores and values over all keys: as many as products and sums of a softmax."""
        return super().flops_per_token(shape, options, seq_len)

    @classmethod
    def backward_flops_per_token(
        cls, shape: AttentionShape, options: TropicalConfig | None, seq_len: int
    ) -> int:
        """The scores of each channel's winner, made again over D; no pass over keys."""
        centre = (options or TropicalConfig()).centre
        return 2 * shape.n_heads * (shape.head_dim + centre) * shape.head_dim


def normalised(x: Tensor) -> Tensor:
    """`x (…, D)` over its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


def gauged(x: Tensor) -> Tensor:
    """`x (…, D)` less its maximum; the first of equal ones has its gradient."""
    return x - x.max(-1, keepdim=True).values
