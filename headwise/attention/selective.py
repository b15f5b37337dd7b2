"""`selective`: attention whose queries mask keys for later queries (Leviathan, Kalman, Matias 2024).

    y_i = Σ_j softmax_j(scale · q_i·k_j - F[i,j]) v_j,   F as in `headwise.functional.selective`

All sources of the selection logits are one thing here: selection queries `(B, M, T, E)`, selection keys
`(B, M or 1, T, E)` and a factor. A combination of heads' logits is the product of their concatenated,
weighted queries with their concatenated keys; slices of a head are narrow heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headwise.attention.base import AttentionShape, Carry, Rope, register
from headwise.attention.flash import FlashAttention
from headwise.attention.observation import Observation, Scores
from headwise.attention.selective_config import SelectiveConfig
from headwise.functional.selective import (
    memory_penalty,
    per_head,
    selection_logits,
    selection_mask,
    selective_attention,
)

BIG_CONSTANT = 50.0


class Selector(NamedTuple):
    """Queries `(B, M, T, E)`, keys `(B, M or 1, T, E)`, a factor and a bias `(M,)` that give logits."""

    q: Tensor
    k: Tensor
    scale: float
    bias: Tensor | None = None

    def logits(self, precise: bool) -> Tensor:
        """`(B, M, T, T)`, computed in float64 where `precise`."""
        q, k = (self.q.double(), self.k.double()) if precise else (self.q, self.k)
        return selection_logits(q, k, scale=self.scale, bias=self.bias)


@register("selective")
class SelectiveAttention(FlashAttention):
    """Softmax attention under a mask that earlier queries made."""

    options = SelectiveConfig
    supports = frozenset({"causal", "gqa", "cpu_training"})
    engine_family = "selective"

    def __init__(self, shape: AttentionShape, options: SelectiveConfig | None = None) -> None:
        super().__init__(shape, options)
        self.config = config = options or SelectiveConfig()
        heads, masks = shape.n_heads, config.masks(shape.n_heads)
        extra = config.extra_heads()
        self.select = nn.Linear(shape.d_model, 2 * extra * shape.head_dim, bias=shape.bias) if extra else None
        self.combination = self.combination_bias = self.protection_combination = self.residual = None
        if config.source == "linear_combo":
            self.combination = nn.Parameter(torch.empty(masks, heads))
            if config.combination_init == "head_zero_and_bias":
                self.combination_bias = nn.Parameter(torch.empty(masks))
        elif config.source == "latent":
            self.combination = nn.Parameter(torch.empty(heads, config.n_masks))
            self.combination_bias = nn.Parameter(torch.empty(heads)) if config.latent_bias else None
        if config.protection.kind.startswith("linear_combo"):
            self.protection_combination = nn.Parameter(torch.empty(1, heads))
        if config.residual_logits and shape.layer > 0:
            self.residual = nn.Parameter(torch.empty(masks, masks))
        self.mask: Tensor | None = None
        """F of the last forward pass, kept only for an attached observer."""
        self.prune: Callable[[Tensor, Carry], Tensor] | None = None
        """Where set, gives F, `(B, M or H, T, T)`, with +inf for keys that are dropped: a context budget."""
        self.initialise()

    def initialise(self) -> None:
        """Draw the selection parameters as their switches say."""
        config = self.config
        if self.combination is not None:
            init = config.combination_init if config.source == "linear_combo" else config.latent_init
            _draw(self.combination, init)
        if self.combination_bias is not None:
            nn.init.zeros_(self.combination_bias)
        if self.protection_combination is not None:
            second = config.protection.kind == "linear_combo_head_two"
            _draw(self.protection_combination, "head_two" if second else "normal")
        if self.residual is not None:
            nn.init.normal_(self.residual, std=0.02)

    def lr_multipliers(self) -> dict[str, float]:
        """Learning-rate multipliers of the selection parameters, which do not decay."""
        own = ("combination", "combination_bias", "protection_combination", "residual")
        names = [name for name in own if getattr(self, name) is not None]
        return {name: self.config.combination_lr if "combination" in name else 1.0 for name in names}

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
        """The core, under the F that x, q and k make."""
        self.mask = None
        if not self.config.enabled:
            return self.core(q, k, v, mask=mask, causal=causal)
        taken = self.taken(x, q, k, rope, carry)
        if self.prune is not None:
            taken = self.prune(taken, carry)
        if self.config.memory_penalty.epsilon:
            carry.penalty = carry.penalty + self.penalty(taken)
        if self.observer is not None:
            self.mask = taken.detach()
        self.record_engine("selective-plain")
        return selective_attention(q, k, v, taken, scale=self.scale)

    def taken(self, x: Tensor, q: Tensor, k: Tensor, rope: Rope | None, carry: Carry) -> Tensor:
        """F, `(B, M, T, T)` float32 or better."""
        config = self.config
        precise = config.accumulate == "float64"
        selector = self.selector(x, q, k, rope)
        logits = selector.logits(precise)
        if config.residual_logits:
            if self.residual is not None and carry.logits is not None:
                mixed = torch.einsum("nm,bmij->bnij", self.residual.to(logits.dtype), carry.logits)
                logits = logits + mixed
            carry.logits = logits
        taken = selection_mask(
            logits,
            self.protection(logits, q, k, precise),
            protect_bos=config.protect_bos,
            protect_self=config.protect_self,
            relu_leak=config.relu_leak,
            relu_after_cumsum=config.relu_after_cumsum,
            accumulate="torch" if config.accumulate == "fused" else config.accumulate,
        )
        if config.mask_layernorm:
            taken = normalised(taken)
        return taken.to(torch.promote_types(q.dtype, torch.float32))

    def selector(self, x: Tensor, q: Tensor, k: Tensor, rope: Rope | None) -> Selector:
        """What makes the selection logits, by `source`."""
        config = self.config
        if config.source == "head_zero":
            return Selector(q[:, :1], k[:, :1], self.scale)
        if config.source == "linear_combo":
            assert self.combination is not None
            return combined(q, k, self.combination, self.scale, self.combination_bias)
        assert self.select is not None
        heads = self.select(x).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
        select_q, select_k = heads.chunk(2, dim=1)
        if rope is not None:
            select_q, select_k = rope(select_q, select_k)
        if config.mask_heads == "sliced":
            select_q, select_k = (
                part[:, 0].unflatten(-1, (config.n_masks, -1)).transpose(1, 2)
                for part in (select_q, select_k)
            )
        if config.source == "dedicated":
            return Selector(select_q, select_k, self.scale)
        assert self.combination is not None
        scale = self.scale * config.latent_scale
        return combined(select_q, select_k, self.combination, scale, self.combination_bias)

    def protection(self, logits: Tensor, q: Tensor, k: Tensor, precise: bool) -> Tensor | None:
        """p, `(B, M or 1, T, T)` and 0 above the diagonal, by `protection.kind`; None where there is none."""
        if self.config.protection.kind == "none":
            return None
        protector = self.protector(q, k)
        return self.strength(logits, protector and protector.logits(precise)).tril()

    def protector(self, q: Tensor, k: Tensor) -> Selector | None:
        """What makes the logits of protection, by `protection.kind`; None where none of their own."""
        kind = self.config.protection.kind
        if kind == "head_two":
            second = int(self.shape.n_kv_heads == self.shape.n_heads)  # otherwise it shares head 0's keys
            return Selector(q[:, 1:2], k[:, second : second + 1], self.scale)
        if self.protection_combination is not None:
            return combined(q, k, self.protection_combination, self.scale, None)
        return None

    def strength(self, logits: Tensor, own: Tensor | None) -> Tensor:
        """p of the selection logits `(B, M, …)` and the protector's own, `(B, 1, …)`."""
        config = self.config.protection
        if own is not None:
            p = own.relu()
        elif config.kind == "leaky_relu":
            p = (config.offset - config.alpha * logits).relu()
        else:
            p = torch.full_like(logits[:, :1], BIG_CONSTANT if config.kind == "big_constant" else 0.0)
        p = p * config.scale
        return p if config.bias is None else (p + config.bias).relu()

    def penalty(self, taken: Tensor) -> Tensor:
        """This layer's share of the memory penalty."""
        config = self.config.memory_penalty
        share = config.epsilon / self.shape.n_layers if config.normalize_layers else config.epsilon
        return share * memory_penalty(taken, tau=config.tau, reduce=config.reduce)

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
        """The softmax scores, with -F as the bias it is."""
        if self.mask is None:
            return super().observation(q, k, v, q_pre, k_pre, mask=mask, causal=causal)
        bias = -per_head(self.mask, self.shape.n_heads)
        self.mask = None
        return Scores(q, k, self.scale, causal=causal, bias=bias, q_pre=q_pre, k_pre=k_pre)


def combined(q: Tensor, k: Tensor, weights: Tensor, scale: float, bias: Tensor | None) -> Selector:
    """Masks `Σ_h weights[m,h] · q_h·k_h` as one product each.

    Args:
        q: `(B, H, T, E)`.
        k: `(B, K, T, E)`; heads that share a key are added before the product.
        weights: `(M, H)`.
    """
    grouped = weights.unflatten(1, (k.shape[1], -1))
    with torch.autocast(q.device.type, enabled=False):
        queries = torch.einsum("mkg,bkgte->bmtke", grouped.to(q.dtype), q.unflatten(1, (k.shape[1], -1)))
    return Selector(queries.flatten(-2), k.transpose(1, 2).flatten(-2)[:, None], scale, bias)


def normalised(taken: Tensor) -> Tensor:
    """F `(B, M, T, T)` normalised per query over masks and visible keys; columns by their later queries."""
    length = taken.shape[-1]
    visible = torch.ones(length, length, dtype=torch.bool, device=taken.device).tril()
    count = visible.sum(-1, keepdim=True) * taken.shape[1]
    mean = taken.sum((1, 3), keepdim=True) / count
    apart = (taken - mean) * visible
    variance = apart.square().sum((1, 3), keepdim=True) / count
    later = torch.arange(length - 1, -1, -1, device=taken.device).clamp(min=1)
    return apart / (variance + 1e-5).sqrt() / later


def _draw(weights: nn.Parameter, init: str) -> None:
    if init == "normal":
        nn.init.normal_(weights, std=0.02)
        return
    with torch.no_grad():
        weights.zero_()
        if init == "ones":
            weights.fill_(1.0)
        elif init == "inverse":
            weights.fill_(1.0 / weights.shape[1])
        else:
            weights[:, 1 if init == "head_two" else 0] = 1.0
