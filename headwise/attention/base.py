"""The contract that every kind of attention keeps.

A kind is one file or one folder: a subclass of `Attention` with its `core`, its options as a dataclass, and
`@register` (kinds.py). The base class owns what all kinds share: projections, heads, rotation, the output
projection, and the place where an observer looks. All that other parts of the project need to know of a kind
is a class attribute or a method here; none of them names a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from headwise.attention.cache import KeyValueCache, LayerCache
from headwise.attention.carry import Carry as Carry
from headwise.attention.modifiers import MODIFIERS, ModifierLayer, Modifiers
from headwise.attention.observation import (
    Observation,
    Observer,
    Parts,
    Scores,
    Unmeasured,
    Weights,
    read_mask,
)
from headwise.errors import HeadwiseError
from headwise.functional.budget import keys_of_share
from headwise.functional.softmax_attention import windowed
from headwise.measures.spec import Measure

OFF = Modifiers()
"""No modifier is on."""
Rope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@runtime_checkable
class NormalisingRope(Protocol):
    """A rotation that takes the norms before it along, in one pass over q and k."""

    def after_norms(self, q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor) -> tuple[Tensor, Tensor]:
        """q and k normalised with these weights, then rotated."""
        ...


FEATURES = ("causal", "full", "padding", "additive_mask", "gqa", "dropout", "cpu_training", *MODIFIERS)


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer.

    Attributes:
        d_model: width of the residual stream.
        n_heads: query heads H.
        n_kv_heads: key/value heads K; H % K == 0.
        head_dim: D; H·D need not equal d_model.
        bias: whether projections have biases.
        dropout: share of attention weights dropped in training.
        head_dropout: share of heads whose whole output is dropped in training.
        layer: index of the layer, from 0.
        n_layers: layers of the model.
        modifiers: what the layer does besides its kind's attention.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    bias: bool = False
    dropout: float = 0.0
    head_dropout: float = 0.0
    layer: int = 0
    n_layers: int = 1
    modifiers: Modifiers = OFF


@dataclass(frozen=True)
class NewHead:
    """A head that surgery adds to a layer.

    Attributes:
        index: its place among the heads afterwards.
        n_heads: heads before it was added.
        zero_output: whether its output is 0 at the start.
        zero_logits: whether its keys are 0 at the start, and so its logits.
    """

    index: int
    n_heads: int
    zero_output: bool
    zero_logits: bool


class Preserved(NamedTuple):
    """Whether a change leaves a model's function as it was, to rounding, and why (not)."""

    holds: bool
    why: str


class Attention(nn.Module):
    """One attention layer: `y = forward(x, attn_mask=…, causal=…, rope=…)`, `x, y (B, T, d_model)`.

    Subclasses set `engine_family` and `supports`, and implement `core`. The rest has defaults.

    Attributes:
        kind: its name, set by `@register`.
        options: the dataclass of `model.attention.<kind>`, or None. Where it has them, `validate_values()`
            refuses values that have no meaning, whichever kind is chosen, and
            `validate(n_heads=…, head_dim=…)` what does not go together where this one is.
        supports: names out of `FEATURES`. Of the modifiers, the base class applies `qk_norm`,
            `output_gate` and `value_residual` for a kind that declares them; `core` itself obeys `sink()` and
            `window()`, and a decoding cache obeys all of them (`KeyValueCache` does).
        declines: for modifiers that the kind does not declare, a clause that says why it cannot take them,
            where there is a mathematical reason.
        engine_family: what the engines of this kind are called before the first hyphen.
        measures: those of its own; its observations carry their values in `extra`.
        sections: what the kind adds to a report, each as `package.module:NAME` of a
            `headwise.report.section.Section`.
        benchmarks: what `headwise bench NAME` runs: name to the module whose `main(argv)` it calls.
        monitors: what the log gets at every evaluation, by the key of `measure` that turns it on: each as
            `package.module:NAME` of a class that is made and called as `headwise.training.run.Monitor`.
        projects: whether q, k, v and the output are `qkv` and `out` here. False for a layer of another
            package, which keeps its own: it has no heads to add or to cut.
        inspector: for a kind whose queries mask keys, the module from which `headwise masks` takes
            `selections`, `rules`, `switches` and `notes`.
        engine_table: `package.module:NAME` of a function that gives a Markdown table: which engine computes
            which option.
        flop_formulas: of operators of its own, into which torch's FlopCounterMode does not see: what each
            counts as, for it. `flops_per_token` is tested against what it counts.
        attached: attributes that are set for the length of a block and None otherwise; a copy has None.
    """

    kind: ClassVar[str]
    options: ClassVar[type | None] = None
    supports: ClassVar[frozenset[str]] = frozenset()
    declines: ClassVar[Mapping[str, str]] = {}
    engine_family: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]] = ()
    sections: ClassVar[tuple[str, ...]] = ()
    benchmarks: ClassVar[Mapping[str, str]] = {}
    monitors: ClassVar[Mapping[str, str]] = {}
    projects: ClassVar[bool] = True
    inspector: ClassVar[str | None] = None
    engine_table: ClassVar[str | None] = None
    flop_formulas: ClassVar[Mapping[Any, Callable[..., int]]] = {}
    attached: ClassVar[tuple[str, ...]] = ("observer",)

    def __init__(self, shape: AttentionShape, options: Any = None) -> None:
        super().__init__()
        self.shape = shape
        self.features = self.supported(options)
        """What this layer takes: `supported` of its options."""
        self.scale = shape.head_dim**-0.5
        if self.projects:
            self.qkv, self.out = self.make_projections(shape, options)
        modifiers = shape.modifiers.present()
        for name in modifiers:
            if reason := self.why_not(name, options):
                raise HeadwiseError(f"model.attention.{name} is set, but {reason}")
        self.modifiers = ModifierLayer(shape) if modifiers else None
        self.initialise_modifiers()
        self.observer: Observer | None = None
        self.engine: str | None = None
        """The engine that computed the last forward pass outside of compiled code."""

    def make_projections(self, shape: AttentionShape, options: Any) -> tuple[nn.Module, nn.Module]:
        """The modules from x to q, k and v side by side, and from all heads to y: dense matrices here.

        Each is an `nn.Linear` or a `headwise.attention.projection.Projection`. Called while the layer is
        made, before it has any other module.
        """
        rows = shape.n_heads * self.query_width(shape.head_dim, options)
        rows += 2 * shape.n_kv_heads * shape.head_dim
        return (
            nn.Linear(shape.d_model, rows, bias=shape.bias),
            nn.Linear(shape.n_heads * shape.head_dim, shape.d_model, bias=shape.bias),
        )

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        causal: bool = True,
        rope: Rope | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: `(B, T, d_model)`.
            attn_mask: `(B or 1, T, T)`, bool (True = may attend) or additive float.
            causal: query i sees keys j <= i only; combines with `attn_mask`.
            rope: rotates q and k before the core.
            carry: what passes between the layers of this forward pass.

        Returns:
            `(B, T, d_model)`; a query that may attend to nothing contributes zeros.

        Raises:
            ValueError: x or a mask of another shape or dtype, or a form that this kind does not support.
        """
        self._check(x, attn_mask, causal)
        carry = carry or Carry()
        q_raw, k_raw, v = self.projected(x)
        if self.modifiers is not None:
            v = self.modifiers.values(v, carry)
        q, k = self.rotated(q_raw, k_raw, rope)
        y = self.attend(x, q, k, v, mask=attn_mask, causal=causal, rope=rope, carry=carry)
        if self.observer is not None:
            before = self.rotated(q_raw, k_raw, None)
            self.observer(self._observed(x, q, k, v, *before, mask=attn_mask, causal=causal))
        if self.modifiers is not None:
            y = self.modifiers.outputs(x, y)
        out: Tensor = self.out(self.drop_heads(y).transpose(1, 2).flatten(2))
        return out

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project `x (B, T, d_model)` to q `(B, H, T, D)` and k, v `(B, K, T, D)`; q, k after their norm."""
        q, k, v = self.projected(x)
        return *self.rotated(q, k, None), v

    def rotated(self, q: Tensor, k: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
        """q and k as they were projected, after their norm and their rotation, where there are any."""
        norm = None if self.modifiers is None else self.modifiers.qk_norm
        if norm is not None and isinstance(rope, NormalisingRope):
            return rope.after_norms(q, k, norm.q, norm.k)
        if norm is not None:
            q, k = norm(q, k)
        return (q, k) if rope is None else rope(q, k)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project `x (B, T, d_model)` to q `(B, H, T, D)` and k, v `(B, K, T, D)`, before any norm.

        A kind whose heads have several queries or keys gives these in turn, so that q has more than H heads.
        """
        shape = self.shape
        heads = self.qkv(x).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
        q, k, v = heads.split((shape.n_heads, shape.n_kv_heads, shape.n_kv_heads), dim=1)
        return q, k, v

    def sink(self) -> Tensor | None:
        """The logits `(H,)` that take a share of each query's weight, for `core`; None where nothing does."""
        return None if self.modifiers is None or self.modifiers.sink is None else self.modifiers.sink.logit

    def window(self, length: int) -> int | None:
        """The window for `core` on a sequence of `length`; None where a query sees every key of it."""
        window = self.shape.modifiers.window
        return None if window is None or window >= length else window

    @classmethod
    def why_not(cls, modifier: str, options: Any) -> str | None:
        """Why this kind, with these options, does not take a modifier, as a sentence; None where it does."""
        if modifier in cls.supported(options):
            return None
        taken = [name for name in MODIFIERS if name in cls.supported(options)]
        takes = f"of the modifiers it takes {', '.join(taken) or 'none'}"
        reason = cls.declining(options).get(modifier)
        return f"kind {cls.kind!r} cannot take it: {f'{reason}; ' if reason else ''}{takes}"

    @classmethod
    def declining(cls, options: Any) -> Mapping[str, str]:
        """`declines` of the kind with these options."""
        return cls.declines

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
        """The core; a kind that also reads x, or hands something on, does it here."""
        return self.core(q, k, v, mask=mask, causal=causal)

    def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        """What the kind is: q `(B, H, T, D)`, k and v `(B, K, T, D)` to y `(B, H, T, D)`."""
        raise NotImplementedError

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
        """What this layer offers to be measured; nothing, until its kind declares what its weights are."""
        return Unmeasured(f"attention kind {self.kind!r} does not declare what its weights are")

    def softmax_scores(
        self, q: Tensor, k: Tensor, q_pre: Tensor, k_pre: Tensor, *, mask: Tensor | None, causal: bool
    ) -> Scores:
        """The observation of a kind whose weights are a softmax of `scale · q·k` under `mask`."""
        window = self.window(q.shape[-2])
        if mask is None:
            return Scores(q, k, self.scale, causal=causal, window=window, q_pre=q_pre, k_pre=k_pre)
        mask = windowed(mask, window, q.shape[-2], q.device)
        assert mask is not None
        seen = read_mask(mask[:, None], q.shape[0], causal=causal)
        return Scores(
            q, k, self.scale, causal=seen.causal, bias=seen.bias, window=seen.window,
            key_mask=seen.key_mask, documents=seen.documents, q_pre=q_pre, k_pre=k_pre,
        )  # fmt: skip

    def _observed(self, x: Tensor, *args: Tensor, mask: Tensor | None, causal: bool) -> Observation:
        """The kind's observation, with the measures of the modifiers."""
        seen = self.observation(*args, mask=mask, causal=causal)
        if self.modifiers is None or isinstance(seen, Unmeasured):
            return seen
        added, sink = self.modifiers.measures(x), self.sink()
        if isinstance(seen, Scores) and sink is not None:
            seen = replace(seen, sink=sink)
        if isinstance(seen, Parts):
            return replace(seen, whole=replace(seen.whole, extra={**seen.whole.extra, **added}))
        return replace(seen, extra={**seen.extra, **added})

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not observed, and has its class's methods where this layer's are replaced for a block."""
        own = {name: value for name, value in vars(self).items() if not _replaces_method(self, name, value)}
        return own | dict.fromkeys(self.attached)

    def explicit_weights(self, weights: Tensor, *, mask: Tensor | None, causal: bool) -> Weights:
        """The observation of a kind that has its weights `(B, H, T, T)` in memory, under `mask`."""
        if mask is None:
            return Weights(weights, weights.shape[-1])
        seen = read_mask(mask[:, None], weights.shape[0], causal=causal)
        return Weights(weights, weights.shape[-1], key_mask=seen.key_mask, documents=seen.documents)

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        """Why no layer can compute on `device` (`cpu`, `cuda`) in this installation; None where one can."""
        return None

    @classmethod
    def supported(cls, options: Any) -> frozenset[str]:
        """What the kind takes with these options: `supports`, or less."""
        return cls.supports

    @classmethod
    def shift_invariant(cls, options: Any) -> bool:
        """Whether rotated queries and keys enter by the distance of their positions alone.

        Where they do not, padding before a text changes what is computed for it.
        """
        return True

    @classmethod
    def extra_parameters(cls, shape: AttentionShape, options: Any) -> int:
        """Parameters of a layer by which its MLP is smaller where `model.d_ff` is not given."""
        return 0

    def initialise(self) -> None:
        """Draw parameters that do not start as the model's matrices do."""

    def initialise_modifiers(self) -> None:
        """Set the modifiers' parameters to their start, once all matrices are drawn."""
        if self.modifiers is not None:
            self.modifiers.initialise(self.out)

    def lr_multipliers(self) -> dict[str, float]:
        """Learning-rate multipliers by name of parameters with one of their own; they do not decay."""
        return {}

    @property
    def selects(self) -> bool:
        """Whether queries of this layer decide which keys later queries see."""
        return False

    @property
    def keeps_first(self) -> bool:
        """Whether the first key is always held within a context budget."""
        return False

    def whole_context_only(self) -> str | None:
        """Why this layer can hold nothing less than its whole context; None where it can hold less."""
        if "padding" in self.features:
            return None
        return f"its kind, {self.kind}, has no F and takes no window"

    def within_share(self, share: float, *, readmit: bool = False) -> AbstractContextManager[None]:
        """While it lasts, hold at most `share` of the sequence: by default a window over the last keys.

        Args:
            share: in (0, 1).
            readmit: every query chooses among all keys anew; means nothing for a window.
        """
        return self._window(share)

    @contextmanager
    def _window(self, share: float) -> Iterator[None]:
        attend = self.forward

        def narrow(x: Tensor, **options: Any) -> Tensor:
            length = x.shape[1]
            keys = keys_of_share(share, length, protect_bos=False)
            age = torch.arange(length, device=x.device)
            age = age[:, None] - age
            return attend(x, **options | {"attn_mask": ((age >= 0) & (age < keys))[None]})

        before = vars(self).get("forward")
        # In place of the method and not as a hook, which a copy takes along and compiled code does not see.
        vars(self)["forward"] = narrow
        try:
            yield
        finally:
            if before is None:
                del vars(self)["forward"]
            else:
                vars(self)["forward"] = before

    def undecodable(self) -> str | None:
        """Why this layer cannot go on token by token; None where it can."""
        return f"attention kind {self.kind!r} has no cache"

    def cache(self, batch: int, slots: int, length: int, like: Tensor) -> LayerCache:
        """What this layer holds while text is read token by token; `KeyValueCache` documents the arguments.

        Called only where `undecodable` gives no reason.
        """
        raise NotImplementedError

    @classmethod
    def query_width(cls, head_dim: int, options: Any) -> int:
        """Rows of the fused projection that make one head's queries; more than D where it has several."""
        return head_dim

    @classmethod
    def rotated_width(cls, head_dim: int, options: Any) -> int:
        """Width of one query and one key, which the rotation turns; less than D where a head has several."""
        return head_dim

    @classmethod
    def check(cls, shape: AttentionShape, options: Any) -> None:
        """Refuse options that a layer of these sizes cannot have; asked before anything is allocated.

        Raises:
            HeadwiseError: names the key, the value and what is possible.
        """

    @classmethod
    def dense_parameters(cls, shape: AttentionShape, options: Any) -> int:
        """Entries of the dense matrices from x to q, k and v and from all heads to y."""
        own = shape.n_heads * (cls.query_width(shape.head_dim, options) + shape.head_dim)
        return (own + 2 * shape.n_kv_heads * shape.head_dim) * shape.d_model if cls.projects else 0

    @classmethod
    def projection_parameters(cls, shape: AttentionShape, options: Any) -> int:
        """Parameters of the projections of `make_projections`, without biases."""
        return cls.dense_parameters(shape, options)

    @classmethod
    def heads_are_fixed(cls, options: Any) -> str | None:
        """Why a head can neither be added nor be taken out; None where it can."""
        if cls.projects:
            return None
        return f"the layers of kind {cls.kind} are another package's, and have no heads to add or to cut"

    @classmethod
    def computes(cls, options: Any) -> str:
        """A name for what a head computes; two kinds with one name compute the same from the same weights."""
        return cls.kind if options is None else f"{cls.kind} {options}"

    @classmethod
    def heads_interact(cls, options: Any) -> bool:
        """Whether a head's output depends on other heads of its layer."""
        return False

    @classmethod
    def head_ranges(cls, leaf: str, index: int, options: Any) -> dict[int, list[tuple[int, int]]]:
        """Where a head lies in the kind's own parameter `leaf`: along each axis, ranges `[start, stop)`.

        Surgery inserts a new head there and takes a removed one out. Empty for what all heads share.
        """
        return {}

    @classmethod
    def preserves(cls, head: NewHead, before: Any, after: Any) -> Preserved:
        """Whether a head whose output is 0 leaves the others as they were; asked where `heads_interact`.

        Args:
            before: the kind's options before; None where the heads did not act on one another.
            after: its options afterwards.
        """
        return Preserved(False, f"heads of kind {cls.kind} act on one another")

    def dropout(self) -> float:
        """The share of weights to drop now: none outside of training."""
        return self.shape.dropout if self.training else 0.0

    def drop_heads(self, y: Tensor) -> Tensor:
        """Heads' outputs `y (B, H, T, D)`; in training each head of each sequence is dropped with probability
        p = `head_dropout`, and the others are scaled by 1 / (1 - p)."""
        if not (self.training and self.shape.head_dropout):
            return y
        return y * functional.dropout(y.new_ones(*y.shape[:2], 1, 1), self.shape.head_dropout)

    def record_engine(self, name: str) -> None:
        """Remember which engine computed; skipped inside compiled code, where it would be a side effect."""
        if not torch.compiler.is_compiling():
            self.engine = name

    def fallback(self, batch: int, tokens: int) -> str | None:
        """Why the last pass was not on the kind's fastest engine, and what that costs; None where it was.

        Args:
            batch: B of that pass.
            tokens: T.
        """
        return None

    def idle(self) -> list[nn.Module]:
        """Modules that are kept and compute nothing, as those of an option that is off: they cost nothing."""
        return []

    @classmethod
    def flops_per_token(cls, shape: AttentionShape, options: Any, seq_len: int) -> int:
        """Forward FLOPs of the core for one token: its matrix products, two for each multiply-add.

        Where a kind has another pair of operations in their place, such as a sum and a maximum, it counts two
        for each as well. Scores and values are counted over all `seq_len` keys, masked or not, or over the
        layer's window, although engines that mask what lies beyond it compute all keys. The layer's
        `nn.Linear` matrices and projections are counted apart, from their sizes; softmax, sums and other work
        on single numbers is not.

        Args:
            shape: the layer's, its index included.
            options: as the layer was built with them; None where the kind has none.
            seq_len: T.
        """
        keys = min(seq_len, shape.modifiers.window or seq_len)
        return 4 * keys * shape.n_heads * shape.head_dim

    @classmethod
    def backward_flops_per_token(cls, shape: AttentionShape, options: Any, seq_len: int) -> int:
        """Those of the backward pass: twice the forward, since two matrix products follow from each.

        Scores that a fused kernel computes a second time are not counted, by the usual convention.
        """
        return 2 * cls.flops_per_token(shape, options, seq_len)

    def padded_flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of the core besides `flops_per_token`: of zeros that this layer multiplies here.

        Where one path pads and another does not, the layer's device decides. The backward pass has twice as
        many.
        """
        return 0

    def _check(self, x: Tensor, attn_mask: Tensor | None, causal: bool) -> None:
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.shape.d_model:
            expected = f"(B, T, {self.shape.d_model}) with T >= 1"
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {expected}")
        form = "causal" if causal else "full"
        if form not in self.features:
            raise ValueError(f"{self._cannot(form)}; it got causal={causal}")
        if attn_mask is None:
            return
        batch, length = x.shape[0], x.shape[1]
        sizes = attn_mask.shape  # one by one: the compiler does not find symbols of a tuple in another
        if len(sizes) != 3 or sizes[0] not in (1, batch) or sizes[1] != length or sizes[2] != length:
            expected = f"({batch} or 1, {length}, {length})"
            raise ValueError(f"attn_mask has shape {tuple(attn_mask.shape)}; expected {expected}")
        is_bool = attn_mask.dtype == torch.bool
        if not is_bool and not attn_mask.is_floating_point():
            raise ValueError(f"attn_mask is {attn_mask.dtype}; expected bool (True = may attend) or float")
        feature = "padding" if is_bool else "additive_mask"
        if feature not in self.features:
            raise ValueError(f"{self._cannot(feature)}; pass attn_mask=None")

    def _cannot(self, feature: str) -> str:
        also = " with its options as they are" if feature in self.supports else ""
        return f"attention kind {self.kind!r} does not support {feature}{also}"


def _replaces_method(layer: Attention, name: str, value: Any) -> bool:
    return callable(value) and callable(getattr(type(layer), name, None))


class SoftmaxAttention(Attention):
    """What kinds share whose heads are a softmax of q·k over keys and values that a cache can hold."""

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
        """The softmax scores."""
        return self.softmax_scores(q, k, q_pre, k_pre, mask=mask, causal=causal)

    def undecodable(self) -> str | None:
        """Nothing speaks against it."""
        return None

    def cache(self, batch: int, slots: int, length: int, like: Tensor) -> LayerCache:
        """Keys and values of the last tokens."""
        return KeyValueCache(self, batch, slots, length, like)

    @classmethod
    def computes(cls, options: Any) -> str:
        """Softmax attention, whichever engine computes it."""
        return "softmax"
