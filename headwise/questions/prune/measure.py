"""Remove a share of the heads by a measure, and see what it costs against removing as many at random.

The loss is the mean over sequences of the mean cross entropy of their tokens; differences are paired sequence
by sequence. What ranks heads and is measured here (importance, or any measure of a model without a head table)
is measured on other sequences than those that tell the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from headwise.analysis.association import Ranked, spearman
from headwise.analysis.statistics import Summary, holm, summarize
from headwise.errors import HeadwiseError, in_range, one_of
from headwise.model.count import forward_flops_by_part
from headwise.model.decoder import Decoder
from headwise.questions.prune import after as pruned_model
from headwise.questions.prune.choose import MODES, Unit, choose, refuse_fraction, units_of
from headwise.questions.prune.heads import (
    IMPORTANCE,
    Heads,
    measured_now,
    must_be_known,
    recorded,
    refuse_unknown,
)
from headwise.questions.prune.text import Sequences, losses, open_sequences
from headwise.watch.effect import Speaker, load_speaker
from headwise.watch.hooks import Layer, attention_layers
from headwise.watch.load import is_run
from headwise.watch.removal import leave_one_out, removed
from headwise.watch.samples import Source

ROUNDS = 3
"""Times that each batch is timed with each model, by turns."""


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
        """Refuse what means nothing, before a model is loaded.

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
    known = recorded(Path(name), options.last) if is_run(name) and options.last else {}
    needs = options.mode != "random" and options.by != IMPORTANCE
    if needs and is_run(name) and options.last and options.by not in known:
        there = ", ".join(known) or "no table of heads at all"
        raise HeadwiseError(
            f"{name} has not recorded {options.by}, it has {there}; choose another --by, train with measure.heads "
            "(or measure.entanglement.enabled), or pass --last 0 to measure the heads now"
        )
    trust = options.source.trust_remote_code
    speaker = load_speaker(name, dtype=dtype, device=device, trust_remote_code=trust)
    if not speaker.predicts_next:
        raise HeadwiseError(f"{name} does not predict the next token, so removing heads has no loss to tell")
    evaluated, ranking, identity = open_sequences(
        options.source, speaker.loaded, options.sequences, options.context_length
    )
    layers = attention_layers(speaker.loaded.model, speaker, evaluated.inputs[:1])
    sizes = pruned_model.unit_sizes(speaker, layers, zeroed=options.zero)
    units = units_of({layer.number: layer.n_heads for layer in layers}, sizes)
    now = options.by not in known
    rankable = _rankable(speaker, options, layers, ranking, known)
    rng = np.random.default_rng(options.seed)
    chosen = _choose(units, rankable, options, options.mode, rng)
    n_heads = sum(layer.n_heads for layer in layers)
    by_layer = _by_layer(chosen)
    after = pruned_model.without_heads(speaker, layers, by_layer, zeroed=options.zero)
    apart = pruned_model.check(speaker, after, layers, by_layer, evaluated.inputs[:2])
    with progress("losses without heads", 3 + n_heads + options.draws) as advance:

        def measured(model: Speaker) -> np.ndarray:
            found = losses(model, evaluated, options.batch_size)
            advance(1)
            return found

        before_losses, after_losses = measured(speaker), measured(after)
        importance = _left_out(layers, lambda: float(measured(speaker).mean()))
        drawn = []
        for _ in range(options.draws):
            some = _choose(units, rankable, options, "random", rng)
            with removed(_as_heads(layers, some)):
                drawn.append((some, measured(speaker)))
    times = _times(speaker, after, evaluated, options.batch_size)
    known = known | {options.by: rankable} if rankable else known
    record = {
        "format": 1, "model": name, "mode": options.mode, "by": options.by, "fraction": options.fraction,
        "per_layer": options.per_layer, "zeroed": options.zero, "seed": options.seed,
        "evaluations": None if now else options.last, "data": identity, "checksum": evaluated.checksum,
        "n_sequences": len(evaluated), "context_length": int(evaluated.inputs.shape[1]),
        "n_heads": n_heads, "unit": max(sizes.values()),
        "removed": [[unit.layer, head] for unit in chosen for head in unit.heads],
        "heads_by_layer": [[layer.n_heads, layer.n_heads - len(by_layer.get(layer.number, ()))] for layer in layers],
        "logit_change": apart,
        "loss": _paired(before_losses, after_losses), "speed": _speed(times, min(options.batch_size, len(evaluated)) * evaluated.inputs.shape[1]),
        "params": [_parameters(model) for model in (speaker, after)],
        "flops_per_token": [_flops(model, evaluated) for model in (speaker, after)],
        "draws": [
            {"removed": [[u.layer, h] for u in some for h in u.heads], **_paired(before_losses, found)}
            for some, found in drawn
        ],
        "against_random": _against(before_losses, after_losses, [found for _, found in drawn], options.mode),
        "law": laws(known, importance, options.by, options.seed),
        "heads": [
            {"layer": at[0], "head": at[1], "value": rankable.get(at), "importance": rise}
            for at, rise in importance.items()
        ],
    }  # fmt: skip
    return Pruned(after, record)


def _rankable(
    speaker: Speaker, options: Options, layers: Sequence[Layer], ranking: Sequences, known: dict[str, Heads]
) -> Heads:
    """The measure of every head; empty where heads are drawn at random and it is not known."""
    by, name = options.by, speaker.loaded.name
    found: Heads
    if by in known:
        found = known[by]
    elif options.mode == "random":
        return {}
    elif by == IMPORTANCE:
        size = options.batch_size
        found = _left_out(layers, lambda: float(losses(speaker, ranking, size).mean()))
    else:
        found = measured_now(speaker, by, ranking, options.batch_size, options.seed)
    must_be_known(found, by, layers, name)
    return found


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


def _by_layer(units: Sequence[Unit]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for unit in units:
        found.setdefault(unit.layer, []).extend(unit.heads)
    return found


def _as_heads(layers: Sequence[Layer], units: Sequence[Unit]) -> list[tuple[Layer, int]]:
    by_number = {layer.number: layer for layer in layers}
    return [(by_number[unit.layer], head) for unit in units for head in unit.heads]


def laws(known: dict[str, Heads], importance: Heads, by: str, seed: int) -> list[dict[str, Any]]:
    """For every measure at hand its rank correlation with importance over the heads, `by` first.

    The p-values are Holm's over all of them, beside their own.
    """
    names = [by, *(name for name in known if name not in (by, IMPORTANCE))] if by in known else list(known)
    heads = list(importance)
    found: list[tuple[str, Ranked]] = []
    for name in names:
        values = [known[name].get(at, math.nan) for at in heads]
        found.append((name, spearman(values, [importance[at] for at in heads], seed=seed)))
    corrected = holm([one.p for _, one in found])
    return [
        {"measure": name} | asdict(one) | {"p_holm": p}
        for (name, one), p in zip(found, corrected, strict=True)
    ]


def _paired(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Losses in nats, their paired difference over sequences, and perplexities."""
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise HeadwiseError("a loss is not finite, so nothing can be said of the heads; is the model sound?")
    difference = summarize(after - before)
    return {
        "before": float(before.mean()), "after": float(after.mean()), "delta": _summary(difference),
        "perplexity_before": math.exp(min(before.mean(), 700.0)),
        "perplexity_after": math.exp(min(after.mean(), 700.0)),
    }  # fmt: skip


def _summary(found: Summary) -> dict[str, Any]:
    return {"mean": found.mean, "ci95": found.ci95, "n": found.n}


def _against(
    before: np.ndarray, after: np.ndarray, drawn: Sequence[np.ndarray], mode: str
) -> dict[str, Any] | None:
    """The difference to the random removals, over draws and over sequences; None without a control.

    `verdict` is better or worse where both intervals exclude 0 on the same side, and undecided otherwise.
    """
    if not drawn:
        return None
    over_draws = summarize(float(after.mean() - one.mean()) for one in drawn)
    over_sequences = summarize(after - np.mean(drawn, axis=0))
    ends = [(one.low, one.high) for one in (over_draws, over_sequences)]
    verdict = "undecided"
    if all(high is not None and high < 0 for _, high in ends):
        verdict = "better"
    elif all(low is not None and low > 0 for low, _ in ends):
        verdict = "worse"
    return {
        "delta": _summary(summarize(float((one - before).mean()) for one in drawn)),
        "over_draws": _summary(over_draws), "over_sequences": _summary(over_sequences),
        "verdict": "control" if mode == "random" else verdict,
    }  # fmt: skip


@torch.no_grad()
def _times(before: Speaker, after: Speaker, sequences: Sequences, batch_size: int) -> np.ndarray:
    """Seconds of a pass, `(passes, 2)`, of full batches, both models by turns after a pass to warm up."""
    batches = [inputs for inputs, _ in sequences.batches(batch_size)]
    batches = [inputs for inputs in batches if len(inputs) == len(batches[0])]
    for model in (before, after):
        _timed(model, batches[0])
    rows = [[_timed(model, inputs) for model in (before, after)] for _ in range(ROUNDS) for inputs in batches]
    return np.array(rows)


def _timed(model: Speaker, inputs: torch.Tensor) -> float:
    device = next(model.loaded.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    model(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _speed(times: np.ndarray, tokens: int) -> dict[str, Any]:
    """Tokens per second of forward passes, and the speed-up with its interval over paired passes."""
    ratios = summarize(np.log(times[:, 0] / times[:, 1]))
    assert ratios.mean is not None
    ends = (
        None if ratios.low is None or ratios.high is None else [math.exp(ratios.low), math.exp(ratios.high)]
    )
    before, after = (tokens / float(seconds) for seconds in np.median(times, axis=0))
    return {"tokens_per_sec_before": before, "tokens_per_sec_after": after, "speedup": math.exp(ratios.mean),
            "interval": ends, "passes": len(times)}  # fmt: skip


def _parameters(model: Speaker) -> int:
    return sum(parameter.numel() for parameter in model.loaded.model.parameters())


def _flops(model: Speaker, sequences: Sequences) -> int | None:
    if model.loaded.run is None:
        return None
    decoder = cast(Decoder, model.loaded.model)
    return sum(forward_flops_by_part(decoder, sequences.inputs.shape[1]).values())
