"""A path is a path: not a pattern, not a URI, not YAML. What cannot be one is refused in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from headwise.cli.geometry import _dynamics
from headwise.cli.main import main
from headwise.config.run import from_dict, load, to_yaml
from headwise.errors import HeadwiseError
from headwise.measures import table as head_table
from headwise.runs.folder import RunFolder
from headwise.runs.read import Run, find_runs
from headwise.training.run import train
from tests.fixtures.disk import files_of_at_most

NAMES = ["r[1]", "r*", "r?", "r{1,2}", "a:b", "exp-12:30", "s3:x", "k=v", "pct%20", "a b", "a#b", "#a", "-a",
         "~a", "'q\"", "a\nb", "é", "1e3", "0x10", "1_000", ".5", "[1]"]  # fmt: skip
TINY = {
    "model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2, "data.name": "copy", "data.seq_len": 8,
    "data.batch_size": 2, "data.vocab_size": 8, "data.eval_sequences": 2, "training.max_steps": 2,
    "training.warmup_steps": 1, "device": "cpu", "measure.map_tokens": 4,
}  # fmt: skip


def write(folder: Path, entropy: float) -> None:
    columns = {"layer": np.zeros(2, int), "head": np.arange(2), "entropy": np.full(2, entropy)}
    head_table.write_part(folder, "step_00000001", columns | {"logit_std": np.ones(2), "step": 1})


@pytest.mark.parametrize("name", NAMES)
def test_a_head_table_is_that_of_its_folder(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("r1", "heads"), 1.0)
    write(Path(name, "heads"), 2.0)
    assert head_table.read(Path(name, "heads"))["entropy"].to_list() == [2.0, 2.0]
    assert Run(Path(name)).heads is not None
    assert _dynamics(Path(name))["entropy"].tolist() == [[2.0, 2.0]]
    part = Path(name, "heads", "step_00000001.parquet")
    assert head_table.read_columns(part, ["entropy"]).column_names == ["entropy"]
    assert pl.read_parquet(part.open("rb")).columns[0] == "run"


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_keeps_a_path_as_it_is(tmp_path: Path, name: str) -> None:
    config = from_dict(TINY | {"out": f"./{name}" if name.startswith("#") else name})
    (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    assert load(tmp_path / f"{name}.yaml") == config


@pytest.mark.parametrize("name", ["r[1]", "exp-12:30", "-a*", "~k=v"])
def test_a_run_trains_and_goes_on_in_a_folder_of_that_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    config = from_dict(TINY | {"out": name})
    train(config)
    RunFolder(Path(name)).write_status("interrupted")
    shutil.rmtree(Path(name, "heads"))
    assert train(config, resume=True)["state"] == "finished"
    assert [run.state for run in find_runs(tmp_path)] == ["finished"]


@pytest.mark.parametrize("value", ["#x", "&x", "# x"])
def test_what_yaml_reads_as_nothing_is_refused(value: str) -> None:
    with pytest.raises(HeadwiseError, match=r"reads as nothing.*write \./"):
        from_dict(TINY | {"out": value})


@pytest.mark.parametrize("room", [0, 300, 3000])
@pytest.mark.parametrize("verb", ["train", "prepare", "profile", "report", "geometry", "surgery"])
def test_a_full_disk_is_one_sentence_of_every_verb(
    tmp_path: Path, verb: str, room: int, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    text, out = tmp_path / "text.txt", str(tmp_path / "out" / "x")
    text.write_text("some words\n" * 400)
    tiny = [f"--{key}={value}" for key, value in (TINY | {"model.d_model": 64}).items()]
    arguments = {
        "train": ["train", *tiny, "--out", out],
        "prepare": ["data", "prepare", str(text), "--tokenizer", "bytes", "--keep", "all", "--out", out],
        "profile": [
            "profile",
            str(run),
            "--n-samples",
            "2",
            "--context-length",
            "8",
            "--device=cpu",
            "--out",
            out,
        ],
        "report": ["report", str(run), "--out", out],
        "geometry": ["geometry", str(run), "--out", out],
        "surgery": ["surgery", str(run), "--add-head", "end", "--init", "zero", "--out", out],
    }[verb]
    with files_of_at_most(room):
        code = main(arguments)
    errors = capsys.readouterr().err
    assert code == 2
    assert "headwise: the file is larger than this disk or user may have: " in errors
    assert "Traceback" not in errors
    assert [path for path in tmp_path.rglob("*") if path.name.endswith((".draft", ".lock"))] == []


@pytest.mark.parametrize("out", ["/proc/headwise", "FILE/x", "x" * 300, "a\0b"])
@pytest.mark.parametrize("verb", ["train", "prepare", "report", "geometry"])
def test_a_place_that_cannot_be_is_one_sentence_of_every_verb(
    tmp_path: Path, verb: str, out: str, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 400)
    out = out.replace("FILE", str(text))
    arguments = {
        "train": ["train", *(f"--{key}={value}" for key, value in TINY.items()), f"--out={out}"],
        "prepare": ["data", "prepare", str(text), "--tokenizer", "bytes", "--keep", "all", "--out", out],
        "report": ["report", str(run), "--out", out],
        "geometry": ["geometry", str(run), "--out", out],
    }[verb]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("headwise: ")
    assert errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_argument_that_is_not_utf_8_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "r\udcff"]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "r"
    train(from_dict(TINY | {"out": str(out)}))
    return out


@pytest.mark.parametrize(
    "command",
    [
        ["intervene", "absent", "--all-heads", "--out"], ["intervene", "gain", "absent.csv", "--out"],
        ["geometry", "absent", "--out"], ["geometry", "absent", "--json"],
        ["geometry", "correlate", "absent", "--out"], ["profile", "absent", "--out"],
        ["prune", "absent", "--mode", "low", "--fraction", "0.5", "--out"], ["budget", "absent", "--out"],
        ["masks", "absent", "--prompt", "a", "--out"], ["report", "absent", "--out"],
        ["bench", "linear", "--device", "cpu", "--out"],
    ],
    ids=lambda command: " ".join(command[:2]),
)  # fmt: skip
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before what is read is looked for, even: there is no such model or run."""
    assert main([*command, "/proc/headwise/out"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "cannot write /proc/headwise" in said.err


def test_what_has_no_query_to_scale_is_refused_before_anything_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"model.attention.kind": "differential", "out": str(tmp_path / "run"), "measure.heads": False}
    train(from_dict(TINY | own))
    for what in (["--all-heads"], ["--target-layer", "0", "--target-head", "1"]):
        command = ["intervene", str(tmp_path / "run"), *what, "--context-length", "8", "--n-samples", "2"]
        assert main([*command, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "2 softmaxes each" in said.err or "has 2 queries" in said.err
        assert not (tmp_path / "out").exists()
