"""Scale one head's query; measure what follows in the head and in the output (query-scaling study).

The query is scaled after its projection and normalisation and before RoPE. In Hugging Face models it
is reached after the rotation, which is the same: a rotation is linear, `rope(s·q) = s·rope(q)`.

Scaling a query rescales that query's own logits and nothing else in its layer, so the measures of
EVERY head at all scales follow from one pass over the unchanged model (`all_heads`). This does not
hold for attention that selects: there a query's logits also decide what later queries see, and the
model is run for each head and scale instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headwise.attention.observation import Observation, Parts, Scores, Unmeasured
from headwise.errors import HeadwiseError
from headwise.functional.head_stats import HeadStats, head_stats
from headwise.measures.collector import IGNORE_FIRST, Collector, ScoresFrom
from headwise.questions.intervene.sweep import MEASURES, Sweep
from headwise.watch.effect import Effect, Speaker
from headwise.watch.hooks import Changes, Layer, changed, scale_head
from headwise.watch.observe import attached


class Tokens(Protocol):
    """Samples of one length: `headwise.watch.samples.Samples`."""

    @property
    def context_length(self) -> int:
        """T."""
        ...

    def __len__(self) -> int: ...

    def batch(self, first: int, last: int) -> Tensor:
        """Samples first … last - 1, `(n, T)`."""
        ...


@dataclass(frozen=True)
class Target:
    """One head, and what it is in the experiment: `target` or `control`."""

    layer: Layer
    head: int
    head_type: str = "target"

    @property
    def name(self) -> str:
        """`L12 H0`."""
        return f"L{self.layer.number} H{self.head}"


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        scales: factors on the query.
        scores: measure logits of q and k after their rotation (what the model attends with), or
            before it (query-scaling study).
        batch_size: samples at a time.
        ignore_first: tokens at the start of a sample that are not measured.
        advance: called with the number of passes just finished.
    """

    scales: tuple[float, ...]
    scores: ScoresFrom = "post_rope"
    batch_size: int = 4
    ignore_first: int = IGNORE_FIRST
    advance: Callable[[int], None] = lambda passes: None


@torch.no_grad()
def check_baseline(speaker: Speaker, target: Target, tokens: Tensor) -> None:
    """Scale 1.0 must equal no intervention, to the last bit of the output.

    Raises:
        HeadwiseError: it does not; nothing may be concluded from this model as it runs now.
    """
    plain = speaker(tokens)
    must_be_finite(plain, speaker.loaded.name)
    with changed(target.layer, Changes(query=scale_head(target.head, 1.0))):
        scaled = speaker(tokens)
    if not torch.equal(plain, scaled):
        difference = (plain.float() - scaled.float()).abs().max().item()
        raise HeadwiseError(
            f"check failed: {target.name} at scale 1.0 does not equal no intervention, outputs differ by "
            f"up to {difference:.3g}; the model is not deterministic as it runs, and nothing was measured"
        )


def must_be_finite(output: Tensor, name: str) -> None:
    """Refuse a model whose output, unchanged, is nothing to compare with."""
    if not output.isfinite().all():
        raise HeadwiseError(
            f"the output of {name} is not finite, so nothing can be compared with it; are there NaN weights?"
        )


@torch.no_grad()
def check_isolation(speaker: Speaker, target: Target, tokens: Tensor, scale: float = 0.5) -> None:
    """Only the target head's query may change: other heads' q, and all k and v, keep every bit.

    Raises:
        HeadwiseError: something else changes; says what.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for factor in (None, scale):
        query = None if factor is None else scale_head(target.head, factor)
        with changed(target.layer, Changes(query=query, look=lambda *qkv: seen.append(qkv))):
            speaker(tokens)
    (q, k, v), (q_scaled, k_scaled, v_scaled) = seen
    others = torch.arange(q.shape[1], device=q.device) != target.head
    unchanged = {
        "another head's query": torch.equal(q[:, others], q_scaled[:, others]),
        "a key": torch.equal(k, k_scaled),
        "a value": torch.equal(v, v_scaled),
    }
    for what, holds in unchanged.items():
        if not holds:
            raise HeadwiseError(
                f"check failed: scaling {target.name} also changes {what}; nothing was measured"
            )
    if not torch.equal(q_scaled[:, target.head], q[:, target.head] * scale):
        raise HeadwiseError(f"check failed: the query of {target.name} is not scaled; nothing was measured")


@torch.no_grad()
def refuse_unmeasurable(
    speaker: Speaker, layers: Sequence[Layer], targets: Sequence[Target], tokens: Tensor, setting: Setting,
    *, everyone: bool,
) -> None:  # fmt: skip
    """Refuse by one short pass what `sweep`, or `all_heads`, could not measure.

    Args:
        tokens: `(1, T)`.
        everyone: whether all heads are asked for.

    Raises:
        HeadwiseError: a target's attention is not a softmax of its query's logits, or that of all heads.
    """
    for target in targets:
        one = _OneHead(target, setting)
        with attached(speaker.loaded.model, one):
            speaker(tokens)
        one.must_have_seen()
    if everyone and not any(map(selects, layers)):
        every = _AllHeads(setting)
        with attached(speaker.loaded.model, every):
            speaker(tokens)
        every.must_have_seen(speaker.loaded.name)


@torch.no_grad()
def sweep(speaker: Speaker, samples: Tokens, targets: Sequence[Target], setting: Setting) -> list[Sweep]:
    """Measure each target at every scale, with the effect on the model's output.

    Raises:
        HeadwiseError: a target's attention is not a softmax of its query's logits, or memory runs out.
    """
    collectors = {(t, s): _OneHead(t, setting) for t in targets for s in setting.scales}
    effects = {key: Effect() for key in collectors}
    for first in range(0, len(samples), setting.batch_size):
        tokens = samples.batch(first, first + setting.batch_size)
        with memory_to_spare(setting.batch_size):
            before = speaker(tokens)
            for (target, scale), collector in collectors.items():
                with ExitStack() as stack:
                    stack.enter_context(attached(speaker.loaded.model, collector))
                    query = scale_head(target.head, scale)
                    stack.enter_context(changed(target.layer, Changes(query=query)))
                    after = speaker(tokens)
                collector.must_have_seen()
                effects[target, scale].add(speaker, tokens, before, after)
                setting.advance(1)
    return [
        _sweep_of(
            t, setting, [collectors[t, s] for s in setting.scales], [effects[t, s] for s in setting.scales]
        )
        for t in targets
    ]


@torch.no_grad()
def all_heads(speaker: Speaker, samples: Tokens, layers: Sequence[Layer], setting: Setting) -> list[Sweep]:
    """Every head at every scale from one pass over the model as it is; entropy and max_weight only.

    Layers whose attention is no softmax of its query's logits are left out; layers that select are
    run for each head and scale.

    Raises:
        HeadwiseError: no layer can be measured so, or memory runs out.
    """
    collector = _AllHeads(setting)
    for first in range(0, len(samples), setting.batch_size):
        with memory_to_spare(setting.batch_size), attached(speaker.loaded.model, collector):
            speaker(samples.batch(first, first + setting.batch_size))
        setting.advance(1)
    selecting = {layer.number: layer for layer in layers if selects(layer)}
    found = [s for s in collector.sweeps() if s.layer not in selecting]
    targets = [Target(layer, h, "any") for layer in selecting.values() for h in range(layer.n_heads)]
    found += sweep(speaker, samples, targets, setting) if targets else []
    if not found:
        collector.must_have_seen(speaker.loaded.name)
    return sorted(found, key=lambda s: (s.layer, s.head))


def selects(layer: Layer) -> bool:
    """Whether a query of this layer also decides what later queries see."""
    return getattr(layer.module, "selects", False)


class _OneHead(Collector):
    """Measures one head in one layer, per sample."""

    def __init__(self, target: Target, setting: Setting) -> None:
        super().__init__(measures=MEASURES, scores=setting.scores, ignore_first=setting.ignore_first)
        self.target = target
        self.values: list[dict[str, np.ndarray]] = []

    def add(self, layer: int, observation: Observation) -> None:
        """Keep `(B, T')` of each measure, of the tokens that count."""
        if layer != self.target.layer.number:
            return
        if not isinstance(observation, Scores):
            self.reasons[layer] = _why_not(observation)
            return
        one = _only(observation, self.target.head)
        stats = _measured(one, self.scores, k_eff=True)
        columns = {name: getattr(stats, name)[:, 0, self.ignore_first :] for name in MEASURES}
        self.values.append({name: value.double().cpu().numpy() for name, value in columns.items()})

    def must_have_seen(self) -> None:
        """Refuse a head that has no query to scale."""
        if not self.values:
            why = next(iter(self.reasons.values()), "it computed no attention")
            raise HeadwiseError(f"{self.target.name} cannot be scaled: {why}")

    def tokens(self, name: str) -> np.ndarray:
        """`(N, T')`, all samples."""
        return np.concatenate([batch[name] for batch in self.values])


class _AllHeads(Collector):
    """Measures every head at every scale; keeps means over tokens, per sample."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(
            measures=("entropy", "max_weight"), scores=setting.scores, ignore_first=setting.ignore_first
        )
        self.setting = setting
        self.means: dict[int, list[dict[str, np.ndarray]]] = {}
        self.squares: dict[int, dict[str, np.ndarray]] = {}
        self.n_tokens = 0

    def add(self, layer: int, observation: Observation) -> None:
        """Keep `(S, B, H)` means of each measure."""
        if not isinstance(observation, Scores):
            self.reasons[layer] = _why_not(observation)
            return
        stats = _measured(observation, self.scores, k_eff=False, q_scales=self.setting.scales)
        means = {}
        for name in self.measures:
            value = getattr(stats, name)[..., self.ignore_first :].double()
            means[name] = value.mean(-1).cpu().numpy()
            squares = self.squares.setdefault(layer, {})
            squares[name] = squares.get(name, 0) + value.square().sum((1, 3)).cpu().numpy()
        self.means.setdefault(layer, []).append(means)
        self.n_tokens = value.shape[-1]

    def must_have_seen(self, model: str) -> None:
        """Refuse a model without a query to scale."""
        if not self.means:
            why = next(iter(self.reasons.values()), "it has no softmax attention")
            raise HeadwiseError(f"no head of {model} has a gain: {why}")

    def sweeps(self) -> list[Sweep]:
        """One sweep per head, without k_eff and without an effect on the output."""
        found = []
        for layer, parts in sorted(self.means.items()):
            samples = {name: np.concatenate([p[name] for p in parts], axis=1) for name in self.measures}
            _, n, heads = samples["max_weight"].shape
            count = n * self.n_tokens
            for head in range(heads):
                mean = {name: samples[name][:, :, head].mean(1) for name in self.measures}
                std = {
                    name: _std(self.squares[layer][name][:, head], mean[name], count)
                    for name in self.measures
                }
                unknown = {"k_eff": np.full(len(self.setting.scales), np.nan)}
                found.append(
                    Sweep(
                        layer=layer,
                        head=head,
                        head_type="any",
                        scales=np.array(self.setting.scales),
                        mean=mean | unknown,
                        std=std | unknown,
                        n_tokens=count,
                        samples=samples["max_weight"][:, :, head],
                    )
                )
        return found


def _sweep_of(target: Target, setting: Setting, collectors: list[_OneHead], effects: list[Effect]) -> Sweep:
    values = {name: [c.tokens(name) for c in collectors] for name in MEASURES}  # S arrays (N, T')

    def effect(name: str, of: Callable[[Effect, str], float | None]) -> np.ndarray | None:
        found = [of(e, name) for e in effects]
        return None if any(x is None for x in found) else np.array(found, dtype=np.float64)

    return Sweep(
        layer=target.layer.number,
        head=target.head,
        head_type=target.head_type,
        scales=np.array(setting.scales),
        mean={name: np.array([x.mean() for x in values[name]]) for name in MEASURES},
        std={
            name: np.array([x.std(ddof=1) if x.size > 1 else np.nan for x in values[name]])
            for name in MEASURES
        },
        n_tokens=values["entropy"][0].size,
        delta_loss=effect("delta_loss", Effect.mean),
        delta_loss_ci95=effect("delta_loss", Effect.half_width),
        kl=effect("kl", Effect.mean),
        output_change=effect("output_change", Effect.mean),
        samples=np.stack([x.mean(1) for x in values["max_weight"]]),
    )


def _measured(
    seen: Scores, scores: ScoresFrom, *, k_eff: bool, q_scales: tuple[float, ...] | None = None
) -> HeadStats:
    q, k = seen.q, seen.k
    if scores == "pre_rope" and seen.q_pre is not None and seen.k_pre is not None:
        q, k = seen.q_pre, seen.k_pre
    return head_stats(
        q, k, causal=seen.causal, scale=seen.scale, q_scales=q_scales, bias=seen.bias, window=seen.window,
        softcap=seen.softcap, key_mask=seen.key_mask, documents=seen.documents, k_eff=k_eff,
    )  # fmt: skip


def _only(seen: Scores, head: int) -> Scores:
    """The same observation of one head."""
    kv_head = head // (seen.q.shape[1] // seen.k.shape[1])
    bias = seen.bias if seen.bias is None or seen.bias.shape[1] == 1 else seen.bias[:, head : head + 1]
    return replace(
        seen, q=seen.q[:, head : head + 1], k=seen.k[:, kv_head : kv_head + 1], bias=bias,
        q_pre=None if seen.q_pre is None else seen.q_pre[:, head : head + 1],
        k_pre=None if seen.k_pre is None else seen.k_pre[:, kv_head : kv_head + 1],
    )  # fmt: skip


def _why_not(observation: Observation) -> str:
    if isinstance(observation, Unmeasured):
        return observation.reason
    if isinstance(observation, Parts):
        several = len(observation.parts)
        return f"its heads have {several} softmaxes each, and scaling one query of several sharpens only one"
    return "its weights are not a softmax of its query's logits, so the query's length does not sharpen them"


def _std(squares: np.ndarray, mean: np.ndarray, count: int) -> np.ndarray:
    if count < 2:
        return np.full_like(mean, np.nan)
    return np.sqrt(np.maximum(squares - count * mean**2, 0) / (count - 1))


@contextmanager
def memory_to_spare(batch_size: int) -> Iterator[None]:
    """Turn running out of GPU memory into a line that says which batch size to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        hint = f"try --batch-size {batch_size // 2}" if batch_size > 1 else "try a shorter --context-length"
        raise HeadwiseError(f"out of memory with {batch_size} samples at a time; {hint}") from error
