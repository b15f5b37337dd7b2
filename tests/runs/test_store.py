"""Copies of runs: whole and verified or not there; nothing that a manifest names leaves its folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings

from headwise.cli.main import main
from headwise.errors import HeadwiseError
from headwise.reading import Unreadable
from headwise.runs import copies
from headwise.runs.folder import RunFolder
from headwise.runs.manifest import CLAIM, MANIFEST, read_manifest, to_bytes
from headwise.runs.read import Study, find_runs
from headwise.runs.store import open_store, pull, push, verify
from tests.fixtures.runs import contents, run_folder, train_on
from tests.malformed import mutations


class Stops:
    """Ends the process, as far as it knows, when enough bytes were counted of one piece of work."""

    def __init__(self, what: str, after: int) -> None:
        self.what, self.after, self.now = what, after, ""

    def begin(self, what: str, total: int) -> None:
        self.now = what

    def count(self, n_bytes: int) -> None:
        if self.now.startswith(self.what):
            self.after -= n_bytes
            if self.after < 0:
                raise KeyboardInterrupt


@pytest.fixture(params=["path", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind of store."""
    name = f"{tmp_path.name}/copy"
    return {"path": f"{tmp_path}/copy", "file": f"file://{tmp_path}/copy", "memory": f"memory://{name}"}[
        request.param
    ]


def test_a_run_comes_back_as_it_was(tmp_path: Path, place: str) -> None:
    run = run_folder(tmp_path / "run@lr=0.1").path
    (run / "maps").mkdir()
    (run / "maps" / "ünïcode [1]*?#.npz").write_bytes(b"x")
    (run / ".hidden").write_text("not pushed")
    (run / "latest").symlink_to("maps")
    copy = push(run, place)
    assert copy.files == len(contents(run)) - 1
    assert copy.moved == copy.size == sum(map(len, contents(run).values())) - len("not pushed")
    assert push(run, place).moved == 0
    back = pull(place, tmp_path / "back")
    (run / ".hidden").unlink()
    assert contents(tmp_path / "back") == contents(run)
    assert back.size == copy.size
    assert verify(open_store(place))["step"] == 10
    listed = find_runs(tmp_path / "back")[0]
    assert (listed.state, listed.get("val_loss"), listed.get("kind")) == ("finished", 2.5, "flash")


def test_where_copies_lie_is_recorded_with_the_run_that_lasts(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run").path
    push(run, f"memory://{tmp_path.name}/other")
    assert copies.known(run) == []
    push(run, tmp_path / "copy")
    push(run, tmp_path / "copy")
    assert [copy["url"] for copy in copies.known(run)] == [str(tmp_path / "copy")]
    pull(tmp_path / "copy", tmp_path / "back")
    assert [copy["url"] for copy in copies.known(tmp_path / "back")] == [str(tmp_path / "copy")]


def test_a_study_keeps_its_form_and_the_runs_that_were_deleted_here(tmp_path: Path, place: str) -> None:
    study = tmp_path / "study"
    for seed in (0, 1):
        run_folder(study / "a" / f"seed_{seed}", seed=seed)
    (study / "study.yaml").write_text("name: s\nbaseline: a\nseeds: [0, 1]\nvariants:\n  a: {label: A}\n")
    (study / "report.md").write_text("# s\n")
    before = contents(study)
    assert len(push(study, place).runs) == 2
    shutil.rmtree(study / "a" / "seed_1")
    (study / "report.md").write_text("# s, of one run\n")
    assert len(push(study, place).runs) == 1
    assert len(pull(place, tmp_path / "back").runs) == 2
    assert contents(tmp_path / "back") == before | {"report.md": b"# s, of one run\n"}
    assert [run.state for run in Study.read(tmp_path / "back").runs] == ["finished", "finished"]


@pytest.mark.parametrize(
    ("what", "after"), [("reading", 5), ("writing", 0), ("writing", 1200), ("reading back", 1200)]
)
def test_a_push_that_was_interrupted_is_no_copy_and_goes_on(tmp_path: Path, what: str, after: int) -> None:
    run = run_folder(tmp_path / "run").path
    with pytest.raises(KeyboardInterrupt):
        push(run, tmp_path / "copy", progress=Stops(what, after))
    with pytest.raises(HeadwiseError, match=r"is incomplete|holds no copy"):
        pull(tmp_path / "copy", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert copies.known(run) == []
    arrived = sum(len(v) for name, v in contents(tmp_path / "copy").items() if contents(run).get(name) == v)
    copy = push(run, tmp_path / "copy")
    assert copy.moved == copy.size - arrived
    assert contents(tmp_path / "copy") == contents(run)
    assert not (tmp_path / "copy" / CLAIM).exists()


def test_a_pull_that_was_interrupted_goes_on_and_appears_whole(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run").path
    push(run, tmp_path / "copy")
    with pytest.raises(KeyboardInterrupt):
        pull(tmp_path / "copy", tmp_path / "back", progress=Stops("fetching", 1100))
    assert not (tmp_path / "back").exists()
    assert find_runs(tmp_path / "back") == []
    (tmp_path / ".back.pull" / "of another copy").write_text("x")
    copy = pull(tmp_path / "copy", tmp_path / "back")
    assert 0 < copy.moved < copy.size
    assert contents(tmp_path / "back") == contents(run)
    assert sorted(os.listdir(tmp_path)) == ["back", "copy", "run"]


def test_a_file_that_was_damaged_in_the_store_is_found_and_mended(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run").path
    push(run, tmp_path / "copy")
    weights = tmp_path / "copy" / "checkpoints" / "step_00000010" / "model.safetensors"
    weights.write_bytes(b"\7" + weights.read_bytes()[1:])
    with pytest.raises(HeadwiseError, match=r"model\.safetensors .* is missing or damaged"):
        verify(open_store(tmp_path / "copy"))
    with pytest.raises(HeadwiseError, match="its SHA-256 differs"):
        pull(tmp_path / "copy", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert push(run, tmp_path / "copy").moved == 1000
    assert contents(tmp_path / "copy") == contents(run)


def test_another_runs_place_is_refused(tmp_path: Path, place: str) -> None:
    first, other = run_folder(tmp_path / "a", seed=0).path, run_folder(tmp_path / "b", seed=1).path
    push(first, place)
    with pytest.raises(HeadwiseError, match="copy of another run"):
        push(other, place)
    assert pull(place, tmp_path / "back").files
    assert contents(tmp_path / "back") == contents(first)


def test_a_push_under_way_and_other_files_are_refused(tmp_path: Path) -> None:
    first, other = run_folder(tmp_path / "a", seed=0).path, run_folder(tmp_path / "b", seed=1).path
    with pytest.raises(KeyboardInterrupt):
        push(first, tmp_path / "copy", progress=Stops("writing", 0))
    with pytest.raises(HeadwiseError, match="copy of another run"):
        push(other, tmp_path / "copy")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.yaml").write_text("mine")
    with pytest.raises(HeadwiseError, match=r"holds other files, such as config\.yaml"):
        push(first, tmp_path / "thesis")
    for target in (first / "inside", tmp_path):
        with pytest.raises(HeadwiseError, match="one inside the other"):
            push(first, target)


def test_a_run_that_went_on_replaces_its_copy_and_never_the_other_way(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", state="interrupted")
    push(folder.path, tmp_path / "copy")
    old = shutil.copytree(folder.path, tmp_path / "old")
    train_on(folder, 20)
    shutil.rmtree(folder.checkpoints / "step_00000010")
    push(folder.path, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(folder.path)
    with pytest.raises(HeadwiseError, match="later state"):
        push(old, tmp_path / "copy")
    (folder.checkpoints / "step_00000020" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(HeadwiseError, match="other weights"):
        push(folder.path, tmp_path / "copy")
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(HeadwiseError, match="weights that this folder does not hold"):
        push(folder.path, tmp_path / "copy")
    assert verify(open_store(tmp_path / "copy"))["step"] == 20


def test_a_running_run_is_pushed_as_a_snapshot_alone(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", state="running")
    with pytest.raises(HeadwiseError, match="is running"):
        push(folder.path, tmp_path / "copy")
    push(folder.path, tmp_path / "copy", snapshot=True)
    assert verify(open_store(tmp_path / "copy"))["state"] == "running"
    folder.write_status("interrupted")
    pull(tmp_path / "copy", tmp_path / "back")
    assert RunFolder(tmp_path / "back").holds_run()


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run").path
    for name, make, message in (
        ("pipe", os.mkfifo, "pipe"),
        ("out", lambda path: path.symlink_to("/etc/hostname"), "link"),
        ("checkpoints/step_00000020", lambda path: path.symlink_to("step_00000010"), "link"),
        ("a\\b", lambda path: path.write_text(""), "not the name"),
    ):
        make(run / name)
        with pytest.raises(HeadwiseError, match=message):
            push(run, tmp_path / "copy")
        (run / name).unlink()
    push(run, tmp_path / "copy")


NAMES = ["../x", "/etc/x", "a/../../x", "", ".", "a//b", ".ssh", "a/.git/hooks", "a\\..\\x", "a\0b", "a\nb",
         "config.yaml",
         "config.yaml/x", "headwise-copy.json", "copies.json", "n" * 300, "a/" * 600 + "a"]  # fmt: skip


def test_a_manifest_names_files_inside_alone(tmp_path: Path) -> None:
    push(run_folder(tmp_path / "run").path, tmp_path / "copy")
    original = json.loads((tmp_path / "copy" / MANIFEST).read_text())
    for name in NAMES:
        for key, value in (("files", {"name": name, "size": 1, "sha256": "0" * 64}), ("runs", name)):
            altered = original | {"kind": "folder", key: [*original[key], value]}
            (tmp_path / "copy" / MANIFEST).write_text(json.dumps(altered))
            with pytest.raises(HeadwiseError, match=r"cannot be used|cannot be read"):
                pull(tmp_path / "copy", tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == ["copy", "run"]


def test_a_store_that_lies_about_its_files(tmp_path: Path) -> None:
    push(run_folder(tmp_path / "run").path, tmp_path / "copy")
    log = tmp_path / "copy" / "log.txt"
    for make in (
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/etc/hostname"),
    ):
        log.unlink()
        make(log)
        with pytest.raises(HeadwiseError):
            pull(tmp_path / "copy", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_folder_that_is_taken_is_refused_and_a_planned_run_is_not(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run").path
    push(run, tmp_path / "copy")
    with pytest.raises(HeadwiseError, match="holds another run"):
        pull(tmp_path / "copy", run)
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadwiseError, match="is a file"):
        pull(tmp_path / "copy", tmp_path / "file")
    RunFolder(tmp_path / "planned").write_status("planned")
    pull(tmp_path / "copy", tmp_path / "planned")
    assert contents(tmp_path / "planned") == contents(run)


def test_any_damage_to_a_manifest_is_refused_or_harmless(tmp_path: Path) -> None:
    push(run_folder(tmp_path / "run").path, tmp_path / "copy")
    path = tmp_path / "copy" / MANIFEST
    original = path.read_bytes()

    @settings(max_examples=40, database=None)
    @given(mutations.of_file(path.name, original))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            manifest = read_manifest(open_store(tmp_path / "copy"))
        except HeadwiseError:
            return
        assert manifest is not None
        assert set(json.loads(to_bytes(manifest))) >= {"files", "runs", "identity"}

    check()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 9, "copies": []}', '{"format": 1, "copies": [{"url": 1}]}']
)
def test_a_damaged_copies_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    run = run_folder(tmp_path / "run").path
    (run / "copies.json").write_text(content)
    with pytest.raises(HeadwiseError, match=r"copies\.json") as caught:
        copies.known(run)
    assert not isinstance(caught.value, Unreadable)


@pytest.mark.parametrize(("url", "message"), [
    ("", "cannot be the place"), ("s3", None), ("nothing://a", "not known"), ("zip://a::file://b", "chains"),
    ("ftp://user:secret@host/a", "password"), ("hf://name", "is not hf://"), ("hf://a/b/../c", "is not hf://"),
])  # fmt: skip
def test_places_that_are_none(url: str, message: str | None) -> None:
    if message is None:
        assert open_store(url).url == os.path.abspath(url)
        return
    with pytest.raises(HeadwiseError, match=message) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("url", "root"), [
    ("hf://me/runs", "me/runs@main"), ("hf://me/runs/a@lr=0.1/seed_0", "me/runs@main/a@lr=0.1/seed_0"),
    ("hf://datasets/me/runs@v2/x", "datasets/me/runs@v2/x"),
])  # fmt: skip
def test_a_place_on_the_hub(url: str, root: str) -> None:
    store = open_store(url)
    assert store.root == root
    assert store.below("b").root == f"{root}/b"
    assert store.below("b").url == f"{url}/b"


def test_the_verbs_push_and_pull(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variant in "ab":
        run_folder(Path("runs", "s", variant, "seed_0"))
    assert main(["runs", "push", "runs/s/a/seed_0", "runs/s/b/seed_0", "store"]) == 0
    assert sorted(os.listdir("store")) == ["a", "b"]
    assert main(["runs", "pull", "store/a/seed_0"]) == 0
    assert contents(Path("runs/seed_0")) == contents(Path("runs/s/a/seed_0"))
    assert "7 files, " in capsys.readouterr().out
    assert main(["runs", "pull", "store/a/seed_0"]) == 2
    assert main(["runs", "pull", "store"]) == 2
    assert "holds no copy" in capsys.readouterr().err
    Path("push").mkdir()
    assert main(["runs", "./push"]) == 0


def test_memory_is_as_fsspec_has_it(tmp_path: Path) -> None:
    push(run_folder(tmp_path / "run").path, f"memory://{tmp_path.name}/x")
    assert fsspec.filesystem("memory").exists(f"{tmp_path.name}/x/{MANIFEST}")
