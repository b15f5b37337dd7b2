"""Which runs a study has, each with its whole configuration, and the plan that its report reads."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headwise import reading
from headwise.attention import attention_kind
from headwise.config.run import Config, flatten, load, to_dict
from headwise.errors import HeadwiseError
from headwise.files import write_text
from headwise.model.count import parameters_by_part
from headwise.model.decoder import Decoder
from headwise.names import refuse_clash
from headwise.runs.folder import FORMAT, RESULTS, RunFolder, state_of
from headwise.runs.schemas import RunConfig
from headwise.study.code import Code, code_of, located, record_revision, resolve
from headwise.study.configure import configure, given
from headwise.study.expand import Place, places, references
from headwise.study.fit import NO_FIT, Fit, adopted, fit_of
from headwise.study.folders import refuse_newer_plan, variant_folder
from headwise.study.search import follow_all, record, search_places, to_come
from headwise.study.stages import Choice, choose
from headwise.study.study import CODE, KIND, Study, Variant
from headwise.training.distributed import find_device
from headwise.training.run import SAME_RUN, refuse_device

MATCHED = 0.02
"""Parameters within this share of the baseline's count as equal."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        variant: name, with the axes' values.
        config: complete, `out` set.
        skip: why it cannot run here; None where it can.
        fit: what happens when its memory does not suffice.
        trial: whether a search tries it out: then a failure is its result, and it is in no comparison.
        attempt: of the worker that it was given to, as `RunFolder.take` numbered it.
        code: the revision that it executes; None for the code that plans it.
    """

    variant: str
    config: Config
    skip: str | None = None
    fit: Fit = NO_FIT
    trial: bool = False
    attempt: int | None = None
    code: Code | None = None

    @property
    def folder(self) -> RunFolder:
        """Where it runs."""
        assert self.config.out is not None
        return RunFolder(Path(self.config.out), self.attempt)


def plan(
    study: Study, root: Path, known: Sequence[PlannedRun] = (), device: torch.device | None = None
) -> list[PlannedRun]:
    """Every run of the study, as `planned_runs`.

    Args:
        device: that runs will compute on; the study's, on this machine, where not given.

    Raises:
        HeadwiseError: a configuration that cannot be, or a folder that holds another one.
    """
    taken = set(map(id, known))
    runs = planned_runs(study, root, known, device)
    for run in runs:
        if id(run) not in taken:
            refuse_other(run, "give the study another name")
            _refuse_no_source(run)
    return runs


def planned_runs(
    study: Study, root: Path, known: Sequence[PlannedRun] = (), device: torch.device | None = None
) -> list[PlannedRun]:
    """Every run of the study, seed by seed, so that an early stop leaves whole comparisons.

    A stage has runs once the variants that it waits for have ended; a search has the trials that are known,
    and its winner once all of them have ended. Whether a run's folder holds another run is not looked at.

    Args:
        known: runs of an earlier plan of this study, which are taken as they are.
        device: that runs will compute on; the study's, on this machine, where not given.

    Raises:
        HeadwiseError: a configuration that cannot be.
    """
    device = device or find_device(study.device)
    refuse_newer_plan(root / study.name)
    resolve(study)
    found = _places(study, root)
    refuse_clash(((place.name, place.given) for place in found), "variants")
    before = {(run.variant, run.config.seed): run for run in known}
    seeds = {variant_folder(place.name): place.seeds or study.seeds_of(place.origin) for place in found}
    new = [place for place in found if any((place.name, seed) not in before for seed in seeds[place.name])]
    configs = {place.name: configure(study, place) for place in new}
    if study.match_parameters and new:
        others = references(study, found)
        of_baseline = {place.name: configure(study, place) for place in found}
        configs = {
            name: match_parameters(config, of_baseline[others[name]]) for name, config in configs.items()
        }
    by_name = {place.name: place for place in found}
    runs: list[PlannedRun] = []
    for seed in dict.fromkeys([*study.seeds, *itertools.chain(*seeds.values())]):
        for name in seeds:
            if seed not in seeds[name]:
                continue
            if (name, seed) in before:
                runs.append(before[name, seed])
                continue
            runs.append(planned(study, by_name[name], configs[name], seed, root, device))
    return runs


def planned(
    study: Study, place: Place, config: Config, seed: int, root: Path, device: torch.device
) -> PlannedRun:
    """A run of a place with its seed and folder."""
    config = dataclasses.replace(config, seed=seed, out=str(root / study.name / place.name / f"seed_{seed}"))
    try:
        refuse_device(config, device)
        skip = None
    except HeadwiseError as error:
        skip = str(error)
    code = None
    if CODE in place.at:
        config = located(config)
        code = code_of(study, place.at[CODE], root, config, given(study, place))
        if state_of((folder := RunFolder(Path(str(config.out)))).read_status()) in RESULTS:
            record_revision(folder, code)  # its worker may have been killed before it could
    return adopted(PlannedRun(place.name, config, skip, fit_of(study), place.trial, code=code))


def waiting(study: Study, root: Path) -> dict[str, str]:
    """The variants without runs, with the reason: what each waits for, or why nothing can be chosen."""
    found = {unit.name: one.waits for one in follow_all(study, root) if one.waits for unit in one.units}
    for name, variant in study.variants.items():
        if variant.best_of is not None:
            choice = _chosen(study, root, name)
            if choice is None:
                found[name] = f"waits for {', '.join(variant.best_of.among)}"
            elif choice.best is None:
                found[name] = choice.text
    return found


def still_to_come(study: Study, root: Path) -> int:
    """Runs of searches that are not planned yet, at most."""
    return to_come(follow_all(study, root), study.search)


def _places(study: Study, root: Path) -> list[Place]:
    if study.search is not None:
        return search_places(study, follow_all(study, root))
    found = []
    for place in places(study):
        variant = study.variants[place.origin]
        if variant.best_of is not None:
            choice = _chosen(study, root, place.origin)
            if choice is None or choice.best is None:
                continue
            taken = variant.best_of.takes(study.variants[choice.best].overrides)
            place = dataclasses.replace(place, overrides=taken | place.overrides)
        found.append(place)
    return found


def _chosen(study: Study, root: Path, name: str) -> Choice | None:
    stage = study.variants[name].best_of
    assert stage is not None
    seeds = {other: study.seeds_of(other) for other in stage.among}
    return choose(stage, root / study.name, seeds)


_counted: dict[str, int] = {}


def count_parameters(config: Config) -> int:
    """Parameters of the model that `config` describes, without making it; a missing vocabulary counts 256."""
    key = repr((config.model, config.data.seq_len))
    if key not in _counted:
        sized = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 256)
        with torch.device("meta"):
            _counted[key] = sum(parameters_by_part(Decoder(sized, config.data.seq_len)).values())
    return _counted[key]


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


def refuse_other(run: PlannedRun, remedy: str) -> None:
    """Refuse a run whose folder holds a run of another configuration.

    Args:
        remedy: what the user can do besides deleting the folder.

    Raises:
        HeadwiseError: that is so; names the first key that differs.
    """
    if not run.folder.holds_run():
        return
    run.folder.refuse_newer()
    now = dict(flatten(to_dict(run.config)))
    if run.code is None:
        before = dict(flatten(to_dict(load(run.folder.config))))
    else:  # another revision has keys and defaults of its own
        recorded = dict(flatten(reading.read_yaml(run.folder.config, RunConfig)))
        before = {key: value for key, value in recorded.items() if key in run.code.given}
    for key, value in before.items():
        if key in SAME_RUN or key == "model.vocab_size" or now[key] == value:
            continue
        raise HeadwiseError(
            f"{run.folder.path} holds a run with {key}={value}, and this command says {now[key]}; "
            f"{remedy}, or delete that folder"
        )


def _refuse_no_source(run: PlannedRun) -> None:
    """Refuse before anything starts what would fail in every run's own process."""
    source = run.config.init_from
    if source and not source.startswith("hf://") and not Path(source).exists() and not run.folder.holds_run():
        raise HeadwiseError(
            f"variant {run.variant!r} starts from {source}, which is not there; make it first: "
            "the comments on top of the study's file say how"
        )


def write_plan(study: Study, runs: list[PlannedRun], root: Path, device: torch.device | None = None) -> Path:
    """Write study.yaml, which the report reads, and return the study's folder."""
    found = [place for place in _places(study, root) if not place.trial]
    others = references(study, places(study))
    by_name = {run.variant: run.config for run in runs}
    variants: dict[str, Any] = {}
    for place in found:
        origin, config = study.variants[place.origin], by_name.get(place.name)
        if config is None:
            continue
        label = origin.label or place.origin
        axes = _axes_of(study, place)
        variants[place.name] = {
            "label": f"{label} ({axes})" if axes else label,
            "kind": config.model.attention.kind,
            "expected_engine": origin.expected_engine,
            "params_total": count_parameters(config),
            "overrides": place.overrides,
            "seeds": study.seeds_of(place.origin),
            "against": others[place.name],
        }
        if CODE in place.at:
            commit = study.commits[place.at[CODE]]
            variants[place.name][CODE] = {"commit": commit.sha, "subject": commit.subject}
        if origin.best_of is not None and (choice := _chosen(study, root, place.origin)):
            variants[place.name]["chosen"] = dataclasses.asdict(choice)
    for name, reason in waiting(study, root).items():
        origin = study.variants[name.partition("@")[0]]
        label = origin.label or name
        variants[name] = {"label": label, "waits": reason, "seeds": origin.seeds or study.seeds}
    baseline = next(place.name for place in places(study) if place.origin == study.baseline)
    values = dataclasses.asdict(study) | {
        "baseline": baseline,
        "variants": variants,
        "search": record(study, follow_all(study, root)),
        "device": str(device or find_device(study.device)),
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    folder = root / study.name
    write_text(folder / "study.yaml", reading.to_yaml(values))
    return folder


def _axes_of(study: Study, place: Place) -> str:
    """The values of the axes for a label, a revision as the user wrote it."""
    axes = place.name.partition("@")[2].replace("@", ", ")
    if CODE not in place.at:
        return axes
    commit = study.commits[place.at[CODE]]
    return axes.replace(f"{CODE}={commit.short}", f"{CODE}={commit.label}")


def supported_variants(variants: dict[str, Variant]) -> dict[str, Variant]:
    """Those whose attention kind exists, to offer kinds of the future by name."""
    known = {}
    for name, variant in variants.items():
        try:
            attention_kind(variant.overrides[KIND])
        except HeadwiseError:
            continue
        known[name] = variant
    return known
