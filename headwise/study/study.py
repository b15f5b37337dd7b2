"""What a study is: variants x axes x seeds on one base configuration.

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
sizes: {smoke: {budget: {kind: steps, value: 20}}}
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from headwise.analysis.choice import HIGHEST, LOWEST
from headwise.analysis.conclusion import DEFAULT_SMALLEST, smallest_difference
from headwise.analysis.verdict import DEFAULT_CRITERIA, check_criteria
from headwise.config.run import keys
from headwise.config.training import MOST_FLOPS
from headwise.errors import HeadwiseError, did_you_mean, in_range, one_of
from headwise.names import folder_name, refuse_clash
from headwise.study.folders import variant_name
from headwise.study.git import Commit
from headwise.study.memory_size import parse_size
from headwise.study.space import Search

BUDGETS = {"flops": "max_flops", "steps": "max_steps", "tokens": "max_tokens"}
MOST_RUNS = 10_000
KIND = "model.attention.kind"
CODE = "code"
"""The axis whose values are revisions of a git repository, and the key under which a run records its own."""

CRITERIA = {
    "val_loss": LOWEST, "val_bits_per_byte": LOWEST, "val_perplexity": LOWEST, "val_accuracy": HIGHEST,
    "train_loss": LOWEST, "tokens_per_sec": HIGHEST, "step_time_ms": LOWEST, "peak_vram_mb": LOWEST,
    "peak_rss_mb": LOWEST,
}  # fmt: skip
"""What the best of several variants can be chosen by, and which end of it is best."""


@dataclass
class BestOf:
    """A stage: a variant that waits for others and takes what the best of them changes.

    Attributes:
        among: the variants it waits for.
        by: what it chooses by, one of `CRITERIA`; the mean over the seeds that finished.
        take: the overrides that it takes from the best: those that are these keys or lie below them.
    """

    among: list[str] = field(default_factory=list)
    by: str = "val_loss"
    take: list[str] = field(default_factory=lambda: ["model"])

    def takes(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Those of a variant's overrides that the stage takes."""
        return {
            key: value
            for key, value in overrides.items()
            if any(key == part or key.startswith(f"{part}.") for part in self.take)
        }


@dataclass
class Variant:
    """One thing to compare.

    Attributes:
        label: how the report calls it.
        expected_engine: fail the variant when its attention ran on another engine.
        overrides: dotted keys of the configuration and their values.
        seeds: its own, where it needs others than the study's.
        against: the variant it is compared with, where that is not the study's baseline.
        best_of: for a stage, which variants it waits for and what it takes from the best of them.
    """

    label: str = ""
    expected_engine: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    against: str | None = None
    best_of: BestOf | None = None


@dataclass
class Study:
    """What is compared, on what, with which budget.

    Attributes:
        name: the folder's name.
        title, question, hypothesis: for the report.
        plugins: modules outside of headwise that register the attention kinds of the variants.
        baseline: the variant that the others are compared with; the first where not given.
        base: nested configuration that all runs share.
        variants: by name. A study with axes needs none: each kind that is an axis is one then.
        axes: dotted key to values; every variant runs at every combination. An axis that is an option of one
            kind of attention applies to the runs of that kind alone. The axis `code` lists revisions of a git
            repository; each run executes one of them.
        code_repository: a folder in the repository of the axis `code`; where not given, that of the study's
            file, or of the current folder.
        seeds: one run of each.
        search: keys whose values are tried out first; only the winners' runs on fresh seeds are compared.
        budget: `{kind: flops | steps | tokens, value: number}`, equal for all variants.
        smallest_difference: of the loss that matters: in nats, or as a share of the baseline's loss (`0.5%`).
        criteria: which of memory, length, entropy_signal, quality earn a GO.
        match_parameters: change a variant's d_ff so that its parameters match the baseline's.
        fit_batch: halve the batch of a run whose memory does not suffice, with as many more passes a step.
        memory_limit: of a run's training, such as 24GiB: a run that needs more is out of memory. On a GPU
            the allocator's limit; on a CPU two steps are measured beforehand.
        max_length_at: memory, such as 24GiB, at which the longest trainable sequence of each variant is
            searched for.
        max_length_until: the longest sequence that the search tries.
        timeout_s: seconds of training a run.
        workers: runs at a time.
        device: as `--device`.
        size: which of the file's sizes it has; empty for the file as it stands.
        command: the command that makes the study again.
        commits: of the axis `code`: each revision's commit, once it is resolved.
        code_dirty: whether files of the user's own working tree differ from its commit.
        has_headwise: whether one of these commits holds a headwise, so that the revisions run themselves.
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
    code_repository: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    search: Search | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    smallest_difference: float | str = DEFAULT_SMALLEST
    criteria: list[str] = field(default_factory=lambda: list(DEFAULT_CRITERIA))
    match_parameters: bool = False
    fit_batch: bool = False
    memory_limit: str | None = None
    max_length_at: str | None = None
    max_length_until: int = 65_536
    timeout_s: float | None = None
    workers: int = 1
    device: str = "auto"
    size: str = ""
    command: str = ""
    commits: dict[str, Commit] = field(default_factory=dict, init=False)
    code_dirty: bool | None = field(default=None, init=False)
    has_headwise: bool = field(default=False, init=False)

    def validate(self) -> None:
        """Refuse a study that cannot be run.

        Raises:
            HeadwiseError: one line with the value received and what to do.
        """
        folder_name(self.name, "study")
        self._check_axes()
        if not self.variants:
            raise HeadwiseError(f"study {self.name!r} has no variants")
        for name in self.variants:
            variant_name(name)
        refuse_clash(zip(self.variants, self.variants, strict=True), "variants")
        self.baseline = self.baseline or next(iter(self.variants))
        one_of("baseline", self.baseline, self.variants)
        if self.search is not None:
            self._check_search(self.search)
        for name, variant in self.variants.items():
            self._check_seeds(name)
            self._check_reference(name, variant)
            self._check_stage(name, variant)
            for key in variant.overrides:
                self.refuse_decided(f"variant {name!r}: {key}", key)
        self._check_budget()
        smallest_difference(self.smallest_difference, None)
        check_criteria(self.criteria)
        in_range("workers", self.workers, 1, 2**10)
        in_range("timeout_s", self.timeout_s, 0, 1e9, above=True)
        in_range("max_length_until", self.max_length_until, 2, 2**24)
        for key in ("memory_limit", "max_length_at"):
            if (size := getattr(self, key)) is not None:
                parse_size(key, size)
        combinations = math.prod(len(values) for values in self.axes.values())
        runs = combinations * sum(len(self.seeds_of(name)) for name in self.variants)
        if self.search is not None:
            runs = combinations * len(self.variants) * self.search.most_runs()
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

    def reference_of(self, variant: str) -> str:
        """The variant that this one is compared with; itself where it is a baseline."""
        return self.variants[variant].against or self.baseline

    def _check_axes(self) -> None:
        for key, values in self.axes.items():
            if key not in (CODE, *keys()):
                raise HeadwiseError(
                    f"study {self.name!r} has the unknown axis {key!r}{did_you_mean(key, [CODE, *keys()])}; "
                    f"an axis is {CODE}, or a key of the configuration, which `headwise train --help` lists"
                )
            self.refuse_decided(f"axes.{key}", key)
            if (
                not isinstance(values, list)
                or not values
                or any(value in values[:n] for n, value in enumerate(values))
            ):
                raise HeadwiseError(
                    f"axes.{key} is {values!r}; an axis is a list of different values, such as [1, 2]"
                )
        if self.axes and not self.variants:
            self._variants_of_axes()

    def _variants_of_axes(self) -> None:
        """A study of axes alone compares the kinds on its axis, or has one variant."""
        for kind in self.axes.pop(KIND, [None]):
            overrides = {} if kind is None else {KIND: kind}
            self.variants[str(kind or "run")] = Variant(overrides=overrides)

    def _check_seeds(self, name: str) -> None:
        seeds = self.seeds_of(name)
        numbers = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)
        if not numbers or not seeds or len(set(seeds)) < len(seeds):
            raise HeadwiseError(f"study {self.name!r} has seeds {seeds}; give a list of different ones")
        for seed in seeds:
            in_range("seeds", seed, 0, 2**63 - 1)
        reference = self.reference_of(name)
        other = self.seeds_of(reference) if reference in self.variants else seeds
        if alone := sorted(set(seeds) - set(other)):
            raise HeadwiseError(
                f"variant {name!r} has seeds {alone} and the baseline {reference!r} has not: "
                "differences are paired by seed, so give it these too"
            )

    def _check_reference(self, name: str, variant: Variant) -> None:
        if variant.against is None:
            return
        one_of(f"variant {name!r}: against", variant.against, self.variants)
        if self.reference_of(variant.against) != variant.against and variant.against != self.baseline:
            raise HeadwiseError(
                f"variant {name!r} is compared with {variant.against!r}, which is itself compared with "
                f"{self.reference_of(variant.against)!r}; give both one baseline"
            )

    def _check_stage(self, name: str, variant: Variant) -> None:
        stage = variant.best_of
        if stage is None:
            return
        where = f"variant {name!r}: best_of"
        if self.axes:
            raise HeadwiseError(
                f"{where} waits for variants, and a study with axes has none that run once; leave axes out"
            )
        if len(stage.among) < 2 or len(set(stage.among)) < len(stage.among):
            raise HeadwiseError(f"{where}.among is {stage.among}; name two different variants or more")
        for other in stage.among:
            one_of(f"{where}.among", other, self.variants)
            if self.variants[other].best_of is not None:
                raise HeadwiseError(f"{where}.among names {other!r}, which waits for others itself")
        one_of(f"{where}.by", stage.by, CRITERIA)
        if self.baseline == name or any(v.against == name for v in self.variants.values()):
            raise HeadwiseError(f"{where}: a variant that waits for others is no baseline; choose another")

    def _check_search(self, search: Search) -> None:
        """Refuse a search that cannot be made in this study; its fresh seeds are those that are compared."""
        search.validate()
        one_of("search.by", search.by, CRITERIA)
        where = "search.keys."
        for key in search.keys:
            self.refuse_decided(where + key, key)
            setting = [name for name, variant in self.variants.items() if key in variant.overrides]
            if key in self.axes:
                raise HeadwiseError(f"{where}{key} is an axis, too; leave it out of axes or of search.keys")
            if setting:
                raise HeadwiseError(
                    f"{where}{key} is set by variant {setting[0]!r}, so that a search would change nothing "
                    "there; leave it out of the variant or of search.keys"
                )
        if stages := [name for name, variant in self.variants.items() if variant.best_of]:
            raise HeadwiseError(
                f"variant {stages[0]!r} waits for the best of others, and the study has a search: a stage "
                "takes overrides, and what a search finds is none; make two studies"
            )
        sized = [key for key in search.keys if not key.startswith("training.")]
        for name in ("match_parameters", "max_length_at"):
            if sized and getattr(self, name):
                raise HeadwiseError(
                    f"{name} needs models of known size, and {where}{sized[0]} changes it: leave one out"
                )
        self.use_seeds(list(search.confirm_seeds))

    def _check_budget(self) -> None:
        if not self.budget:
            return
        for key in self.budget:
            one_of("budget key", key, ("kind", "value"))
        one_of("budget.kind", str(self.budget.get("kind")), BUDGETS)
        value = self.budget.get("value")
        if not is_number(value) or isinstance(value, str | bool):
            raise HeadwiseError(
                f"budget.value is {value!r}; give a number above 0 and below {MOST_FLOPS:.0e}"
            )
        if self.budget["kind"] != "flops" and self.budget["value"] % 1 != 0:
            raise HeadwiseError(
                f"budget.value is {value!r} {self.budget['kind']}; give a whole number of them"
            )

    def refuse_decided(self, where: str, key: str) -> None:
        """Refuse a key, of all runs, a variant or an axis, whose value the study sets itself in every run.

        Raises:
            HeadwiseError: that is so; says what to use instead.
        """
        reason = ""
        if self.budget and key in [f"training.{limit}" for limit in BUDGETS.values()]:
            reason = "the budget decides that: use budget.kind and budget.value"
        elif self.timeout_s and key == "training.timeout_s":
            reason = "use the study's timeout_s, or --timeout-s"
        elif key in ("seed", "out", "device"):
            reason = "the study gives every run its seed, folder and device: use its seeds, --out and device"
        if reason:
            raise HeadwiseError(f"{where} would change nothing: {reason}")


def is_number(value: Any) -> bool:
    """Whether it is a number that a budget can have; YAML reads 1e9 as text."""
    try:
        return 0 < float(value) <= MOST_FLOPS
    except (TypeError, ValueError, OverflowError):
        return False
