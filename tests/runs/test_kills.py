"""A run killed at any change of its folder is taken up by the next command, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headwise.config.run import Config, from_dict
from headwise.errors import HeadwiseError
from headwise.files import remove_folder, replacing, sweep, write_text
from headwise.runs.folder import RunFolder
from headwise.training.run import train
from tests.fixtures.kills import killed_at

TINY = {
    "model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2, "data.name": "copy", "data.seq_len": 8,
    "data.batch_size": 2, "data.vocab_size": 8, "data.eval_sequences": 2, "training.max_steps": 3,
    "training.warmup_steps": 1, "training.log_every": 1, "training.eval_every": 2,
    "training.checkpoint_every": 1, "training.keep_checkpoints": 1, "seed": 7, "device": "cpu",
    "measure.maps": 0, "measure.heads": False,
}  # fmt: skip


def tiny(out: Path) -> Config:
    return from_dict(TINY | {"out": str(out)})


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing killed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny(folder))
    return folder


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6, 9, 14, 20, 27, 35, 40, 43, 45])
def test_the_next_command_ends_a_killed_run_as_if_nothing_had_been(
    whole: Path, tmp_path: Path, call: int
) -> None:
    config = tiny(tmp_path / "run")
    assert killed_at(call, lambda: train(config))
    folder = RunFolder(tmp_path / "run")
    train(config, resume=folder.holds_run())
    assert files(tmp_path / "run") == files(whole)
    assert [name for name in files(tmp_path) if "draft" in name] == []
    losses = [[row["loss"] for row in RunFolder(f).read_metrics()] for f in (whole, tmp_path / "run")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("left", [(), ("status.json",), ("log.txt",), (".config.yaml.abcd1234.draft",)])
def test_a_beginning_is_a_fresh_run(tmp_path: Path, left: tuple[str, ...]) -> None:
    for name in left:
        if name.endswith(".draft"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.yaml").touch()
        else:
            (tmp_path / name).write_text('{"state": "failed", "reason": "no data"}')
    RunFolder(tmp_path).start("seed: 1\n")
    assert [name for name in files(tmp_path) if "draft" in name] == []


def test_a_beginning_with_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "status.json").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".a.abcd1234.draft").mkdir()
    with pytest.raises(HeadwiseError, match="is no run folder"):
        RunFolder(tmp_path).start("seed: 1\n")
    assert files(tmp_path) == [".a.abcd1234.draft", "notes.txt", "status.json"]


@pytest.mark.parametrize("call", range(1, 8))
def test_a_folder_is_removed_whole_or_not_at_all(tmp_path: Path, call: int) -> None:
    folder = tmp_path / "step_1"
    folder.mkdir()
    for name in "abc":
        (folder / name).touch()
    killed_at(call, lambda: remove_folder(folder))
    assert files(folder) in ([], ["a", "b", "c"])
    sweep(tmp_path)
    assert [name for name in files(tmp_path) if "draft" in name] == []


@pytest.mark.parametrize("call", range(1, 9))
def test_a_killed_replacement_of_a_folder_leaves_the_old_one_or_the_new(tmp_path: Path, call: int) -> None:
    folder = tmp_path / "figures"

    def write(name: str) -> None:
        with replacing(folder) as draft:
            draft.mkdir()
            (draft / name).touch()

    write("old")
    killed_at(call, lambda: write("new"))
    sweep(tmp_path)
    assert files(tmp_path) in (["figures", "figures/old"], ["figures", "figures/new"])


def test_a_living_writer_keeps_its_draft(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as draft:
        sweep(tmp_path)
        draft.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127, "\udcff" * 200, "a[1]*?{b}:#%~ '\"\n"):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    with pytest.raises(HeadwiseError, match="File name too long"):
        write_text(tmp_path / ("x" * 256), "text")


@pytest.mark.parametrize("place", ["/proc/headwise/a", "/sys/headwise", "/dev/null/a"])
def test_where_nothing_can_be_written_is_one_sentence(place: str) -> None:
    with pytest.raises(HeadwiseError, match=rf"^cannot write {place}: .*; give another place$"):
        write_text(place, "text")


def test_folders_made_for_what_failed_are_gone(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a" / "b" / "c"):
            raise HeadwiseError("refused")

    with pytest.raises(HeadwiseError, match="refused"):
        fail()
    assert files(tmp_path) == []
