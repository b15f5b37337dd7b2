"""Axes: an option of one kind is an axis of that kind alone, and each place is compared at its own values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from headwise.attention import KINDS, register
from headwise.attention.config import declare_sections
from headwise.attention.flash import FlashAttention
from headwise.cli.main import main
from headwise.errors import HeadwiseError
from headwise.runs.read import Study as Planned
from headwise.study.expand import owner, places, references
from headwise.study.plan import plan, write_plan
from headwise.study.study import Study, Variant

BASE = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "data": {"name": "copy", "seq_len": 16, "batch_size": 2, "eval_sequences": 4},
    "training": {"max_steps": 2, "eval_every": 0, "checkpoint_every": 0},
}
KIND, LENGTH = "model.attention.kind", "data.seq_len"


@dataclass
class Ranked:
    """model.attention.ranked.*

    Attributes:
        rank: of nothing.
    """

    rank: int = 4


@pytest.fixture(autouse=True)
def ranked() -> Iterator[None]:
    """A kind with a rank, for the length of a test."""

    class RankedAttention(FlashAttention):
        options = Ranked

    register("ranked")(RankedAttention)
    yield
    KINDS.pop("ranked")
    declare_sections()


def sweep(**values: object) -> Study:
    made = Study(**{"name": "s", "base": BASE, "seeds": [0], "device": "cpu"} | values)  # type: ignore[arg-type]
    made.validate()
    return made


RANK = "model.attention.ranked.rank"


def test_a_rank_is_an_axis_of_its_own_kind_alone(tmp_path: Path) -> None:
    made = sweep(axes={KIND: ["flash", "ranked"], LENGTH: [16, 32], RANK: [4, 8]})
    runs = plan(made, tmp_path)
    assert [run.variant for run in runs] == [
        "flash@seq_len=16", "flash@seq_len=32",
        "ranked@seq_len=16@rank=4", "ranked@seq_len=16@rank=8",
        "ranked@seq_len=32@rank=4", "ranked@seq_len=32@rank=8",
    ]  # fmt: skip
    ranks = [run.config.model.attention.options().rank for run in runs if "rank" in run.variant]
    assert ranks == [4, 8, 4, 8]


def test_it_applies_to_the_kind_that_a_variant_sets_and_to_an_axis_of_kinds(tmp_path: Path) -> None:
    variants = {"a": Variant(overrides={KIND: "ranked"}), "b": Variant()}
    made = sweep(variants=variants, axes={RANK: [4, 8]})
    assert [place.name for place in places(made)] == ["a@rank=4", "a@rank=8", "b"]
    made = sweep(variants={"a": Variant(), "b": Variant()}, axes={KIND: ["flash", "ranked"], RANK: [4, 8]})
    names = [place.name for place in places(made)]
    assert names[:3] == ["a@kind=flash", "a@kind=ranked@rank=4", "a@kind=ranked@rank=8"]
    assert len(names) == 6


def test_an_option_belongs_to_a_kind_and_other_keys_to_none() -> None:
    assert owner(RANK) == "ranked"
    assert [owner(key) for key in (LENGTH, KIND, "model.attention.dropout", "model.d_model")] == [None] * 4


def test_each_place_is_compared_with_the_baseline_at_its_own_length(tmp_path: Path) -> None:
    made = sweep(axes={KIND: ["flash", "ranked"], LENGTH: [16, 32], RANK: [4, 8]})
    found = references(made, places(made))
    assert found["ranked@seq_len=32@rank=8"] == "flash@seq_len=32"
    assert found["flash@seq_len=32"] == "flash@seq_len=32"
    planned = Planned.read(write_plan(made, plan(made, tmp_path), tmp_path))
    assert planned.variants["ranked@seq_len=16@rank=4"]["against"] == "flash@seq_len=16"


def test_one_variant_is_compared_with_itself_at_the_first_values() -> None:
    made = sweep(variants={"a": Variant()}, axes={"training.lr": [1e-3, 1e-2]})
    assert set(references(made, places(made)).values()) == {"a@lr=0.001"}


def test_a_variant_may_have_a_baseline_of_its_own_but_no_chain_of_them() -> None:
    variants = {"a": Variant(), "b": Variant(against="b"), "c": Variant(against="b")}
    made = sweep(variants=variants)
    assert references(made, places(made)) == {"a": "a", "b": "b", "c": "b"}
    variants["d"] = Variant(against="c")
    with pytest.raises(HeadwiseError, match="'c', which is itself compared with 'b'"):
        sweep(variants=variants)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data.seq_length": [1]}, "unknown axis 'data.seq_length' (did you mean 'data.seq_len'?)"),
        ({RANK.replace("ranked", "rankd"): [4]}, f"did you mean '{RANK}'?"),
        ({LENGTH: []}, "an axis is a list of different values"),
        ({LENGTH: [16], KIND: ["flash", "holographic"]}, "'holographic', which is not installed"),
    ],
)
def test_an_axis_that_cannot_be_is_refused_in_one_sentence(
    axes: dict[str, list], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "axes": axes}))
    assert main(["sweep", str(file), "--out", str(tmp_path / "runs"), "--device", "cpu", "--plan"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_sweep_needs_an_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "none.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "variants": {"a": {}}}))
    assert main(["sweep", str(file), "--plan"]) == 2
    assert "has no axes: give one" in capsys.readouterr().err
