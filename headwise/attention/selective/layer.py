"""`selective`: attention whose queries mask keys for later queries (Leviathan, Kalman, Matias 2024).

    y_i = Σ_j softmax_j(scale · q_i·k_j - F[i,j]) v_j,   F as in `headwise.functional.selective`

All sources of the selection logits are one thing here: selection queries `(B, M, T, E)`, selection keys
`(B, M or 1, T, E)` and a factor. A combination of heads' logits is the product of their concatenated,
weighted queries with their concatenated keys; slices of a head are narrow heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headwise.attention.base import AttentionShape, Carry, NewHead, Preserved, Rope
from headwise.attention.cache import KeyValueCache, LayerCache
from headwise.attention.flash import FlashAttention
from headwise.attention.kinds import register
from headwise.attention.modifiers import MODIFIERS
from headwise.attention.observation import Observation, Scores
from headwise.attention.selective import heads as new_heads
from headwise.attention.selective.budget import Pruner
from headwise.attention.selective.cache import SelectiveCache
from headwise.attention.selective.config import SelectiveConfig
from headwise.attention.selective.engines import fallback
from headwise.functional.budget import GONE
from headwise.functional.dispatch import fits_kernel
from headwise.functional.selective import (
    Protection,
    fits_own_masks,
    memory_penalty,
    own_mask_attention,
    selection,
    selection_logits,
    selection_mask,
    selective_attention,
)
from headwise.functional.sharing import per_head
from headwise.functional.softmax_attention import windowed

BIG_CONSTANT = 50.0
MASK_BYTES = 1 << 29
"""Largest F that is kept whole where every head has a mask of its own; beyond it, some heads at a time."""


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
    supports = frozenset({"causal", "gqa", "cpu_training", *MODIFIERS})
    engine_family = "selective"
    sections = ("headwise.attention.selective.section:KEPT_CONTEXT",)
    benchmarks: ClassVar[Mapping[str, str]] = {
        "selective": "headwise.attention.selective.bench",
        "selective-step": "headwise.attention.selective.bench_step",
    }
    monitors: ClassVar[Mapping[str, str]] = {"sums": "headwise.attention.selective.sums:SumRecorder"}
    inspector = "headwise.attention.selective.inspect"
    engine_table = "headwise.attention.selective.engines:engine_table"
    attached = (*FlashAttention.attached, "prune", "mask")

    def __init__(self, shape: AttentionShape, options: SelectiveConfig | None = None) -> None:
        super().__init__(shape, options)
        self.config = (options or SelectiveConfig()).at(shape.layer)
        inherited = set(self.parameters())
        with torch.random.fork_rng(devices=[]):  # what the kind adds shifts no other draw of a model
            self._add_parameters()
            self.initialise()
        if not self.config.enabled:  # what it adds is there to be read and written, and nothing uses it
            for parameter in set(self.parameters()) - inherited:
                parameter.requires_grad_(False)
        self.mask: Tensor | None = None
        """F of the last forward pass, kept only for an attached observer."""
        self.prune: Callable[[Tensor, Carry], Tensor] | None = None
        """Where set, gives F, `(B, M or H, T, T)`, with `GONE` for dropped keys: a context budget."""

    def idle(self) -> list[nn.Module]:
        """The projection of extra heads, where selection is off."""
        return [self.select] if self.select is not None and not self.config.enabled else []

    def _add_parameters(self) -> None:
        shape, config = self.shape, self.config
        heads, masks, extra = shape.n_heads, config.masks(shape.n_heads), config.extra_heads()
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
        if config.mixes(shape.layer):
            self.residual = nn.Parameter(torch.empty(masks, masks))

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
        selector = self.selector(x, q, k, rope)
        protection = self.protection(selector, q, k)
        whole = self.prune is not None or self.observer is not None
        if not whole and self.streams(selector, q):
            self.record_engine("selective-fused")
            return self.streamed(selector, q, k, v)
        step = self.shape.n_heads if whole else self.masks_at_once(selector, q)
        sink = self.sink()
        if step == self.shape.n_heads:
            y, penalty = self.under(selector, protection, q, k, v, sink, carry)
        else:
            parts = [
                checkpoint(
                    self.under, *one_group(selector, protection, q, k, v, sink, slice(at, at + step)), carry,
                    use_reentrant=False, preserve_rng_state=False,
                )
                for at in range(0, self.shape.n_heads, step)
            ]  # fmt: skip
            y = torch.cat([part[0] for part in parts], dim=1)
            penalty = torch.stack([part[1] for part in parts]).mean()
        carry.penalty = carry.penalty + penalty
        return y

    def under(
        self,
        selector: Selector,
        protection: Protection | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        carry: Carry,
    ) -> tuple[Tensor, Tensor]:
        """Attention under the masks of `selector`, and what they add to the loss."""
        taken = self.mask_of(selector, protection, carry)
        near = windowed(None, self.window(q.shape[-2]), q.shape[-2], q.device)
        if near is not None:  # a key outside of the window is gone for good
            taken = taken.masked_fill(~near, GONE)
        if self.prune is not None:
            taken = self.prune(taken.tril(), carry)
        if self.observer is not None:
            self.mask = taken.detach().tril()
        penalty = self.penalty(taken) if self.config.memory_penalty.epsilon else taken.new_zeros(())
        engine = "fused" if self.fused(q) else "plain-mask" if fits_kernel(q) else "plain"
        self.record_engine(f"selective-{engine}")
        return selective_attention(q, k, v, taken, scale=self.scale, sink=sink), penalty

    @property
    def selects(self) -> bool:
        """Whether selection is enabled."""
        return self.config.enabled

    @property
    def keeps_first(self) -> bool:
        """Whether the first key is always held within a context budget."""
        return self.config.enabled and self.config.protect_bos

    def whole_context_only(self) -> str | None:
        """Without selection there is no F to drop keys by."""
        return None if self.selects else "its selection is disabled, so it has no F to drop keys by"

    @contextmanager
    def within_share(self, share: float, *, readmit: bool = False) -> Iterator[None]:
        """While it lasts, hold at most `share` of the sequence: the keys that F took least from."""
        self.prune = Pruner(self, share, readmit)
        try:
            yield
        finally:
            self.prune = None

    def undecodable(self) -> str | None:
        """`mask_layernorm` needs the whole sequence."""
        if not self.config.mask_layernorm:
            return None
        return (
            "mask_layernorm normalises F over all keys of a query, dropped ones too, and divides it by the "
            "number of queries still to come"
        )

    def cache(self, batch: int, slots: int, length: int, like: Tensor) -> LayerCache:
        """Keys and values, of which those that were masked most leave first."""
        cache = SelectiveCache if self.selects else KeyValueCache
        return cache(self, batch, slots, length, like)

    @classmethod
    def check(cls, shape: AttentionShape, options: SelectiveConfig) -> None:
        """Refuse `layers` that the model does not have."""
        options.refuse_beyond(shape.n_layers)

    @classmethod
    def heads_interact(cls, options: SelectiveConfig) -> bool:
        """Heads mask keys for one another."""
        return options.enabled

    @classmethod
    def head_ranges(cls, leaf: str, index: int, options: SelectiveConfig) -> dict[int, list[tuple[int, int]]]:
        """Where a head lies in the learned combinations."""
        return new_heads.head_ranges(leaf, index, options)

    @classmethod
    def preserves(cls, head: NewHead, before: SelectiveConfig | None, after: SelectiveConfig) -> Preserved:
        """Whether the masks of the other heads stay."""
        return new_heads.preserves(head, before, after)

    def streams(self, selector: Selector, q: Tensor) -> bool:
        """Whether masks, one a head, are made within the attention's kernel and never kept.

        That kernel knows neither a sink nor a window.
        """
        shape = self.shape
        if self.sink() is not None or self.window(q.shape[-2]) is not None:
            return False
        width = self.config.width(shape.n_kv_heads, shape.head_dim)
        return self.config.streams(shape.n_heads, width) and fits_own_masks(q, selector.q)

    def streamed(self, selector: Selector, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention under masks of which nothing is kept."""
        config = self.config
        return own_mask_attention(
            q, k, v, selector.q, selector.k, scale=self.scale, select_scale=selector.scale,
            bias=selector.bias, protect_bos=config.protect_bos, protect_self=config.protect_self,
            relu_leak=config.relu_leak, relu_after_cumsum=config.relu_after_cumsum,
        )  # fmt: skip

    @classmethod
    def flops_per_token(cls, shape: AttentionShape, options: SelectiveConfig | None, seq_len: int) -> int:
        """Forward FLOPs of the core for one token: of `flash`, and of what makes the mask.

        Counted over all keys are the selection logits, those that protect, and the product that mixes an
        earlier layer's logits into a later one's; by token the product that combines heads' queries. The
        projection of extra heads is an `nn.Linear` and counted as one. The running sum over queries is not
        a product of matrices (what a kernel does with products of ones is its own affair), nor are the game
        of attack and protection, the activation, and the penalty; none of them is counted. Neither is what
        is computed again in a backward pass to save memory.
        """
        config = (options or SelectiveConfig()).at(shape.layer)
        flops = super().flops_per_token(shape, options, seq_len)
        if not config.enabled:
            return flops
        masks, own_keys = config.masks(shape.n_heads), shape.n_kv_heads * shape.head_dim
        width = config.width(shape.n_kv_heads, shape.head_dim)
        logits, queries = 2 * masks * width, shape.n_heads * shape.head_dim
        flops += seq_len * logits
        if config.source in ("linear_combo", "latent"):
            flops += 2 * (width if config.source == "latent" else queries) * masks * width
        if config.protection.kind == "head_two":
            flops += seq_len * 2 * shape.head_dim
        elif config.protection.kind.startswith("linear_combo"):
            flops += seq_len * 2 * own_keys + 2 * queries * own_keys
        elif config.protection.kind == "leaky_relu" and not config.residual_logits:
            flops += seq_len * logits  # made a second time
        if config.mixes(shape.layer) and masks > 1:  # a single mask's by a number
            flops += seq_len * 2 * masks**2
        return flops

    def fused(self, q: Tensor) -> bool:
        """Whether kernels compute the mask as well as the attention under it."""
        return self.config.plain_because() is None and fits_kernel(q)

    def fallback(self, batch: int, tokens: int) -> str | None:
        """Why the last pass was not on the fused engine."""
        shape = self.shape
        return fallback(
            self.config, self.engine, cuda=next(self.out.parameters()).is_cuda, n_heads=shape.n_heads,
            head_dim=shape.head_dim, batch=batch, tokens=tokens,
        )  # fmt: skip

    def masks_at_once(self, selector: Selector, q: Tensor) -> int:
        """Heads whose masks may be in memory together: all of them, unless each has its own."""
        batch, masks, tokens, _ = selector.q.shape
        heads, group = self.shape.n_heads, self.shape.n_heads // self.shape.n_kv_heads
        if masks < heads or heads == 1 or not self.fused(q):
            return heads
        for step in range(heads, 0, -1):
            fits = 4 * batch * step * tokens**2 <= MASK_BYTES or step == 1
            if heads % step == 0 and fits and (step % group == 0 or group % step == 0):
                return step
        return 1

    def taken(self, x: Tensor, q: Tensor, k: Tensor, rope: Rope | None, carry: Carry) -> Tensor:
        """F, `(B, M, T, T)` float32 or better, 0 above the diagonal."""
        selector = self.selector(x, q, k, rope)
        return self.mask_of(selector, self.protection(selector, q, k), carry).tril()

    def mask_of(self, selector: Selector, protection: Protection | None, carry: Carry) -> Tensor:
        """F of a selector; of a kernel's, only what lies on and below the diagonal counts."""
        config = self.config
        switches: dict[str, Any] = {
            "protect_bos": config.protect_bos, "protect_self": config.protect_self,
            "relu_leak": config.relu_leak, "relu_after_cumsum": config.relu_after_cumsum,
        }  # fmt: skip
        if not config.residual_logits:
            taken = selection(
                selector.q, selector.k, scale=selector.scale, bias=selector.bias, protection=protection,
                accumulate=config.accumulate, **switches,
            )  # fmt: skip
        else:
            logits = selector.logits(config.accumulate == "float64")
            if self.residual is not None and carry.logits is not None:
                with torch.autocast(logits.device.type, enabled=False):
                    logits = logits + torch.einsum(
                        "nm,bmij->bnij", self.residual.to(logits.dtype), carry.logits
                    )
            carry.logits = logits
            how = "torch" if config.accumulate == "fused" else config.accumulate
            p = protection.of(logits) if protection else None
            if self.protects_by_attacks():
                p = self.rule().strength(logits).tril()
            taken = selection_mask(logits, p, accumulate=how, **switches)
        if config.mask_layernorm:
            taken = normalised(taken)
        return taken.to(torch.promote_types(selector.q.dtype, torch.float32))

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

    def protection(self, selector: Selector, q: Tensor, k: Tensor) -> Protection | None:
        """What protects keys, by `protection.kind`; None where nothing does."""
        kind = self.config.protection.kind
        if kind == "none":
            return None
        protector = selector if kind == "leaky_relu" else self.protector(q, k)
        if protector is None or self.protects_by_attacks():
            return self.rule()
        return replace(
            self.rule(), q=protector.q, k=protector.k, qk_scale=protector.scale, qk_bias=protector.bias
        )

    def protects_by_attacks(self) -> bool:
        """Whether the logits that protect are those that attack, earlier layers' share included."""
        return self.config.residual_logits and self.config.protection.kind == "leaky_relu"

    def protector(self, q: Tensor, k: Tensor) -> Selector | None:
        """What makes the logits of protection, by `protection.kind`; None where none of their own."""
        kind = self.config.protection.kind
        if kind == "head_two":
            second = int(self.shape.n_kv_heads == self.shape.n_heads)  # otherwise it shares head 0's keys
            return Selector(q[:, 1:2], k[:, second : second + 1], self.scale)
        if self.protection_combination is not None:
            return combined(q, k, self.protection_combination, self.scale, None)
        return None

    def rule(self) -> Protection:
        """How protecting logits protect."""
        config = self.config.protection
        bias = config.bias or 0.0
        if config.kind == "leaky_relu":
            return Protection(slope=-config.alpha, offset=config.offset, scale=config.scale, bias=bias)
        if config.kind in ("zero", "big_constant"):
            constant = BIG_CONSTANT if config.kind == "big_constant" else 0.0
            return Protection(slope=0.0, offset=constant, scale=config.scale, bias=bias)
        return Protection(scale=config.scale, bias=bias)

    def strength(self, logits: Tensor, own: Tensor | None) -> Tensor:
        """p of selection logits `(B, M, …)` and the protector's own, `(B, 1, …)`, where it has any."""
        return self.rule().strength(logits if own is None else own)

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
        """The softmax scores, with -F as the bias it is. A layer that `layers` leaves out has F = 0."""
        if self.mask is None:
            seen = self.softmax_scores(q, k, q_pre, k_pre, mask=mask, causal=causal)
            if self.selects or self.config.layers is None:
                return seen
            return replace(seen, taken=q.new_zeros(()).expand(q.shape[0], 1, q.shape[2], q.shape[2]))
        taken = per_head(self.mask, self.shape.n_heads)
        self.mask = None
        return Scores(
            q, k, self.scale, causal=causal, bias=-taken, window=self.window(q.shape[-2]), q_pre=q_pre,
            k_pre=k_pre, taken=taken,
        )  # fmt: skip


def combined(q: Tensor, k: Tensor, weights: Tensor, scale: float, bias: Tensor | None) -> Selector:
    """Masks `Σ_h weights[m,h] · q_h·k_h` as one product each.

    Args:
        q: `(B, H, T, E)`.
        k: `(B, K, T, E)`; heads that share a key are added before the product.
        weights: `(M, H)`.
    """
    grouped = weights.to(q.dtype).unflatten(1, (k.shape[1], -1))
    same_key, same_entry = (torch.eye(n, dtype=q.dtype, device=q.device) for n in (k.shape[1], q.shape[-1]))
    with torch.autocast(q.device.type, enabled=False):
        # (K, G, E) -> (M, K, E) as one product instead of broadcasts and their sums.
        mixing = torch.einsum("mkg,kl,ef->kgemlf", grouped, same_key, same_entry)
        queries = q.transpose(1, 2).flatten(2) @ mixing.flatten(3).flatten(0, 2)
    queries = queries.unflatten(-1, (len(weights), -1)).transpose(1, 2)
    return Selector(queries, k.transpose(1, 2).flatten(-2)[:, None], scale, bias)


def one_group(
    selector: Selector,
    protection: Protection | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    heads: slice,
) -> tuple[Selector, Protection | None, Tensor, Tensor, Tensor, Tensor | None]:
    """What some heads need of a layer whose heads have a mask each."""

    def part(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == 1 else x[:, heads]

    group = q.shape[1] // k.shape[1]
    shared = slice(heads.start // group, -(-heads.stop // group))
    bias = None if selector.bias is None else selector.bias[heads]
    keys = selector.k if selector.k.shape[1] == 1 else selector.k[:, heads]
    if protection is not None:
        own = None if protection.qk_bias is None else protection.qk_bias[heads]
        protection = replace(protection, q=part(protection.q), k=part(protection.k), qk_bias=own)
    few = Selector(selector.q[:, heads], keys, selector.scale, bias)
    sink = None if sink is None else sink[heads]
    return few, protection, q[:, heads], k[:, shared], v[:, shared], sink


def normalised(taken: Tensor) -> Tensor:
    """F `(B, M, T, T)` normalised per query over masks and visible keys; columns by their later queries."""
    length = taken.shape[-1]
    taken = taken.tril()
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
