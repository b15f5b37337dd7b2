"""A model with its output layer, and what a change inside does to what it says.

The effect of a change is measured against the model as it was, per sample: the difference of the
next-token loss, and KL(unchanged ‖ changed) of the predicted distribution. A model without an output
layer has neither; then its last hidden states tell, by their relative change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError, one_of
from headwise.files import local
from headwise.pretrained import load_config, load_model
from headwise.watch.load import DTYPES, Loaded, is_run, load
from headwise.watch.tensors import find, tensors_of_folder

ELEMENTS = 1 << 24
"""Logits that are compared at a time, in float32."""
NEXT_TOKEN = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Speaker:
    """A model that is run for what it says.

    Attributes:
        loaded: the model; its `forward` gives the output to compare, `(B, T, V)` or `(B, T, d_model)`.
        has_logits: whether the last axis of the output is the vocabulary.
        predicts_next: whether the logits at token t are for token t + 1.
    """

    loaded: Loaded
    has_logits: bool
    predicts_next: bool

    def __call__(self, tokens: Tensor) -> Tensor:
        device = next(self.loaded.model.parameters()).device
        return self.loaded.forward(tokens.to(device))


def load_speaker(
    name: str,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Speaker:
    """The model of that name with the output layer that its checkpoint has.

    Args:
        name: a folder with config.json and *.safetensors, a name on the hub, or a headwise run.
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        device: where it computes.
        trust_remote_code: run code of the checkpoint where it names some.

    Raises:
        HeadwiseError: nothing of that name, no weights, or an architecture that is not known.
    """
    if is_run(name):
        loaded = load(name, dtype=dtype, device=device)
        return Speaker(replace(loaded, forward=loaded.model), True, True)
    one_of("dtype", dtype, ("auto", *DTYPES))
    path = local(name)
    folder = find(path if path.exists() else name, with_code=trust_remote_code)
    assert isinstance(folder, Path)
    tensors_of_folder(folder)  # says clearly what is missing, before transformers says it otherwise
    return speaker_of(_pretrained(name, folder, dtype, trust_remote_code).to(device), name)


def speaker_of(model: nn.Module, name: str = "model") -> Speaker:
    """A transformers model in memory, in eval mode and without gradients from now on."""
    model.eval().requires_grad_(False)
    model.config.use_cache = False  # type: ignore[union-attr]
    with_logits = model.get_output_embeddings() is not None  # type: ignore[operator]
    forward: Callable[[Tensor], Any] = lambda ids: model(input_ids=ids)[0]  # noqa: E731
    return Speaker(Loaded(name, model, None, forward), with_logits, type(model).__name__.endswith(NEXT_TOKEN))


def _pretrained(name: str, folder: Path, dtype: str, trust: bool) -> nn.Module:
    try:
        config = load_config(folder, trust=trust)
        wanted = (config.architectures or [""])[0]
        kind = "AutoModel"
        if wanted.endswith(NEXT_TOKEN):
            kind = "AutoModelForCausalLM"
        elif wanted.endswith(("ForMaskedLM", "ForPreTraining")):
            kind = "AutoModelForMaskedLM"
        if getattr(config, "is_encoder_decoder", False):
            raise HeadwiseError(
                f"{name} is an encoder with a decoder, whose two inputs are not supported here"
            )
        return load_model(
            kind, folder, config, trust=trust, dtype=dtype if dtype == "auto" else DTYPES[dtype]
        )
    except HeadwiseError:
        raise
    except Exception as error:  # transformers raises errors of many libraries
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise HeadwiseError(f"{name} could not be loaded ({reason})") from error


@dataclass
class Effect:
    """What one change did, per sample so far; None where the model cannot tell.

    Attributes:
        delta_loss: nats per token, changed minus unchanged.
        kl: nats per token.
        output_change: mean of ‖y' - y‖ / ‖y‖ of the last hidden states.
    """

    delta_loss: list[float] | None = None
    kl: list[float] | None = None
    output_change: list[float] | None = None
    base_loss: list[float] = field(default_factory=list)

    def add(self, speaker: Speaker, tokens: Tensor, before: Tensor, after: Tensor) -> None:
        """Compare the outputs `(B, T, …)` of one batch."""
        found = compare(speaker, tokens, before, after)
        self.base_loss += found.pop("base_loss", [])
        for name, values in found.items():
            setattr(self, name, (getattr(self, name) or []) + values)

    def mean(self, name: str) -> float | None:
        """The mean over samples of `delta_loss`, `kl` or `output_change`."""
        values = getattr(self, name)
        return float(np.mean(values)) if values else None

    def half_width(self, name: str) -> float | None:
        """Half of the mean's 95% interval over samples; None for under two."""
        from headwise.analysis.statistics import summarize

        values = getattr(self, name)
        return summarize(values).ci95 if values and np.isfinite(values).all() else None


@torch.no_grad()
def compare(speaker: Speaker, tokens: Tensor, before: Tensor, after: Tensor) -> dict[str, list[float]]:
    """Per sample: delta_loss, base_loss and kl, or output_change without logits."""
    if not speaker.has_logits:
        difference = torch.linalg.vector_norm((after - before).float(), dim=-1)
        size = torch.linalg.vector_norm(before.float(), dim=-1)
        relative = torch.where(difference == 0, 0.0, difference / size)
        return {"output_change": relative.mean(-1).tolist()}
    batch, length, vocabulary = before.shape
    targets = tokens.to(before.device)[:, 1:]
    step = max(1, ELEMENTS // (batch * vocabulary))
    totals = torch.zeros(3, batch, dtype=torch.float64, device=before.device)  # KL, loss before, loss after
    for first in range(0, length, step):
        old, new = (x[:, first : first + step].float().log_softmax(-1) for x in (before, after))
        share = old.exp()
        totals[0] += (share * (old - new).masked_fill(share == 0, 0)).sum((1, 2))
        chosen = targets[:, first : first + step, None]
        if speaker.predicts_next and chosen.shape[1]:
            for row, x in ((1, old), (2, new)):
                totals[row] -= x[:, : chosen.shape[1]].gather(-1, chosen).sum((1, 2))
    found = {"kl": (totals[0] / length).clamp_min(0).tolist()}
    if speaker.predicts_next:
        losses = totals[1:] / (length - 1)
        found |= {"base_loss": losses[0].tolist(), "delta_loss": (losses[1] - losses[0]).tolist()}
    return found
