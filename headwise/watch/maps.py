"""Attention maps: the whole weight matrix of every head for one short prompt, for figures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headwise.attention.observation import Observation, Scores, Weights
from headwise.functional.softmax_attention import additive_mask, zero_rows
from headwise.model.decoder import Decoder


@torch.no_grad()
def attention_maps(model: Decoder, tokens: Tensor) -> np.ndarray | None:
    """Weights of every layer and head for one prompt.

    Args:
        tokens: `(1, T)` int64, short: the result holds L·H·T² numbers.

    Returns:
        `(L, H, T, T)` float16, or None where a layer has no weights to show, or layers differ in heads.
    """
    maps: list[Tensor | None] = []

    def look(observation: Observation) -> None:
        maps.append(weights_of(observation))

    layers = model.attentions()
    before = [layer.observer for layer in layers]
    try:
        for layer in layers:
            layer.observer = look
        model(tokens)
    finally:
        for layer, observer in zip(layers, before, strict=True):
            layer.observer = observer
    found = [one[0].half().cpu().numpy() for one in maps if one is not None]
    alike = len({one.shape for one in found}) == 1
    return np.stack(found) if alike and len(found) == len(layers) else None


def weights_of(observation: Observation) -> Tensor | None:
    """`(B, H, T, T)`, zeros where a query sees nothing; None where a layer offers no weights."""
    if isinstance(observation, Weights):
        return observation.weights.float()
    if not isinstance(observation, Scores):
        return None
    q, k = observation.q.float(), observation.k.float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ k.transpose(-2, -1)) * observation.scale
    if observation.softcap is not None:
        logits = observation.softcap * torch.tanh(logits / observation.softcap)
    mask = _mask(observation)
    hidden, empty = additive_mask(mask, causal=observation.causal, length=q.shape[-2], like=logits)
    for bias in (hidden, observation.bias):
        logits = logits if bias is None else logits + bias
    return zero_rows(logits.softmax(-1).nan_to_num(0.0), empty)


def _mask(observation: Scores) -> Tensor | None:
    """`(B or 1, T, T)`, True where window, padding and documents let query i see key j; None without any."""
    documents = observation.documents
    if observation.window is None and observation.key_mask is None and documents is None:
        return None
    tokens, device = observation.q.shape[-2], observation.q.device
    visible = torch.ones(1, tokens, tokens, dtype=torch.bool, device=device)
    if observation.window is not None:
        position = torch.arange(tokens, device=device)
        visible = visible & ((position[:, None] - position).abs() < observation.window)
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None])
    return visible if observation.key_mask is None else visible & observation.key_mask[:, None]
