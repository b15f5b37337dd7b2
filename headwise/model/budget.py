"""A model whose layers hold only a share of the context, in one parallel pass: what a cache would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from headwise.errors import HeadwiseError
from headwise.functional.budget import keys_of_share
from headwise.model.decoder import Decoder


@contextmanager
def within_budget(
    model: Decoder, shares: float | Sequence[float], *, readmit: bool = False
) -> Iterator[None]:
    """While it lasts, every layer of `model` holds at most its share of the sequence.

    Args:
        shares: of every layer, or one for each; in (0, 1].
        readmit: every query chooses afresh among all keys, as the selective attention log evaluated.

    Raises:
        HeadwiseError: a layer can hold nothing less than everything.
        ValueError: a share outside (0, 1], or not one a layer.
    """
    layers = model.attentions()
    each = [float(shares)] * len(layers) if isinstance(shares, int | float) else [float(s) for s in shares]
    with ExitStack() as stack:
        for layer, (attention, share) in enumerate(zip(layers, each, strict=True)):
            keys_of_share(share, 1, False)
            if share == 1:
                continue
            if reason := attention.whole_context_only():
                raise HeadwiseError(f"layer {layer} cannot hold a share of {share} of its context: {reason}")
            stack.enter_context(attention.within_share(share, readmit=readmit))
        yield
