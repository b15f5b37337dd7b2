from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headwise.cli.geometry import main
from headwise.errors import HeadwiseError
from headwise.measures.table import write_part
from headwise.questions.geometry import numbers as geometry

LAYERS, HEADS, KV_HEADS, D, WIDTH, TOKENS = 4, 4, 2, 24, 6, 5


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint folder in Llama's names, made without transformers."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    rows = {"q_proj": HEADS * WIDTH, "k_proj": KV_HEADS * WIDTH, "v_proj": KV_HEADS * WIDTH}
    tensors = {}
    for layer in range(LAYERS):
        for name, n in rows.items():
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.randn(n, D) * (1 + layer)
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = torch.randn(D, HEADS * WIDTH)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.rand(D) + 0.5
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": HEADS, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def profile(folder: Path, heads: int = HEADS) -> Path:
    """A head table of two samples in two parts, entropy NaN at the first two tokens."""
    rng = np.random.default_rng(0)
    for part in range(2):
        index = np.indices((LAYERS, heads, TOKENS)).reshape(3, -1)
        entropy = rng.normal(size=index.shape[1]).astype(np.float32) - index[0]
        entropy[index[2] < 2] = np.nan
        columns = dict(zip(("layer", "head", "token"), index, strict=True))
        logit_std = rng.normal(size=index.shape[1]).astype(np.float32)
        write_part(folder / "heads", f"{part:05d}", {"sample": part, **columns, "entropy": entropy,
                                                    "logit_std": logit_std})  # fmt: skip
    return folder


def test_from_a_model_and_its_profile_to_the_head_geometry_notes_tables(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import polars

    file, out = tmp_path / "heads.json", tmp_path / "out"
    table = profile(tmp_path / "profile")
    assert main([str(model), "--json", str(file), "--profile", str(table), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "4 layers x 4 heads" in printed
    assert "RoPE is left out" in printed
    data = json.loads(file.read_text())
    assert (data["num_layers"], data["num_heads"]) == (LAYERS, HEADS)
    rows = polars.read_parquet(table / "heads" / "*.parquet").filter(
        (polars.col("layer") == 2) & (polars.col("head") == 3)
    )
    expected = np.nanmean(rows["entropy"].to_numpy())
    assert data["dynamic"][2]["mean_attention_entropy_per_head"][3] == pytest.approx(expected, rel=1e-5)
    assert np.shape(data["static"][0]["metric_singvals_per_head"]) == (HEADS, WIDTH)
    with (out / "geometry.csv").open() as opened:
        lines = list(csv.DictReader(opened))
    assert len(lines) == 2 * LAYERS * HEADS
    top = data["static"][2]["metric_singvals_per_head"][3][0]
    found = [r for r in lines if (r["layer"], r["head"], r["circuit"]) == ("2", "3", "query_key")]
    assert float(found[0]["op_norm"]) == pytest.approx(top)

    assert main(["correlate", str(file), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    entropy = np.ravel([row["mean_attention_entropy_per_head"] for row in data["dynamic"]])
    op = np.ravel([np.max(row["metric_singvals_per_head"], axis=1) for row in data["static"]])
    assert f"  op           vs entropy: {np.corrcoef(op, entropy)[0, 1]:+.3f}   vs logit_std: " in printed
    for line in (
        "All (layer, head) pairs — Pearson correlation with dynamic entropy:",
        "Stratified by layer position (entropy correlation):",
        "Best single geometric predictor of entropy (abs):",
        "Linear regression of entropy on multiple descriptors (standardized):",
        "Condition number of the regression",
    ):
        assert line in printed
    assert re.search(r"\[early L0-0\]  op:[+-]\d\.\d\d  fro:", printed)
    assert (out / "correlation.txt").read_text() in printed
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == [
        "geometry_heatmap.png", "geometry_query_key.png", "geometry_scatter_entropy.png",
        "geometry_scatter_logit_std.png", "geometry_value_output.png",
    ]  # fmt: skip


def test_matrix_and_fold_norm_change_what_is_decomposed(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {k: v.numpy() for k, v in load_file(model / "model.safetensors").items()}
    q, k = (tensors[f"model.layers.1.self_attn.{n}_proj.weight"].reshape(-1, WIDTH, D) for n in "qk")
    gain = tensors["model.layers.1.input_layernorm.weight"]
    for options, expected in (
        ([], geometry.query_key_singular_values(q, k)),
        (["--matrix", "core"], geometry.query_key_singular_values(q, k, "core")),
        (["--fold-norm"], geometry.query_key_singular_values(q * gain, k * gain)),
    ):
        assert main([str(model), "--json", str(tmp_path / "x.json"), *options]) == 0
        static = json.loads((tmp_path / "x.json").read_text())["static"]
        np.testing.assert_allclose(static[1]["metric_singvals_per_head"], expected, rtol=1e-6)


def test_weights_that_are_not_finite_are_said_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(tensors, model / "model.safetensors")
    assert main([str(model)]) == 0
    assert capsys.readouterr().err.count("1 circuit has weights that are not finite") == 1


def test_a_headwise_run_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from headwise.config.run import Config, to_yaml
    from headwise.model.decoder import Decoder
    from headwise.runs.checkpoint import Checkpoint, save

    config = Config(out=str(tmp_path))
    config.model.vocab_size, config.training.max_steps = 16, 1
    model = Decoder(config.model)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    save(tmp_path / "checkpoints", Checkpoint(dict(model.named_parameters()), {}, {"step": 1}))
    assert main([str(tmp_path)]) == 0
    assert f"{config.model.n_layers} layers x {config.model.n_heads} heads" in capsys.readouterr().out


def test_errors_are_one_clear_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"num_layers": ')
    wrong = profile(tmp_path / "wrong", heads=3)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "x.parquet").write_bytes(b"PAR1 nonsense")
    json_to = ["--json", str(tmp_path / "x.json"), "--profile"]
    for arguments, message in (
        (["correlate", str(tmp_path / "none.json")], "does not exist; `headwise geometry MODEL --json FILE`"),
        (["correlate", str(tmp_path / "broken.json")], "it is no JSON"),
        (
            [str(model), "--profile", str(wrong)],
            "--profile gives the dynamics of the file that --json writes",
        ),
        ([str(model), *json_to, str(wrong)], "has 4 x 3 .layers x heads., the model 4 x 4"),
        ([str(model), *json_to, str(tmp_path / "model")], "no head table in"),
        ([str(model), *json_to, str(damaged)], "is damaged"),
    ):
        with pytest.raises(HeadwiseError, match=message) as caught:
            main(arguments)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.json").exists()


def test_a_file_without_dynamics_says_how_to_add_them(model: Path, tmp_path: Path) -> None:
    main([str(model), "--json", str(tmp_path / "x.json")])
    with pytest.raises(HeadwiseError, match="dynamic is missing; give --profile DIR"):
        main(["correlate", str(tmp_path / "x.json")])


def test_a_profile_of_other_weights_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal shapes are not the same model."""
    from safetensors.torch import load_file

    from headwise.watch.tensors import checksum_of

    table, call = profile(tmp_path / "profile"), [str(model), "--json", str(tmp_path / "x.json"), "--profile"]
    assert main([*call, str(table)]) == 0
    assert "nothing tells whether" in capsys.readouterr().err
    (table / "profile.json").write_text(json.dumps({"files": checksum_of(model)}))
    assert main([*call, str(table)]) == 0
    assert "nothing tells" not in capsys.readouterr().err
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.self_attn.k_proj.weight"][-1, -1] += 1
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(HeadwiseError, match="was measured on other weights than"):
        main([*call, str(table)])
