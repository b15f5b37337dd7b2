"""The numbers of a report: who is averaged, who is compared, who is judged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from headwise.analysis.statistics import summarize
from headwise.report.collect import collect
from headwise.report.curves import rounded, thin
from headwise.runs.read import Run, Study


def variant(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(v for v in data["variants"] if v["name"] == name)


@pytest.fixture(scope="module")
def of_demo(demo: Path) -> dict[str, Any]:
    """What is collected of the demo study. Read-only."""
    return collected(demo)


def collected(folder: Path) -> dict[str, Any]:
    return collect(Study.read(folder))


def test_averages_are_over_the_usable_runs_alone(demo: Path, of_demo: dict[str, Any]) -> None:
    found = variant(of_demo, "tropical")
    losses = [json.loads((demo / f"tropical/seed_{s}/summary.json").read_text())["val_loss"] for s in (0, 1)]
    expected = summarize(losses)
    assert found["n"] == 2
    assert found["results"]["val_loss"] == {
        "n": 2, "mean": expected.mean, "std": expected.std, "ci95": expected.ci95,
    }  # fmt: skip
    assert found["states"] == {"finished": 2, "diverged": 1}


def test_per_head_means_are_those_of_the_last_parts(demo: Path, of_demo: dict[str, Any]) -> None:
    data = of_demo
    parts = [pl.read_parquet(demo / f"flash/seed_{s}/heads/step_00000200.parquet") for s in (0, 1, 2)]
    values = [part.filter(pl.col("head") == 2)["entropy"].cast(pl.Float64).mean() for part in parts]
    row = variant(data, "flash")["per_head"]["entropy"][2]
    expected = summarize(values)
    assert row["head"] == 2
    assert (row["mean"], row["ci95"]) == pytest.approx((expected.mean, expected.ci95))
    one = variant(data, "flash")["per_layer_head"]["k_eff"][5]
    at = [part.filter((pl.col("layer") == 1) & (pl.col("head") == 1))["k_eff"][0] for part in parts]
    assert (one["layer"], one["head"], one["mean"]) == pytest.approx((1, 1, np.mean(at)))


def test_margins_and_nothing_else_for_a_kind_that_offers_only_margins(of_demo: dict[str, Any]) -> None:
    assert list(variant(of_demo, "tropical")["per_head"]) == ["margin"]


def test_comparisons_pair_seeds(demo: Path, of_demo: dict[str, Any]) -> None:
    rows = [c for c in of_demo["comparisons"] if c["metric"] == "val_loss"]
    assert [(c["variant"], c["seeds"]) for c in rows] == [("mha", [0, 1, 2]), ("tropical", [0, 1])]
    runs = {
        kind: [Run(demo / kind / f"seed_{s}").get("val_loss") for s in (0, 1, 2)] for kind in ("flash", "mha")
    }
    differences = np.subtract(runs["mha"], runs["flash"])
    assert rows[0]["mean"] == pytest.approx(differences.mean())
    assert rows[0]["p_adjusted"] >= rows[0]["p_t"]
    for row in of_demo["comparisons"]:
        if row["n"] > 1:
            assert row["low"] <= row["alone"]["low"] <= row["alone"]["high"] <= row["high"]
            assert (row["low"] > 0 or row["high"] < 0) == (row["p_adjusted"] < 0.05)


def test_smoothed_training_loss_is_compared_too(of_demo: dict[str, Any]) -> None:
    assert "train_loss" in {c["metric"] for c in of_demo["comparisons"]}


def test_runs_on_other_data_are_not_paired(tmp_path: Path, make) -> None:
    variants = {
        "flash": make.Variant("flash"),
        "mha": make.Variant("mha", summary={"data_checksum": "other"}),
    }
    data = collected(make.study(tmp_path, variants, seeds=(0, 1), shape=make.SMALL))
    assert data["comparisons"] == []
    assert "different_data" in {flag["code"] for flag in data["flags"]}
    assert data["verdicts"][0]["verdict"] == "INCONCLUSIVE"


def test_runs_that_overlapped_on_a_machine_are_said(tmp_path: Path, make) -> None:
    folder = make.study(tmp_path, {"flash": make.Variant("flash")}, seeds=(0, 1, 2), shape=make.SMALL)
    for number, path in enumerate(sorted(folder.glob("*/*/status.json"))):
        status = json.loads(path.read_text()) | {
            "host": "lab",
            "started": 6.0 * number,
            "finished": 6.0 * number + 10,
        }
        path.write_text(json.dumps(status))
    texts = {flag["code"]: flag["text"] for flag in collected(folder)["flags"]}
    assert "Up to 2 runs ran at a time" in texts["at_a_time"]


def test_verdicts_of_the_demo(of_demo: dict[str, Any]) -> None:
    found = {v["variant"]: v for v in of_demo["verdicts"]}
    assert set(found) == {"mha", "flex", "tropical"}
    assert found["mha"]["verdict"] == "INCONCLUSIVE"
    assert "peak memory of the process" in found["mha"]["text"]
    assert "not evaluated on CPU" in found["mha"]["text"]
    assert "flex cannot train on cpu" in found["flex"]["text"]
    assert (found["tropical"]["verdict"], found["tropical"]["decided_by"]) == ("NO-GO", "stability")


@pytest.mark.parametrize(("vram", "verdict"), [(6_000.0, "GO"), (9_500.0, "NO-GO")])
def test_memory_decides_on_a_gpu(tmp_path: Path, make, vram: float, verdict: str) -> None:
    on_gpu = {"device": "cuda"}
    variants = {
        "flash": make.Variant("flash", vram=10_000.0, summary=on_gpu),
        "tt": make.Variant("tt", vram=vram, summary=on_gpu),
    }
    data = collected(make.study(tmp_path, variants, seeds=(0, 1, 2), shape=make.SMALL))
    assert (data["verdicts"][0]["verdict"], data["verdicts"][0]["decided_by"]) == (verdict, "memory")


def test_at_chance_gives_no_verdict(tmp_path: Path, make) -> None:
    stuck = {"val_loss": math.log(256)}
    variants = {k: make.Variant(k, summary=stuck) for k in ("flash", "mha")}
    data = collected(make.study(tmp_path, variants, seeds=(0, 1), shape=make.SMALL))
    assert data["verdicts"][0]["verdict"] == "INCONCLUSIVE"
    assert {"at_chance", "identical_losses"} <= {flag["code"] for flag in data["flags"]}


def test_one_variant_alone_is_compared_with_nothing_and_it_says_so(tmp_path: Path, make) -> None:
    data = collected(make.study(tmp_path, {"mha": make.Variant("mha")}, seeds=(0,), shape=make.SMALL))
    assert data["verdicts"] == data["conclusions"] == []
    assert "mha is the only variant here" in data["conclusion_note"]


def conclusion(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in data["conclusions"] if c["variant"] == name)


def study_of(tmp_path: Path, make, losses: dict[str, dict[int, float]], **plan: Any) -> dict[str, Any]:
    """A study whose variants end on these losses, all of one kind, collected."""
    folder = make.study(
        tmp_path, {name: make.Variant("mha", heads=False, maps=False) for name in losses},
        tuple(losses[next(iter(losses))]), make.SMALL, **plan,
    )  # fmt: skip
    for name, by_seed in losses.items():
        for seed, loss in by_seed.items():
            path = folder / name / f"seed_{seed}" / "summary.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"val_loss": loss}))
    return collected(folder)


BASE = {0: 1.600, 1: 1.620, 2: 1.610}


def shifted(*by: float) -> dict[int, float]:
    return {seed: BASE[seed] + d for seed, d in enumerate(by)}


def test_every_variant_is_concluded_against_the_baseline_of_the_study_whatever_its_kind(
    tmp_path: Path, make
) -> None:
    losses = {
        "base": BASE, "better": shifted(-0.1, -0.101, -0.102), "worse": shifted(0.1, 0.101, 0.102),
        "same": shifted(0.0001, -0.0001, 0.0002), "wild": shifted(0.2, -0.2, 0.1),
    }  # fmt: skip
    data = study_of(tmp_path, make, losses)
    assert {c["variant"]: c["conclusion"] for c in data["conclusions"]} == {
        "better": "better", "worse": "worse", "same": "equivalent", "wild": "undecided",
    }  # fmt: skip
    assert [v["variant"] for v in data["verdicts"]] == ["better", "worse", "same", "wild"]
    assert {c["against"] for c in data["conclusions"]} == {"base"}
    found = conclusion(data, "better")
    assert found["smallest_difference"] == pytest.approx(0.005 * 1.61)
    assert found["comparisons"] == 4
    assert found["mean"] == pytest.approx(-0.101)
    assert found["low"] < found["alone"]["low"]
    assert found["costs"]["parameters"] == 1.0
    assert found["memory_of"] == "process"
    assert conclusion(data, "wild")["further_seeds"][0] > 0


def test_the_smallest_difference_and_the_criteria_are_those_of_the_study(tmp_path: Path, make) -> None:
    losses = {"base": BASE, "b": shifted(-0.05, -0.0501, -0.0502)}
    wide = study_of(tmp_path / "a", make, losses, smallest_difference=0.2, criteria=["quality"])
    assert conclusion(wide, "b")["conclusion"] == "equivalent"
    assert "too small to matter" in conclusion(wide, "b")["why"]
    assert (wide["verdicts"][0]["verdict"], wide["verdicts"][0]["decided_by"]) == ("NO-GO", "quality")
    narrow = study_of(tmp_path / "b", make, losses, smallest_difference="1%", criteria=["quality"])
    assert conclusion(narrow, "b")["conclusion"] == "better"
    assert (narrow["verdicts"][0]["verdict"], narrow["verdicts"][0]["decided_by"]) == ("GO", "quality")


def test_one_seed_is_undecided_and_a_missing_pair_is_named(tmp_path: Path, make) -> None:
    one = study_of(tmp_path / "a", make, {"base": {0: 1.6}, "b": {0: 1.0}})
    assert conclusion(one, "b")["conclusion"] == "undecided"
    assert "one seed in common, so there is no interval" in conclusion(one, "b")["text"]
    assert "one seed" in conclusion(one, "b")["distrust"]
    lost = study_of(tmp_path / "b", make, {"base": BASE, "b": {0: 1.5, 1: 1.52, 2: float("nan")}})
    assert conclusion(lost, "b")["seeds"] == [0, 1]
    assert "seed 2 without a pair" in conclusion(lost, "b")["distrust"]


def test_a_variant_without_a_run_to_use_says_why(of_demo: dict[str, Any]) -> None:
    found = conclusion(of_demo, "flex")
    assert found["text"].startswith(
        "undecided against flash: no run of flex can be used (skipped: flex cannot train on cpu; "
    )
    assert found["mean"] is None


@pytest.mark.parametrize(
    "importance", [3, "x", [[0.1]], {"loss": 1.0}, {"loss": 1.0, "delta_loss": [1.0], "tokens": 3}]
)
def test_an_importance_that_no_run_writes_is_said(tmp_path: Path, make, importance: Any) -> None:
    study_of(tmp_path, make, {"base": BASE, "b": shifted(0.1, 0.1, 0.2)})
    path = tmp_path / "b" / "seed_0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"importance": importance}))
    data = collected(tmp_path)
    assert any("unreadable" in flag["text"] and "importance" in flag["text"] for flag in data["flags"])
    assert "seed 0 without a pair" in conclusion(data, "b")["distrust"]


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("at_chance", {"val_loss": math.log(256)}),
        ("identical_losses", {"val_loss": 1.7}),
        ("different_data", {"data_checksum": "other"}),
        ("other_engine", {"engine": "eager"}),
    ],
)
def test_a_flag_never_contradicts_a_conclusion(tmp_path: Path, make, code: str, change: dict) -> None:
    variants = {"flash": make.Variant("flash"), "b": make.Variant("flash", summary=change)}
    data = collected(make.study(tmp_path, variants, seeds=(0, 1, 2), shape=make.SMALL))
    assert code in {flag["code"] for flag in data["flags"]}
    assert conclusion(data, "b")["conclusion"] == "undecided"


def test_no_verdict_of_quality_rests_on_losses_that_a_flag_doubts(tmp_path: Path, make) -> None:
    variants = {"flash": make.Variant("flash"), "b": make.Variant("flash", summary={"val_loss": 1.2})}
    folder = make.study(tmp_path, variants, seeds=(0, 1, 2), shape=make.SMALL, criteria=["quality"])
    [verdict] = collected(folder)["verdicts"]
    assert verdict["verdict"] == "INCONCLUSIVE"
    assert "different seeds of b end on one loss" in verdict["text"]


def test_a_run_that_was_copied_is_not_a_second_run(tmp_path: Path, make) -> None:
    study_of(tmp_path, make, {"base": BASE, "b": {0: 1.7, 1: 1.72, 2: 1.71}})
    before = {name: variant(collected(tmp_path), name)["results"]["val_loss"] for name in ("base", "b")}
    (tmp_path / "study.yaml").unlink()
    shutil.copytree(tmp_path / "b" / "seed_1", tmp_path / "b" / "seed_1_again")
    path = tmp_path / "b" / "seed_1_again" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_loss": 1.0}))
    data = collected(tmp_path)
    assert {name: variant(data, name)["results"]["val_loss"] for name in ("base", "b")} == before
    assert {flag["code"]: flag["variant"] for flag in data["flags"]}["repeated_seed"] == "b"
    [other] = data["conclusions"]
    assert other["seeds"] == [0, 1, 2]
    assert abs(other["mean"]) == pytest.approx(0.1)
    assert any("repeated seed" in reason for reason in other["distrust"])


def test_speed_and_memory_of_different_devices_are_not_compared(tmp_path: Path, make) -> None:
    variants = {
        "flash": make.Variant("flash", vram=9_000.0),
        "b": make.Variant("flash", vram=3_000.0, summary={"device_name": "another GPU"}),
    }
    data = collected(make.study(tmp_path, variants, seeds=(0, 1, 2), shape=make.SMALL))
    assert "different_devices" in {flag["code"] for flag in data["flags"]}
    found = conclusion(data, "b")
    assert (found["costs"]["memory"], found["costs"]["tokens_per_sec"]) == (None, None)
    assert found["costs"]["compute"] == 1.0
    assert {row["metric"] for row in data["comparisons"]} == {"val_loss", "train_loss", "val_accuracy"}
    assert data["verdicts"][0]["verdict"] == "INCONCLUSIVE"


def test_a_run_from_trained_weights_is_not_called_untrained(tmp_path: Path, make) -> None:
    """Its first loss is not the loss of an untrained model, and 1% below it may be much."""
    losses = {"base": BASE, "b": shifted(-0.1, -0.101, -0.102)}
    study_of(tmp_path, make, losses)
    for name, by_seed in losses.items():
        for seed, loss in by_seed.items():
            path = tmp_path / name / f"seed_{seed}"
            head, row = "step,split,loss", f"0,val,{1.001 * loss}"
            (path / "metrics.csv").write_text(f"{head}\n{row}\n60,val,{loss}\n")
    before = collected(tmp_path)
    assert "untrained" in {flag["code"] for flag in before["flags"]}
    assert conclusion(before, "b")["conclusion"] == "undecided"
    for path in tmp_path.glob("*/*/config.yaml"):
        path.write_text(path.read_text() + "init_from: runs/other\n")
    after = collected(tmp_path)
    assert "untrained" not in {flag["code"] for flag in after["flags"]}
    assert conclusion(after, "b")["conclusion"] == "better"


def test_one_unstable_run_is_flagged_and_is_a_no_go(tmp_path: Path, make) -> None:
    data = study_of(tmp_path, make, {"base": BASE, "b": shifted(-0.1, -0.101, -0.102)})
    assert data["verdicts"][0]["verdict"] != "NO-GO"
    path = tmp_path / "b" / "seed_1" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nonfinite_share": 0.002}))
    data = collected(tmp_path)
    assert "nonfinite" in {flag["code"] for flag in data["flags"]}
    assert (data["verdicts"][0]["verdict"], data["verdicts"][0]["decided_by"]) == ("NO-GO", "stability")


def test_importance_and_entropy_are_correlated_head_by_head_and_tested_over_seeds(
    tmp_path: Path, make
) -> None:
    variants = {"flash": make.Variant("flash"), "mha": make.Variant("mha"), "bare": make.Variant("mha")}
    folder = make.study(tmp_path, variants, seeds=(0, 1, 2), shape=make.Shape(60, 10, 5, 2, 4))
    rng, expected = np.random.default_rng(0), []
    for name in ("flash", "mha"):
        for seed in (0, 1, 2):
            run = Run(folder / name / f"seed_{seed}")
            last = run.heads.filter(pl.col("step") == 60).sort("layer", "head")
            entropy = last["entropy"].cast(pl.Float64).to_numpy().reshape(2, 4)
            noise = rng.standard_normal((2, 4))
            rises = noise if name == "flash" else -entropy + 0.05 * noise
            path = run.path / "summary.json"
            importance = {"loss": 1.6, "delta_loss": rises.tolist(), "tokens": 64}
            path.write_text(json.dumps(json.loads(path.read_text()) | {"importance": importance}))
            if name == "mha":
                expected.append(np.corrcoef(entropy.ravel(), rises.ravel())[0, 1])
    data = collected(folder)
    assert list(data["signals"]) == ["flash", "mha"]
    found = data["signals"]["mha"]
    assert list(found["seeds"].values()) == pytest.approx(expected, rel=1e-6)
    assert found["p_holm"] == pytest.approx(2 * found["p"])
    verdicts = {v["variant"]: v for v in data["verdicts"]}
    rule = next(r for r in verdicts["mha"]["rules"] if r["name"] == "entropy_signal")
    assert (rule["holds"], rule["evaluated"]) == (True, True)
    bare = next(r for r in verdicts["bare"]["rules"] if r["name"] == "entropy_signal")
    assert (bare["holds"], bare["evaluated"]) == (None, False)
    assert "measure.importance: true" in bare["text"]


def test_curves_keep_their_ends_and_their_order(of_demo: dict[str, Any]) -> None:
    series = of_demo["curves"]["flash"]["train"]
    assert (series["steps"][0], series["steps"][-1]) == (5, 200)
    assert all(
        low <= mean <= high
        for low, mean, high in zip(series["low"], series["mean"], series["high"], strict=True)
    )
    assert series["tokens"][-1] == 200 * 16 * 128
    assert len(series["seeds"]) == 3


def test_the_difference_to_the_baseline_is_of_the_same_seed_at_every_evaluation(
    of_demo: dict[str, Any],
) -> None:
    curves = of_demo["curves"]
    assert "gap" not in curves[of_demo["baseline"]]
    gap, mine, base = curves["mha"]["gap"], curves["mha"]["val"], curves[of_demo["baseline"]]["val"]
    assert gap["steps"] == mine["steps"]
    for line, first, second in zip(gap["seeds"], base["seeds"], mine["seeds"], strict=True):
        assert line["seed"] == first["seed"] == second["seed"]
        apart = [b - a for a, b in zip(first["values"], second["values"], strict=True)]
        assert line["values"] == pytest.approx(apart, rel=1e-4, abs=1e-9)
    assert gap["mean"][-1] == pytest.approx(sum(line["values"][-1] for line in gap["seeds"]) / 3, rel=1e-4)
    assert gap["tokens"] == mine["tokens"]


def test_a_diverged_run_has_its_own_line_and_is_not_in_the_band(of_demo: dict[str, Any]) -> None:
    series = of_demo["curves"]["tropical"]["train"]
    diverged = series["seeds"][2]
    assert (diverged["used"], diverged["state"], diverged["steps"][-1]) == (False, "diverged", 60)
    assert series["steps"][-1] == 200


def test_the_atlas_holds_every_head_at_every_evaluation(demo: Path, of_demo: dict[str, Any]) -> None:
    atlas = of_demo["atlas"]
    line = atlas["variants"]["flash"][1]
    assert line["steps"] == [40, 80, 120, 160, 200]
    assert np.shape(line["measures"]["entropy"]) == (5, 3, 4)
    part = pl.read_parquet(demo / "flash/seed_1/heads/step_00000120.parquet")
    expected = part.filter((pl.col("layer") == 2) & (pl.col("head") == 3))["entropy"][0]
    assert line["measures"]["entropy"][2][2][3] == pytest.approx(expected, rel=1e-5)


def test_everything_is_json(of_demo: dict[str, Any]) -> None:
    data = of_demo
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_thin_keeps_first_and_last() -> None:
    steps = np.arange(1000)
    kept = thin(steps, 40)
    assert (kept.size, kept[0], kept[-1]) == (40, 0, 999)
    assert thin(steps[:10], 40).tolist() == list(range(10))


def test_rounded_keeps_significant_digits() -> None:
    assert rounded(np.array([123456.789, 0.000123456789, 0.0, -2.0])) == [123457.0, 0.000123457, 0.0, -2.0]
