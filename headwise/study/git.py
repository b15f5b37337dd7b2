"""What a study asks of git. Nothing here changes a branch, an index or a working tree of the user's.

Every call is `git` itself, without a shell, without the user's hooks, and without the variables of the
environment that point git at another repository. A revision is never an option: it is refused where it begins
with a dash.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headwise.errors import HeadwiseError, did_you_mean
from headwise.files import shortened

KEPT = ("GIT_LFS_", "GIT_SSH", "GIT_SSL", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")
"""Variables of git that say how it fetches and where its settings lie; all others are taken away."""
MOST_NAMES = 1000
"""Branches and tags among which a near name is looked for."""
MOST_COMMITS = 100_000
"""Of a history that is searched."""
_PLAIN = (
    "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false",
    "-c", "log.showSignature=false",
)  # fmt: skip


class GitError(HeadwiseError):
    """git refused; `said` is all that it printed."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


class NoRepository(HeadwiseError):
    """A place is in no git repository."""


@dataclass(frozen=True)
class Commit:
    """A revision as the user wrote it, and what it is.

    Attributes:
        sha: of the commit, 40 or 64 hexadecimal digits.
        subject: first line of its message.
        written: the revision as the user wrote it.
    """

    sha: str
    subject: str
    written: str

    @property
    def short(self) -> str:
        """Names a folder: `1a2b3c4d`."""
        return self.sha[:8]

    @property
    def label(self) -> str:
        """As the user wrote it; a commit's full number is cut to 12 digits."""
        return self.written[:12] if re.fullmatch(r"[0-9a-f]{40,64}", self.written) else self.written


@dataclass(frozen=True)
class Repository:
    """A git repository, by the top of its working tree, or by its own folder where it is bare."""

    path: str

    @classmethod
    def around(cls, place: str | Path) -> Repository:
        """The repository that a folder or file is in.

        Raises:
            NoRepository: there is none.
            HeadwiseError: no such place, or git cannot be used there.
        """
        folder = Path(place)
        if not folder.exists():
            raise HeadwiseError(
                f"the repository {shortened(place)} is not there; give the path of a checkout"
            )
        folder = folder if folder.is_dir() else folder.parent
        try:
            return cls(git(folder, "rev-parse", "--show-toplevel"))
        except GitError as error:
            if "work tree" in str(error):  # a bare repository, or a folder within .git
                return cls(git(folder, "rev-parse", "--absolute-git-dir"))
            if "not a git repository" in str(error):
                raise NoRepository(
                    f"{shortened(folder.absolute())} is not in a git repository; name the repository of the "
                    "commits: code_repository in a study, --repository for bisect"
                ) from None
            raise

    def commit(self, revision: object) -> Commit:
        """The commit that a revision names.

        Raises:
            HeadwiseError: it names none, or is not text; tells near names.
        """
        if not isinstance(revision, str):
            raise HeadwiseError(f"the revision {revision!r} is not text in YAML; put it in quotes")
        if not revision or revision[0] in "-^" or not revision.isprintable():
            raise HeadwiseError(
                f"{revision!r} is not a revision; give a branch, a tag or a commit, such as main or 1a2b3c4"
            )
        try:
            named = git(self.path, "rev-parse", "--verify", "--end-of-options", revision).splitlines()[-1]
            sha = git(self.path, "rev-parse", "--verify", f"{named.lstrip('^')}^{{commit}}")
        except GitError as error:
            raise HeadwiseError(self._missing(revision, error.said)) from None
        return Commit(sha, self.subject(sha), revision)

    def _missing(self, revision: str, said: str) -> str:
        text = f"no commit in {self.path} is called {revision!r}"
        if "is ambiguous" in said:
            found = git(self.path, "rev-parse", f"--disambiguate={revision}").split()
            return f"{revision!r} is the beginning of {len(found)} objects in {self.path}; give more digits"
        names = git(
            self.path, "for-each-ref", f"--count={MOST_NAMES}", "--sort=-committerdate",
            "--format=%(refname:short)", "refs/heads", "refs/tags", "refs/remotes",
        ).splitlines()  # fmt: skip
        if hint := did_you_mean(revision, names):
            return f"{text}{hint}"
        if self.shallow():
            return f"{text}; its history is cut off (a shallow clone): `git fetch --unshallow` completes it"
        return f"{text}; it has {', '.join(names[:5]) + (', …' if len(names) > 5 else '') or 'no commits'}"

    def subject(self, sha: str) -> str:
        """First line of a commit's message, printable."""
        line = git(self.path, "show", "-s", "--no-mailmap", "--encoding=UTF-8", "--format=%s", sha)
        return "".join(letter if letter.isprintable() else "�" for letter in line)[:200]

    def shallow(self) -> bool:
        """Whether its history is cut off."""
        return git(self.path, "rev-parse", "--is-shallow-repository") == "true"

    def dirty(self) -> bool | None:
        """Whether files of the working tree differ from its commit; None for a bare repository."""
        try:
            return bool(git(self.path, "status", "--porcelain", "--untracked-files=no"))
        except GitError:
            return None

    def content(self, sha: str, path: str) -> str | None:
        """A file's text at a commit; None where it has no such file."""
        try:
            return git(self.path, "cat-file", "blob", f"{sha}:{path}")
        except GitError:
            return None

    def history(self, good: Commit, bad: Commit) -> list[str]:
        """The commits from `good` to `bad` along first parents, both included, oldest first.

        Raises:
            HeadwiseError: `good` does not lie on that line, or the line is too long.
        """
        if good.sha == bad.sha:
            raise HeadwiseError(f"{good.written} and {bad.written} are one commit, {good.short}; give two")
        if not _is_true(self.path, "merge-base", "--is-ancestor", good.sha, bad.sha):
            reason = f"{good.written} ({good.short}) is not an ancestor of {bad.written} ({bad.short})"
            if _is_true(self.path, "merge-base", "--is-ancestor", bad.sha, good.sha):
                raise HeadwiseError(f"{reason} but comes after it; exchange --good and --bad")
            if self.shallow():
                raise HeadwiseError(
                    f"{reason} as far as a shallow clone tells; `git fetch --unshallow` first"
                )
            raise HeadwiseError(f"{reason}; give a good commit that the bad one was built on")
        between = git(
            self.path, "rev-list", "--first-parent", f"--max-count={MOST_COMMITS + 1}",
            bad.sha, f"^{good.sha}",
        ).split()  # fmt: skip
        if len(between) > MOST_COMMITS:
            raise HeadwiseError(f"more than {MOST_COMMITS:,} commits lie between them; give nearer ones")
        parents = git(self.path, "rev-list", "--parents", "--max-count=1", between[-1]).split()[1:]
        if parents[:1] != [good.sha]:
            raise HeadwiseError(
                f"{good.written} ({good.short}) came into {bad.written} by a merge and is not on its "
                f"first-parent history; the nearest earlier commit there is {(parents or ['none'])[0][:12]}"
            )
        return [good.sha, *reversed(between)]


def git(folder: str | Path, *arguments: str, held: Sequence[int] = ()) -> str:
    """What git prints, without the last end of line.

    Args:
        held: descriptors that git keeps open, so that their locks outlive this process with it.

    Raises:
        GitError: it refused; its last line.
        HeadwiseError: it is not installed.
    """
    command = ["git", "-C", str(folder), *_PLAIN, *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=environment(),
            pass_fds=held,
            check=False,
        )
    except FileNotFoundError:
        raise HeadwiseError("git is not installed, and commits cannot be compared without it") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or f"it ended with {done.returncode}"
        lines = said.splitlines()
        line = next((line for line in lines if line.startswith("fatal:")), lines[-1])
        raise GitError(f"git {arguments[0]} in {folder}: {line.removeprefix('fatal: ')}", said)
    return done.stdout.decode(errors="replace").rstrip("\n")


def environment() -> dict[str, str]:
    """This process's environment without what would point git elsewhere or let it ask questions."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("GIT_") or key.startswith(KEPT)
    }
    return kept | {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C.UTF-8"}


def _is_true(folder: str, *arguments: str) -> bool:
    try:
        git(folder, *arguments)
    except GitError:
        return False
    return True
