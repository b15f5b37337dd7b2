"""`flex`: softmax attention through PyTorch's FlexAttention (Dong et al. 2024).

    y_i = Σ_j softmax_j(scale · q_i·k_j + mask) v_j

Compiled to a fused kernel on a GPU. On a CPU it computes forward only, unfused.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from headwise.attention.base import SoftmaxAttention
from headwise.attention.kinds import register
from headwise.functional.softmax_attention import additive_mask, zero_rows

KERNEL: dict[str, Any] = {"BACKEND": "TRITON"}
"""Not the decoding kernel, chosen below 128 tokens otherwise: gradients through it are wrong (torch 2.11)."""

SMALL_BLOCKS = KERNEL | {
    "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32,
    "num_stages": 1,
}  # fmt: skip
"""Block sizes under an additive mask: the default ones need more shared memory than there is."""

RECOMPILE_LIMIT = 128
"""Shapes that one process may compile. Beyond the usual 8 it would compute unfused, without a word."""


@register("flex")
class FlexAttention(SoftmaxAttention):
    """Softmax attention whose masks are programs."""

    supports = frozenset({"causal", "full", "padding", "additive_mask", "gqa"})
    engine_family = "flex"

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        bias = empty = None
        if mask is not None:
            precise = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
            bias, empty = additive_mask(mask, causal=causal, length=q.shape[-2], like=precise)

        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert bias is not None
            return score + bias[b % bias.shape[0], 0, i, j]

        block_mask = _causal_blocks(q.shape[-2], q.device) if causal and bias is None else None
        arguments: dict[str, Any] = {
            "score_mod": None if bias is None else add_bias,
            "block_mask": block_mask,
            "scale": self.scale,
            "enable_gqa": k.shape[1] != q.shape[1],
        }
        if q.is_cuda:
            arguments["kernel_options"] = KERNEL if bias is None else SMALL_BLOCKS
        self.record_engine("flex" if q.is_cuda else "flex-unfused")
        return zero_rows(_flex(q, k, v, arguments), empty)


def _flex(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
    y: Tensor
    if torch.compiler.is_compiling():
        y = flex_attention(q, k, v, **arguments)
    elif q.is_cuda:
        # Fused also where compiled models run eagerly, as they do while they are watched.
        with (
            torch.compiler.set_stance("default"),
            torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT),
        ):
            y = _compiled()(q, k, v, **arguments)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            y = flex_attention(q, k, v, **arguments)
    return y


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@lru_cache(maxsize=16)
def _causal_blocks(length: int, device: torch.device) -> BlockMask:
    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    return create_block_mask(causal, None, None, length, length, device=str(device))
