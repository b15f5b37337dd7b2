"""Everything a report says, as one JSON-able mapping: `report.json`.

Markdown, HTML and figures only present what is here; none of them computes a number of its own.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headwise.analysis.honesty import Flag, RunFacts, check, different_data, mark_repeats
from headwise.analysis.statistics import Summary, summarize
from headwise.report.atlas import atlas, grid, per_head, per_layer_head
from headwise.report.best import appendix, best_runs
from headwise.report.compare import Material, comparisons, most, number
from headwise.report.conclusions import conclude_all
from headwise.report.curves import curves, gap
from headwise.report.exports import fit_of, option
from headwise.report.section import Found, Section
from headwise.runs.read import Run, Study, Unreadable

RESULTS = ("final_loss", "val_loss", "train_loss", "val_bits_per_byte", "val_perplexity", "val_accuracy",
           "best_val_loss", "tokens_per_sec", "step_time_ms", "peak_vram_mb", "peak_rss_mb", "data_wait",
           "wall_s", "step", "tokens", "flops")  # fmt: skip
SHAPE = ("n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "seq_len", "batch_size")
ENVIRONMENT = ("headwise", "git_commit", "git_dirty", "python", "torch", "cuda", "device", "device_name",
               "cpu_count", "threads", "platform", "engine")  # fmt: skip


def collect(study: Study, sections: Sequence[Section] = ()) -> dict[str, Any]:
    """Read a study's runs and work out all that its report says; what sections add is under their names."""
    known = mark_repeats([_facts(run) for run in study.runs])
    facts = {id(run): one for run, one in zip(study.runs, known, strict=True)}
    names = list(dict.fromkeys([*study.variants, *(str(run.variant) for run in study.runs)]))
    by_variant = {name: [run for run in study.runs if run.variant == name] for name in names}
    material = Material(by_variant, facts)
    used = material.used
    grids, damaged = _grids(by_variant, used)
    reference = _reference(study, by_variant)
    others = _references(study, by_variant, reference)
    lines = {name: found for name, runs in by_variant.items() if (found := _curves(runs, used))}
    _add_gaps(lines, material, others)
    among = Found(study.runs, grids, lines, study)
    added = {section.name: section.collect(among) for section in sections}
    doubts = [
        flag for section in sections if added[section.name] for flag in section.flags(added[section.name])
    ]
    flags = sorted(
        [*check(list(facts.values()), reference, others), *damaged, *_doubtful(study), *doubts],
        key=lambda flag: ("error", "warning", "note").index(flag.severity),
    )
    plan = study.plan
    return finite({
        "run_id": study.name,
        "title": plan.get("title") or study.name,
        "question": plan.get("question"),
        "hypothesis": plan.get("hypothesis"),
        "folder": shown(study.path),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "device": plan.get("device") or most(run.get("device") for run in study.runs),
        "seeds": sorted({run.seed for run in study.runs if run.seed is not None}),
        "budget": plan.get("budget") or _budget(study.runs),
        "baseline": reference,
        "against": _against(others, reference),
        "command": plan.get("command"),
        "timeout_s": plan.get("timeout_s"),
        "flags": [asdict(flag) for flag in flags],
        "variants": [
            _variant(name, study.variants.get(name) or {}, runs, used, grids.get(name, []))
            for name, runs in by_variant.items()
        ],
        "comparisons": comparisons(material, others),
        **conclude_all(material, others, plan, flags, grids),
        "runs": [_run(run, facts[id(run)], study.path) for run in study.runs],
        "best": best_runs(material),
        "appendix": appendix(by_variant),
        "chosen": _chosen(study),
        "different_data": different_data(list(facts.values()), others),
        "curves": lines,
        **added,
        "chance_loss": most(run.get("chance_loss") for run in study.runs),
        "atlas": atlas(grids),
        "environment": _environment(study.runs),
    })  # fmt: skip


def shown(path: Path) -> str:
    """A path as a person would type it: from the working folder where it lies below it."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def finite(value: Any) -> Any:
    """The same value with None for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _facts(run: Run) -> RunFacts:
    version = " ".join(str(v)[:12] for v in (run.get("headwise"), run.get("git_commit")) if v)
    device = run.get("device_name") or run.get("device")
    started = run.state not in ("skipped", "planned")
    step = number(run, "step")
    params = number(run, "params_total")
    return RunFacts(
        variant=str(run.variant), seed=run.seed, state=run.state, reason=run.reason,
        loss=number(run, "final_loss"), chance_loss=number(run, "chance_loss"),
        start_loss=_start_loss(run), engine=run.get("engine"),
        expected_engine=run.get("expected_engine"), data_checksum=run.get("data_checksum"),
        params_total=None if params is None else int(params), step=None if step is None else int(step),
        data_wait=number(run, "data_wait"), nonfinite_share=number(run, "nonfinite_share"),
        spike_share=number(run, "spike_share"), device=device if started else None,
        version=version or None, **_when(run), batch_size=option(run, "data", "batch_size"),
        wanted_batch=fit_of(run).get("wanted"),
    )  # fmt: skip


def _when(run: Run) -> dict[str, Any]:
    """On which machine a run was made, and from when to when in seconds since the epoch."""
    if run.problem:
        return {}
    host, began, ended = (run.status.get(name) for name in ("host", "started", "finished"))
    return {"host": host, "time": (float(began), float(ended)) if began and ended else None}


def _start_loss(run: Run) -> float | None:
    """The validation loss of the untrained model; None for a run that began with trained weights."""
    if run.problem or run.get("init_from"):
        return None
    steps, losses = run.curve("val", "loss")
    return float(losses[0]) if steps.size and steps[0] == 0 else None


def _reference(study: Study, by_variant: dict[str, list[Run]]) -> str | None:
    baseline = study.baseline
    return baseline if baseline in by_variant else next(iter(by_variant), None)


def _references(study: Study, by_variant: dict[str, list[Run]], baseline: str | None) -> dict[str, str]:
    """What each variant is compared with: what its plan names, else the baseline."""
    found = {}
    for name in by_variant:
        own = (study.variants.get(name) or {}).get("against")
        found[name] = str(own if own in by_variant else baseline)
    return found


def _chosen(study: Study) -> list[dict[str, str]]:
    """What each stage took and why, or why it has not run."""
    found = []
    for name, plan in study.variants.items():
        if text := ((plan or {}).get("chosen") or {}).get("text"):
            found.append({"variant": name, "text": f"takes the best of what it waited for: {text}"})
        elif (plan or {}).get("waits"):
            found.append({"variant": name, "text": plan["waits"]})
    return found


def _doubtful(study: Study) -> list[Flag]:
    """Stages whose choice may be noise."""
    found = []
    for name, plan in study.variants.items():
        chosen = (plan or {}).get("chosen") or {}
        if chosen.get("doubt"):
            text = f"{name} takes the best of others by {chosen.get('by')}, and {chosen['doubt']}."
            found.append(Flag("warning", "choice_in_noise", text, name))
    return found


def _against(references: dict[str, str], baseline: str | None) -> str | None:
    """The one baseline by name, or words for several."""
    different = {reference for name, reference in references.items() if reference != name}
    return baseline if different <= {baseline} else "its baseline"


def _grids(by_variant: dict[str, list[Run]], used: set[int]) -> tuple[dict[str, list], list[Flag]]:
    grids: dict[str, list] = {}
    damaged = []
    for name, runs in by_variant.items():
        for run in runs:
            try:
                found = grid(run)
            except Unreadable as error:
                text = f"{name} (seed {run.seed}): {error}; its heads are not shown."
                damaged.append(Flag("error", "unreadable_heads", text, name))
                continue
            if found:
                grids.setdefault(name, []).append((run, id(run) in used, found))
    return grids, damaged


def _add_gaps(lines: dict[str, Any], material: Material, references: dict[str, str]) -> None:
    """Beside the validation loss of each variant how far it is from its baseline's, seed by seed."""
    for name, found in lines.items():
        reference = references[name]
        base = lines.get(reference, {}).get("val")
        if base and name != reference and "val" in found:
            paired, _ = material.pair(reference, name, "val_loss")
            if found_gap := gap(base, found["val"], paired):
                found["gap"] = found_gap


def _curves(runs: list[Run], used: set[int]) -> dict[str, Any]:
    return curves([run for run in runs if not run.problem], used)


def _variant(
    name: str, plan: dict[str, Any], runs: list[Run], used: set[int], grids: list[tuple[Run, bool, dict]]
) -> dict[str, Any]:
    mine = [run for run in runs if id(run) in used]
    last = [found for _, averaged, found in grids if averaged]
    example = next(iter([*mine, *runs]), None)

    def read(key: str) -> Any:
        return example.get(key) if example else None

    return {
        "name": name,
        "label": plan.get("label") or name,
        "kind": plan.get("kind") or read("kind"),
        "expected_engine": plan.get("expected_engine") or read("expected_engine"),
        "engine": most(run.get("engine") for run in runs if run.state not in ("skipped", "planned")),
        "n": len(mine),
        "states": dict(Counter(run.state for run in runs)),
        "results": {key: asdict(summary) for key in RESULTS if (summary := _summary(mine, key)).n},
        "other_splits": _other_splits(mine),
        "params": read("params") or {},
        "params_total": read("params_total"),
        "flops_per_token": read("flops_per_token"),
        "flops_parts": read("flops_parts") or {},
        "shape": {key: value for key in SHAPE if (value := read(key)) is not None},
        "per_head": per_head(last),
        "per_layer_head": per_layer_head(last),
    }  # fmt: skip


def _summary(runs: list[Run], key: str) -> Summary:
    values = [number(run, key) for run in runs]
    return summarize(v for v in values if v is not None and math.isfinite(v))


def _other_splits(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Last loss and accuracy of the splits beside train and val (the test text, other lengths)."""
    splits = dict.fromkeys(s for run in runs for s in run.metrics["split"].unique().sort().to_list())
    found: dict[str, dict[str, Any]] = {}
    for split in splits:
        if split in ("train", "val"):
            continue
        for column in ("loss", "accuracy"):
            ends = [run.curve(split, column)[1] for run in runs]
            values = [float(end[-1]) for end in ends if end.size and math.isfinite(end[-1])]
            if values:
                found.setdefault(split, {})[column] = asdict(summarize(values))
    return found


def _run(run: Run, facts: RunFacts, root: Path) -> dict[str, Any]:
    keys = ("val_loss", "train_loss", "step", "max_steps", "tokens", "flops", "wall_s", "engine",
            "tokens_per_sec")  # fmt: skip
    return {
        "variant": run.variant, "seed": run.seed, "state": run.state, "reason": run.reason,
        "used": facts.usable, "final_loss": facts.loss, **{key: run.get(key) for key in keys},
        "path": shown(run.path), "place": run.path.relative_to(root).as_posix(),
        "summary": shown(run.path / "summary.json"),
    }  # fmt: skip


def _budget(runs: list[Run]) -> dict[str, Any] | None:
    steps = most(run.get("step") for run in runs)
    return None if steps is None else {"kind": "steps", "value": steps}


def _environment(runs: list[Run]) -> list[dict[str, Any]]:
    """Each fact of the environment with the values it takes over the runs."""
    rows = [(name, [run.get(name) for run in runs]) for name in ENVIRONMENT]
    data = [d if isinstance(d := run.get("data"), dict) else {} for run in runs]
    rows = [(name, [str(v)[:12] if name == "git_commit" and v else v for v in found]) for name, found in rows]
    rows += [(f"data {key}", [d.get(key) for d in data]) for key in ("name", "checksum", "vocab_size")]
    listed = [(name, list(dict.fromkeys(str(v) for v in values if v is not None))) for name, values in rows]
    return [{"name": name.replace("_", " "), "values": values} for name, values in listed if values]
