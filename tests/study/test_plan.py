"""Studies: planned from a file, refused with a reason, equal budgets, and run so that nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from headwise.cli.main import main
from headwise.errors import HeadwiseError
from headwise.runs.read import Study as Planned
from headwise.study.executor import state
from headwise.study.plan import count_parameters, match_parameters, plan, write_plan
from headwise.study.read import read_study
from headwise.study.study import Study, Variant

BASE = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "data": {"name": "copy", "seq_len": 16, "batch_size": 2, "eval_sequences": 4},
    "training": {"max_steps": 2, "eval_every": 0, "checkpoint_every": 0},
    "measure": {"maps": 0},
}


def variant(kind: str, **more: Any) -> Variant:
    return Variant(overrides={"model.attention.kind": kind, **more})


def study(**values: Any) -> Study:
    made = Study(
        **{"name": "s", "base": BASE, "variants": {"flash": variant("flash")}, "device": "cpu"} | values
    )
    made.validate()
    return made


def test_every_variant_runs_at_every_combination_of_axes_and_seeds(tmp_path: Path) -> None:
    runs = plan(
        study(
            variants={"flash": variant("flash"), "mha": variant("mha")},
            axes={"data.seq_len": [16, 32], "model.n_layers": [1, 2]},
            seeds=[0, 7],
        ),
        tmp_path,
    )
    assert len({run.config.out for run in runs}) == 2 * 4 * 2
    assert {r.variant for r in runs if r.config.data.seq_len == 32 and r.config.model.n_layers == 2} == {
        "flash@seq_len=32@n_layers=2", "mha@seq_len=32@n_layers=2",
    }  # fmt: skip
    assert [run.config.seed for run in runs] == [0] * 8 + [7] * 8


def test_a_variant_may_have_more_seeds_than_the_rest_which_come_last(tmp_path: Path) -> None:
    variants = {name: variant("flash") for name in ("a", "b", "c")}
    variants["a"].seeds = variants["c"].seeds = [0, 1, 2]
    made = study(variants=variants, seeds=[0])
    runs = plan(made, tmp_path)
    names = [f"{run.variant}{run.config.seed}" for run in runs]
    assert names == ["a0", "b0", "c0", "a1", "c1", "a2", "c2"]
    planned = Planned.read(write_plan(made, runs, tmp_path)).runs
    assert [f"{run.variant}{run.seed}" for run in planned] == ["a0", "a1", "a2", "b0", "c0", "c1", "c2"]
    made.use_seeds([4])
    assert len(plan(made, tmp_path / "other")) == 3


@pytest.mark.parametrize(
    ("kind", "key"), [("flops", "max_flops"), ("tokens", "max_tokens"), ("steps", "max_steps")]
)
def test_a_budget_is_the_only_limit_and_equal_for_all(kind: str, key: str, tmp_path: Path) -> None:
    runs = plan(study(budget={"kind": kind, "value": 5000}), tmp_path)
    for run in runs:
        limits = {
            name: getattr(run.config.training, name) for name in ("max_flops", "max_tokens", "max_steps")
        }
        assert {name for name, value in limits.items() if value is not None} == {key}
        assert limits[key] == 5000


def test_parameters_are_matched_within_two_percent(tmp_path: Path) -> None:
    variants = {"flash": variant("flash"), "mqa": variant("flash", **{"model.n_kv_heads": 1})}
    apart = {r.variant: count_parameters(r.config) for r in plan(study(variants=variants), tmp_path)}
    together = {
        r.variant: count_parameters(r.config)
        for r in plan(study(variants=variants, match_parameters=True), tmp_path)
    }
    assert abs(apart["mqa"] / apart["flash"] - 1) > 0.02
    assert abs(together["mqa"] / together["flash"] - 1) <= 0.02
    assert together["flash"] == apart["flash"]


def test_matching_leaves_an_equal_model_alone(tmp_path: Path) -> None:
    [run] = plan(study(seeds=[0]), tmp_path)
    assert match_parameters(run.config, run.config) is run.config


def test_an_engine_that_is_unavailable_is_skipped_with_its_reason(tmp_path: Path) -> None:
    runs = plan(study(variants={"flash": variant("flash"), "flex": variant("flex")}, seeds=[0]), tmp_path)
    skips = {run.variant: run.skip for run in runs}
    assert skips["flash"] is None
    assert "no backward pass" in (skips["flex"] or "")


def test_a_folder_with_another_configuration_is_refused(tmp_path: Path) -> None:
    [run] = plan(study(seeds=[0]), tmp_path)
    from headwise.config.run import to_yaml

    run.folder.start(to_yaml(run.config))
    changed = BASE | {"training": BASE["training"] | {"lr": 0.5}}
    with pytest.raises(HeadwiseError, match=r"training\.lr=0\.001.*0\.5"):
        plan(study(seeds=[0], base=changed), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("variants: {a: {}}\nseedz: [1]", "unknown key 'seedz' .did you mean 'seeds'"),
        ("variants: {a: {overides: {}}}", "unknown key 'overides' .did you mean 'overrides'"),
        ("seeds: [0]", "no variants"),
        ("variants: {a: {}}\nseeds: [1, 1]", "a list of different ones"),
        ("variants: {a: {}}\nseeds: 3", "seeds: expected a list, got a whole number"),
        ("variants: {a: {seeds: [one]}}", "expected a whole number, got text"),
        (
            "variants: {a: {}, b: {seeds: [0, 5]}}\nseeds: [0]",
            r"'b' has seeds \[5\] and the baseline 'a' has not",
        ),
        ("variants: {a: {}}\nbaseline: b", "'b' is not known"),
        ("variants: {a: {}}\nbudget: {kind: hours, value: 3}", "'hours' is not known"),
        ("variants: {a: {}}\nbudget: {kind: steps, value: many}", "'many'"),
        ("variants: [", "is no YAML"),
    ],
)
def test_a_wrong_study_file_is_refused_in_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert main(["study", str(path), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(HeadwiseError, match=message):
        read_study(path)
    assert not (tmp_path / "runs").exists()


def test_the_plan_is_written_for_the_report(tmp_path: Path) -> None:
    made = study(variants={"a": Variant("the first", "sdpa", {"model.attention.kind": "flash"})}, seeds=[0])
    folder = write_plan(made, plan(made, tmp_path), tmp_path)
    written = yaml.safe_load((folder / "study.yaml").read_text())
    assert written["variants"]["a"]["label"] == "the first"
    assert written["variants"]["a"]["params_total"] > 0
    assert written["baseline"] == "a"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of a good variant, a failing one and a skipped one, run once."""
    root = tmp_path_factory.mktemp("study")
    values = {
        "base": BASE,
        "seeds": [0, 1],
        "variants": {
            "good": {"overrides": {"model.attention.kind": "flash"}},
            "fails": {"expected_engine": "flex", "overrides": {"model.attention.kind": "mha"}},
            "flex": {"overrides": {"model.attention.kind": "flex"}},
        },
    }
    (root / "mixed.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "headwise", "study", "mixed.yaml", "--device", "cpu", "--workers", "2"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(": undecided against ")[0] for line in lines[:-2]] == ["flex", "good"], done.stdout
    assert lines[-2].startswith("report: ")
    return root


def states_of(root: Path) -> dict[str, str]:
    found = {}
    for status in (root / "runs" / "mixed").glob("*/seed_*/status.json"):
        found[f"{status.parts[-3]}/{status.parts[-2]}"] = json.loads(status.read_text())["state"]
    return found


def test_a_failed_run_does_not_stop_the_rest(finished: Path) -> None:
    assert states_of(finished) == {
        "good/seed_0": "finished", "good/seed_1": "finished",
        "fails/seed_0": "failed", "fails/seed_1": "failed",
        "flex/seed_0": "skipped", "flex/seed_1": "skipped",
    }  # fmt: skip
    reason = json.loads((finished / "runs/mixed/fails/seed_0/status.json").read_text())["reason"]
    assert "expected_engine" in reason
    report = (finished / "runs" / "mixed" / "report.md").read_text()
    assert "no backward pass" in report


def test_finished_runs_are_not_run_again(finished: Path) -> None:
    made = read_study(finished / "mixed.yaml")
    made.device = "cpu"
    runs = [run for run in plan(made, finished / "runs") if run.variant == "good"]
    assert all(state(run) == "finished" for run in runs)
    summaries = {run.folder.summary: run.folder.summary.stat().st_mtime_ns for run in runs}
    from headwise.study.executor import run_all
    from headwise.study.local import Local

    assert run_all(runs, Local(1), show=lambda _: None)
    assert {path: path.stat().st_mtime_ns for path in summaries} == summaries


def test_a_run_that_ended_elsewhere_is_not_marked_skipped_here(tmp_path: Path) -> None:
    from headwise.config.run import to_yaml
    from headwise.study.executor import run_all
    from headwise.study.local import Local

    [run] = plan(study(variants={"flex": variant("flex")}, seeds=[0]), tmp_path)
    run.folder.start(to_yaml(run.config))
    run.folder.write_status("finished", reason="on a GPU")
    assert run_all([run], Local(1), show=lambda _: None)
    assert state(run) == "finished"


def test_ctrl_c_leaves_runs_that_go_on(tmp_path: Path) -> None:
    values = {
        "base": BASE | {"training": BASE["training"] | {"max_steps": 100_000}},
        "seeds": [0],
        "variants": {"flash": {"overrides": {"model.attention.kind": "flash"}}},
    }
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "headwise", "study", "long.yaml", "--device", "cpu"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = tmp_path / "runs" / "long" / "flash" / "seed_0"
    try:
        wait_until(
            lambda: '"step"' in text(run / "status.json") and text(run / "metrics.csv").count("train") > 2
        )
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "To continue: headwise study long.yaml" in errors
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert list((run / "checkpoints").glob("step_*/manifest.json"))


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_until(condition: Any, seconds: float = 100) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it never happened"
        threading.Event().wait(0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smallest_difference: 0", "smallest_difference is 0; give a number above 0"),
        ("smallest_difference: -0.5%", "smallest_difference is '-0.5%'"),
        ("smallest_difference: [1]", "smallest_difference: expected a number or text"),
        ("criteria: memory", "criteria: expected a list, got text"),
        ("criteria: [memory, speed]", "'speed' is not known"),
        ("criteria: [memory, memory]", "twice"),
        ("criterion: [memory]", "did you mean 'criteria'"),
    ],
)
def test_what_a_study_decides_by_is_checked_before_it_runs(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(f"variants: {{a: {{}}}}\n{text}\n")
    with pytest.raises(HeadwiseError, match=message):
        read_study(file)


def test_a_study_file_without_criteria_keeps_those_of_the_source_and_writes_them_down(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("variants: {a: {}}\nseeds: [0]\n")
    found = read_study(file)
    assert found.criteria == ["memory", "length", "entropy_signal"]
    found.base, found.device = BASE, "cpu"
    folder = write_plan(found, plan(found, tmp_path), tmp_path)
    written = yaml.safe_load((folder / "study.yaml").read_text())
    assert (written["smallest_difference"], written["criteria"]) == ("0.5%", found.criteria)


def test_a_study_measures_the_importance_of_heads_and_judges_by_it(tmp_path: Path) -> None:
    """From the study's plan over its runs to the lines that its report begins with."""
    from headwise import report
    from headwise.training.run import train

    base = BASE | {"measure": {"maps": 0, "importance": True}}
    base["model"] = BASE["model"] | {"n_heads": 4}
    kinds = {"mha": variant("mha"), "flash": variant("flash")}
    made = study(base=base, variants=kinds, seeds=[0, 1], criteria=["entropy_signal", "quality"])
    runs = plan(made, tmp_path)
    folder = write_plan(made, runs, tmp_path)
    for run in runs:
        train(run.config)
    paths = report.build(folder)
    [line] = report.conclusions(paths["json"])
    assert line.startswith("flash: ")
    assert paths["markdown"].read_text().splitlines()[2] == f"- **flash**: {line.removeprefix('flash: ')}"
    data = json.loads(paths["json"].read_text())
    assert list(data["signals"]) == ["mha", "flash"]
    assert all(set(found["seeds"]) == {"0", "1"} for found in data["signals"].values())
    assert 0 <= data["signals"]["flash"]["p"] <= data["signals"]["flash"]["p_holm"] <= 1
    [verdict] = data["verdicts"]
    rules = {rule["name"]: rule for rule in verdict["rules"]}
    assert list(rules) == ["stability", "loss", "entropy_signal", "quality"]
    assert rules["entropy_signal"]["evaluated"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"axes": {"seed": [1, 2]}},
        {"axes": {"out": ["a", "b"]}},
        {"axes": {"training.max_steps": [1, 2]}},
        {"variants": {"a": variant("flash", seed=3)}},
        {"variants": {"a": variant("flash", **{"training.max_tokens": 64})}},
        {"variants": {"a": variant("flash", **{"training.timeout_s": 9})}, "timeout_s": 5},
    ],
)
def test_what_the_study_sets_in_every_run_is_not_an_axis_or_an_override(wrong: dict[str, Any]) -> None:
    with pytest.raises(HeadwiseError, match="would change nothing"):
        study(**{"budget": {"kind": "steps", "value": 2}} | wrong)


@pytest.mark.parametrize("budget", [{"kind": "steps", "value": 1.5}, {"kind": "steps", "value": 1, "x": 2}])
def test_a_budget_that_would_be_cut_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(HeadwiseError, match="budget"):
        study(budget=budget)
