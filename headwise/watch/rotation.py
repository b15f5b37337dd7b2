"""Undo rotary embeddings: q and k as they were before a Hugging Face layer rotated them.

transformers hands attention functions q and k after the rotation. The rotation is linear and its
tables are the model's own (cos, sin), which layers receive as an argument or compute inside, so
it can be undone: with `a' = a·cos - b·sin` and `b' = b·cos + a·sin`,

    a = (a'·cos + b'·sin) / (cos² + sin²)        b = (b'·cos - a'·sin) / (cos² + sin²)

The divisor matters: YaRN and LongRoPE scale their tables, so that cos² + sin² is not 1. In float32
q and k come back to rounding; in bfloat16 to two of its roundings, 2^-7 relative.

Which coordinates form a pair, and whether a layer rotates at all, differs between architectures.
Instead of knowing them, the first forward pass tries every convention and keeps the one whose
result is found, up to a factor, among the outputs of the layer's own projections and norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.functional.dispatch import fits_kernel
from headwise.watch.taps import tap

LAYOUTS = ("half", "interleaved", "split")
"""Pairs (d, d + P); pairs (2d, 2d + 1); pairs (2d, 2d + 1) that leave the rotation as (d, d + P)."""
MATCH = 0.995
"""Least cosine between q before rotation and a projection's output; bfloat16 rounding stays above."""
PROBES = 4
"""Tokens, spread over the sequence, at which a convention is tried."""


@dataclass(frozen=True)
class Form:
    """What stays the same from one forward pass to the next about a pair of tables.

    Attributes:
        repeats: halves (θ0 θ1 θ0 θ1), pairs (θ0 θ0 θ1 θ1) or once (θ0 θ1).
        scaled: whether cos² + sin² differs from 1 by more than rounding.
    """

    repeats: str
    scaled: bool


@dataclass(frozen=True)
class Tables:
    """One pair of rotation tables, inverted.

    Attributes:
        cos, sin: the model's, divided by cos² + sin²; `(B or 1, 1, T, P)` float32, one angle per pair.
        form: how the model's tables repeat the angles, and whether they scale.
    """

    cos: Tensor
    sin: Tensor
    form: Form

    def at(self, tokens: slice) -> Tables:
        """Of the first sample at some tokens."""
        return Tables(self.cos[:1, :, tokens], self.sin[:1, :, tokens], self.form)


@dataclass(frozen=True)
class Convention:
    """How one layer rotates: with which of the tables it sees, which pairs, from which coordinate."""

    tables: int
    layout: str
    start: int


class Rotations:
    """Follows the rotation tables through a model while it runs.

    Attach with the constructor, detach with `close`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._handles: list[Callable[[], None]] = []
        self._given: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._made: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self._outputs: dict[nn.Module, list[Tensor]] = {}
        self._search: dict[nn.Module, list[Callable[[], None]]] = {}
        self._conventions: dict[nn.Module, Convention | None] = {}
        self._scaled: dict[nn.Module, bool] = {}
        self._tables: dict[tuple[int, int], tuple[Tensor, Tables]] = {}
        self._forms: dict[tuple[nn.Module, int], Form] = {}
        for module in model.modules():
            kind = type(module).__name__
            if "Attention" in kind:
                self._follow(module)
            if "Rotary" in kind or "Rope" in kind:
                self._handles.append(tap(module, after=partial(_remember, self._made)))

    def close(self) -> None:
        """Take every hook off the model."""
        for remove in (*self._handles, *(h for handles in self._search.values() for h in handles)):
            remove()
        self.forget()

    def forget(self) -> None:
        """Drop the tensors of the forward pass that ended."""
        for layer in list(self._outputs):  # it ran, but is not a layer that reports
            self.settle(layer)
        for kept in (self._given, self._made, self._tables):
            kept.clear()

    def settle(self, layer: nn.Module) -> None:
        """Stop keeping what the projections of `layer` give."""
        for remove in self._search.pop(layer, ()):
            remove()
        self._outputs.pop(layer, None)

    def scaled(self, layer: nn.Module) -> bool:
        """Whether a rotation that `layer` may apply changes norms."""
        if layer not in self._scaled:
            self._scaled[layer] = any(table.form.scaled for table in self._candidates(layer))
        return self._scaled[layer]

    def undo(self, layer: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q `(B, H, T, D)` and k `(B, K, T, D)` before the rotation that `layer` applied.

        Raises:
            HeadwiseError: no convention reproduces what the layer's projections gave.
        """
        tables = self._candidates(layer)
        if layer not in self._conventions:
            self._conventions[layer] = self._find(layer, q, tables)
        self.settle(layer)
        convention = self._conventions[layer]
        if convention is None:
            return q, k
        table = tables[convention.tables]
        return _unrotate(q, table, convention), _unrotate(k, table, convention)

    def _follow(self, layer: nn.Module) -> None:
        self._handles.append(tap(layer, partial(_remember_arguments, self._given)))
        leaves = [m for m in layer.modules() if m is not layer and not any(m.children())]
        keep = partial(_keep_output, self._outputs, layer)
        self._search[layer] = [tap(leaf, after=keep) for leaf in leaves]

    def _candidates(self, layer: nn.Module) -> list[Tables]:
        """The tables that `layer` may have used: handed to it, made inside it, else made anywhere."""
        pairs = list(self._given.get(layer, ()))
        inside = [pair for m in layer.modules() for pair in self._made.get(m, ())]
        if not pairs and not inside:
            inside = [pair for made in self._made.values() for pair in made]
        return [self._prepared(layer, n, *pair) for n, pair in enumerate(pairs + inside)]

    def _prepared(self, layer: nn.Module, index: int, cos: Tensor, sin: Tensor) -> Tables:
        key = (id(cos), id(sin))
        if key not in self._tables:  # the tensor is kept beside its id, so that the id stays its own
            # Finding a form reads values and waits for the device: once, not in every forward pass.
            form = self._forms.get((layer, index)) or _form(cos, sin)
            self._tables[key] = (cos, _prepare(cos, sin, form))
        tables = self._tables[key][1]
        self._forms.setdefault((layer, index), tables.form)
        return tables

    def _find(self, layer: nn.Module, q: Tensor, tables: list[Tables]) -> Convention | None:
        seen = _vectors(self._outputs.get(layer, ()), q)
        if seen is None:
            raise HeadwiseError(
                f"q before its rotation cannot be told apart in {type(layer).__name__}: no projection "
                "inside it was seen; use scores='post_rope'"
            )
        at = _probed(q.shape[-2])
        choices: list[Convention | None] = [None, *_conventions(tables, q)]
        few = torch.stack((q[0, 0], q[0, -1]))[None, :, at]
        before = [few if c is None else _unrotate(few, tables[c.tables].at(at), c) for c in choices]
        matches = _match(torch.cat(before).float(), seen).tolist()
        best = max(range(len(choices)), key=matches.__getitem__)
        if not matches[best] >= MATCH and q.isfinite().all():
            raise HeadwiseError(
                f"the rotation of {type(layer).__name__} could not be undone: none of its projections "
                f"gave q before it (best cosine {matches[best]:.3f}); use scores='post_rope'"
            )
        return choices[best]


def _remember_arguments(
    given: dict[nn.Module, list[tuple[Tensor, Tensor]]], layer: nn.Module, args: tuple, kwargs: dict
) -> None:
    given[layer] = [pair for value in (*args, *kwargs.values()) for pair in _table_pairs(value)]


def _remember(made: dict[nn.Module, list[tuple[Tensor, Tensor]]], module: nn.Module, output: Any) -> None:
    made[module] = list(_table_pairs(output))


def _keep_output(
    outputs: dict[nn.Module, list[Tensor]], layer: nn.Module, leaf: nn.Module, output: Any
) -> None:
    if isinstance(output, Tensor) and output.is_floating_point():
        outputs.setdefault(layer, []).append(output.detach())


def _table_pairs(value: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(cos, sin) in `value`: a pair of equal float tensors, or one complex tensor."""
    if isinstance(value, Tensor) and value.is_complex():
        yield value.real, value.imag
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return
    cos, sin = value
    if not (isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        return
    if cos.is_floating_point() and sin.is_floating_point() and cos.shape == sin.shape and cos.dim() <= 4:
        yield cos, sin


def _form(cos: Tensor, sin: Tensor) -> Form:
    width = cos.shape[-1]
    repeats = "once"
    if width % 2 == 0 and torch.equal(cos[..., : width // 2], cos[..., width // 2 :]):
        repeats = "halves"
    elif width % 2 == 0 and torch.equal(cos[..., ::2], cos[..., 1::2]):
        repeats = "pairs"
    # Rounding cos and sin to their dtype moves cos² + sin² from 1 by up to its eps.
    rounding = max(1.5 * torch.finfo(cos.dtype).eps, 1e-6)
    square = cos.float().square() + sin.float().square()
    off = (square - 1).masked_fill(square == 0, 0.0).abs().max()
    return Form(repeats, scaled=bool(off > rounding))


def _prepare(cos: Tensor, sin: Tensor, form: Form) -> Tables:
    """One angle per pair, divided as the inverse needs it."""
    cos, sin = cos.detach().float(), sin.detach().float()
    if form.repeats == "halves":
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
    elif form.repeats == "pairs":
        cos, sin = cos[..., ::2], sin[..., ::2]
    if cos.dim() < 4:
        cos, sin = (x.reshape(-1, 1, *x.shape[-2:]) for x in (cos, sin))
    # Tables of padding may be zeros, which leave nothing to undo: its vectors are zeros before, too.
    square = cos.square() + sin.square()
    divisor = square.masked_fill(square == 0, 1.0)
    return Tables(cos / divisor, sin / divisor, form)


def _conventions(tables: list[Tables], q: Tensor) -> Iterator[Convention]:
    for index, table in enumerate(tables):
        batch, one, tokens, pairs = table.cos.shape
        spare = q.shape[-1] - 2 * pairs
        if spare < 0 or one != 1 or tokens != q.shape[-2] or batch not in (1, q.shape[0]):
            continue
        for layout in LAYOUTS:
            for start in {0, spare}:
                yield Convention(index, layout, start)


def _unrotate(x: Tensor, table: Tables, convention: Convention) -> Tensor:
    """x `(B, ·, T, D)` before the rotation; computed in float32, returned in x's dtype."""
    start, width = convention.start, 2 * table.cos.shape[-1]
    if fits_kernel(x, 256):
        from headwise.functional.rotation.kernel import unrotate

        halves = convention.layout != "interleaved", convention.layout == "half"
        return unrotate(x, table.cos, table.sin, start, from_halves=halves[0], to_halves=halves[1])
    turned = x[..., start : start + width].float()
    if convention.layout == "interleaved":
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned.chunk(2, dim=-1)
    first, second = a * table.cos + b * table.sin, b * table.cos - a * table.sin
    if convention.layout == "half":
        before = torch.cat((first, second), dim=-1)
    else:
        before = torch.stack((first, second), dim=-1).flatten(-2)
    before = before.to(x.dtype)
    if width == x.shape[-1]:
        return before
    return torch.cat((x[..., :start], before, x[..., start + width :]), dim=-1)


def _probed(tokens: int) -> slice:
    """PROBES tokens, the last among them; a slice, for a list would be copied to the device."""
    step = max(1, tokens // PROBES)
    return slice(max((tokens - 1) % step, tokens - 1 - step * (PROBES - 1)), None, step)


def _vectors(outputs: Iterable[Tensor], q: Tensor) -> Tensor | None:
    """Every D consecutive values that the layer's parts gave for the first sample at the probed
    tokens, as directions `(probes, N, D)`."""
    batch, _, tokens, width = q.shape
    at = _probed(tokens)
    found = []
    for output in outputs:
        if output.dim() == 4 and output.shape[-2] == tokens and output.shape[1] != tokens:
            output = output.transpose(1, 2)  # a norm over (B, H, T, D)
        if output.shape[0] == batch * tokens:
            output = output.reshape(batch, tokens, -1)
        if output.dim() < 3 or output.shape[1] != tokens:
            continue
        flat = output[0, at].flatten(1).float()
        if flat.shape[-1] % width == 0:
            found.append(flat.unflatten(1, (-1, width)))
    if not found:
        return None
    return nn.functional.normalize(torch.cat(found, dim=1).nan_to_num(), dim=-1)


def _match(before: Tensor, seen: Tensor) -> Tensor:
    """Per choice, of `(choices, heads, probes, D)`, the least over heads and tokens of the best cosine
    between q and what was seen."""
    directions = nn.functional.normalize(before, dim=-1)
    cosines = torch.einsum("chpd,pnd->chpn", directions, seen).amax(-1)
    return cosines.masked_fill((before == 0).all(-1), 1.0).amin((1, 2))
