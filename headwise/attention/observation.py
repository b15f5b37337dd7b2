"""The six forms of what an attention layer offers to be measured.

A layer computes; an observer measures. While no observer is attached nothing of this is built. `extra`
holds measures that the layer computes itself, `(B, H, T)` by the name of a registered measure (see
`headwise.measures.spec`), or functions that give them and are called where the measure is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Extra = Mapping[str, Tensor | Callable[[], Tensor]]


@dataclass(frozen=True)
class Scores:
    """Weights are a softmax of `scale · q·k + bias` (soft-capped first where `softcap` is set).

    Attributes:
        q: queries as they enter the scores, `(B, H, T, D)`.
        k: keys, `(B, K, T, D)` with `H % K == 0`.
        scale: factor on q·k.
        causal: query i sees keys j <= i only.
        bias: additive mask, `(B or 1, H or 1, T, T)`; -inf where a key is not visible.
        softcap: logits become `softcap · tanh(logits / softcap)`.
        window: query i sees keys j > i - window only.
        key_mask: `(B, T)`, True where a key is real and not padding.
        documents: `(B, T)` integers, the same for the consecutive tokens of one document; a query sees keys
            of its own document only. None = a row is one document.
        q_pre: queries before rotation, `(B, H, T, D)`, q itself where nothing is rotated; None = not known.
        k_pre: keys before rotation, `(B, K, T, D)`.
        taken: F, how much of key j was masked before query i came, `(B, 1 or H, T, T)`, for kinds whose
            queries mask keys; `bias` already has -F.
        sink: a logit in the softmax that has no key, `(H,)` or `(B, H, T)`; the measure `null_weight` is its
            share, and all others are of the weights over the keys, normalised to 1.
    """

    q: Tensor
    k: Tensor
    scale: float
    causal: bool = True
    bias: Tensor | None = None
    softcap: float | None = None
    window: int | None = None
    key_mask: Tensor | None = None
    documents: Tensor | None = None
    q_pre: Tensor | None = None
    k_pre: Tensor | None = None
    taken: Tensor | None = None
    sink: Tensor | None = None
    extra: Extra = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """Explicit weights `(B, H, T, T)` of the first `window` tokens, for kinds without a softmax of q·k.

    `key_mask` and `documents` as in `Scores`.
    """

    weights: Tensor
    window: int
    key_mask: Tensor | None = None
    documents: Tensor | None = None
    extra: Extra = field(default_factory=dict)


@dataclass(frozen=True)
class Margins:
    """Margins γ of maxima over keys, `(B, H, T)`; +inf where fewer than two keys are visible.

    `key_mask` and `documents` as in `Scores`.
    """

    margin: Tensor
    key_mask: Tensor | None = None
    documents: Tensor | None = None
    extra: Extra = field(default_factory=dict)


@dataclass(frozen=True)
class Values:
    """Measures that the layer computes itself, and nothing else to be measured.

    `key_mask` and `documents` as in `Scores`.
    """

    extra: Extra
    key_mask: Tensor | None = None
    documents: Tensor | None = None


@dataclass(frozen=True)
class Unmeasured:
    """Nothing to measure, and why."""

    reason: str


@dataclass(frozen=True)
class Parts:
    """A layer whose heads have several softmaxes, each with weights of its own.

    Attributes:
        parts: each softmax by its name in the column `part` of the head table: lower-case letters and digits.
        whole: measures of the whole head, whose `part` is null.
    """

    parts: Mapping[str, Scores | Weights]
    whole: Values


Observation = Scores | Weights | Margins | Values | Unmeasured | Parts
Observer = Callable[[Observation], None]


def by_part(seen: Observation) -> Iterator[tuple[str, Observation]]:
    """What a layer offers of its whole heads, under an empty name, and of each of their parts."""
    if not isinstance(seen, Parts):
        yield "", seen
        return
    yield "", seen.whole
    yield from seen.parts.items()


@dataclass(frozen=True)
class Mask:
    """A mask in the terms of `Scores`."""

    causal: bool
    window: int | None = None
    key_mask: Tensor | None = None
    bias: Tensor | None = None
    documents: Tensor | None = None


def read_mask(
    mask: Tensor, batch: int, *, causal: bool = False, segments: bool = True, of: Mask | None = None
) -> Mask:
    """A mask as causality, window, padding and documents where it is made of these; as a bias otherwise.

    Args:
        mask: `(B or 1, H or 1, T or 1, T)`, bool (True = may attend) or additive.
        batch: B.
        causal: query i sees keys j <= i only, whatever the mask lets through.
        segments: blocks that do not see each other are documents; False where the layer itself cuts a
            document into chunks.
        of: the mask that this one chooses keys of, which tells padding and documents: a token whose key
            nobody chose is no padding.
    """
    mask = mask.expand(*mask.shape[:-2], mask.shape[-1], mask.shape[-1])
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if causal:
        visible = visible.tril()
    if of is not None:
        real, documents = of.key_mask, of.documents
    else:
        real = _seen(visible).expand(batch, mask.shape[-1])
        documents = _documents(visible, batch) if segments else None
    read = _pattern(visible, batch, documents, real)
    added = mask.dtype != torch.bool and bool((mask.masked_fill(~visible, 0) != 0).any())
    if read is not None and not added:
        return read
    bias = torch.zeros_like(visible, dtype=torch.float32) if mask.dtype == torch.bool else mask.float()
    return Mask(False, None, real, bias.masked_fill(~visible, -torch.inf), documents)


def _seen(visible: Tensor) -> Tensor:
    """The keys that any query sees, `(B or 1, T)`, of `visible (B or 1, H or 1, T, T)`."""
    return visible.any(-2).any(1)


def _pattern(visible: Tensor, batch: int, documents: Tensor | None, real: Tensor | None) -> Mask | None:
    """`visible (B or 1, 1, T, T)` as causal, window, padding and documents; None if it is more."""
    if visible.shape[1] != 1:
        return None
    visible = visible[:, 0]
    tokens = visible.shape[-1]
    position = torch.arange(tokens, device=visible.device)
    behind = position[:, None] - position  # how far key j lies behind query i
    reach = int(torch.where(visible, behind.abs(), 0).max()) + 1
    causal = not bool((visible & (behind < 0)).any())
    expected = (behind.abs() < reach)[None]
    if real is not None:
        expected = expected & real[:, None]
    if causal:
        expected &= behind >= 0
    if documents is not None:
        expected = expected & (documents[:, :, None] == documents[:, None])
    if not torch.equal(*torch.broadcast_tensors(visible, expected)):
        return None
    longest = tokens if documents is None else int(_lengths(documents).max())
    key_mask = None if real is None or bool(real.all()) else real.expand(batch, tokens)
    return Mask(causal and tokens > 1, reach if reach < longest else None, key_mask, None, documents)


def _documents(visible: Tensor, batch: int) -> Tensor | None:
    """The parts of each row that do not see each other, `(B, T)` int64; None where every row is one.

    A token begins a document where no query from it on sees a key before it, nor the other way round.
    """
    seen = visible.any(1)
    tokens = seen.shape[-1]
    position = torch.arange(tokens, device=seen.device)
    first = torch.where(seen, position, tokens).amin(-1).minimum(position)
    last = torch.where(seen, position, -1).amax(-1).maximum(position)
    crossed = torch.zeros(len(seen), tokens + 1, dtype=torch.int64, device=seen.device)
    one = torch.ones_like(first)
    crossed.scatter_add_(1, first + 1, one).scatter_add_(1, last + 1, -one)
    begins = crossed[:, :tokens].cumsum(-1) == 0
    documents = begins.cumsum(-1) - 1
    real = seen.any(-2)
    return documents.expand(batch, tokens) if bool((_count(documents, real) > 1).any()) else None


def _count(documents: Tensor, real: Tensor) -> Tensor:
    """How many documents of each row have a real key, `(B,)`."""
    has = torch.zeros_like(documents, dtype=torch.bool).scatter_reduce(1, documents, real, "amax")
    return has.sum(-1)


def _lengths(documents: Tensor) -> Tensor:
    """How long the documents of each row are, `(B, T)`, zeros at the end."""
    return torch.zeros_like(documents).scatter_add(1, documents, torch.ones_like(documents))
