"""Watch the heads of a running model.

    with watch(model) as seen:
        model(tokens)
    seen.table()

`watch` attaches a collector to a model and takes it off again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from headwise.attention.base import Attention
from headwise.attention.observation import Observation
from headwise.errors import HeadwiseError, one_of
from headwise.measures.collector import IGNORE_FIRST, SCORES, Collector, ScoresFrom
from headwise.measures.spec import KEYS, in_order, wanted_measures
from headwise.watch.capture import Capture

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

    def columns(self) -> dict[str, np.ndarray]:
        """Columns of the head table, as numpy arrays; see `Collector.columns`."""
        return self.collector.columns()

    def table(self) -> polars.DataFrame:
        """The head table: a row per (layer, head), or per (sample, layer, head, token).

        Raises:
            HeadwiseError: nothing was measured; says why.
        """
        import polars

        kinds = {"string": polars.String, "int64": polars.Int64, "int32": polars.Int32}
        columns = self.columns()
        length = len(columns["layer"])
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
            for index, layer in enumerate(layers):
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


@contextmanager
def _observed(layer: Attention, index: int, collector: Collector, capture: Capture | None) -> Iterator[None]:
    values: list[Tensor] = []

    def look(seen: Observation) -> None:
        collector.add(index, seen)
        if capture is not None and values:
            capture.take(index, seen, values.pop())

    def heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = type(layer).heads(layer, x)
        values[:] = [v]
        return q, k, v

    previous = layer.observer
    layer.observer = look
    if capture is not None:
        layer.heads = heads  # type: ignore[method-assign]
    try:
        yield
    finally:
        layer.observer = previous
        vars(layer).pop("heads", None)
