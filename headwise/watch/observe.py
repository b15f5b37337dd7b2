"""Watch the heads of a running model.

    with watch(model) as seen:
        model(tokens)
    seen.table()

`watch` attaches a collector to a model and takes it off again.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from headwise.attention.base import Attention
from headwise.attention.observation import Observation, Observer
from headwise.errors import HeadwiseError, one_of
from headwise.measures.collector import IGNORE_FIRST, SCORES, Collector, ScoresFrom
from headwise.measures.spec import KEYS, in_order, wanted_measures
from headwise.watch.capture import Capture
from headwise.watch.hooks import replaced
from headwise.watch.taps import eagerly, recomputing, tap

if TYPE_CHECKING:
    import polars


class Watch:
    """What `watch` yields: the measures so far."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    @property
    def reasons(self) -> dict[int | str, str]:
        """Layer, by its number or name, to why it was not measured."""
        return self.collector.reasons

    @property
    def unmeasured(self) -> dict[int | str, str]:
        """The same: every attention layer that has no rows, and why."""
        return self.collector.reasons

    def columns(self) -> dict[str, np.ndarray]:
        """Columns of the head table, as numpy arrays; see `Collector.columns`."""
        return self.collector.columns()

    def table(self) -> polars.DataFrame:
        """The head table: a row per (layer, head), or per (sample, layer, head, token).

        Where heads have several softmaxes there is a row for each `part` of a head, and one for the whole.

        Raises:
            HeadwiseError: nothing was measured; says why.
        """
        import polars

        kinds = {"string": polars.String, "int64": polars.Int64, "int32": polars.Int32}
        columns: dict[str, Any] = dict(self.columns())
        length = len(columns["layer"])
        if "part" in columns:  # of an array of objects polars makes no text
            columns["part"] = columns["part"].tolist()
        keys = [
            polars.Series(key, columns.get(key, [None] * length), dtype=kinds[kind])
            for key, kind in KEYS.items()
        ]
        measures = in_order(name for name in columns if name not in KEYS)
        return polars.DataFrame(keys + [polars.Series(name, columns[name]) for name in measures])


@contextmanager
def watch(
    model: nn.Module,
    measures: Iterable[str] | None = None,
    scores: ScoresFrom = "post_rope",
    per_token: bool = False,
    ignore_first: int = IGNORE_FIRST,
) -> Iterator[Watch]:
    """Measure every attention head while `model` runs inside the block; its outputs do not change.

    Args:
        model: a headwise model, or any Hugging Face model whose attention goes through
            transformers' attention interface (see `headwise.watch.huggingface`).
        measures: columns of the head table, default all that are registered (`headwise.measures.spec`).
        scores: measure logits of q and k after their rotation, or before it.
        per_token: rows per (sample, layer, head, token) instead of means per (layer, head). The
            measures stay on the model's device until `columns` or `table` is called.
        ignore_first: tokens at the start of a sequence without measures that need a context.

    Yields:
        A `Watch`, whose `table()` may be read inside the block and after it.

    Raises:
        HeadwiseError: an unknown measure, or a model with nothing to attach to.
    """
    one_of("scores", scores, SCORES)
    if ignore_first < 0:
        raise HeadwiseError(f"ignore_first is {ignore_first}; it is a number of tokens, 0 or more")
    collector = Collector(wanted_measures(measures), scores, per_token, ignore_first)
    with attached(model, collector):
        yield Watch(collector)


@contextmanager
def attached(model: nn.Module, collector: Collector, capture: Capture | None = None) -> Iterator[None]:
    """Have the attention layers of `model` report to `collector`, and to `capture` their q, k and v.

    Raises:
        HeadwiseError: there is nothing to attach to.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if layers:
        with ExitStack() as stack:
            stack.enter_context(eagerly())
            passes = _Passes(collector, layers)
            stack.callback(tap(model, passes.begin, passes.end))
            for index, layer in enumerate(layers):
                stack.callback(tap(layer, passes.enter))
                stack.enter_context(_observed(layer, index, collector, capture))
            yield
        return
    from headwise.watch.huggingface import is_huggingface, watching

    if not is_huggingface(model):
        raise HeadwiseError(
            f"{type(model).__name__} has no attention to watch: it is neither a headwise model "
            "nor a transformers model"
        )
    with watching(model, collector, capture):
        yield


SILENT = ("it has not run", "its forward offers nothing to an observer")


class _Passes:
    """Tells a collector where a forward pass of the model begins and ends, and which layers kept silent."""

    def __init__(self, collector: Collector, layers: list[Attention]) -> None:
        self.collector = collector
        self.layers = layers
        self.ran: set[nn.Module] = set()
        self.depth = 0

    def enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.ran.add(layer)

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self.depth == 0:
            self.collector.begin()
        self.depth += 1

    def end(self, model: nn.Module, output: Any) -> None:
        self.depth -= 1
        if self.depth:
            return
        self.collector.end()
        reasons = self.collector.reasons
        for index, layer in enumerate(self.layers if output is not None else ()):
            if not isinstance(layer.observer, _Observers) or layer.observer.called:
                if reasons.get(index) in SILENT:
                    del reasons[index]
            elif index not in reasons or reasons[index] in SILENT:
                if layer in self.ran and reasons.get(index) != SILENT[1]:
                    warnings.warn(f"attention layer {index} is not measured: {SILENT[1]}", stacklevel=2)
                reasons[index] = SILENT[layer in self.ran]


class _Observers:
    """The observers of one layer, in the order in which they were attached; a layer's `observer`."""

    def __init__(self, before: Observer | None) -> None:
        self.before = before
        self.looks: list[Observer] = []
        self.called = False

    def __call__(self, seen: Observation) -> None:
        if recomputing():
            return
        self.called = True
        if self.before is not None:
            self.before(seen)
        for look in tuple(self.looks):
            look(seen)


_attaching = threading.Lock()


@contextmanager
def _observed(layer: Attention, index: int, collector: Collector, capture: Capture | None) -> Iterator[None]:
    values: list[Tensor] = []

    def look(seen: Observation) -> None:
        collector.add(index, seen)
        if capture is not None and values:
            capture.take(index, seen, values.pop())

    before = layer.attend

    @wraps(before)
    def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        values[:] = [v]
        return before(x, q, k, v, **options)

    with _attaching:
        if not isinstance(layer.observer, _Observers):
            layer.observer = _Observers(layer.observer)
        observers = layer.observer
        observers.looks.append(look)
    try:
        with replaced(layer, "attend", attend) if capture is not None else nullcontext():
            yield
    finally:
        with _attaching:
            observers.looks.remove(look)
            if not observers.looks and layer.observer is observers:
                layer.observer = observers.before
