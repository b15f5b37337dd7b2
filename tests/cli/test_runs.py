"""`headwise runs` lists, filters and sorts, and names what it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwise.cli.runs import main
from headwise.errors import HeadwiseError
from headwise.runs.folder import RunFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    runs = [("mha", 0, 2.5), ("mha", 1, 2.1), ("flash", 0, 2.3)]
    for kind, seed, loss in runs:
        folder = RunFolder(tmp_path / "demo" / kind / f"seed_{seed}")
        folder.start("{}\n")
        folder.write_status("finished", step=100)
        folder.write_summary(
            {"state": "finished", "kind": kind, "seed": seed, "val_loss": loss, "step": 100, "d_model": 64}
        )
    skipped = RunFolder(tmp_path / "demo" / "flex" / "seed_0")
    skipped.start("{}\n")
    skipped.write_status("skipped", reason="flex needs a GPU")
    return tmp_path


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main([*argv, "--json"]) == 0
    return [record["run"] for record in json.loads(capsys.readouterr().out)]


def test_lists_every_run_with_its_state_and_reason(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root)]) == 0
    out = capsys.readouterr().out
    for text in (
        "demo/mha/seed_0",
        "demo/flex/seed_0",
        "2.5000",
        "skipped",
        "flex needs a GPU",
        "4 of 4 runs",
    ):
        assert text in out


def test_sorts_with_missing_values_last(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ascending = ["demo/mha/seed_1", "demo/flash/seed_0", "demo/mha/seed_0", "demo/flex/seed_0"]
    assert listed(capsys, str(root), "--sort", "val_loss") == ascending
    descending = [*ascending[2::-1], ascending[3]]
    assert listed(capsys, str(root), "--sort=-val_loss") == descending


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["kind=mha"], ["demo/mha/seed_0", "demo/mha/seed_1"]),
        (["kind=mha", "seed=1"], ["demo/mha/seed_1"]),
        (["state!=finished"], ["demo/flex/seed_0"]),
        (["val_loss<2.4"], ["demo/flash/seed_0", "demo/mha/seed_1"]),
        (["d_model>=64", "val_loss>=2.5"], ["demo/mha/seed_0"]),
        (["kind=tropical"], []),
    ],
)
def test_filters(
    root: Path, capsys: pytest.CaptureFixture[str], filters: list[str], expected: list[str]
) -> None:
    argv = [part for text in filters for part in ("--filter", text)]
    assert listed(capsys, str(root), *argv) == expected


def test_limit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, str(root), "--sort", "val_loss", "--limit", "1") == ["demo/mha/seed_1"]


@pytest.mark.parametrize("argv", [["--sort", "val_los"], ["--filter", "val_los=2"]])
def test_an_unknown_column_names_the_nearest(root: Path, argv: list[str]) -> None:
    with pytest.raises(HeadwiseError, match="did you mean 'val_loss'"):
        main([str(root), *argv])


@pytest.mark.parametrize("text", ["kind", "kind~mha", "val_loss=low"])
def test_a_filter_that_is_none(root: Path, text: str) -> None:
    with pytest.raises(HeadwiseError, match="--filter"):
        main([str(root), "--filter", text])


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert "no runs below" in capsys.readouterr().out
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_an_absent_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="does not exist"):
        main([str(tmp_path / "absent")])


def test_a_filter_that_matches_nothing_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root), "--filter", "kind=tropical"]) == 0
    assert "none of the 4 runs" in capsys.readouterr().out


def test_a_damaged_run_is_listed_as_failed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "demo" / "mha" / "seed_0" / "summary.json").write_text("{")
    assert main([str(root), "--filter", "state=failed"]) == 0
    assert "unreadable summary.json" in capsys.readouterr().out
