"""The places of a study: its variants at every combination of its axes, and the baseline of each place."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from headwise.attention import KINDS
from headwise.attention.config import AttentionConfig
from headwise.config.run import flatten
from headwise.names import cleaned
from headwise.study.study import CODE, KIND, Study

OPTIONS = "model.attention."


@dataclass(frozen=True)
class Place:
    """A variant at one combination of the axes.

    Attributes:
        name: name of its folder: the variant and the value of every axis.
        given: the same with the values as given, for messages.
        origin: the variant's own name.
        at: axis -> value, for the axes that apply to this kind.
        overrides: dotted keys and values of the variant and the axes, the revision left out.
        seeds: those it runs on, where they are not its variant's.
        trial: whether a search tries it out, so that it is in no comparison.
    """

    name: str
    given: str
    origin: str
    at: dict[str, Any]
    overrides: dict[str, Any]
    seeds: tuple[int, ...] = ()
    trial: bool = False


def places(study: Study) -> list[Place]:
    """Every variant at every combination of the axes, of a study whose revisions are resolved; each once.

    An axis that is an option of one kind of attention is left out where another kind runs.
    """
    found: dict[str, Place] = {}
    base = dict(flatten(study.base))
    for name, variant in study.variants.items():
        for values in itertools.product(*study.axes.values()):
            every = dict(zip(study.axes, values, strict=True))
            own = {"expected_engine": variant.expected_engine} | variant.overrides
            kind = (base | own | every).get(KIND, AttentionConfig().kind)
            at = {key: value for key, value in every.items() if owner(key) in (None, kind)}
            axes = [(key.rpartition(".")[2], key, value) for key, value in at.items()]
            given = name + "".join(f"@{last}={value!r}" for last, _, value in axes)
            folder = name + "".join(f"@{last}={_in_name(study, key, value)}" for last, key, value in axes)
            overrides = own | {key: value for key, value in at.items() if key != CODE}
            found.setdefault(given, Place(folder, given, name, at, overrides))
    return list(found.values())


def _in_name(study: Study, key: str, value: Any) -> str:
    """An axis's value as a part of a folder's name: of a revision, its commit."""
    return study.commits[value].short if key == CODE else cleaned(value)


def owner(key: str) -> str | None:
    """The kind of attention whose own option a dotted key is; None for any other key."""
    section = key.removeprefix(OPTIONS).partition(".")[0] if key.startswith(OPTIONS) else ""
    kind = KINDS.get(section)
    return section if kind is not None and kind.options is not None else None


def references(study: Study, found: list[Place]) -> dict[str, str]:
    """The baseline of each place, at the same values of the axes.

    A study of one variant compares all values of its axes with the first.
    """
    by_origin: dict[str, list[Place]] = {}
    for place in found:
        by_origin.setdefault(place.origin, []).append(place)
    if len(study.variants) == 1:
        return {place.name: found[0].name for place in found}

    def reference(place: Place) -> str:
        candidates = by_origin[study.reference_of(place.origin)]
        shared = [key for key in place.at if key != KIND and owner(key) is None]
        same = [one for one in candidates if all(one.at.get(key) == place.at[key] for key in shared)]
        return (same or candidates)[0].name

    return {place.name: reference(place) for place in found}
