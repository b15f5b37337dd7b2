"""`flex`: softmax attention through PyTorch's FlexAttention (Dong et al. 2024).

    y_i = Σ_j softmax_j(scale · q_i·k_j + mask) v_j

Compiled to a fused kernel on a GPU. On a CPU it computes forward only, unfused. A sink is applied by way of
the log-sum-exp, through which gradients flow; a window is part of the block mask.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from headwise.attention.base import SoftmaxAttention
from headwise.attention.kinds import register
from headwise.attention.modifiers import MODIFIERS
from headwise.functional.softmax_attention import additive_mask, windowed, zero_rows

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

    supports = frozenset({"causal", "full", "padding", "additive_mask", "gqa", *MODIFIERS})
    engine_family = "flex"

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        bias = empty = None
        sink, window = self.sink(), self.window(q.shape[-2])
        if mask is not None:
            mask = windowed(mask, window, q.shape[-2], q.device)
            assert mask is not None
            precise = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
            bias, empty = additive_mask(mask, causal=causal, length=q.shape[-2], like=precise)

        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert bias is not None
            return score + bias[b % bias.shape[0], 0, i, j]

        block_mask = None
        if bias is None and (causal or window is not None):
            block_mask = _blocks(q.shape[-2], q.device, causal, window)
        arguments: dict[str, Any] = {
            "score_mod": None if bias is None else add_bias,
            "block_mask": block_mask,
            "scale": self.scale,
            "enable_gqa": k.shape[1] != q.shape[1],
        }
        if q.is_cuda:
            arguments["kernel_options"] = KERNEL if bias is None else SMALL_BLOCKS
        self.record_engine("flex" if q.is_cuda else "flex-unfused")
        if sink is None:
            return zero_rows(_flex(q, k, v, arguments), empty)
        y, aux = _flex(q, k, v, arguments | {"return_aux": AuxRequest(lse=True)})
        keeps = torch.sigmoid(aux.lse - sink.to(aux.lse.dtype)[:, None])
        return zero_rows((y * keeps[..., None]).to(y.dtype), empty)


def _flex(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Any:
    """Attention; with more where `arguments` ask for `return_aux`."""
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
def _blocks(length: int, device: torch.device, causal: bool, window: int | None) -> BlockMask:
    near = window or length

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def sees_near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j < near) & ((i >= j) if causal else (j - i < near))

    seen = sees if window is None else sees_near
    return create_block_mask(seen, None, None, length, length, device=str(device))
