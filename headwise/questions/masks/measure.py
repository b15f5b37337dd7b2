"""`headwise masks`: which token of a prompt was masked by whom and when, and what that says of a run."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwise.config.run import Config
from headwise.data.config import TEXT
from headwise.errors import HeadwiseError
from headwise.model.decoder import Decoder
from headwise.questions.generate.measure import codec
from headwise.questions.masks import numbers as masking
from headwise.questions.masks.selection import Rules, Selection
from headwise.runs.folder import RunFolder
from headwise.runs.weights import find_checkpoint, load_model
from headwise.training.distributed import find_device

VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Masks:
    """One prompt under the masks of a run.

    Attributes:
        data: all that the page says, JSON-able.
        layers: what it was worked out from.
    """

    data: dict[str, Any]
    layers: list[Selection]


def look(
    run: str | Path,
    text: str,
    *,
    layers: Sequence[int] | None = None,
    max_tokens: int = 256,
    device: str = "auto",
    source: str = "--prompt",
) -> Masks:
    """Run `text` through the best checkpoint of a run and see what masks what.

    Args:
        layers: those to look at; default all.
        max_tokens: of the text, from its start; never more than the run's training length.
        source: where the text is from, for errors and the page.

    Raises:
        HeadwiseError: a run that selects nothing, too short a text, or a layer that is not there.
    """
    if not text:
        raise HeadwiseError(f"{source} is empty; give some text to look at")
    if max_tokens < 3:
        raise HeadwiseError(f"--max-tokens is {max_tokens}; it takes 3 tokens for one to mask another")
    model, config = load_model(run, find_device(device))
    inspector, options = _inspector(run, model, config), config.model.attention.options()
    chosen = _layers(layers, config.model.n_layers)
    ids, labels, notes = _tokens(run, text, config, max_tokens, source)
    found = inspector.selections(model, torch.tensor([ids], device=next(model.parameters()).device))
    found = [one for one in found if one.layer in chosen]
    if not found:
        raise HeadwiseError(f"--layers {' '.join(map(str, chosen))}: none of them selects in {run}")
    data = {
        "title": "Which token was masked by whom, and when",
        "run": str(run),
        "checkpoint": find_checkpoint(RunFolder(Path(run))).name,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "source": source,
        "tokens": labels,
        "ids": ids,
        "unit": "byte" if _reads_bytes(config) else "token",
        "seq_len": config.data.seq_len,
        "switches": inspector.switches(options),
        "notes": notes + inspector.notes(options),
        "near": masking.NEAR, "later": masking.LATER, "bounds": [masking.LOW, masking.HIGH],
        "edges": list(masking.EDGES),
        **numbers(found, inspector.rules(options)),
    }  # fmt: skip
    return Masks(data, found)


def numbers(layers: list[Selection], rules: Rules) -> dict[str, Any]:
    """What is said of each mask, of each layer and of all layers, and of attacking all keys alike."""
    given = {"protect_bos": rules.protect_bos, "adds_up": rules.adds_up}

    def of(attack: np.ndarray, taken: np.ndarray, bare: np.ndarray | None) -> dict[str, Any]:
        found = masking.numbers(attack, taken, **given)
        if bare is not None:
            found["unprotected"] = masking.numbers(attack, bare, **given)
            found["absorbed"] = masking.absorbed(attack, taken) if rules.adds_up else None
        return found

    def whole(name: str) -> Any:
        parts = [getattr(one, name) for one in layers]
        return None if parts[0] is None else np.concatenate(parts)

    return {
        "protected": layers[0].unprotected is not None,
        "alike": masking.attacked_alike(
            layers[0].taken.shape[-1],
            protect_bos=rules.protect_bos,
            protect_self=rules.protect_self,
        ),
        "all": of(whole("attack"), whole("taken"), whole("unprotected")),
        "layers": [
            {
                "layer": one.layer,
                "heads": one.heads,
                "all": of(one.attack, one.taken, one.unprotected),
                "masks": [
                    of(
                        one.attack[m : m + 1],
                        one.taken[m : m + 1],
                        None if one.unprotected is None else one.unprotected[m : m + 1],
                    )
                    for m in range(len(one.taken))
                ],
                "differences": masking.differences(one.taken),
            }
            for one in layers
        ],
    }


def readable(ids: Sequence[int], config: Config) -> list[str]:
    """Every token as a person reads it: whitespace visible, the bytes of one character on the first."""
    if config.data.tokenizer and not _reads_bytes(config):
        from headwise.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(config.data.tokenizer)
        return [_visible(tokenizer.token(i)) for i in ids]
    return _characters(bytes(ids)) if _reads_bytes(config) else [str(i) for i in ids]


def _characters(raw: bytes) -> list[str]:
    """A label for each byte; the later bytes of a character are `…`."""
    labels = []
    for character in raw.decode(errors="surrogateescape"):
        size = len(character.encode(errors="surrogateescape"))
        if "\udc80" <= character <= "\udcff":
            labels.append(f"\\x{ord(character) - 0xDC00:02x}")
        else:
            labels += [_visible(character), *("…" for _ in range(size - 1))]
    return labels


def _visible(text: str) -> str:
    return "".join(VISIBLE.get(c, c if c.isprintable() else "·") for c in text)


def _reads_bytes(config: Config) -> bool:
    return config.data.tokenizer == "bytes" or (not config.data.tokenizer and config.data.name in TEXT)


def _inspector(run: str | Path, model: Decoder, config: Config) -> Any:
    """The module that tells who masks whom."""
    attention = model.deciding()
    if attention.inspector is None:
        raise HeadwiseError(
            f"{run} has attention of kind {attention.kind!r}, which masks no token; give a run that selects"
        )
    if not attention.selects:
        raise HeadwiseError(
            f"{run} selects nothing: its model.attention.{attention.kind}.enabled is false; "
            "give a run that selects"
        )
    return importlib.import_module(attention.inspector)


def _layers(asked: Sequence[int] | None, n_layers: int) -> list[int]:
    for layer in asked or ():
        if not 0 <= layer < n_layers:
            raise HeadwiseError(f"--layers has {layer}; the run has layers 0 to {n_layers - 1}")
    return sorted(set(asked)) if asked else list(range(n_layers))


def _tokens(
    run: str | Path, text: str, config: Config, max_tokens: int, source: str
) -> tuple[list[int], list[str], list[str]]:
    """Ids and labels of the text that is looked at, and a note where that is not all of it."""
    encode, _ = codec(config)
    ids = encode(text)
    vocabulary = config.model.vocab_size
    if vocabulary is not None and (wrong := [i for i in ids if not 0 <= i < vocabulary]):
        raise HeadwiseError(f"{source} has token {wrong[0]}, and the model of {run} knows {vocabulary}")
    limit = min(max_tokens, config.data.seq_len)
    if len(ids) < 3:
        raise HeadwiseError(f"{source} is {len(ids)} tokens; it takes 3 for one to mask another")
    notes = []
    if len(ids) > limit:
        why = "--max-tokens" if limit == max_tokens else "the length that the run was trained with"
        notes.append(f"{source} has {len(ids):,} tokens and was cut to its first {limit}: {why}.")
    ids = ids[:limit]
    return ids, readable(ids, config), notes
