"""The axis `code` of a study: revisions of a repository, and a working tree of its own for each that runs.

A working tree is made once, in `.code/` of the study's folder, and used again; only the user removes it
(`git worktree remove -f -f PATH`). It is locked for git, so that `git worktree prune` leaves it alone. The
file `<commit>.json` beside it is written when it is whole, and what a kill left without one is made anew.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from headwise import reading
from headwise.config.run import Config, flatten, to_dict
from headwise.errors import HeadwiseError
from headwise.files import local, write_json
from headwise.runs.folder import FORMAT, RunFolder
from headwise.runs.read import Unreadable, read_plan
from headwise.runs.schemas import Environment
from headwise.study.git import Commit, GitError, NoRepository, Repository, git
from headwise.study.study import CODE, Study

FOLDER = ".code"
PACKAGE = "headwise/__init__.py"
"""A repository with it is one of headwise: its revisions run themselves."""
LENGTH = 12
"""Digits of a commit in the name of its working tree."""


class Marker(TypedDict):
    """`<commit>.json` beside a working tree that is whole."""

    commit: str
    repository: str


@dataclass(frozen=True)
class Code:
    """The revision that a run executes.

    Attributes:
        repository: the top of the user's working tree, or a bare repository.
        folder: where working trees of revisions lie.
        sha: the commit.
        written: the revision as the user wrote it.
        has_headwise: whether the revision's own headwise runs, and not the installed one.
        dirty: whether files of the user's working tree differed from its commit; the run uses none of them.
        given: dotted keys of the configuration that the study sets, and their values. The revision decides
            the others, so that it is given no key that it may not know.
    """

    repository: str
    folder: str
    sha: str
    written: str
    has_headwise: bool
    dirty: bool | None
    given: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """What the run's `env.json` tells of it."""
        return {
            "commit": self.sha, "revision": self.written, "repository": self.repository,
            "user_dirty": self.dirty,
        }  # fmt: skip


def locate(study: Study, near: Path) -> None:
    """Settle the repository of a study with the axis `code`: its own key, that around `near`, or around here.

    Plug-ins are found in it too.

    Raises:
        HeadwiseError: none of them is one.
    """
    if CODE not in study.axes:
        return
    places = [local(study.code_repository)] if study.code_repository is not None else [near, Path.cwd()]
    for place in places:
        try:
            study.code_repository = Repository.around(place).path
            break
        except NoRepository:
            if place == places[-1]:
                raise
    import_from(Repository(str(study.code_repository)))


def import_from(repository: Repository) -> None:
    """Let plug-ins be found in the user's working tree, after all other places."""
    if repository.path not in sys.path:
        sys.path.append(repository.path)


def resolve(study: Study) -> None:
    """Find the commit of every revision of the study, once: a branch that moves meanwhile changes nothing.

    Raises:
        HeadwiseError: a revision that does not exist, two that are one commit, one whose run folders this
            headwise does not read, or a key of the study that cannot be combined with revisions.
    """
    if CODE not in study.axes and study.code_repository is not None:
        raise HeadwiseError(
            f"study {study.name!r} has a code_repository and no axis {CODE}; "
            f"give axes.{CODE}, a list of revisions"
        )
    if CODE not in study.axes or study.commits:
        return
    for key in ("fit_batch", "memory_limit", "max_length_at"):
        if getattr(study, key):
            raise HeadwiseError(
                f"{key} measures the memory of the code that plans, and axes.{CODE} runs other revisions; "
                f"leave one out{' (headwise sweep sets it: use headwise study)' * (key == 'fit_batch')}"
            )
    if study.search is not None:
        raise HeadwiseError(f"a search does not go over revisions; leave out search, or axes.{CODE}")
    locate(study, Path.cwd())
    repository = Repository(str(study.code_repository))
    found: dict[str, Commit] = {}
    for revision in study.axes[CODE]:
        commit = repository.commit(revision)
        if (other := next((one for one in found.values() if one.sha == commit.sha), None)) is not None:
            raise HeadwiseError(
                f"axes.{CODE}: {other.written} and {revision} are one commit, {commit.short}; leave one out"
            )
        refuse_newer(repository, commit)
        found[revision] = commit
    settle(study, repository, found.values())


def settle(study: Study, repository: Repository, commits: Collection[Commit]) -> None:
    """Note the commits of a study, and what they have in common."""
    study.code_repository = repository.path
    study.commits = {commit.written: commit for commit in commits}
    study.code_dirty = repository.dirty()
    study.has_headwise = any(repository.content(commit.sha, PACKAGE) is not None for commit in commits)


def refuse_newer(repository: Repository, commit: Commit) -> None:
    """Refuse a revision of headwise that writes run folders of a format that this one does not read.

    Raises:
        HeadwiseError: that is so.
    """
    text = repository.content(commit.sha, "headwise/runs/folder.py") or ""
    number = re.search(r"^FORMAT = ([0-9]{1,6})$", text, re.MULTILINE)
    if number and int(number[1]) > FORMAT:
        raise HeadwiseError(
            f"{commit.written} writes run folders of format {number[1]}, and this headwise reads up to "
            f"{FORMAT}; compare these commits with the newest headwise of them"
        )


def moved(study: Study, root: Path) -> Iterator[str]:
    """Lines for the user: revisions that named another commit when the study ran before, and a dirty tree.

    Raises:
        HeadwiseError: as `resolve`.
    """
    resolve(study)
    try:
        before = read_plan(root / study.name).get("commits") or {}
    except Unreadable:
        before = {}
    for revision, commit in study.commits.items():
        old = before.get(revision, {}).get("sha", commit.sha)
        if old != commit.sha:
            yield f"{revision} was {old[:8]} when the study ran before; it is {commit.short} now, run anew"
    if study.code_dirty:
        yield f"{study.code_repository} has changes that are not committed; no run contains them"


def record_revision(folder: RunFolder, code: Code) -> None:
    """Add the revision to the env.json of a run that ended."""
    with suppress(reading.Unreadable):
        environment = reading.read_json(folder.environment, Environment)
        if environment.get(CODE) != code.record():
            write_json(folder.environment, environment | {CODE: code.record()})


def located(config: Config) -> Config:
    """`config` with the paths that it reads made absolute, because a revision runs in another folder."""

    def place(path: str | None) -> str | None:
        return None if path is None else os.path.abspath(local(path))

    data, source = config.data, config.init_from
    tokenizer = data.tokenizer
    if tokenizer is not None and os.path.exists(local(tokenizer)):
        tokenizer = place(tokenizer)
    if source is not None and not source.startswith("hf://"):
        source = place(source)
    data = dataclasses.replace(data, path=place(data.path), cache=place(data.cache), tokenizer=tokenizer)
    return dataclasses.replace(config, data=data, init_from=source, out=place(config.out))


def code_of(study: Study, revision: str, root: Path, config: Config, given: dict[str, Any]) -> Code:
    """The revision of a run.

    Args:
        config: the run's, complete.
        given: what the study sets of it.
    """
    default, values = (dict(flatten(to_dict(one))) for one in (Config(), config))
    where = {key for key in ("data.path", "data.cache", "data.tokenizer", "init_from") if values[key]}
    sized = (
        {"model.d_ff"} if study.match_parameters and values["model.d_ff"] != default["model.d_ff"] else set()
    )
    keys = {key for key, value in given.items() if value is not None and key != "plugins"} | where | sized
    return Code(
        str(study.code_repository), os.path.abspath(root / study.name / FOLDER), study.commits[revision].sha,
        revision, study.has_headwise, study.code_dirty, {key: values[key] for key in sorted(keys | {"seed"})},
    )  # fmt: skip


def worktree(code: Code) -> Path:
    """The working tree of a revision: whole, and without changes. It is made where there is none.

    Raises:
        HeadwiseError: it cannot be made, or somebody changed its files.
    """
    name = code.sha[:LENGTH]
    path, mark = Path(code.folder, name), Path(code.folder, f"{name}.json")
    with _locked(Path(code.folder, f"{name}.lock")) as held:
        if not _whole(path, mark, code.sha):
            mark.unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            git(
                code.repository, "worktree", "add", "--quiet", "--force", "--force", "--detach", "--lock",
                "--reason", "headwise runs this revision", str(path), code.sha, held=[held],
            )  # fmt: skip
            write_json(mark, {"commit": code.sha, "repository": code.repository})
    return path


def _whole(path: Path, mark: Path, sha: str) -> bool:
    """Whether the working tree is there as it was made.

    Raises:
        HeadwiseError: its files, or its commit, are not those that it was made with.
    """
    try:
        known = reading.read_json(mark, Marker)
    except reading.Unreadable:
        return False
    if known["commit"] != sha or not path.is_dir():
        return False
    try:
        try:
            changed = _changed(path, sha)
        except GitError:  # the repository or the study was moved
            git(known["repository"], "worktree", "repair", str(path))
            changed = _changed(path, sha)
    except GitError as error:
        raise HeadwiseError(f"{error}; delete that folder, and it is made again") from None
    if changed:
        raise HeadwiseError(
            f"{path} is the working tree of commit {sha[:LENGTH]}, and its files were changed; "
            f"undo that, or remove it with `git worktree remove -f -f {path}`"
        )
    return True


def _changed(path: Path, sha: str) -> bool:
    top, at = git(path, "rev-parse", "--show-toplevel", "HEAD").rsplit("\n", 1)
    status = ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    return at != sha or not os.path.samefile(top, path) or bool(git(path, *status))


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a lock file, waiting for it. A process that has the descriptor holds it too, and longer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
