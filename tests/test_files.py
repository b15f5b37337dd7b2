"""Files and folders appear whole or not at all, whatever ends the writer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.files import replacing, sweep, write_json, write_text
from tests.fixtures.disk import files_of_at_most


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    write_text(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    assert files(tmp_path) == ["new", "new/a.txt"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with replacing(path) as draft:
            draft.mkdir()
            (draft / name).write_text(name)
    assert files(tmp_path) == ["folder", "folder/new"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"

    def write(draft: Path, text: str) -> None:
        if kind == "folder":
            draft.mkdir()
            draft = draft / "inside"
        draft.write_text(text)

    with replacing(path) as draft:
        write(draft, "old")
    before = files(tmp_path)

    def fail() -> None:
        with replacing(path) as draft:
            write(draft, "new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert files(tmp_path) == before
    assert (path / "inside" if kind == "folder" else path).read_text() == "old"


def test_a_killed_writer_changes_nothing_and_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "status.json"
    write_json(path, {"state": "running"})
    pid = os.fork()
    if pid == 0:
        with replacing(path) as draft:
            draft.write_text("{")
            os._exit(9)
    os.waitpid(pid, 0)
    assert path.read_text() == '{\n  "state": "running"\n}\n'
    assert len(files(tmp_path)) > 2  # the draft is there, hidden
    sweep(tmp_path)
    assert files(tmp_path) == ["runs", "runs/status.json"]


def test_a_full_disk_is_one_clear_line_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fill() -> None:
        with replacing(path), Path("/dev/full").open("w") as full:
            full.write("new")

    with pytest.raises(HeadwiseError, match=r"the disk is full: .*a\.txt was not written"):
        fill()
    with files_of_at_most(100), pytest.raises(HeadwiseError, match=r"a\.txt was not written"):
        write_text(path, "new" * 100)
    assert path.read_text() == "old"
    assert files(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    "told",
    [
        "I/O error: File too large (os error 27)",
        "[errno 27] File too large",
        'Error while serializing: IoError(Os { code: 27, kind: FileTooLarge, message: "File too large" })',
    ],
)
def test_a_full_disk_is_seen_in_the_words_of_a_library(tmp_path: Path, told: str) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a"):
            raise RuntimeError(told)

    with pytest.raises(HeadwiseError, match="the file is larger than this disk or user may have"):
        fail()


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a"):
        pass  # the block wrote nothing
    assert files(tmp_path) == []
