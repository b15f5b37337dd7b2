from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from headwise.cli.intervene import RESULTS, SAMPLES, main
from headwise.errors import HeadwiseError
from headwise.questions.intervene.gain import fit

QUERY_SCALING_STUDY = [
    "scale",
    "mean_entropy",
    "mean_max_attn",
    "mean_k_eff",
    "std_entropy",
    "std_max_attn",
    "std_k_eff",
]
QUERY_SCALING_STUDY += ["n_tokens", "layer", "head", "head_type"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers x 4 heads, and shards of 6 contexts of 16 tokens beside it."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    built = transformers.LlamaForCausalLM(config)
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    built.save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, 50, size=(6, 16), dtype=np.int32)
    np.savez(folder / "shard_0.npz", input_ids=ids)
    return folder


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(model / "shard_0.npz"), "--n-samples", "6", "--context-length", "16"]
    return [str(model), *more, *data, "--out", str(out), "--cache", str(out / "cache"), "--dtype", "float32"]


TARGET = ("--target-layer", "1", "--target-head", "2", "--control-head", "0")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_target_and_a_control(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(model, tmp_path / "a", *TARGET)) == 0
    printed = capsys.readouterr().out
    places = [
        printed.index(text)
        for text in (
            "check passed, L1 H2: scale 1.0 equals no intervention",
            "check passed, L1 H2: other heads' queries, all keys and all values are bit-equal",
            "check passed, L1 H0: scale 1.0",
            "Expected as the scale goes from 0.5 to 1.5",
            "L1 H2 (target), 84 tokens",
            "L1 H0 (control), 84 tokens",
            "gain_ratio L1 H2 / L1 H0",
            "If the target head does not exhibit monotonic trends",
            "dH/dβ = -β·Var_p(s) <= 0",
        )
    ]
    assert places == sorted(places)
    rows = rows_of(tmp_path / "a" / RESULTS)
    assert list(rows[0])[:11] == QUERY_SCALING_STUDY
    assert [(r["head"], r["head_type"], r["scale"]) for r in rows[4:6]] == [
        ("2", "target", "1.5"),
        ("0", "control", "0.5"),
    ]
    assert float(rows[2]["delta_loss"]) == float(rows[2]["kl"]) == 0
    assert float(rows[0]["kl"]) > 0
    (gain,) = (r for r in rows_of(tmp_path / "a" / "gain_summary.csv") if r["head_type"] == "target")
    expected = fit(
        [float(r["scale"]) for r in rows[:5]], np.array([float(r["mean_max_attn"]) for r in rows[:5]])
    )
    assert float(gain["gain_max_attn"]) == pytest.approx(float(expected.slope))
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == {
        "q_scale_intervention.png", "gain_fit_L1_H2.png", "gain_fit_L1_H0.png", "gain_comparison.png",
    }  # fmt: skip
    about = json.loads((tmp_path / "a" / "intervene.json").read_text())
    assert (about["scores"], about["n_samples"], about["checks"]) == ("pre_rope", 6, "passed")

    # saved sweeps lead to the same verdict, from one file or from one for each head
    line = re.search("gain_ratio.*", printed)
    assert line is not None
    assert "over 6 samples" in line[0]
    assert main(["gain", str(tmp_path / "a" / RESULTS), "--out", str(tmp_path / "b")]) == 0
    assert line[0] in capsys.readouterr().out
    for type_ in ("target", "control"):
        for name in (RESULTS, SAMPLES):
            chosen = [r for r in rows_of(tmp_path / "a" / name) if r["head_type"] == type_]
            (tmp_path / type_).mkdir(exist_ok=True)
            with (tmp_path / type_ / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, list(chosen[0]))
                writer.writeheader()
                writer.writerows(chosen)
    files = [str(tmp_path / type_ / RESULTS) for type_ in ("target", "control")]
    assert main(["gain", *files, "--out", str(tmp_path / "c")]) == 0
    assert line[0] in capsys.readouterr().out
    assert (tmp_path / "c" / "gain_summary.csv").read_text() == (
        tmp_path / "a" / "gain_summary.csv"
    ).read_text()
    with pytest.raises(HeadwiseError, match="holds L1 H2 again"):
        main(["gain", files[0], files[0], "--out", str(tmp_path / "d")])


@pytest.mark.parametrize(("head_type", "missing"), [("control", "target"), ("target", "control")])
def test_one_head_alone_has_no_verdict_and_that_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], head_type: str, missing: str
) -> None:
    head = ["--target-layer", "1", "--target-head", "2", "--head-type", head_type, "--scales", "0.5", "1"]
    assert main(arguments(model, tmp_path, *head)) == 0
    printed = capsys.readouterr().out
    assert f"No gain ratio without a {missing}: `headwise intervene gain` compares" in printed
    assert "\n\n\n" not in printed


def test_all_heads_place_the_target_among_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, tmp_path, "--all-heads", *TARGET[:4], "--scores", "post_rope")) == 0
    printed = capsys.readouterr().out
    assert "Gains of 8 heads" in printed
    assert re.search(r"L1 H2 has a higher gain than [0-7] of 8 heads", printed)
    everyone = rows_of(tmp_path / "gain_all_heads.csv")
    assert [(r["layer"], r["head"]) for r in everyone] == [
        (str(i), str(h)) for i in range(2) for h in range(4)
    ]
    (target,) = rows_of(tmp_path / "gain_summary.csv")
    assert float(everyone[6]["gain_max_attn"]) == pytest.approx(float(target["gain_max_attn"]), rel=1e-4)
    assert (tmp_path / "gain_all_heads.png").is_file()


@pytest.fixture(scope="module")
def half_broken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with NaN in the queries of layer 1."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("broken")
    broken = transformers.LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight[:] = torch.nan
    broken.save_pretrained(folder)
    (folder / "shard_0.npz").write_bytes((model / "shard_0.npz").read_bytes())
    return folder


def test_gains_of_all_heads_leave_out_those_that_are_nan_and_say_so_once(
    half_broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(half_broken, tmp_path, "--all-heads")) == 0
    printed, said = capsys.readouterr()
    assert said.count("4 of 8 gains are NaN; are there NaN weights?") == 1
    assert "Gains of 4 heads" in printed
    assert "nan" not in printed.lower()
    rows = rows_of(tmp_path / "gain_all_heads.csv")
    assert [row["gain_max_attn"] == "nan" for row in rows] == [False] * 4 + [True] * 4
    assert {row["is_monotonic"] for row in rows[4:]} == {"False"}


@pytest.mark.parametrize("more", [("--remove", "0.1"), TARGET])
def test_nothing_is_compared_with_an_output_that_is_not_finite(
    half_broken: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    with pytest.raises(HeadwiseError, match="is not finite, so nothing can be compared with it; are there"):
        main(arguments(half_broken, tmp_path, *more))
    assert not list(tmp_path.glob("*.csv"))


def test_heads_are_removed_alone_and_together(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, tmp_path, "--remove", "0.1", "1.2", "--how", "mean")) == 0
    printed = capsys.readouterr().out
    assert "output replaced by its mean" in printed
    assert re.search(r"loss of the whole model: \d\.\d{4}", printed)
    rows = rows_of(tmp_path / "removed_heads.csv")
    assert [row["heads"] for row in rows] == ["0.1", "1.2", "0.1 1.2"]
    assert all(float(row["kl"]) > 0 and row["delta_loss_ci95"] for row in rows)
    assert (tmp_path / "removed_heads.png").is_file()


TO_LOAD = {
    "layer": (("--target-layer", "2", "--target-head", "0"), "no layer 2; this model has layers 0 to 1"),
    "head": (("--target-layer", "1", "--target-head", "4"), "layer 1 has no head 4; it has heads 0 to 3"),
    "control": ((*TARGET[:4], "--control-head", "9"), "layer 1 has no head 9"),
    "removed": (("--remove", "0.9"), "layer 0 has no head 9"),
    "not a head": (("--remove", "3x"), "--remove '3x' is not LAYER.HEAD"),
    "too many samples": ((*TARGET[:4], "--n-samples", "7"), "has 6 contexts of 16 tokens"),
}


@pytest.mark.parametrize("case", TO_LOAD)
def test_what_the_model_or_the_data_lack_is_said(model: Path, tmp_path: Path, case: str) -> None:
    more, message = TO_LOAD[case]
    base = arguments(model, tmp_path)
    with pytest.raises(HeadwiseError, match=message):
        main([*base, *more])
    assert not (tmp_path / RESULTS).exists()


BEFORE_LOADING = {
    "nothing": ((), "nothing to change"),
    "half a head": (("--target-layer", "1"), "name one head together"),
    "control alone": (("--control-head", "1", "--all-heads"), "is compared with a target"),
    "itself": ((*TARGET[:4], "--control-head", "2"), "both target and control"),
    "two experiments": ((*TARGET, "--remove", "0.1"), "two experiments"),
    "one scale": ((*TARGET, "--scales", "1"), "--scales 1: give at least two"),
    "negative scale": (
        (*TARGET, "--scales", "-1", "1"),
        "--scales -1 1: give at least two different factors above 0",
    ),
    "scores": ((*TARGET, "--scores", "pre"), "--scores 'pre' is not known.*pre_rope"),
    "how": (("--remove", "0.1", "--how", "half"), "--how 'half' is not known"),
    "short": ((*TARGET, "--context-length", "3"), "leaves no token to measure"),
    "batch": ((*TARGET, "--batch-size", "0"), "--batch-size is 0; it must be at least 1"),
}


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_options_that_do_not_go_together_are_refused_first(case: str) -> None:
    more, message = BEFORE_LOADING[case]
    with pytest.raises(HeadwiseError, match=message):
        main(["no/such/model", *more])


def test_files_that_are_no_sweeps_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(HeadwiseError, match=r"x\.csv has no column 'scale'"):
        main(["gain", str(tmp_path / "x.csv"), "--out", str(tmp_path)])
    with pytest.raises(HeadwiseError, match=r"y\.csv does not exist"):
        main(["gain", str(tmp_path / "y.csv"), "--out", str(tmp_path)])


def test_a_folder_without_weights_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HeadwiseError, match="holds no weights"):
        main(arguments(tmp_path, tmp_path / "out", *TARGET))


def test_a_selective_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Head 0 also selects; scaling it is no sharpening alone, and removing heads goes past the mask."""
    from headwise.config.run import from_dict
    from headwise.training.run import train

    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    values = {
        "model.d_model": 16, "model.n_layers": 2, "model.n_heads": 2, "model.init_std": 0.4,
        "model.attention.kind": "selective", "data.name": "text", "data.path": str(tmp_path / "text.txt"),
        "data.seq_len": 16, "data.batch_size": 4, "training.max_steps": 1, "measure.heads": False,
        "measure.maps": 0, "device": "cpu", "out": str(tmp_path / "run"),
    }  # fmt: skip
    train(from_dict(values))
    common = [str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"), "--tokenizer", "bytes"]
    common += [
        "--n-samples",
        "4",
        "--context-length",
        "16",
        "--device",
        "cpu",
        "--cache",
        str(tmp_path / "c"),
    ]
    assert main([*common, "--remove", "0.0", "1.1", "--out", str(tmp_path / "removed")]) == 0
    for row in json.loads((tmp_path / "removed" / "removed_heads.json").read_text())["removed"]:
        assert row["kl"] > 0
    assert (
        main([*common, "--target-layer", "0", "--target-head", "0", "--out", str(tmp_path / "scaled")]) == 0
    )
    assert "check passed, L0 H0" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "scaled" / RESULTS)) == 5
