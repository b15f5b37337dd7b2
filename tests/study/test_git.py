"""Revisions as users write them, and repositories as users have them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.study.git import NoRepository, Repository, environment
from tests.fixtures.history import History, history


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> History:
    """A repository with a line of three commits, a merged branch, and a branch of its own root."""
    made = history(tmp_path_factory.mktemp("git") / "with space")
    made.commit("one", {"a.py": "1"})
    made.git("tag", "start")
    made.git("switch", "-q", "-c", "side")
    made.commit("aside\n\nmore", {"b.py": "1"})
    made.git("switch", "-q", "main")
    made.commit("two", {"a.py": "2"})
    made.git("merge", "-q", "--no-ff", "-m", "three: merge", "side")
    made.git("switch", "-q", "--orphan", "other")
    made.commit("unrelated", {"c.py": "1"})
    made.git("switch", "-q", "main")
    return made


def test_a_revision_is_its_commit_however_it_is_written(made: History) -> None:
    repository = Repository.around(made.path)
    sha = made.git("rev-parse", "start")
    made.git("tag", "-f", "-a", "-m", "annotated", "noted", "start")
    for written in ("start", "noted", sha, sha[:9], "main~2", "other@{0}~0", ":/one"):
        found = repository.commit(written)
        if not written.startswith("other"):
            assert (found.sha, found.subject, found.short) == (sha, "one", sha[:8])
        assert found.label == (sha[:12] if written == sha else written)


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("stat", "did you mean 'start'"), ("nope", "no commit in"), ("--all", "is not a revision"),
        ("-n1", "is not a revision"), ("^main", "is not a revision"), ("", "is not a revision"),
        ("main\nstart", "is not a revision"), ("start..main", "no commit in"), ("main:a.py", "no commit in"),
        (1234567, "put it in quotes"), (1e5, "put it in quotes"), (None, "put it in quotes"),
        ("1" * 40, "no commit in"),
    ],
)  # fmt: skip
def test_what_names_no_commit_is_refused_in_one_sentence(
    made: History, revision: object, message: str
) -> None:
    with pytest.raises(HeadwiseError, match=message) as caught:
        Repository.around(made.path).commit(revision)
    assert "\n" not in str(caught.value)


def test_a_history_runs_along_first_parents_from_good_to_bad(made: History) -> None:
    repository = Repository.around(made.path)
    good, two, bad, side, other = (
        repository.commit(name) for name in ("start", "main~1", "main", "side", "other")
    )
    assert repository.history(good, bad) == [good.sha, two.sha, bad.sha]
    for first, last, message in [
        (bad, good, "exchange"), (good, good, "one commit"), (other, bad, "not an ancestor"),
        (side, bad, "by a merge"),
    ]:  # fmt: skip
        with pytest.raises(HeadwiseError, match=message):
            repository.history(first, last)


def test_repositories_of_every_form_are_found(
    made: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = made.git("rev-parse", "main")
    (made.path / "deep").mkdir(exist_ok=True)
    assert Repository.around(made.path / "deep").path == str(made.path)
    bare, shallow, linked = tmp_path / "bare.git", tmp_path / "shallow", tmp_path / "linked"
    made.git("clone", "-q", "--bare", str(made.path), str(bare))
    made.git("clone", "-q", "--depth=1", f"file://{made.path}", str(shallow))
    made.git("worktree", "add", "-q", "--detach", str(linked), "main")
    outer = history(tmp_path / "outer")
    outer.git("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(made.path), "inner")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    for place in (bare, shallow, linked, outer.path / "inner"):
        repository = Repository.around(place)
        assert repository.commit("HEAD").sha == sha
        assert repository.dirty() is (None if place == bare else False)
    with pytest.raises(HeadwiseError, match="--unshallow"):
        Repository.around(shallow).commit("start")
    with pytest.raises(NoRepository, match="not in a git repository"):
        Repository.around(tmp_path)
    with pytest.raises(HeadwiseError, match="not there"):
        Repository.around(tmp_path / "missing")
    assert not [key for key in environment() if key in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")]


def test_an_empty_repository_has_no_commits(tmp_path: Path) -> None:
    empty = history(tmp_path / "empty")
    with pytest.raises(HeadwiseError, match="no commits"):
        Repository.around(empty.path).commit("HEAD")


def test_without_git_the_message_says_so(made: History, tmp_path: Path) -> None:
    code = (
        "from headwise.study.git import Repository\nfrom headwise.errors import HeadwiseError\n"
        f"try: Repository.around({str(made.path)!r})\nexcept HeadwiseError as error: print(error)"
    )
    import sys

    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "git is not installed" in done.stdout
