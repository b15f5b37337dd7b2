"""`headwise bisect` on a history with a planted regression and a commit that cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwise.cli.main import main
from headwise.study.bisect import RELIABILITY, SIMULATED
from tests.fixtures.history import History, history

LEVELS = [1.0, 1.01, 0.99, 1.02, 3.0, 3.01, 2.99, 3.02]
BROKEN, FIRST_WORSE = 3, 4
SMALL = ["--data.name=copy", "--data.seq_len=8", "--training.max_steps=3", "--device=cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> History:
    """Eight commits; the fifth makes the loss worse, and the one before it does not start."""
    made = history(tmp_path_factory.mktemp("bisect") / "a repository")
    for number, level in enumerate(LEVELS):
        if number == BROKEN:
            made.commit("does not start", {"headwise/cli/main.py": "x = = 1"})
        else:
            made.small_headwise(f"number {number}", level)
    return made


def bisect(made: History, out: Path, *flags: str, good: str = "main~7", bad: str = "main") -> int:
    where = ["--repository", str(made.path), "--out", str(out)]
    return main(["bisect", "--good", good, "--bad", bad, *where, *SMALL, *flags])


def times(out: Path) -> dict[str, int]:
    """How often each run was started."""
    return {str(log.parent.relative_to(out)): log.read_text().count("\n") for log in out.rglob("log.txt")}


def test_the_planted_commit_is_found_and_nothing_runs_twice(
    made: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "b i", made.state()
    assert bisect(made, out, "--workers=2") == 1
    said = capsys.readouterr()
    answer = json.loads((out / "bisect.json").read_text())
    shas = [made.git("rev-parse", f"main~{7 - number}") for number in range(8)]
    assert answer["candidates"] == [
        shas[BROKEN],
        shas[FIRST_WORSE],
    ]  # one of them cannot be told from the other
    assert list(answer["skipped"]) == [shas[BROKEN]]
    assert "SyntaxError" in answer["skipped"][shas[BROKEN]]
    assert answer["difference"]["mean"] == pytest.approx(2.0, abs=0.3)
    assert "number 4" in said.out
    assert RELIABILITY in said.out
    assert "6 commits left" in said.err
    ran = times(out)
    assert set(ran.values()) == {1}
    assert len(ran) == sum(map(len, answer["measured"].values())) - 1  # the broken one left no log
    assert made.state() == before
    assert bisect(made, out) == 1
    assert times(out) == ran
    assert bisect(made, out, bad="main~3") == 1
    assert {run: count for run, count in times(out).items() if run in ran} == ran


def test_one_commit_is_the_answer_where_all_run(
    made: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.git("branch", "-f", "clean", "main~7")
    made.git("switch", "-q", "clean")
    made.small_headwise("harmless", 1.01)
    made.small_headwise("makes it worse", 3.0)
    made.git("switch", "-q", "main")
    assert bisect(made, tmp_path / "out", "--workers=2", good="clean~2", bad="clean") == 0
    said = capsys.readouterr().out
    assert f"first worse commit: {made.git('rev-parse', 'clean')}" in said
    assert "makes it worse" in said
    assert "an interval of 95% that holds at every look" in said


def test_what_cannot_be_searched_is_refused_before_a_run(
    made: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, message in [
        (["--metric=val_los"], "did you mean 'val_loss'"),
        (["--seeds-at-most=2"], "at least 3"),
        (["--axes.data.seq_len=[1,2]"], "no axes"),
        (["--trainig.lr=1"], "did you mean 'training.lr'"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml"),
        (["--smallest-difference=-1"], "at least 0"),
        (["--good=main"], "one commit"),
        (["--good=main", "--bad=main~3"], "exchange --good and --bad"),
        (["--good=--all"], "not a revision"),
        (["--bad=mian"], "did you mean 'main'"),
        (["--repository", str(tmp_path)], "not in a git repository"),
    ]:
        assert bisect(made, tmp_path / "out", *flags) == 2, flags
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_end_that_cannot_run_ends_the_search(
    made: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bisect(made, tmp_path / "out", good=f"main~{7 - BROKEN}") == 2
    assert "the good commit cannot run" in capsys.readouterr().err


def test_the_reliability_that_is_printed_was_simulated() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "bisect-cpu.json"
    rows = json.loads(path.read_text())["rows"]
    found = {row["history"]: row for row in rows if not row["shared_by_seed_std"]}
    for size, (right, wrong) in SIMULATED.items():
        row = found[f"regression of {size:g} std"]
        assert (row["found"], row["wrong"], row["trials"], row["commits"]) == (right, wrong, 1000, 64)
