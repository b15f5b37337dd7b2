"""How far the running sums of selective attention, and their gradients, are off float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.attention.base import Carry
from headwise.attention.selective.inspect import masks_made_by
from headwise.attention.selective.layer import SelectiveAttention, Selector
from headwise.functional.selective import Protection
from headwise.model.decoder import Decoder
from headwise.runs.folder import RunFolder


@dataclass(frozen=True)
class SumError:
    """The error of one layer's F, as it is accumulated in training, against the same in float64.

    Attributes:
        layer: its index.
        largest: of F itself.
        error: the largest absolute one of F.
        gradient_largest: of the gradient at the selection queries, for a gradient of F drawn from a
            standard normal distribution.
        gradient_error: the largest absolute one of that.
    """

    layer: int
    largest: float
    error: float
    gradient_largest: float
    gradient_error: float

    def __str__(self) -> str:
        found = []
        for error, largest in ((self.error, self.largest), (self.gradient_error, self.gradient_largest)):
            found.append(f"{error:.2g}" + (f" ({error / largest:.2g} of the largest)" if largest else ""))
        return f"layer {self.layer}: running sum off float64 by {found[0]}, its gradient by {found[1]}"


def sum_errors(model: Decoder, tokens: Tensor) -> list[SumError]:
    """Errors of every layer that selects, beside a forward pass over one sequence.

    Both sums are over the same selection queries and keys, in float32 and float64: what they were rounded
    to on the way is no error of the sum. Heads with a mask each are measured on the kernel that keeps F.

    Args:
        tokens: `(1, T)` int64; a layer takes some M·T² numbers in float64.
    """
    found: list[SumError] = []

    def compare(
        layer: SelectiveAttention, index: int, selector: Selector, protection: Protection | None, carry: Carry
    ) -> Tensor:
        found.append(_error(layer, index, selector, protection, carry.logits))
        return type(layer).mask_of(layer, selector, protection, carry)

    with torch.no_grad(), masks_made_by(model, compare):
        model.hidden(tokens)
    return found


def _error(
    layer: SelectiveAttention,
    index: int,
    selector: Selector,
    protection: Protection | None,
    before: Tensor | None,
) -> SumError:
    precise = copy.copy(layer)
    precise.config = replace(layer.config, accumulate="float64")
    upstream: Tensor | None = None
    sums, gradients = [], []
    for own, dtype in ((layer, torch.float32), (precise, torch.float64)):
        q = selector.q.detach().to(dtype).requires_grad_()
        few = selector._replace(q=q, k=selector.k.to(dtype))
        guard = protection
        if protection is not None and protection.q is not None and protection.k is not None:
            guard = replace(protection, q=protection.q.to(dtype), k=protection.k.to(dtype))
        carry = Carry(None if before is None else before.to(dtype))
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            taken = type(layer).mask_of(own, few, guard, carry).tril()
        if upstream is None:
            generator = torch.Generator(q.device).manual_seed(0)
            upstream = torch.randn(taken.shape, generator=generator, device=q.device)
        gradients.append(torch.autograd.grad(taken, q, upstream.to(taken.dtype))[0].double())
        sums.append(taken.detach().double())
    return SumError(
        index,
        sums[1].abs().max().item(),
        (sums[0] - sums[1]).abs().max().item(),
        gradients[1].abs().max().item(),
        (gradients[0] - gradients[1]).abs().max().item(),
    )


class SumRecorder:
    """Writes a line for every selecting layer to log.txt each time it is called; see `training.run.Monitor`.

    Args:
        tokens: `(B, T)` int64, of which the first sequence is measured.
        autocast: of training, so that selection queries and keys are what they are there.
    """

    def __init__(self, model: Decoder, tokens: Tensor, autocast: torch.autocast, folder: RunFolder) -> None:
        self.model, self.tokens, self.autocast, self.folder = model, tokens[:1], autocast, folder

    def __call__(self, step: int) -> None:
        """Measure and log."""
        training = self.model.training
        self.model.eval()
        with self.autocast:
            errors = sum_errors(self.model, self.tokens)
        self.model.train(training)
        for error in errors:
            self.folder.say(f"step {step}, {error}")
        if not errors and step == 0:
            self.folder.say("measure.sums: no layer selects, so there are no running sums")
