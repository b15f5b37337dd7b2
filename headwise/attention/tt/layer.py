"""`tt`: softmax attention whose projections are tensor trains (Oseledets 2011, Novikov et al. 2015).

    W[(i_1 … i_d), (j_1 … j_d)] = G_1[i_1, j_1] G_2[i_2, j_2] … G_d[i_d, j_d]

with a matrix `G_k[i_k, j_k]` of size `(r_{k-1}, r_k)`, for each of W_Q, W_K, W_V and W_O. Scores and values
are those of `flash`, or of `mha`. The matrices are never formed in training.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from headwise.attention.base import AttentionShape, SoftmaxAttention
from headwise.attention.flash import FlashAttention
from headwise.attention.kinds import register
from headwise.attention.mha import VanillaAttention
from headwise.attention.tt.config import TensorTrainConfig
from headwise.attention.tt.trains import TensorTrainProjection, layer_sizes
from headwise.functional.tensor_train import FLOP_FORMULAS

CORES: dict[str, Any] = {"flash": FlashAttention.core, "mha": VanillaAttention.core}


@register("tt")
class TensorTrainAttention(SoftmaxAttention):
    """Softmax attention with tensor-train projections."""

    options = TensorTrainConfig
    supports = FlashAttention.supports
    engine_family = "sdpa"
    flop_formulas = {**FlashAttention.flop_formulas, **FLOP_FORMULAS}  # noqa: RUF012  # declared in the base class
    benchmarks = {"tt": "headwise.attention.tt.bench"}  # noqa: RUF012  # declared in the base class

    def __init__(self, shape: AttentionShape, options: TensorTrainConfig | None = None) -> None:
        self.config = options or TensorTrainConfig()
        super().__init__(shape, self.config)

    def make_projections(self, shape: AttentionShape, options: Any) -> tuple[nn.Module, nn.Module]:
        """Both as tensor trains."""
        sizes = layer_sizes(shape, options)
        return (
            TensorTrainProjection(sizes.qkv, options.init, bias=shape.bias),
            TensorTrainProjection([sizes.out], options.init, bias=shape.bias),
        )

    modified = FlashAttention.modified

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        """That of the kind `engine` names."""
        return cast(Tensor, CORES[self.config.engine](self, q, k, v, mask=mask, causal=causal))

    @classmethod
    def check(cls, shape: AttentionShape, options: Any) -> None:
        """Refuse a rank or factors that the matrices do not allow."""
        layer_sizes(shape, options)

    @classmethod
    def projection_parameters(cls, shape: AttentionShape, options: Any) -> int:
        """Numbers in all cores."""
        return sum(sizes.parameters for sizes in layer_sizes(shape, options).all())

    @classmethod
    def heads_are_fixed(cls, options: Any) -> str | None:
        """A head has no rows of its own."""
        return "the projections of kind tt are tensor trains, in which all heads share cores"
