"""Loss against the context kept, from run folders: pairing, parity, budgets of layers, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from headwise.config.run import from_dict
from headwise.data import eval_batches, open_data
from headwise.errors import HeadwiseError
from headwise.questions.budget.greedy import greedy_shares
from headwise.questions.budget.measure import Options, measure, variants
from headwise.runs.weights import load_model
from headwise.training.distributed import World, find_device
from headwise.training.loss import TokenLoss, evaluate
from headwise.training.run import train

TINY = {
    "model.d_model": 16, "model.n_layers": 2, "model.n_heads": 2, "data.name": "ngram", "data.vocab_size": 16,
    "data.seq_len": 16, "data.batch_size": 4, "data.eval_sequences": 8, "training.max_steps": 2,
    "training.lr": 0.01, "measure.heads": False, "measure.maps": 0, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of selective and of flash, as a study lays them out."""
    root = tmp_path_factory.mktemp("study")
    for kind in ("flash", "selective"):
        for seed in (1, 2):
            out = {"seed": seed, "model.attention.kind": kind, "out": str(root / kind / f"seed_{seed}")}
            train(from_dict(TINY | out))
    return root


def options(*shares: float, **others: Any) -> Options:
    return Options(shares, device="cpu", **others)


def quiet(line: str) -> None:
    pass


def test_seeds_are_averaged_and_paired_with_the_baselines(study: Path) -> None:
    data = measure([study], options(1.0, 0.5, 0.25), say=quiet)
    flash, selective = data["series"]
    assert (flash["name"], selective["name"]) == ("flash, window", "selective")
    assert data["baseline"]["name"] == "flash"
    assert [point["keys"] for point in selective["points"]] == [16, 8, 4]
    full, _, quarter = selective["points"]
    assert full["n"] == 2
    assert full["ci95"] is not None
    by_seed = [quarter["losses"][s] - flash["points"][0]["losses"][s] for s in ("1", "2")]
    assert quarter["difference"]["mean"] == pytest.approx(sum(by_seed) / 2)
    assert full["losses"] != quarter["losses"]
    assert selective["parity"]["seeds"] == 2
    assert flash["parity"] is None


def test_variants_of_a_study_come_in_its_plans_order(study: Path, tmp_path: Path) -> None:
    assert list(variants([study])) == ["flash", "selective"]
    shutil.copytree(study, tmp_path / "planned")
    (tmp_path / "planned/study.yaml").write_text(
        "variants: {selective: {}, other: {}, flash: {seeds: [1]}}\nseeds: [1, 2]\n"
    )
    found = variants([tmp_path / "planned"])
    assert {name: [run.seed for run in runs] for name, runs in found.items()} == {
        "selective": [1, 2],
        "flash": [1, 2],
    }
    shutil.copytree(study / "flash", tmp_path / "planned/added_by_hand")
    assert list(variants([tmp_path / "planned"])) == ["selective", "flash", "added_by_hand"]


def test_the_full_context_is_the_loss_of_the_run(study: Path) -> None:
    run = study / "selective" / "seed_1"
    data = measure([run], options(1.0), say=quiet)
    model, config = load_model(run)
    batches = eval_batches(open_data(config.data, config.seed), "val", 3)
    world = World(0, 1, find_device("cpu"))
    loss = evaluate(TokenLoss(model), batches, world, world.autocast("fp32")).loss
    assert data["series"][0]["points"][0]["losses"]["1"] == pytest.approx(loss, rel=1e-6)
    assert data["baseline"] is None


def test_a_baseline_of_another_folder_is_measured_with_its_full_context(study: Path) -> None:
    data = measure([study / "selective"], options(0.25), baseline=study / "flash" / "seed_2", say=quiet)
    flash, selective = data["series"]
    assert flash["points"][0]["budget"] == 1.0
    assert selective["parity"]["seeds"] == 1
    assert [point["budget"] for point in selective["points"]] == [0.25]


def test_layers_get_budgets_whose_mean_is_the_budget(study: Path) -> None:
    run = study / "selective" / "seed_1"
    data = measure(
        [run], options(0.5, 0.25, greedy=True, readmit=True, calibration=2, sequences=4), say=quiet
    )
    assert [one["method"] for one in data["series"]] == ["kept", "chosen afresh", "per layer"]
    for point in data["series"][2]["points"]:
        assert sum(point["layers"]["1"]) / 2 == pytest.approx(point["budget"])
    assert (data["sequences"], data["calibration"]) == (4, 2)


def test_greedy_takes_from_the_layer_that_misses_its_keys_least() -> None:
    weights = [5.0, 1.0, 3.0]

    def loss(shares: list[float]) -> float:
        return sum(w / share for w, share in zip(weights, shares, strict=True))

    found = greedy_shares(3, [0.5, 0.25, 1.0], 0.1, loss)
    assert found[1.0] == [1.0, 1.0, 1.0]
    for target, shares in found.items():
        assert sum(shares) == pytest.approx(3 * target)
        assert shares[1] <= shares[2] <= shares[0]
        assert loss(shares) <= loss([target] * 3)
    assert min(greedy_shares(3, [0.2], 0.1, loss)[0.2]) >= 0.1


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_a_budget_outside_of_0_to_1_is_refused(study: Path, share: float) -> None:
    with pytest.raises(HeadwiseError, match="above 0 and at most 1"):
        measure([study], options(share))


def test_a_run_remembers_its_measurement_and_needs_its_weights_only_for_another(tmp_path: Path) -> None:
    out = {"model.attention.kind": "selective", "out": str(tmp_path / "run"), "training.checkpoint_every": 1}
    train(from_dict(TINY | out))
    asked = options(1.0, 0.5, greedy=True, readmit=True, calibration=2, sequences=4)
    first = measure([tmp_path / "run"], asked, say=quiet)
    weights = [*tmp_path.rglob("*.safetensors")]
    assert weights
    for path in weights:
        path.unlink()
    said: list[str] = []
    again = measure([tmp_path / "run"], asked, say=said.append)
    assert again["series"] == first["series"]
    assert "measured before" in said[0]
    with pytest.raises(HeadwiseError, match=r"safetensors|checkpoint"):
        measure([tmp_path / "run"], options(0.25), say=quiet)
    (tmp_path / "run" / "budget.json").write_text("[")
    with pytest.raises(HeadwiseError, match=r"safetensors|checkpoint"):
        measure([tmp_path / "run"], asked, say=quiet)


def test_a_run_made_again_is_measured_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(from_dict(TINY | {"out": str(folder)}))
    first = measure([folder], options(1.0), say=quiet)
    remembered = (folder / "budget.json").read_bytes()
    shutil.rmtree(folder)
    train(from_dict(TINY | {"out": str(folder), "training.lr": 0.02}))
    (folder / "budget.json").write_bytes(remembered)
    said: list[str] = []
    again = measure([folder], options(1.0), say=said.append)
    assert "measured before" not in said[0]
    assert again["series"] != first["series"]


def test_what_cannot_be_compared_is_refused(study: Path, tmp_path: Path) -> None:
    train(from_dict(TINY | {"out": str(tmp_path / "longer"), "data.seq_len": 32, "training.max_steps": 1}))
    with pytest.raises(HeadwiseError, match=r"has seq_len 32, and .* has 16"):
        measure([study / "flash", tmp_path / "longer"], options(1.0), say=quiet)
    with pytest.raises(HeadwiseError, match="no folder"):
        measure([tmp_path / "absent"], options(1.0))
    with pytest.raises(HeadwiseError, match="no runs below"):
        measure([study / "flash" / "seed_1" / "checkpoints"], options(1.0))
    with pytest.raises(HeadwiseError, match=r"--baseline .* holds 2 variants"):
        measure([study / "flash"], options(1.0), baseline=study)


def test_runs_are_named_apart_and_counted_once(study: Path) -> None:
    found = variants([study / "flash" / "seed_1", study / "flash", study / "selective"])
    assert {name: len(runs) for name, runs in found.items()} == {"flash": 2, "selective": 2}
