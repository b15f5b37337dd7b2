"""Names become folders only where they stay in place, and no two become one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.errors import HeadwiseError
from headwise.names import cleaned, folder_name, hub_name, leads_out, place_inside, refuse_clash


@given(st.text(max_size=300))
def test_an_accepted_name_is_one_folder_in_its_parent(name: str) -> None:
    try:
        folder_name(name, "variant")
    except HeadwiseError:
        return
    assert Path("/a", name).parent == Path("/a")
    assert Path("/a", name).name == name == os.path.normpath(name)
    assert len(name.encode()) <= 255
    assert not name.startswith((".", "~"))


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../x", "../../x", "/abs", "a/b", "a\\b", "a\0b", "a\nb", "\ud800", "x" * 256,
     "é" * 128,
     ".hidden", "~", "~root", " a", "a ", "a.", None, 1, True, ["a"]],
)  # fmt: skip
def test_what_is_no_name_is_refused_by_name(name: object) -> None:
    with pytest.raises(HeadwiseError, match=r"^--run-id .* (cannot name a folder|is not a name)") as raised:
        folder_name(name, "--run-id")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["Report.md", "FIGURES", "study.yaml"])
def test_names_of_own_files_are_reserved(name: str) -> None:
    with pytest.raises(HeadwiseError, match="of the study has that name"):
        folder_name(name, "variant", reserved=("report.md", "figures", "study.yaml"))


@pytest.mark.parametrize("pair", [("a", "A"), ("straße", "STRASSE"), ("\u00e9", "e\u0301"), ("a", "a")])
def test_names_that_are_one_to_some_file_system_clash(pair: tuple[str, str]) -> None:
    with pytest.raises(HeadwiseError, match="'first' and 'second' would share the folder"):
        refuse_clash([(pair[0], "first"), ("b", "b"), (pair[1], "second")], "variants")
    refuse_clash([("a", "a"), ("b", "b")], "variants")


@given(st.one_of(st.text(), st.integers(), st.floats(), st.lists(st.integers()), st.none()))
def test_a_cleaned_value_is_a_part_of_a_name(value: object) -> None:
    assert cleaned(value).isprintable()
    assert not set(cleaned(value)) & set("/\\\0")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a\0", "a\\..\\b", "link", "link/b", 3, None]
)
def test_a_file_outside_is_not_inside(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(HeadwiseError, match=r"index\.json names .* which is not a file inside"):
        place_inside(folder, name, "index.json")
    assert place_inside(folder, "a/b.safetensors", "index.json") == folder / "a" / "b.safetensors"


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (snapshot / "model").symlink_to("../../blobs/ff")
    (snapshot / "other").symlink_to("../../../secret")
    assert leads_out(snapshot, snapshot / "model") is None
    assert leads_out(snapshot, snapshot / "other") == tmp_path / "secret"


@pytest.mark.parametrize(
    "name", ["../a", "a/../b", "a/b/c", "a//b", "", "/a", "a/", "a b/c", "a/..", "a\0/b", "-a/b"]
)
def test_what_the_hub_does_not_allow_is_refused(name: str) -> None:
    with pytest.raises(HeadwiseError, match="owner/name"):
        hub_name(name)
    for good in ("gpt2", "EleutherAI/pythia-70m", "HuggingFaceTB/SmolLM2-135M", "a/b_c.d"):
        assert hub_name(good) == good
