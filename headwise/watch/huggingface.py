"""Watch Hugging Face models: every architecture that uses transformers' attention interface.

Such a layer asks `ALL_ATTENTION_FUNCTIONS.get_interface(...)` for the function that attends and
calls it with q, k, v, the mask and the scaling. While a model is watched, what the interface
gives to its layers is wrapped: measure, then call the very function the layer would have called.
The model's configuration is not touched, so masks, branches on the implementation's name and
outputs are exactly those of the model unwatched, whether it runs SDPA, eager or any other.

What is measured is read from the arguments alone: mask (boolean, additive, or none with
`is_causal`), documents of a packed row, sliding window, soft-capping, scaling and grouped keys. No
architecture is named here.

A layer is a module. Several calls of a module in one forward pass are more samples of that layer
(a layer that the model runs at several depths, a tower that runs once per image); several calls of the
interface in one forward of a module are segments of its sequence (attention window by window). What
a checkpoint computes again in the backward pass is not measured again. Compiled models run eagerly
while they are watched.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.observation import Mask, Observation, Scores, Unmeasured, read_mask
from headwise.errors import HeadwiseError
from headwise.measures.collector import Collector
from headwise.measures.spec import measure_of
from headwise.watch.calls import Call, read_flags, sink, unsupported
from headwise.watch.capture import Capture
from headwise.watch.layers import (
    argument,
    attention_modules,
    layer_numbers,
    other_attention,
    source_of_keys,
)
from headwise.watch.rotation import Rotations
from headwise.watch.taps import eagerly, recomputing, tap

Attend = Callable[..., Any]


Listener = Callable[[nn.Module, Call], None]

_listeners: dict[nn.Module, list[Listener]] = {}
_replaced: dict[str, Attend | None] = {}
_patching = threading.Lock()


def is_huggingface(model: nn.Module) -> bool:
    """Whether `model` is, or holds, a transformers model or one of its attention layers."""
    return "transformers" in sys.modules and bool(_pretrained(model) or attention_modules(model))


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
        for module in (*watcher.modules, *watcher.others):
            stack.callback(tap(module, watcher.enter))
        for part in _pretrained(model) or [model]:
            stack.callback(tap(part, watcher.begin, watcher.end))
        stack.enter_context(eagerly())
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
        self.model = next((type(part).__name__ for part in _pretrained(model)), type(model).__name__)
        self.names = {module: name.replace("_orig_mod.", "") for name, module in model.named_modules()}
        self.modules = attention_modules(model)
        self.others = other_attention(model)
        self.numbers = layer_numbers(self.modules)
        self.collector = collector
        self.rotations = rotations
        self.capture = capture
        self.depth = 0
        self.warned = False
        self.ran: set[nn.Module] = set()
        self.heard: set[nn.Module] = set()
        self.sources: dict[nn.Module, str | None] = {}
        self.inside: set[nn.Module] = set()
        self.given: dict[nn.Module, Any] = {}
        self.masks: list[tuple[Tensor, Mask]] = []

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a forward pass of the model, or of a model inside it."""
        if self.depth == 0:
            self.collector.begin()
        self.depth += 1

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of one attention module."""
        self.ran.add(layer)
        self.inside.discard(layer)
        self.sources[layer] = source_of_keys(layer, args, kwargs)
        self.given.pop(layer, None)
        for mask in argument(layer, "attention_mask", args, kwargs):
            self.given[layer] = mask

    def end(self, model: nn.Module, output: Any) -> None:
        """After it, also when it failed."""
        self.depth -= 1
        if self.depth:
            return
        self.collector.end()
        self.masks.clear()
        self.given.clear()
        if self.rotations is not None:
            self.rotations.forget()
        # Without an output the forward pass failed by itself, and its own error is the one to show.
        if output is None:
            return
        if not self.heard:
            raise HeadwiseError(
                f"{self.model} computes attention without transformers' attention interface, "
                "so its heads cannot be watched"
            )
        for layer, name in (self.modules | self.others).items():
            if layer not in self.heard:
                self._refuse(
                    name,
                    "it computed its attention past transformers' attention interface"
                    if layer in self.ran
                    else "it has not run",
                    aloud=layer in self.ran,
                )

    def _refuse(self, name: str, reason: str, aloud: bool = True) -> None:
        """Keep the reason; it is warned about once, for the first layer."""
        if aloud and not self.warned:
            self.warned = True
            warnings.warn(f"{name} is not measured: {reason}", stacklevel=2)
        self.collector.reasons[name] = reason

    @torch.no_grad()
    def attention(self, layer: nn.Module, call: Call) -> None:
        """Measure one call of the interface."""
        name = self.names[layer]
        if layer not in self.heard:
            self.heard.add(layer)
            self.collector.reasons.pop(name, None)
        seen = self._observe(layer, call)
        if isinstance(seen, Unmeasured):
            self._refuse(name, seen.reason)
            return
        number = self.numbers.setdefault(layer, max(self.numbers.values(), default=-1) + 1)
        if layer in self.inside:
            self.collector.resume(number)
        self.collector.add(number, seen)
        if layer in self.modules:
            self.inside.add(layer)
        if self.capture is not None:
            self.capture.take(number, seen, call.v)

    def _observe(self, layer: nn.Module, call: Call) -> Observation:
        problem = unsupported(call, self.sources.get(layer))
        if problem is not None:
            return Unmeasured(problem)
        mask = self._mask(layer, call)
        if isinstance(mask, Unmeasured):
            return mask
        logits = sink(call)
        if isinstance(logits, Unmeasured):
            return logits
        q, k = call.q, call.k
        q_pre = k_pre = None
        if self.rotations is not None:
            if self.collector.scores == "pre_rope" or self.rotations.scaled(layer):
                q_pre, k_pre = self.rotations.undo(layer, q, k)
            self.rotations.settle(layer)
        scale = call.options.get("scaling")
        return Scores(
            q, k, scale=q.shape[-1] ** -0.5 if scale is None else float(scale), causal=mask.causal,
            bias=mask.bias, softcap=call.softcap, window=mask.window,
            key_mask=mask.key_mask, documents=mask.documents, q_pre=q_pre, k_pre=k_pre,
            sink=logits,
        )  # fmt: skip

    def _mask(self, layer: nn.Module, call: Call) -> Mask | Unmeasured:
        read = self._read_mask(layer, call)
        position_bias = call.options.get("position_bias")
        if position_bias is None or isinstance(read, Unmeasured):
            return read
        bias = position_bias if read.bias is None else position_bias + read.bias
        return replace(read, bias=bias)

    def _read_mask(self, layer: nn.Module, call: Call) -> Mask | Unmeasured:
        """The mask of this call; a 4-D one says everything by itself and is read once for all layers."""
        if call.mask is None or call.mask.dim() != 4:
            return read_flags(layer, call)
        chunk = getattr(getattr(layer, "config", None), "attention_chunk_size", None)
        batch, tokens = call.q.shape[0], call.q.shape[-2]
        # Neither a chunk of the layer's own nor a window of one key is a document.
        cut = (chunk is not None and tokens > chunk) or call.options.get("sliding_window") == 1
        whole = self._given_mask(layer, call, tokens, batch, segments=not cut)
        return self._read_once(call.mask, tokens, batch, segments=not cut, of=whole)

    def _given_mask(
        self, layer: nn.Module, call: Call, tokens: int, batch: int, *, segments: bool
    ) -> Mask | None:
        """The mask that the layer was given, where it made another: it chooses keys, by an indexer say.

        Only the given one tells padding and documents; a token whose key nobody chose is neither.
        """
        given = self.given.get(layer, call.mask)
        if given is None:
            return Mask(False)
        if given is call.mask or not isinstance(given, Tensor):
            return None
        adds = given.is_floating_point()
        if given.dim() == 4 and given.shape[-2:] == (tokens, tokens) and (adds or given.dtype == torch.bool):
            return self._read_once(given, tokens, batch, segments=segments)
        return Mask(False, key_mask=given.bool()) if given.shape == (batch, tokens) and not adds else None

    def _read_once(self, mask: Tensor, tokens: int, batch: int, **options: Any) -> Mask:
        for known, read in self.masks:
            if known is mask:
                return read
        read = read_mask(mask[..., :tokens], batch, **options)
        self.masks.append((mask, read))
        return read


def _pretrained(model: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _wrap_interface() -> None:
    """Have the attention interface of every model file report to the listeners of the calling layer."""
    from transformers.modeling_utils import AttentionInterface

    get_interface, getitem = AttentionInterface.get_interface, AttentionInterface.__getitem__

    def get_reporting(self: Any, name: str, default: Attend) -> Attend:
        attend = get_interface(self, name, default)
        return _reporting(attend, name, eager=attend is default)

    def getitem_reporting(self: Any, name: str) -> Attend:
        return _reporting(getitem(self, name), name, eager=False)

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


def _reporting(attend: Attend, name: str, eager: bool) -> Attend:
    if getattr(attend, "reports_to_headwise", False):
        return attend

    @wraps(attend)
    def report(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **rest: Any
    ) -> Any:
        for listener in () if recomputing() else tuple(_listeners.get(module, ())):
            listener(module, Call(query, key, value, attention_mask, rest, eager, name))
        return attend(module, query, key, value, attention_mask, **rest)

    report.reports_to_headwise = True  # type: ignore[attr-defined]
    return report
