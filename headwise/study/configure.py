"""The configuration of a place of a study."""

from __future__ import annotations

import functools
import json
from typing import Any

from headwise.attention import KINDS
from headwise.config.run import Config, flatten, from_dict
from headwise.errors import HeadwiseError, did_you_mean
from headwise.study.expand import Place
from headwise.study.study import BUDGETS, KIND, Study


def configure(study: Study, place: Place) -> Config:
    """The configuration of a variant at a combination of the axes, without seed and folder.

    Raises:
        HeadwiseError: it cannot be; says which variant where its kind of attention is not installed.
    """
    values: dict[str, Any] = dict(flatten(study.base)) | place.overrides
    _refuse_missing_kind(place, values)
    if study.budget:
        for kind, limit in BUDGETS.items():
            values[f"training.{limit}"] = study.budget["value"] if kind == study.budget["kind"] else None
            if kind != "flops" and values[f"training.{limit}"] is not None:
                values[f"training.{limit}"] = int(study.budget["value"])
    if study.timeout_s:
        values["training.timeout_s"] = study.timeout_s
    if study.plugins:
        values["plugins"] = study.plugins
    made = _made(json.dumps(values | {"device": study.device}), tuple(KINDS))
    if isinstance(made, HeadwiseError):
        raise HeadwiseError(str(made))
    return made


@functools.lru_cache(maxsize=4096)  # a search asks for one configuration again and again
def _made(values: str, kinds: tuple[str, ...]) -> Config | HeadwiseError:
    try:
        return from_dict(json.loads(values))
    except HeadwiseError as error:
        return error.with_traceback(None)


def _refuse_missing_kind(place: Place, values: dict[str, Any]) -> None:
    kind = values.get(KIND)
    if isinstance(kind, str) and kind not in KINDS:
        raise HeadwiseError(
            f"variant {place.origin!r} names the attention kind {kind!r}, which is not installed"
            f"{did_you_mean(kind, KINDS)}; installed are {', '.join(KINDS)}"
        )
