"""Text token by token, with a cache: each step reads one token of every sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from headwise.functional.rotation import rotate
from headwise.model.cache import Cache
from headwise.model.decoder import Block, Decoder, sinusoids


def make_cache(
    model: Decoder,
    batch: int,
    length: int,
    slots: int | list[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Cache:
    """A cache for sequences of up to `length` tokens.

    Args:
        slots: keys each layer holds at most, or one number for each; all where not given.
        dtype: of keys and values; the weights' where not given.

    Raises:
        HeadwiseError: the model cannot go on token by token.
        ValueError: more tokens than learned positions, or too few slots.
    """
    if model.positions is not None and length > model.max_seq_len:
        raise ValueError(f"{length} tokens exceed the {model.max_seq_len} learned positions of this model")
    if model.rope is not None and length > model.rope.cos.shape[0]:
        model.rope.extend(length)
    weights = model.tokens.weight
    like = torch.empty(0, dtype=dtype or weights.dtype, device=weights.device)
    return Cache(model.attentions(), batch, length if slots is None else slots, length, like)


def decode_step(model: Decoder, cache: Cache, tokens: Tensor) -> Tensor:
    """Read the next token of every sequence, in eval mode.

    Args:
        tokens: `(B,)` int64.

    Returns:
        logits of the token after it, `(B, vocab_size)`.
    """
    now = cache.position
    x = model.tokens(tokens)[:, None]
    if model.positions is not None:
        x = x + model.positions.weight[now]
    elif model.config.position == "sinusoidal":
        every = sinusoids(cache.layers[0].length, x.shape[-1], x.device)
        x = x * math.sqrt(x.shape[-1]) + every[now].to(x.dtype)

    def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert model.rope is not None
        dtype = torch.promote_types(q.dtype, torch.float32)
        cos, sin = (table[now].to(dtype) for table in (model.rope.cos, model.rope.sin))
        return rotate(q, cos, sin), rotate(k, cos, sin)

    handed: Tensor | None = None
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        assert isinstance(block, Block)
        rope = None if model.rope is None else turn
        y, handed = layer.attend(block.attention_norm(x), now, rope, handed)
        x = x + y
        x = x + block.mlp(block.mlp_norm(x))
    cache.position.add_(1)
    return model.head(model.norm(x))[:, 0]


@torch.no_grad()
def read(model: Decoder, cache: Cache, tokens: Tensor) -> Tensor:
    """Read `tokens (B, T)` one after the other; logits after each, `(B, T, vocab_size)`."""
    return torch.stack([decode_step(model, cache, column) for column in tokens.unbind(1)], dim=1)


def generate(model: Decoder, cache: Cache, prompt: Tensor, n_tokens: int, **how: Any) -> Tensor:
    """Continue `prompt (B, T)` by `n_tokens`, `(B, n_tokens)`; as `write` takes it."""
    return write(model, cache, read(model, cache, prompt)[:, -1], n_tokens, **how)


@torch.no_grad()
def write(
    model: Decoder,
    cache: Cache,
    logits: Tensor,
    n_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Write tokens after those that were read.

    Args:
        logits: of the first of them, `(B, vocab_size)`.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from the softmax of
            logits / temperature.
        top_k: draw among the k likeliest alone.
        generator: what draws.

    Returns:
        `(B, n_tokens)`. The last one is not read.
    """
    written = []
    for number in range(n_tokens):
        token = choose(logits, temperature=temperature, top_k=top_k, generator=generator)
        written.append(token)
        if number + 1 < n_tokens:
            logits = decode_step(model, cache, token)
    return torch.stack(written, dim=1)


def choose(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of `logits (B, vocab_size)`, `(B,)`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
