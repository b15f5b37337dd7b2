"""What other parts of headwise make of heads with two softmaxes: each part by itself, or a refusal."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from headwise.attention import AttentionConfig
from headwise.attention.differential.config import DifferentialConfig
from headwise.cli.geometry import _dynamics
from headwise.config.run import Config
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.questions.geometry.projections import read_weights
from headwise.questions.intervene.ablate import remove
from headwise.questions.intervene.measure import Setting, Target, all_heads, sweep
from headwise.questions.profile.config import ProfileConfig
from headwise.questions.profile.export import export_csv
from headwise.questions.profile.measure import Profile
from headwise.questions.profile.page import collect
from headwise.questions.profile.parts import Folders, read_moments
from headwise.watch.effect import Speaker
from headwise.watch.hooks import attention_layers
from headwise.watch.load import Loaded
from headwise.watch.maps import attention_maps
from headwise.watch.samples import Samples

HEADS, LENGTH = 3, 12


def loaded(model: Decoder) -> Loaded:
    return Loaded("model", model, Config(model=model.config), model)


@pytest.fixture(scope="module", params=[1, 2])
def model(request: pytest.FixtureRequest) -> Decoder:
    options = DifferentialConfig(version=request.param)
    attention = AttentionConfig(kind="differential", differential=options)
    config = ModelConfig(
        d_model=24, n_layers=2, n_heads=HEADS, head_dim=8, vocab_size=31, init_std=0.3, attention=attention
    )
    torch.manual_seed(0)
    return Decoder(config, LENGTH).eval()


@pytest.fixture(scope="module")
def samples() -> Samples:
    tokens = np.random.default_rng(0).integers(1, 31, (1, 100))
    return Samples(tokens, np.arange(5), LENGTH, {"name": "random"})


@pytest.fixture(scope="module")
def profile(model: Decoder, samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile")
    config = ProfileConfig(n_samples=5, context_length=LENGTH, samples_per_part=2, raw_layers=(1,))
    Profile(out, config).run(loaded(model), samples, batch_size=4)
    return out


def test_a_profile_has_a_row_for_each_part_and_for_the_whole(profile: Path) -> None:
    rows = list(csv.DictReader((profile / "per_head.csv").open()))
    places = [(row["layer"], row["part"], row["head"]) for row in rows]
    assert places == [(la, part, h) for la in "01" for part in ("", "1", "2") for h in "012"]
    for row in rows:
        assert bool(row["entropy"]) == bool(row["spearman_entropy"]) == bool(row["part"])
        assert bool(row["lambda"]) == bool(row["negative_weight"]) == (not row["part"])
    summary = (profile / "summary.json").read_text()
    assert '"heads": 6' in summary
    assert '"layers_with_nan": []' in summary


def test_its_page_and_its_export_name_the_parts(profile: Path) -> None:
    data = collect(profile)
    named = [f"{head} part {part}" for head in range(HEADS) for part in (1, 2)]
    assert data["columns"]["entropy"] == data["kinds"]["columns"] == named
    assert data["columns"]["lambda"] == ["0", "1", "2"]
    assert np.array(data["grids"]["entropy"]).shape == (2, 2 * HEADS)
    assert np.isfinite(np.array(data["grids"]["lambda"], dtype=float)).all()
    assert any("several softmaxes" in flag for flag in data["flags"])
    assert all("part" in row[1] for row in data["top"][1:])
    with export_csv(profile).open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-2:] == ["k_eff", "part"]
    assert len(rows) == 5 * 2 * HEADS * 2 * LENGTH
    assert {row["part"] for row in rows} == {"1", "2"}


def test_a_profile_keeps_queries_and_keys_of_each_part(profile: Path) -> None:
    found = load_file(profile / "raw" / "part_000000.safetensors")
    named = {f"layer_01.part_{part}.{name}" for part in (1, 2) for name in ("q", "k")}
    assert set(found) == named | {"layer_01.v"}
    assert found["layer_01.part_2.q"].shape[:3] == (2, HEADS, LENGTH)


def test_an_interrupted_profile_goes_on(
    model: Decoder, samples: Samples, profile: Path, tmp_path: Path
) -> None:
    config = ProfileConfig(n_samples=5, context_length=LENGTH, samples_per_part=2, raw_layers=(1,))
    Profile(tmp_path, config).run(loaded(model), samples, batch_size=4)
    (tmp_path / "heads" / "part_000001.parquet").unlink()
    Profile(tmp_path, config).run(loaded(model), samples, batch_size=4)
    assert (tmp_path / "per_head.csv").read_bytes() == (profile / "per_head.csv").read_bytes()


def test_scaling_one_of_two_queries_is_refused(model: Decoder, samples: Samples) -> None:
    speaker = Speaker(loaded(model), True, True)
    layers = attention_layers(model, model, samples.batch(0, 1))
    setting = Setting((0.5, 1.0, 2.0))
    with pytest.raises(HeadwiseError, match="L1 H2 cannot be scaled: its heads have 2 softmaxes each"):
        sweep(speaker, samples, [Target(layers[1], 2)], setting)
    with pytest.raises(HeadwiseError, match="no head of model has a gain: its heads have 2 softmaxes"):
        all_heads(speaker, samples, layers, setting)


def test_a_head_is_removed_whole(model: Decoder, samples: Samples) -> None:
    speaker = Speaker(loaded(model), True, True)
    layers = attention_layers(model, model, samples.batch(0, 1))
    assert [layer.n_heads for layer in layers] == [HEADS, HEADS]
    whole = model.state_dict()["blocks.1.attention.out.weight"].clone()
    (removal,) = remove(speaker, samples, [[(layers[1], 2)]], how="zero")
    with torch.no_grad():
        before = model(samples.batch(0, 5))
        model.blocks[1].attention.out.weight[:, 16:].zero_()
        after = model(samples.batch(0, 5))
        model.blocks[1].attention.out.weight.copy_(whole)
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
    assert removal.effect.mean("kl") == pytest.approx(kl.item(), rel=1e-3)


def test_geometry_refuses_heads_with_two_queries(model: Decoder, profile: Path) -> None:
    with pytest.raises(HeadwiseError, match="a head of attention kind 'differential' has 2 queries"):
        read_weights(model).read(0)
    with pytest.raises(HeadwiseError, match="have several softmaxes"):
        _dynamics(profile)


def test_there_is_no_map_of_two_softmaxes(model: Decoder, samples: Samples) -> None:
    assert attention_maps(model, samples.batch(0, 1)) is None


def test_damaged_names_of_parts_are_told(profile: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(profile, tmp_path / "out"))
    table = (out / "per_head.csv").read_text()
    (out / "per_head.csv").write_text(table.replace("0,0,1,", "0,0,<b>,", 1))
    with pytest.raises(HeadwiseError, match="column 'part' has names that no part of a head has"):
        collect(out)
    path = out / "moments" / "part_000001.safetensors"
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        about = file.metadata()
    for damaged in ("1 2", about["parts"].replace("2", "3"), about["parts"].replace("2", "..")):
        save_file(tensors, path, about | {"parts": damaged})
        with pytest.raises(HeadwiseError, match=r"part_000001.*\(its parts of heads are not those"):
            read_moments(Folders(out))
