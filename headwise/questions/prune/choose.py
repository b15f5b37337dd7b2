"""Which heads to remove: units ranked by a measure, over the whole model or layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headwise.errors import HeadwiseError, one_of

MODES = ("low", "high", "mixed", "random")


@dataclass(frozen=True)
class Unit:
    """Query heads of one layer that leave together."""

    layer: int
    heads: tuple[int, ...]


def units_of(heads: Mapping[int, int], sizes: Mapping[int, int]) -> list[Unit]:
    """All units of a model.

    Args:
        heads: query heads by layer.
        sizes: query heads of a unit, by layer.
    """
    return [
        Unit(layer, tuple(range(first, first + sizes[layer])))
        for layer, count in heads.items()
        for first in range(0, count, sizes[layer])
    ]


def refuse_fraction(fraction: float) -> None:
    """Refuse a share that removes nothing or everything.

    Raises:
        HeadwiseError: it is not above 0 and below 1.
    """
    if not 0 < fraction < 1:
        raise HeadwiseError(f"--fraction is {fraction:g}; it is a share of the heads, above 0 and below 1")


def choose(
    units: Sequence[Unit],
    values: Sequence[float],
    *,
    mode: str,
    fraction: float,
    per_layer: bool,
    rng: np.random.Generator,
) -> list[Unit]:
    """The units to remove: at most `fraction` of all, or of each layer.

    Args:
        values: the measure of each unit; not read where `mode` is random.
        mode: low (the lowest values), high, mixed (lowest and highest by turns) or random.
        rng: for random, which draws among the choices that leave a unit in every layer.

    Raises:
        HeadwiseError: an unknown mode, a fraction that is no share, one that removes nothing, or one that
            would remove every head of a layer; names the layer.
    """
    one_of("--mode", mode, MODES)
    refuse_fraction(fraction)
    layers: dict[int, list[int]] = {}
    for at, unit in enumerate(units):
        layers.setdefault(unit.layer, []).append(at)
    groups = list(layers.values()) if per_layer else [list(range(len(units)))]
    counts = [math.floor(fraction * len(group) + 1e-9) for group in groups]
    if not any(counts):
        most = max(map(len, groups))
        where = "of the largest layer's" if per_layer else "of the"
        raise HeadwiseError(
            f"--fraction {fraction:g} {where} {most} removable heads is less than one head; "
            f"give {1 / most:.3g} or more"
        )
    if mode == "random":
        chosen = _drawn(list(layers.values()), counts, per_layer, rng)
    else:
        chosen = [
            at for group, n in zip(groups, counts, strict=True) for at in _ranked(group, values, mode)[:n]
        ]
    for layer, members in layers.items():
        if set(members) <= set(chosen):
            raise HeadwiseError(
                f"--fraction {fraction:g} would remove every head of layer {layer}; "
                "lower it, or rank within each layer with --per-layer"
            )
    return [units[at] for at in sorted(chosen)]


def _ranked(group: Sequence[int], values: Sequence[float], mode: str) -> list[int]:
    """Members in the order of their removal; equal values leave in the order of layer and head."""
    rising = sorted(group, key=lambda at: values[at])
    if mode == "low":
        return rising
    falling = sorted(group, key=lambda at: -values[at])
    if mode == "high":
        return falling
    order = dict.fromkeys(at for pair in zip(rising, falling, strict=True) for at in pair)
    return list(order)


def _drawn(
    layers: Sequence[Sequence[int]], counts: Sequence[int], per_layer: bool, rng: np.random.Generator
) -> list[int]:
    """Units at random, with one left in every layer: in each layer one drawn unit is safe."""
    if per_layer:
        return [
            int(at)
            for group, n in zip(layers, counts, strict=True)
            for at in rng.choice(group, n, replace=False)
        ]
    every = [at for group in layers for at in group]
    if counts[0] > len(every) - len(layers):
        raise HeadwiseError(
            f"removing {counts[0]} of {len(every)} removable heads cannot leave one in each of {len(layers)} "
            "layers; give a smaller --fraction"
        )
    for _ in range(1000):
        drawn = rng.permutation(every)[: counts[0]].tolist()
        if not any(set(group) <= set(drawn) for group in layers):
            return drawn
    safe = {int(rng.choice(group)) for group in layers}
    return rng.permutation([at for at in every if at not in safe])[: counts[0]].tolist()
