"""Sizes of a study file: what each changes, and the presets of the attention variant study at every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from headwise.attention import KINDS
from headwise.errors import HeadwiseError
from headwise.study.expand import places
from headwise.study.plan import plan, waiting
from headwise.study.read import read_study
from headwise.study.study import Study

FOLDER = Path(__file__).parents[2] / "configs" / "studies"
FILE: dict[str, Any] = {
    "base": {"model": {"d_model": 64, "n_heads": 4}, "data": {"name": "enwik8", "bytes": 1000}},
    "variants": {"a": {"overrides": {"data.fraction": 0.5, "model.n_layers": 2}}, "b": {}},
    "axes": {"data.seq_len": [512, 1024], "training.lr": [1e-3]},
    "seeds": [0, 1, 2],
    "budget": {"kind": "tokens", "value": 1000000},
    "sizes": {
        "full": None,
        "smoke": {
            "base": {"model": {"d_model": 16}, "data": {"name": "pystdlib", "bytes": None}},
            "variants": {"a": {"overrides": {"data.fraction": None}}},
            "axes": {"data.seq_len": [32]},
            "seeds": [0],
            "budget": {"value": 4000},
        },
    },
}


def written(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "sized.yaml"
    file.write_text(yaml.safe_dump(FILE | changes))
    return file


def test_a_size_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    smoke = read_study(written(tmp_path), "smoke")
    assert smoke.name == "sized"
    assert smoke.size == "smoke"
    assert smoke.base == {"model": {"d_model": 16, "n_heads": 4}, "data": {"name": "pystdlib"}}
    assert smoke.variants["a"].overrides == {"model.n_layers": 2}
    assert smoke.axes == {"data.seq_len": [32]}
    assert smoke.seeds == [0]
    assert smoke.budget == {"kind": "tokens", "value": 4000}


def test_the_file_as_it_stands_is_its_full_size(tmp_path: Path) -> None:
    file = written(tmp_path)
    plain, full = read_study(file), read_study(file, "full")
    full.size = ""
    assert plain == full
    assert plain.base == FILE["base"]


@pytest.mark.parametrize(
    ("sizes", "size", "message"),
    [
        (FILE["sizes"], "smol", "did you mean 'smoke'"),
        (None, "smoke", "has no sizes, so --size=smoke has no effect"),
        ({"smoke": {"seedz": [1]}}, "smoke", "unknown key 'seedz'"),
        ({"smoke": {"name": "x"}}, "smoke", "sets name, which is the same at every size"),
        ({"smoke": 3}, "smoke", "maps the name of each size"),
    ],
)
def test_a_wrong_size_is_refused(sizes: Any, size: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=message):
        read_study(written(tmp_path, sizes=sizes), size)


def test_a_mistake_in_the_file_is_noticed_at_every_size(tmp_path: Path) -> None:
    axes = FILE["axes"] | {"data.seq_length": [1, 2]}
    with pytest.raises(
        HeadwiseError, match=r"unknown axis 'data.seq_length' \(did you mean 'data.seq_len'\?\)"
    ):
        read_study(written(tmp_path, axes=axes), "smoke")
    sizes = FILE["sizes"] | {"small": {"axes": {"data.seqlen": [64]}}}
    with pytest.raises(HeadwiseError, match=r"at size 'small'.*unknown axis 'data.seqlen'"):
        read_study(written(tmp_path, sizes=sizes), "smoke")


PRESETS = ["attention-variants", "attention-ablations"]
SIZES = [None, "full", "small", "smoke"]


def kinds_of(study: Study) -> set[str]:
    kinds = {place.overrides.get("model.attention.kind", "flash") for place in places(study)}
    return {kind for kind in kinds if kind is not None}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_study_at_every_size(name: str, size: str | None, tmp_path: Path) -> None:
    study = read_study(FOLDER / f"{name}.yaml", size)
    study.device = "cpu"
    missing = kinds_of(study) - set(KINDS)
    if missing:
        with pytest.raises(HeadwiseError, match=r"which is not installed"):
            plan(study, tmp_path)
        return
    runs = plan(study, tmp_path)
    waits = waiting(study, tmp_path)
    assert {run.variant for run in runs} | set(waits) == set(study.variants)
    if size == "smoke":
        assert {run.config.data.name for run in runs} <= {"pystdlib", "copy", "ngram"}, "needs a network"


def test_the_matrix_of_the_attention_variant_study() -> None:
    """E1 to E9: kind, data and length as the source's table has them."""
    study = read_study(FOLDER / "attention-variants.yaml")
    base = study.base["data"]
    found = {}
    for place in places(study):
        values = {"data.name": base["name"], "data.seq_len": base["seq_len"]} | place.overrides
        kind = values.get("model.attention.kind")
        rank = values.get("model.attention.tt.rank")
        found[place.name] = (values["data.name"], values["data.seq_len"], kind, rank)
    assert {name: found[name] for name in ("e1", "e2", "e3")} == {
        "e1": ("copy", 1024, "mha", None), "e2": ("copy", 1024, "holo", None), "e3": ("copy", 1024, "tt", 16),
    }  # fmt: skip
    assert found["e4"] == ("enwik8", 1024, "flash", None)
    assert found["e5"] == ("enwik8", 1024, "holo", None)
    assert found["e6"] == ("enwik8", 1024, "tt", 16)
    assert found["e7"] == ("enwik8", 2048, "holo", None)
    assert found["e8"] == ("enwik8", 2048, "tt", 32)
    assert found["e9"] == ("wikitext103", 1024, None, None)
    stage = study.variants["e9"].best_of
    assert stage is not None
    assert (stage.among, stage.by) == (["e5", "e6", "e7", "e8"], "val_loss")
