"""Text that a run continues, with a full cache or within a context budget, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from headwise.config.run import Config
from headwise.data.config import TEXT
from headwise.errors import HeadwiseError
from headwise.functional.budget import keys_of_share
from headwise.model.generate import make_cache, read, write
from headwise.runs.weights import load_model
from headwise.training.distributed import World, find_device


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        text: the continuation, without the prompt.
        tokens: how many.
        tokens_per_sec: while writing, the prompt not counted.
        keys: held at most by a layer.
        length: tokens of prompt and continuation, which a full cache would hold.
        cache_bytes: of the cache that was used.
        full_bytes: of one that drops nothing.
    """

    text: str
    tokens: int
    tokens_per_sec: float
    keys: int
    length: int
    cache_bytes: int
    full_bytes: int


def continue_text(
    run: str | Path,
    prompt: str,
    n_tokens: int,
    *,
    budget: float = 1.0,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Written:
    """Continue `prompt` with the best checkpoint of a run.

    Args:
        budget: share of prompt and continuation that every layer holds at most, in (0, 1].
        temperature, top_k, seed: as `headwise.model.generate.write` draws; 0 takes the likeliest token.

    Raises:
        HeadwiseError: a value out of range, no checkpoint, or a model that cannot go on token by token.
    """
    _check(prompt, n_tokens, budget, temperature, top_k, seed)
    world = World(0, 1, find_device(device))
    model, config = load_model(run, world.device)
    encode, decode = codec(config)
    ids = encode(prompt)
    if not ids:
        raise HeadwiseError(f"--prompt {prompt!r} has no token; give some to continue")
    if wrong := [i for i in ids if not 0 <= i < model.head.out_features]:
        raise HeadwiseError(
            f"--prompt has token {wrong[0]}, and the model of {run} knows {model.head.out_features}"
        )
    length = len(ids) + n_tokens
    if model.positions is not None and length > model.max_seq_len:
        raise HeadwiseError(
            f"prompt and continuation are {length} tokens, and the model has {model.max_seq_len} learned "
            "positions; ask for fewer --tokens"
        )
    keys = keys_of_share(budget, length, model.deciding().keeps_first)
    autocast = world.autocast(config.training.precision)
    dtype = torch.bfloat16 if autocast._enabled else None
    try:
        cache = make_cache(model, 1, length, keys, dtype)
    except (RuntimeError, MemoryError) as error:  # RuntimeError: of a CPU's allocator, and what is too large
        reason = str(error).splitlines()[0]
        raise HeadwiseError(
            f"no memory for a cache of {keys} keys a layer ({reason}); ask for fewer --tokens"
        ) from error
    generator = torch.Generator(world.device).manual_seed(seed)
    with autocast:
        logits = read(model, cache, torch.tensor([ids], device=world.device))[:, -1]
        began = time.perf_counter()
        written = write(
            model, cache, logits, n_tokens, temperature=temperature, top_k=top_k, generator=generator
        )[0].tolist()
    seconds = time.perf_counter() - began
    return Written(
        decode(written), n_tokens, n_tokens / seconds, keys, length, cache.nbytes,
        cache.nbytes // keys * length,
    )  # fmt: skip


def _check(
    prompt: str, n_tokens: int, budget: float, temperature: float, top_k: int | None, seed: int
) -> None:
    if not prompt:
        raise HeadwiseError("--prompt is empty; give some text to continue")
    if n_tokens < 1:
        raise HeadwiseError(f"--tokens is {n_tokens}; it must be at least 1")
    if not 0 < budget <= 1:
        raise HeadwiseError(f"--budget is {budget:g}; it is a share of the context, above 0 and at most 1")
    if not temperature >= 0:
        raise HeadwiseError(f"--temperature is {temperature:g}; it must be at least 0")
    if top_k is not None and top_k < 1:
        raise HeadwiseError(f"--top-k is {top_k}; it must be at least 1")
    if not 0 <= seed < 1 << 63:
        raise HeadwiseError(f"--seed is {seed}; it must be at least 0 and below 2^63")


def codec(config: Config) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Text to token ids and back: a tokenizer, bytes, or the ids themselves where data is no text.

    The first raises HeadwiseError for what is no text, or no ids.
    """
    encode, decode = _codec(config)

    def checked(text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise HeadwiseError(
                f"the prompt is no UTF-8 text: {text[error.start]!r} at character {error.start}"
            ) from None
        return encode(text)

    return checked, decode


def _codec(config: Config) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    from headwise.data.tokenizer import load_tokenizer, text_of_bytes

    if config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer)
        return lambda text: tokenizer.encode([text])[0], tokenizer.decode
    if config.data.name in TEXT:
        return lambda text: list(text.encode()), text_of_bytes

    def numbers(text: str) -> list[int]:
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise HeadwiseError(
                f"data.name={config.data.name} has no text; give --prompt token ids, as '5 3 9'"
            ) from None

    return numbers, lambda ids: " ".join(map(str, ids))
