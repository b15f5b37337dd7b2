"""Reading a study from its file, at one of its sizes, and changing it from a command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from headwise import reading
from headwise.attention.kinds import load_plugins
from headwise.config.run import flatten, keys
from headwise.errors import HeadwiseError, did_you_mean, one_of
from headwise.study.code import locate
from headwise.study.space import Search
from headwise.study.study import CODE, BestOf, Study, Variant, is_number

NOT_OF_A_SIZE = ("name", "sizes", "size", "command")
"""Keys of a study that its sizes cannot change."""


def read_study(path: str | Path, size: str | None = None) -> Study:
    """Read a study from its YAML file.

    Args:
        size: one of the file's `sizes`, whose keys replace the file's; the file as it stands where None.

    Raises:
        HeadwiseError: missing, unreadable, with a mistake as it stands or at any of its sizes, or without
            this size.
    """
    try:
        values = reading.read_yaml(path)
    except reading.Unreadable as error:
        raise HeadwiseError(f"study {error}") from error
    if not isinstance(values, dict):
        raise HeadwiseError(f"study {path} is empty; it needs variants, seeds and a budget")
    where = f"study {path}"
    sizes = _sizes(values, where)
    if size is not None and not sizes:
        raise HeadwiseError(f"{where} has no sizes, so --size={size} has no effect; leave it out")
    if size is not None:
        one_of("--size", size, sizes)
    plain = {key: value for key, value in values.items() if key != "sizes"}
    study = _study(plain, path, where)
    for name, changes in sizes.items():  # each is checked, whichever is used
        found = _study_at_size(plain, name, changes or {}, path, where)
        study = found if name == size else study
    return study


def _study_at_size(
    values: dict[str, Any], size: str, changes: dict[str, Any], path: str | Path, where: str
) -> Study:
    for key in changes:
        if key in NOT_OF_A_SIZE:
            raise HeadwiseError(f"{where}: size {size!r} sets {key}, which is the same at every size")
    own = f"{where} at size {size!r}"
    try:
        return _study(_merged(values, changes) | {"size": size}, path, own)
    except HeadwiseError as error:
        text = str(error)
        raise HeadwiseError(text if text.startswith(own) else f"{own}: {text}") from error


def _study(values: dict[str, Any], path: str | Path, where: str) -> Study:
    """The study of a file's values at one of its sizes, validated."""
    _refuse_unknown(values, Study, where)
    values = {"name": Path(path).stem} | {key: value for key, value in values.items() if value is not None}
    variants, search = values.pop("variants", None) or {}, values.pop("search", None)
    if not isinstance(variants, dict):
        raise HeadwiseError(f"{where}: variants is {variants!r}; it maps names to their changes")
    study = Study(**_typed(values, Study, where))
    locate(study, Path(path).absolute().parent)
    load_plugins(study.plugins)
    for name, variant in variants.items():
        study.variants[name] = _variant(variant, f"{where}: variant {name!r}")
    if search is not None:
        study.search = _search(search, where)
        given = [f"variant {name!r}" for name, one in study.variants.items() if one.seeds]
        if given := ["the study"] * ("seeds" in values) + given:
            raise HeadwiseError(
                f"{where}: {given[0]} has seeds that would change nothing: a search has search.seeds for "
                "its trials and search.confirm_seeds for what is compared"
            )
    study.validate()
    return study


def _search(values: Any, where: str) -> Search:
    if not isinstance(values, dict):
        raise HeadwiseError(f"{where}: search is {values!r}; it needs the keys keys, sampler and trials")
    _refuse_unknown(values, Search, f"{where}: search")
    known = {key: value for key, value in values.items() if value is not None}
    return Search(**_typed(known, Search, f"{where}: search"))


def _variant(values: Any, where: str) -> Variant:
    values = {key: value for key, value in _mapping(values, where).items() if value is not None}
    _refuse_unknown(values, Variant, where)
    stage = values.pop("best_of", None)
    variant = Variant(**_typed(values, Variant, where))
    if stage is not None:
        if not isinstance(stage, dict):
            raise HeadwiseError(f"{where}: best_of is {stage!r}; it needs the keys among, by and take")
        _refuse_unknown(stage, BestOf, f"{where}: best_of")
        variant.best_of = BestOf(**_typed(stage, BestOf, f"{where}: best_of"))
    return variant


def _sizes(values: dict[str, Any], where: str) -> dict[str, Any]:
    sizes = values.get("sizes") or {}
    if not isinstance(sizes, dict) or not all(isinstance(one, dict | None) for one in sizes.values()):
        raise HeadwiseError(f"{where}: sizes is {sizes!r}; it maps the name of each size to its changes")
    return sizes


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` over them, mapping by mapping; a null takes a key away."""
    found = dict(values)
    for key, change in changes.items():
        before = found.get(key)
        if change is None:
            found.pop(key, None)
        elif isinstance(before, dict) and isinstance(change, dict) and key != "axes":
            found[key] = _merged(before, change)
        else:
            found[key] = change
    return found


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise HeadwiseError(f"{where} is {value!r}; it is a mapping with keys such as label and overrides")
    return value or {}


def _typed(values: dict[str, Any], schema: Any, where: str) -> dict[str, Any]:
    try:
        return reading.check(values, schema)
    except reading.Unreadable as error:
        raise HeadwiseError(f"{where}: {error.reason}") from error


def _refuse_unknown(values: dict[str, Any], kind: type, where: str) -> None:
    known = [f.name for f in dataclasses.fields(kind) if f.init]
    for key in values:
        if key not in known:
            raise HeadwiseError(f"{where} has the unknown key {key!r}{did_you_mean(str(key), known)}")


def override(study: Study, key: str, value: str) -> None:
    """Set a dotted key of the study's shared base, its budget, an axis or a variant from a command line.

    What variants set themselves stays as they set it.

    Args:
        key: `model.d_model`, say, or `budget.value`, `axes.data.seq_len`, `search.trials`,
            `search.keys.training.lr`, `variants.NAME.training.lr`.
        value: as YAML.

    Raises:
        HeadwiseError: an unknown key, an invalid YAML value, or a key that would not affect any run.
    """
    try:
        parsed = reading.parse_yaml(value)
    except reading.Unreadable as error:
        raise HeadwiseError(f"--{key}={value[:100]} is not a YAML value: {error}") from None
    section, _, rest = key.partition(".")
    if section == "budget":
        one_of("budget", rest, ("kind", "value"))
        study.budget[rest] = float(parsed) if rest == "value" and is_number(parsed) else parsed
    elif section == "axes":
        if not isinstance(parsed, list) or not parsed:
            raise HeadwiseError(f"--{key}={value}: an axis is a list of values, such as [1, 2]")
        study.axes[rest if rest == CODE else _known(rest)] = parsed
    elif section == "search":
        _override_search(study, key, rest, parsed)
    elif section == "variants":
        name = next((name for name in study.variants if rest.startswith(f"{name}.")), None)
        if name is None:
            one_of("variant", rest, study.variants)
        study.variants[str(name)].overrides[_known(rest.removeprefix(f"{name}."))] = parsed
    else:
        _refuse_ineffective(study, _known(key))
        study.base = dict(flatten(study.base)) | {key: parsed}


def _override_search(study: Study, key: str, rest: str, value: Any) -> None:
    search = study.search or Search()
    section, _, searched = rest.partition(".")
    if section == "keys" and searched:
        search.keys = search.keys | {_known(searched): value}
    else:
        one_of("search key", rest, [f.name for f in dataclasses.fields(Search)])
        search = Search(**_typed(dataclasses.asdict(search) | {rest: value}, Search, f"--{key}"))
    study.search = search


def _known(key: str) -> str:
    if key not in keys():
        raise HeadwiseError(
            f"unknown key {key!r}{did_you_mean(key, keys())}; `headwise train --help` lists them"
        )
    return key


def _refuse_ineffective(study: Study, key: str) -> None:
    """Refuse a key of the base that is overridden in every run."""
    study.refuse_decided(f"--{key}", key)
    reason = ""
    if key in study.axes:
        reason = f"it is an axis of the study: --axes.{key}=[...] changes that"
    elif key == "expected_engine":
        reason = "a variant names its own: expected_engine beside its overrides"
    elif all(key in variant.overrides for variant in study.variants.values()):
        reason = "every variant sets it"
    if reason:
        raise HeadwiseError(f"--{key} would change nothing: {reason}")
