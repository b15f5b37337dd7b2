"""Remove heads for one measurement: replace a head's output before the output projection.

The head is still computed, so a head whose logits also decide what other heads see keeps doing that.
The model is unchanged afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from headwise.watch.hooks import Change, Changes, Layer, changed

Head = tuple[Layer, int]


@contextmanager
def removed(heads: Sequence[Head], means: dict[Head, Tensor] | None = None) -> Iterator[None]:
    """Inside the block, each head gives its mean `(D,)`, or zeros where none is given."""
    means = means or {}

    def giving(layer: Layer, members: list[int]) -> Change:
        def give(y: Tensor) -> Tensor:
            y = y.clone()
            for head in members:
                value = means.get((layer, head))
                y[:, head] = 0 if value is None else value.to(y.dtype)
            return y

        return give

    with in_each_layer(heads, giving):
        yield


@contextmanager
def in_each_layer(heads: Iterable[Head], change: Callable[[Layer, list[int]], Change]) -> Iterator[None]:
    """Change the outputs of each layer that has some of `heads`."""
    members: dict[Layer, list[int]] = {}
    for layer, head in heads:
        members.setdefault(layer, []).append(head)
    with ExitStack() as stack:
        for layer, own in members.items():
            stack.enter_context(changed(layer, Changes(output=change(layer, own))))
        yield


def leave_one_out(layers: Sequence[Layer], loss: Callable[[], float]) -> tuple[float, list[list[float]]]:
    """The loss of the whole model, and by how much it rises without each head: one pass a head.

    Args:
        loss: runs the model and gives its loss.

    Returns:
        The loss with all heads, and the rise per layer and head, in the unit of `loss`; a head that
        helps has a rise above 0.
    """
    whole = loss()
    rises: list[list[float]] = []
    for layer in layers:
        rises.append([])
        for head in range(layer.n_heads):
            with removed([(layer, head)]):
                rises[-1].append(loss() - whole)
    return whole, rises
