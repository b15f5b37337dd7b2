"""Remove a share of the heads by a measure, and see what it costs against removing as many at random.

The loss is the mean over sequences of the mean cross entropy of their tokens; differences are paired sequence
by sequence. What ranks heads and is measured here (importance, or any measure of a model without a head
table) is measured on other sequences than those that tell the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from headwise.errors import HeadwiseError, in_range, one_of
from headwise.model.count import forward_flops_by_part
from headwise.model.decoder import Decoder
from headwise.questions.prune.after import check, unit_sizes, without_heads
from headwise.questions.prune.choose import MODES, Unit, choose, refuse_fraction, units_of
from headwise.questions.prune.files import FORMAT
from headwise.questions.prune.heads import (
    IMPORTANCE,
    Heads,
    measured_now,
    must_be_known,
    recorded,
    refuse_unknown,
)
from headwise.questions.prune.numbers import against_random, laws, paired
from headwise.questions.prune.speed import compared
from headwise.questions.prune.text import Sequences, losses, open_sequences
from headwise.watch.effect import Speaker, load_speaker
from headwise.watch.hooks import Layer, attention_layers
from headwise.watch.load import is_run
from headwise.watch.removal import leave_one_out, removed
from headwise.watch.samples import Source

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda number: None


@dataclass(frozen=True)
class Options:
    """What to remove, and how to measure it.

    Attributes:
        mode: low, high, mixed or random.
        fraction: share of the heads.
        by: the measure that ranks them.
        per_layer: rank within each layer.
        zero: leave the heads in place and set their outputs to 0.
        last: evaluations of a run's table that are averaged; 0 measures now.
        draws: random removals of as many heads, the control.
        sequences: of the loss; as many others rank heads.
        context_length: tokens of each; a run's own, or 512, where not given.
        batch_size: sequences of a pass.
        seed: of random removals, and of bootstrap and permutations.
    """

    mode: str
    fraction: float
    by: str = "entropy"
    per_layer: bool = False
    zero: bool = False
    last: int = 3
    draws: int = 5
    sequences: int = 32
    context_length: int | None = None
    batch_size: int = 8
    seed: int = 0
    source: Source = field(default_factory=Source)

    def validate(self) -> None:
        """Refuse invalid options before a model is loaded.

        Raises:
            HeadwiseError: names the option.
        """
        one_of("--mode", self.mode, MODES)
        refuse_unknown(self.by)
        refuse_fraction(self.fraction)
        for name, least, most in (
            ("last", 0, 2**20), ("draws", 0, 1000), ("sequences", 2, 2**20), ("batch_size", 1, 2**16),
            ("context_length", 2, 2**24), ("seed", 0, 2**32 - 1),
        ):  # fmt: skip
            in_range(f"--{name.replace('_', '-')}", getattr(self, name), least, most)


@dataclass(frozen=True)
class Pruned:
    """The model after, and everything that was found.

    Attributes:
        after: the model without the heads.
        record: what `prune.json` holds (`headwise.questions.prune.files.Pruning`).
    """

    after: Speaker
    record: dict[str, Any]


def prune(
    name: str,
    options: Options,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Pruned:
    """Rank, remove, measure.

    Args:
        name: a run folder, or a folder or hub name of a Hugging Face model.
        progress: shows a number of measurements as they are made.

    Raises:
        HeadwiseError: whatever makes it impossible, before anything is measured where that can be.
    """
    options.validate()
    known = _recorded(name, options)
    trust = options.source.trust_remote_code
    speaker = load_speaker(name, dtype=dtype, device=device, trust_remote_code=trust)
    if not speaker.predicts_next:
        raise HeadwiseError(f"{name} does not predict the next token, so it has no loss to measure")
    evaluated, ranking, identity = open_sequences(
        options.source, speaker.loaded, options.sequences, options.context_length
    )
    layers = attention_layers(speaker.loaded.model, speaker, evaluated.inputs[:1])
    sizes = unit_sizes(speaker, layers, zeroed=options.zero)
    units = units_of({layer.number: layer.n_heads for layer in layers}, sizes)
    evaluations = options.last if options.by in known and options.by != IMPORTANCE else None
    if values := _values(speaker, options, layers, ranking, known):
        known = known | {options.by: values}
    rng = np.random.default_rng(options.seed)
    chosen = _choose(units, values, options, options.mode, rng)
    after = without_heads(speaker, layers, by_layer(chosen), zeroed=options.zero)
    apart = check(speaker, after, layers, by_layer(chosen), evaluated.inputs[:2])
    random = [_choose(units, values, options, "random", rng) for _ in range(options.draws)]
    found = _losses(speaker, after, layers, evaluated, random, options.batch_size, progress)
    heads = {layer.number: layer.n_heads for layer in layers}
    record = {
        "format": FORMAT, "model": name, "mode": options.mode, "by": options.by, "fraction": options.fraction,
        "per_layer": options.per_layer, "zeroed": options.zero, "seed": options.seed,
        "evaluations": evaluations, "data": identity, "checksum": evaluated.checksum,
        "n_sequences": len(evaluated), "context_length": int(evaluated.inputs.shape[1]),
        "n_heads": sum(heads.values()), "unit": max(sizes.values()), "removed": _places(chosen),
        "heads_by_layer": [[n, n - len(by_layer(chosen).get(layer, ()))] for layer, n in heads.items()],
        "logit_change": apart, "loss": paired(found.before, found.after),
        "speed": compared(speaker, after, evaluated, options.batch_size),
        "params": [_parameters(model) for model in (speaker, after)],
        "flops_per_token": [_flops(model, evaluated) for model in (speaker, after)],
        "draws": [
            {"removed": _places(some)} | paired(found.before, losses)
            for some, losses in zip(random, found.random, strict=True)
        ],
        "against_random": against_random(found.before, found.after, found.random, options.mode),
        "law": laws(known, found.importance, options.by, options.seed),
        "heads": [
            {"layer": at[0], "head": at[1], "value": values.get(at), "importance": rise}
            for at, rise in found.importance.items()
        ],
    }  # fmt: skip
    return Pruned(after, record)


def _recorded(name: str, options: Options) -> dict[str, Heads]:
    """The recorded measures of a run's heads; empty for a model that is measured now.

    Raises:
        HeadwiseError: it lacks the measure that heads are to be ranked by.
    """
    if not (is_run(name) and options.last):
        return {}
    known = recorded(Path(name), options.last)
    if options.by not in (*known, IMPORTANCE) and options.mode != "random":
        there = ", ".join(known) or "no table of heads at all"
        raise HeadwiseError(
            f"{name} has not recorded {options.by}, it has {there}; choose another --by, train with "
            "measure.heads (or measure.entanglement.enabled), or pass --last 0 to measure the heads now"
        )
    return known


def _values(
    speaker: Speaker, options: Options, layers: Sequence[Layer], ranking: Sequences, known: dict[str, Heads]
) -> Heads:
    """The measure of every head; empty where heads are drawn at random and it is not known."""
    by, size = options.by, options.batch_size
    if by not in known and options.mode == "random":
        return {}
    if by in known:
        found = known[by]
    elif by == IMPORTANCE:
        found = _left_out(layers, lambda: float(losses(speaker, ranking, size).mean()))
    else:
        found = measured_now(speaker, by, ranking, size, options.seed)
    must_be_known(found, by, layers, speaker.loaded.name)
    return found


@dataclass(frozen=True)
class _Losses:
    """Losses by sequence `(N,)` with all heads, without the chosen, and without each random choice."""

    before: np.ndarray
    after: np.ndarray
    importance: Heads
    random: list[np.ndarray]


def _losses(
    speaker: Speaker,
    after: Speaker,
    layers: Sequence[Layer],
    evaluated: Sequences,
    random: Sequence[Sequence[Unit]],
    batch_size: int,
    progress: Progress,
) -> _Losses:
    by_number = {layer.number: layer for layer in layers}
    total = 3 + sum(layer.n_heads for layer in layers) + len(random)
    with progress("losses without heads", total) as advance:

        def measured(model: Speaker) -> np.ndarray:
            found = losses(model, evaluated, batch_size)
            advance(1)
            return found

        before, without = measured(speaker), measured(after)
        importance = _left_out(layers, lambda: float(measured(speaker).mean()))
        drawn = []
        for some in random:
            with removed([(by_number[unit.layer], head) for unit in some for head in unit.heads]):
                drawn.append(measured(speaker))
    return _Losses(before, without, importance, drawn)


def _left_out(layers: Sequence[Layer], loss: Callable[[], float]) -> Heads:
    """The rise of the loss without each head."""
    _, rises = leave_one_out(layers, loss)
    return {(x.number, h): v for x, row in zip(layers, rises, strict=True) for h, v in enumerate(row)}


def _choose(
    units: Sequence[Unit], values: Heads, options: Options, mode: str, rng: np.random.Generator
) -> list[Unit]:
    """The units to remove; a unit's value is the mean of its heads'."""
    means = [float(np.mean([values.get((u.layer, h), 0.0) for h in u.heads])) for u in units]
    return choose(units, means, mode=mode, fraction=options.fraction, per_layer=options.per_layer, rng=rng)


def by_layer(units: Sequence[Unit]) -> dict[int, list[int]]:
    """Query heads by layer."""
    found: dict[int, list[int]] = {}
    for unit in units:
        found.setdefault(unit.layer, []).extend(unit.heads)
    return found


def _places(units: Sequence[Unit]) -> list[list[int]]:
    return [[unit.layer, head] for unit in units for head in unit.heads]


def _parameters(model: Speaker) -> int:
    return sum(parameter.numel() for parameter in model.loaded.model.parameters())


def _flops(model: Speaker, sequences: Sequences) -> int | None:
    """Forward FLOPs a token; None for a model of transformers."""
    if model.loaded.run is None:
        return None
    decoder = cast(Decoder, model.loaded.model)
    return sum(forward_flops_by_part(decoder, sequences.inputs.shape[1]).values())
