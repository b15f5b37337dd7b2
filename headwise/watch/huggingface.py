"""Watch Hugging Face models: every architecture that uses transformers' attention interface.

Such a layer asks `ALL_ATTENTION_FUNCTIONS.get_interface(...)` for the function that attends and
calls it with q, k, v, the mask and the scaling. While a model is watched, what the interface
gives to its layers is wrapped: measure, then call the very function the layer would have called.
The model's configuration is not touched, so masks, branches on the implementation's name and
outputs are exactly those of the model unwatched, whether it runs SDPA, eager or any other.

What is measured is read from the arguments alone: mask (boolean, additive, or none with
`is_causal`), sliding window, soft-capping, scaling and grouped keys. No architecture is named here.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.observation import Observation, Scores, Unmeasured
from headwise.errors import HeadwiseError
from headwise.measures.collector import Collector
from headwise.measures.spec import measure_of
from headwise.watch.capture import Capture
from headwise.watch.rotation import Rotations

Attend = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """What a layer hands to the attention interface.

    Attributes:
        q, k, v: `(B, H, T, D)`, `(B, K, T, D)`, `(B, K, T, D)`, after the rotation.
        mask: as handed over.
        options: the other keyword arguments.
        eager: whether the layer's own eager function attends, which knows no `is_causal`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    options: dict[str, Any]
    eager: bool


Listener = Callable[[nn.Module, Call], None]

_listeners: dict[nn.Module, list[Listener]] = {}
_replaced: dict[str, Attend | None] = {}
_patching = threading.Lock()


def is_huggingface(model: nn.Module) -> bool:
    """Whether `model` is, or holds, a transformers model."""
    return "transformers" in sys.modules and bool(_pretrained(model))


@contextmanager
def listening(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Call `listener(layer, call)` before every attention computed inside `model`."""
    modules = list(model.modules())
    with _patching:
        if not _listeners:
            _wrap_interface()
        for module in modules:
            _listeners.setdefault(module, []).append(listener)
    try:
        yield
    finally:
        with _patching:
            for module in modules:
                _listeners[module].remove(listener)
                if not _listeners[module]:
                    del _listeners[module]
            if not _listeners:
                _unwrap_interface()


@contextmanager
def watching(model: nn.Module, collector: Collector, capture: Capture | None = None) -> Iterator[None]:
    """Attach `collector`, and `capture`, to a transformers model.

    Raises:
        HeadwiseError: inside the block, after a forward pass in which no layer used the interface.
    """
    before_rotation = any(measure_of(name).source == "query" for name in collector.measures)
    follow = collector.scores == "pre_rope" or before_rotation
    rotations = Rotations(model) if follow else None
    watcher = _Watcher(model, collector, rotations, capture)
    with ExitStack() as stack:
        if rotations is not None:
            stack.callback(rotations.close)
        for part in _pretrained(model):
            stack.callback(part.register_forward_pre_hook(watcher.begin).remove)
            stack.callback(part.register_forward_hook(watcher.end, always_call=True).remove)
        stack.enter_context(listening(model, watcher.attention))
        yield


class _Watcher:
    """Turns calls of the interface into observations of numbered layers."""

    def __init__(
        self,
        model: nn.Module,
        collector: Collector,
        rotations: Rotations | None,
        capture: Capture | None,
    ) -> None:
        self.model = type(model).__name__
        self.names = {module: name for name, module in model.named_modules()}
        self.collector = collector
        self.rotations = rotations
        self.capture = capture
        self.depth = 0
        self.calls: Counter[nn.Module] = Counter()
        self.numbers: dict[tuple[nn.Module, int], int] = {}
        self.masks: list[tuple[Tensor, _Mask]] = []

    def begin(self, model: nn.Module, args: Any) -> None:
        """Before a forward pass of the model, or of a model inside it."""
        if self.depth == 0:
            self.calls.clear()
        self.depth += 1

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """After it, also when it failed."""
        self.depth -= 1
        if self.depth:
            return
        self.masks.clear()
        if self.rotations is not None:
            self.rotations.forget()
        # Without an output the forward pass failed by itself, and its own error is the one to show.
        if not self.calls and output is not None:
            raise HeadwiseError(
                f"{self.model} computes attention without transformers' attention interface, "
                "so its heads cannot be watched"
            )

    @torch.no_grad()
    def attention(self, layer: nn.Module, call: Call) -> None:
        """Measure one call of the interface."""
        self.calls[layer] += 1
        seen = self._observe(layer, call)
        if isinstance(seen, Unmeasured):
            name = self.names[layer]
            if not self.collector.reasons:
                warnings.warn(f"{name} is not measured: {seen.reason}", stacklevel=2)
            self.collector.reasons[name] = seen.reason
            return
        number = self._number(layer)
        self.collector.add(number, seen)
        if self.capture is not None:
            self.capture.take(number, seen, call.v)

    def _number(self, layer: nn.Module) -> int:
        """The layer's own index; the next free number where it has none, where another layer
        (of a decoder beside an encoder) has the same, or where one module attends several times."""
        which = (layer, self.calls[layer])
        if which not in self.numbers:
            own = getattr(layer, "layer_idx", None)
            taken = self.numbers.values()
            if not isinstance(own, int) or own in taken:
                own = max(taken, default=-1) + 1
            self.numbers[which] = own
        return self.numbers[which]

    def _observe(self, layer: nn.Module, call: Call) -> Observation:
        problem = _unsupported(call)
        if problem is not None:
            return Unmeasured(problem)
        mask = self._mask(layer, call)
        q, k = call.q, call.k
        q_pre = k_pre = None
        if self.rotations is not None:
            if self.collector.scores == "pre_rope" or self.rotations.scaled(layer):
                q_pre, k_pre = self.rotations.undo(layer, q, k)
            self.rotations.settle(layer)
        scale = call.options.get("scaling")
        return Scores(
            q, k, scale=q.shape[-1] ** -0.5 if scale is None else float(scale), causal=mask.causal,
            bias=mask.bias, softcap=call.options.get("softcap"), window=mask.window,
            key_mask=mask.key_mask, q_pre=q_pre, k_pre=k_pre,
        )  # fmt: skip

    def _mask(self, layer: nn.Module, call: Call) -> _Mask:
        read = self._read_mask(layer, call)
        position_bias = call.options.get("position_bias")
        if position_bias is None:
            return read
        bias = position_bias if read.bias is None else position_bias + read.bias
        return _Mask(read.causal, read.window, read.key_mask, bias)

    def _read_mask(self, layer: nn.Module, call: Call) -> _Mask:
        """The mask of this call; a 4-D one says everything by itself and is read once for all layers."""
        if call.mask is None or call.mask.dim() != 4:
            return _read_flags(layer, call)
        for known, read in self.masks:
            if known is call.mask:
                return read
        read = _read_pattern(call)
        self.masks.append((call.mask, read))
        return read


@dataclass(frozen=True)
class _Mask:
    """A mask in the terms of `head_stats`."""

    causal: bool
    window: int | None = None
    key_mask: Tensor | None = None
    bias: Tensor | None = None


def _unsupported(call: Call) -> str | None:
    """Why this call cannot be measured, or None."""
    q, k = call.q, call.k
    if q.dim() != 4 or k.dim() != 4:
        return f"its queries have shape {tuple(q.shape)}, not (B, H, T, D)"
    if q.shape[-2] != k.shape[-2]:
        return (
            f"{q.shape[-2]} queries met {k.shape[-2]} keys: cross-attention and steps with a "
            "key-value cache are not measured, only whole sequences"
        )
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        return f"queries {tuple(q.shape)} and keys {tuple(k.shape)} do not pair up"
    if any(call.options.get(name) is not None for name in ("s_aux", "sinks")):
        return "it adds learned sink logits to its softmax, so its weights do not sum to 1"
    if call.mask is not None and not isinstance(call.mask, Tensor):
        return f"its mask is a {type(call.mask).__name__}; load the model with attn_implementation='sdpa'"
    if call.mask is not None and call.mask.dim() != 4 and call.mask.shape[:-1] != q.shape[:1]:
        return f"its mask has shape {tuple(call.mask.shape)}, neither (B, 1, T, T) nor (B, T)"
    return None


def _read_flags(layer: nn.Module, call: Call) -> _Mask:
    """Without a mask, or with padding alone `(B, T)` as flash attention takes it: flags say the rest."""
    given = call.options.get("is_causal")
    causal = bool(getattr(layer, "is_causal", True) if given is None else given)
    window = call.options.get("sliding_window")
    if call.mask is None:
        return _Mask(causal and not call.eager, window)
    return _Mask(causal, window, key_mask=call.mask[:, -call.q.shape[-2] :].bool())


def _read_pattern(call: Call) -> _Mask:
    """A 4-D mask as causal, window and padding where it is made of these; as a bias otherwise."""
    batch, tokens = call.q.shape[0], call.q.shape[-2]
    mask = call.mask[..., :tokens]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    read = _pattern(visible, batch)
    added = mask.dtype != torch.bool and bool((mask.masked_fill(~visible, 0) != 0).any())
    if read is not None and not added:
        return read
    bias = torch.zeros_like(visible, dtype=torch.float32) if mask.dtype == torch.bool else mask.float()
    key_mask = visible.any(-2).any(1).expand(batch, tokens)
    return _Mask(False, None, key_mask, bias.masked_fill(~visible, -torch.inf))


def _pattern(visible: Tensor, batch: int) -> _Mask | None:
    """`visible (B or 1, 1, T, T)` as causal, sliding window and padding; None if it is more."""
    if visible.shape[1] != 1:
        return None
    visible = visible[:, 0]
    tokens = visible.shape[-1]
    position = torch.arange(tokens, device=visible.device)
    behind = position[:, None] - position  # how far key j lies behind query i
    real = visible.any(-2)
    reach = int(torch.where(visible, behind.abs(), 0).max()) + 1
    causal = not bool((visible & (behind < 0)).any())
    expected = (behind.abs() < reach) & real[:, None]
    if causal:
        expected &= behind >= 0
    if not torch.equal(visible, expected):
        return None
    key_mask = None if bool(real.all()) else real.expand(batch, tokens)
    return _Mask(causal and tokens > 1, reach if reach < tokens else None, key_mask)


def _pretrained(model: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _wrap_interface() -> None:
    """Have the attention interface of every model file report to the listeners of the calling layer."""
    from transformers.modeling_utils import AttentionInterface

    get_interface, getitem = AttentionInterface.get_interface, AttentionInterface.__getitem__

    def get_reporting(self: Any, name: str, default: Attend) -> Attend:
        attend = get_interface(self, name, default)
        return _reporting(attend, eager=attend is default)

    def getitem_reporting(self: Any, name: str) -> Attend:
        return _reporting(getitem(self, name), eager=False)

    for name, reporting in (("get_interface", get_reporting), ("__getitem__", getitem_reporting)):
        _replaced[name] = vars(AttentionInterface).get(name)
        setattr(AttentionInterface, name, reporting)


def _unwrap_interface() -> None:
    from transformers.modeling_utils import AttentionInterface

    for name, plain in _replaced.items():
        if plain is None:
            delattr(AttentionInterface, name)  # inherited
        else:
            setattr(AttentionInterface, name, plain)
    _replaced.clear()


def _reporting(attend: Attend, eager: bool) -> Attend:
    if getattr(attend, "reports_to_headwise", False):
        return attend

    @wraps(attend)
    def report(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **rest: Any
    ) -> Any:
        for listener in tuple(_listeners.get(module, ())):
            listener(module, Call(query, key, value, attention_mask, rest, eager))
        return attend(module, query, key, value, attention_mask, **rest)

    report.reports_to_headwise = True  # type: ignore[attr-defined]
    return report
