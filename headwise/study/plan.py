"""A study: variants x axes x seeds on one base configuration, planned from a YAML file.

name: demo
question: …
baseline: flash
base: {model: {…}, data: {…}, training: {…}}
variants:
  flash: {label: fused, expected_engine: sdpa, overrides: {model.attention.kind: flash}}
axes: {data.seq_len: [128, 256]}
seeds: [0, 1, 2]
budget: {kind: flops, value: 2.0e8}
smallest_difference: 0.5%
criteria: [memory, length, entropy_signal]
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headwise import reading
from headwise.analysis.conclusion import DEFAULT_SMALLEST, smallest_difference
from headwise.analysis.verdict import DEFAULT_CRITERIA, check_criteria
from headwise.attention import attention_kind
from headwise.attention.kinds import load_plugins
from headwise.config.run import Config, flatten, from_dict, keys, load, to_dict
from headwise.config.training import MOST_FLOPS
from headwise.errors import HeadwiseError, did_you_mean, in_range, one_of
from headwise.files import write_text
from headwise.model.count import parameters_by_part
from headwise.model.decoder import Decoder
from headwise.names import cleaned, folder_name, refuse_clash
from headwise.runs.folder import FORMAT, RunFolder
from headwise.study.folders import refuse_newer_plan, variant_folder, variant_name
from headwise.training.distributed import find_device
from headwise.training.run import SAME_RUN, refuse_device

BUDGETS = {"flops": "max_flops", "steps": "max_steps", "tokens": "max_tokens"}
MOST_RUNS = 10_000
MATCHED = 0.02
"""Parameters within this share of the baseline's count as equal."""


@dataclass
class Variant:
    """One thing to compare.

    Attributes:
        label: how the report calls it.
        expected_engine: fail the variant when its attention ran on another engine.
        overrides: dotted keys of the configuration and their values.
        seeds: its own, where it needs others than the study's.
    """

    label: str = ""
    expected_engine: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)


@dataclass
class Study:
    """What is compared, on what, with which budget.

    Attributes:
        name: the folder's name.
        title, question, hypothesis: for the report.
        plugins: modules outside of headwise that register the attention kinds of the variants.
        baseline: the variant that the others are compared with; the first where not given.
        base: nested configuration that all runs share.
        variants: by name.
        axes: dotted key to values; every variant runs at every combination.
        seeds: one run of each.
        budget: `{kind: flops | steps | tokens, value: number}`, equal for all variants.
        smallest_difference: of the loss that matters: in nats, or as a share of the baseline's loss (`0.5%`).
        criteria: which of memory, length, entropy_signal, quality earn a GO.
        match_parameters: change a variant's d_ff so that its parameters match the baseline's.
        timeout_s: seconds of training a run.
        workers: runs at a time.
        device: as `--device`.
        command: the command that makes the study again.
    """

    name: str
    title: str = ""
    question: str = ""
    hypothesis: str = ""
    plugins: list[str] = field(default_factory=list)
    baseline: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    budget: dict[str, Any] = field(default_factory=dict)
    smallest_difference: float | str = DEFAULT_SMALLEST
    criteria: list[str] = field(default_factory=lambda: list(DEFAULT_CRITERIA))
    match_parameters: bool = False
    timeout_s: float | None = None
    workers: int = 1
    device: str = "auto"
    command: str = ""

    def validate(self) -> None:
        """Refuse a study that cannot be run.

        Raises:
            HeadwiseError: one line with the value received and what to do.
        """
        folder_name(self.name, "study")
        if not self.variants:
            raise HeadwiseError(f"study {self.name!r} has no variants")
        for name in self.variants:
            variant_name(name)
        refuse_clash(zip(self.variants, self.variants, strict=True), "variants")
        self.baseline = self.baseline or next(iter(self.variants))
        one_of("baseline", self.baseline, self.variants)
        for name in self.variants:
            seeds = self.seeds_of(name)
            numbers = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
            if not numbers or not seeds or len(set(seeds)) < len(seeds):
                raise HeadwiseError(f"study {self.name!r} has seeds {seeds}; give a list of different ones")
            for seed in seeds:
                in_range("seeds", seed, 0, 2**63 - 1)
            if alone := sorted(set(seeds) - set(self.seeds_of(self.baseline))):
                raise HeadwiseError(
                    f"variant {name!r} has seeds {alone} and the baseline {self.baseline!r} has not: "
                    "differences are paired by seed, so give it these too"
                )
        if self.budget:
            for key in self.budget:
                one_of("budget key", key, ("kind", "value"))
            one_of("budget.kind", str(self.budget.get("kind")), BUDGETS)
            value = self.budget.get("value")
            if not _is_number(value) or isinstance(value, str | bool):
                raise HeadwiseError(
                    f"budget.value is {value!r}; give a number above 0 and below {MOST_FLOPS:.0e}"
                )
            if self.budget["kind"] != "flops" and self.budget["value"] % 1 != 0:
                raise HeadwiseError(
                    f"budget.value is {value!r} {self.budget['kind']}; give a whole number of them"
                )
        for key in self.axes:
            _refuse_decided(self, f"axes.{key}", key)
        for name, one in self.variants.items():
            for key in one.overrides:
                _refuse_decided(self, f"variant {name!r}: {key}", key)
        smallest_difference(self.smallest_difference, None)
        check_criteria(self.criteria)
        for key, values in self.axes.items():
            if (
                not isinstance(values, list)
                or not values
                or any(value in values[:n] for n, value in enumerate(values))
            ):
                raise HeadwiseError(
                    f"axes.{key} is {values!r}; an axis is a list of different values, such as [1, 2]"
                )
        in_range("workers", self.workers, 1, 2**10)
        in_range("timeout_s", self.timeout_s, 0, 1e9, above=True)
        combinations = math.prod(len(values) for values in self.axes.values())
        runs = combinations * sum(len(self.seeds_of(name)) for name in self.variants)
        if runs > MOST_RUNS:
            raise HeadwiseError(
                f"study {self.name!r} has {runs:,} runs, and at most {MOST_RUNS:,} are planned"
            )

    def seeds_of(self, variant: str) -> list[int]:
        """The seeds of a variant."""
        return self.variants[variant].seeds or self.seeds

    def use_seeds(self, seeds: list[int]) -> None:
        """Run every variant with these instead."""
        self.seeds = seeds
        for variant in self.variants.values():
            variant.seeds = []


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        variant: name, with the axes' values.
        config: complete, `out` set.
        skip: why it cannot run here; None where it can.
    """

    variant: str
    config: Config
    skip: str | None = None

    @property
    def folder(self) -> RunFolder:
        """Where it runs."""
        assert self.config.out is not None
        return RunFolder(Path(self.config.out))


def read_study(path: str | Path) -> Study:
    """Read a study from its YAML file.

    Raises:
        HeadwiseError: missing, unreadable, or with a key that no study has.
    """
    try:
        values = reading.read_yaml(path)
    except reading.Unreadable as error:
        raise HeadwiseError(f"study {error}") from error
    if not isinstance(values, dict):
        raise HeadwiseError(f"study {path} is empty; it needs variants, seeds and a budget")
    _refuse_unknown(values, Study, f"study {path}")
    values = {"name": Path(path).stem} | {key: value for key, value in values.items() if value is not None}
    variants = values.pop("variants", None) or {}
    if not isinstance(variants, dict):
        raise HeadwiseError(f"study {path}: variants is {variants!r}; it names each, with what it changes")
    study = Study(**_typed(values, Study, f"study {path}"))
    load_plugins(study.plugins)
    for name, variant in variants.items():
        where = f"study {path}: variant {name!r}"
        variant = {key: value for key, value in _mapping(variant, where).items() if value is not None}
        _refuse_unknown(variant, Variant, where)
        study.variants[name] = Variant(**_typed(variant, Variant, where))
    study.validate()
    return study


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise HeadwiseError(f"{where} is {value!r}; it holds keys such as label and overrides")
    return value or {}


def _typed(values: dict[str, Any], schema: Any, where: str) -> dict[str, Any]:
    try:
        return reading.check(values, schema)
    except reading.Unreadable as error:
        raise HeadwiseError(f"{where}: {error.reason}") from error


def override(study: Study, key: str, value: str) -> None:
    """Change a dotted key of the study's shared base, its budget, an axis or a variant, from a command line.

    What variants set themselves stays as they set it.

    Args:
        key: `model.d_model`, say, or `budget.value`, `axes.data.seq_len`, `variants.NAME.training.lr`.
        value: as YAML.

    Raises:
        HeadwiseError: no such key, no YAML, or one that no run of the study would take.
    """
    try:
        parsed = reading.parse_yaml(value)
    except reading.Unreadable as error:
        raise HeadwiseError(f"--{key}={value[:100]} is no YAML value: {error}") from None
    section, _, rest = key.partition(".")
    if section == "budget":
        one_of("budget", rest, ("kind", "value"))
        study.budget[rest] = float(parsed) if rest == "value" and _is_number(parsed) else parsed
    elif section == "axes":
        if not isinstance(parsed, list) or not parsed:
            raise HeadwiseError(f"--{key}={value}: an axis is a list of values, such as [1, 2]")
        study.axes[_known(rest)] = parsed
    elif section == "variants":
        name = next((name for name in study.variants if rest.startswith(f"{name}.")), None)
        if name is None:
            one_of("variant", rest, study.variants)
        study.variants[str(name)].overrides[_known(rest.removeprefix(f"{name}."))] = parsed
    else:
        _refuse_ineffective(study, _known(key))
        study.base = dict(flatten(study.base)) | {key: parsed}


def _known(key: str) -> str:
    if key not in keys():
        raise HeadwiseError(
            f"unknown key {key!r}{did_you_mean(key, keys())}; `headwise train --help` lists them"
        )
    return key


def _is_number(value: Any) -> bool:
    """YAML reads 1e9 as text."""
    try:
        return 0 < float(value) <= MOST_FLOPS
    except (TypeError, ValueError, OverflowError):
        return False


def _refuse_ineffective(study: Study, key: str) -> None:
    """Refuse a key of the base that something else decides in every run."""
    _refuse_decided(study, f"--{key}", key)
    reason = ""
    if key in study.axes:
        reason = f"it is an axis of the study: --axes.{key}=[...] changes that"
    elif key == "expected_engine":
        reason = "a variant names its own: expected_engine beside its overrides"
    elif all(key in variant.overrides for variant in study.variants.values()):
        reason = "every variant sets it"
    if reason:
        raise HeadwiseError(f"--{key} would change nothing: {reason}")


def _refuse_decided(study: Study, where: str, key: str) -> None:
    """Refuse a key, of all runs, a variant or an axis, whose value the study sets itself in every run."""
    reason = ""
    if study.budget and key in [f"training.{limit}" for limit in BUDGETS.values()]:
        reason = "the budget decides that: use budget.kind and budget.value"
    elif study.timeout_s and key == "training.timeout_s":
        reason = "use the study's timeout_s, or --timeout-s"
    elif key in ("seed", "out", "device"):
        reason = "the study gives every run its seed, folder and device: use its seeds, --out and device"
    if reason:
        raise HeadwiseError(f"{where} would change nothing: {reason}")


def _refuse_unknown(values: dict[str, Any], kind: type, where: str) -> None:
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise HeadwiseError(f"{where} has the unknown key {key!r}{did_you_mean(key, known)}")


def plan(study: Study, root: Path) -> list[PlannedRun]:
    """Every run of the study, seed by seed, so that an early stop leaves whole comparisons.

    Raises:
        HeadwiseError: a configuration that cannot be, or a folder that holds another one.
    """
    device = find_device(study.device)
    refuse_newer_plan(root / study.name)
    refuse_clash(((name, given) for name, given, _ in _variants(study)), "variants")
    configs = {variant_folder(name): _configure(study, values) for name, _, values in _variants(study)}
    if study.match_parameters:
        baseline = configs[next(name for name in configs if _origin(name) == study.baseline)]
        configs = {name: match_parameters(config, baseline) for name, config in configs.items()}
    runs = []
    for seed in dict.fromkeys([*study.seeds, *study.seeds_of(study.baseline)]):
        for name, config in configs.items():
            if seed not in study.seeds_of(_origin(name)):
                continue
            out = str(root / study.name / name / f"seed_{seed}")
            config = dataclasses.replace(config, seed=seed, out=out)
            try:
                refuse_device(config, device)
                skip = None
            except HeadwiseError as error:
                skip = str(error)
            runs.append(PlannedRun(name, config, skip))
    for run in runs:
        _refuse_other(run)
        _refuse_no_source(run)
    return runs


def _variants(study: Study) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, what it was made of, and dotted values of every variant at every combination of the axes."""
    combinations = [
        list(zip(study.axes, values, strict=True)) for values in itertools.product(*study.axes.values())
    ]
    for name, variant in study.variants.items():
        for combination in combinations:
            axes = [(key.rpartition(".")[2], value) for key, value in combination]
            suffix = "".join(f"@{key}={cleaned(value)}" for key, value in axes)
            given = "".join(f"@{key}={value!r}" for key, value in axes)
            overrides = {"expected_engine": variant.expected_engine} | variant.overrides | dict(combination)
            yield name + suffix, name + given, overrides


def _origin(name: str) -> str:
    return name.partition("@")[0]


def _configure(study: Study, overrides: dict[str, Any]) -> Config:
    values: dict[str, Any] = dict(flatten(study.base)) | overrides
    if study.budget:
        for kind, limit in BUDGETS.items():
            values[f"training.{limit}"] = study.budget["value"] if kind == study.budget["kind"] else None
            if kind != "flops" and values[f"training.{limit}"] is not None:
                values[f"training.{limit}"] = int(study.budget["value"])
    if study.timeout_s:
        values["training.timeout_s"] = study.timeout_s
    if study.plugins:
        values["plugins"] = study.plugins
    return from_dict(values | {"device": study.device})


def count_parameters(config: Config) -> int:
    """Parameters of the model that `config` describes, without making it; a missing vocabulary counts 256."""
    sized = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 256)
    with torch.device("meta"):
        return sum(parameters_by_part(Decoder(sized, config.data.seq_len)).values())


def match_parameters(config: Config, baseline: Config) -> Config:
    """`config` with the d_ff that brings its parameters nearest to the baseline's.

    A difference of more than 2% that remains is for the report to say.
    """
    wanted = count_parameters(baseline)
    if abs(count_parameters(config) - wanted) <= MATCHED * wanted:
        return config

    def at(d_ff: int) -> Config:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=d_ff))

    per_unit = count_parameters(at(2)) - count_parameters(at(1))
    return at(max(1, round(1 + (wanted - count_parameters(at(1))) / per_unit)))


def _refuse_other(run: PlannedRun) -> None:
    if not run.folder.holds_run():
        return
    run.folder.refuse_newer()
    before, now = (dict(flatten(to_dict(c))) for c in (load(run.folder.config), run.config))
    for key, value in before.items():
        if key in SAME_RUN or key == "model.vocab_size" or now[key] == value:
            continue
        raise HeadwiseError(
            f"{run.folder.path} holds a run with {key}={value}, and this study says {now[key]}; "
            "give the study another name, or delete that folder"
        )


def _refuse_no_source(run: PlannedRun) -> None:
    """Refuse before anything starts what would fail in every run's own process."""
    source = run.config.init_from
    if source and not source.startswith("hf://") and not Path(source).exists() and not run.folder.holds_run():
        raise HeadwiseError(
            f"variant {run.variant!r} starts from {source}, which is not there; make it first: "
            "the comments on top of the study's file say how"
        )


def write_plan(study: Study, runs: list[PlannedRun], root: Path) -> Path:
    """Write study.yaml, which the report reads, and return the study's folder."""
    variants = {}
    for run in runs:
        origin = study.variants[_origin(run.variant)]
        axes = run.variant.partition("@")[2].replace("@", ", ")
        label = origin.label or _origin(run.variant)
        variants[run.variant] = {
            "label": f"{label} ({axes})" if axes else label,
            "kind": run.config.model.attention.kind,
            "expected_engine": origin.expected_engine,
            "params_total": count_parameters(run.config),
            "overrides": origin.overrides,
            "seeds": study.seeds_of(_origin(run.variant)),
        }
    baseline = next(name for name in variants if _origin(name) == study.baseline)
    values = dataclasses.asdict(study) | {
        "baseline": baseline,
        "variants": variants,
        "device": str(find_device(study.device)),
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    folder = root / study.name
    write_text(folder / "study.yaml", reading.to_yaml(values))
    return folder


def supported_variants(variants: dict[str, Variant]) -> dict[str, Variant]:
    """Those whose attention kind exists, to offer kinds of the future by name."""
    known = {}
    for name, variant in variants.items():
        try:
            attention_kind(variant.overrides["model.attention.kind"])
        except HeadwiseError:
            continue
        known[name] = variant
    return known
