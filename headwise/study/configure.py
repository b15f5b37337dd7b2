"""The configuration of a place of a study."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from headwise import reading
from headwise.attention import KINDS
from headwise.config.run import Config, flatten, from_dict, to_dict
from headwise.errors import HeadwiseError, did_you_mean
from headwise.study.expand import Place
from headwise.study.study import BUDGETS, KIND, Study


def configure(study: Study, place: Place) -> Config:
    """The configuration of a variant at a combination of the axes, without seed and folder.

    Raises:
        HeadwiseError: it cannot be; says which variant where its kind of attention is not installed.
    """
    values = given(study, place)
    _refuse_missing_kind(place, values)
    return _config(values, [key for key in place.at if key in values])


def given(study: Study, place: Place) -> dict[str, Any]:
    """Dotted keys and values that a study sets in the configuration of a variant; None for the default."""
    values: dict[str, Any] = dict(flatten(study.base)) | place.overrides
    if study.budget:
        for kind, limit in BUDGETS.items():
            values[f"training.{limit}"] = study.budget["value"] if kind == study.budget["kind"] else None
            if kind != "flops" and values[f"training.{limit}"] is not None:
                values[f"training.{limit}"] = int(study.budget["value"])
    if study.timeout_s:
        values["training.timeout_s"] = study.timeout_s
    if study.plugins:
        values["plugins"] = study.plugins
    return values | {"device": study.device}


_parsed: dict[str, Config] = {}
"""What was worked out before in this process: the thousand places of a plan are alike."""


def _config(values: dict[str, Any], axes: Collection[str]) -> Config:
    """The configuration of dotted `values`; one that differs from an earlier one in numbers is not parsed.

    Args:
        axes: the keys among them that may differ.
    """
    numbers = {key: values[key] for key in axes if type(values[key]) in (int, float, bool)}
    rest = sorted((key, repr(value)) for key, value in values.items() if key not in numbers)
    like = repr((rest, sorted(numbers)))
    found = with_numbers(_parsed[like], numbers) if like in _parsed else None
    if found is None:
        found = from_dict(values)
        _parsed.setdefault(like, found)
    return found


def with_numbers(config: Config, numbers: dict[str, Any]) -> Config | None:
    """A copy of `config` with these numbers; None where the parser must judge: another type, or a refusal."""
    found = copy.deepcopy(config)
    for key, value in numbers.items():
        *sections, name = key.split(".")
        section: Any = found
        for part in sections:
            section = getattr(section, part, None)
        if type(getattr(section, name, None)) is not type(value):
            return None
        setattr(section, name, value)
    try:
        reading.check(to_dict(found), Config)
        found.validate()
    except HeadwiseError:
        return None
    return found


def _refuse_missing_kind(place: Place, values: dict[str, Any]) -> None:
    kind = values.get(KIND)
    if isinstance(kind, str) and kind not in KINDS:
        raise HeadwiseError(
            f"variant {place.origin!r} names the attention kind {kind!r}, which is not installed"
            f"{did_you_mean(kind, KINDS)}; installed are {', '.join(KINDS)}"
        )
