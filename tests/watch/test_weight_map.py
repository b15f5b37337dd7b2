"""A checkpoint's index names files of its own folder, or the checkpoint is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headwise.errors import HeadwiseError
from headwise.runs.weights import read_source
from headwise.watch.load import load
from headwise.watch.tensors import tensors_of_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, folder / "model-1.safetensors")
    return folder


def index(folder: Path, value: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../x", "", 3, None])
def test_an_index_that_leads_out_is_refused(folder: Path, name: object) -> None:
    index(folder, {"weight_map": {"a": name}})
    for read in (tensors_of_folder, lambda path: load(str(path))):
        with pytest.raises(HeadwiseError, match=r"(not a file inside|cannot be read as an index)"):
            read(folder)
    index(folder, {"weight_map": {"a": "model-1.safetensors"}})
    assert tensors_of_folder(folder).names == ["a"]


@pytest.mark.parametrize("value", [[], {}, {"weight_map": []}, {"weight_map": {"a": []}}])
def test_an_index_of_another_shape_is_refused(folder: Path, value: object) -> None:
    index(folder, value)
    with pytest.raises(HeadwiseError, match="cannot be read as an index of weights"):
        tensors_of_folder(folder)


def test_weights_that_are_a_link_elsewhere_are_refused(folder: Path, tmp_path: Path) -> None:
    save_file({"b": torch.zeros(2)}, tmp_path / "secret.safetensors")
    (folder / "model-2.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(HeadwiseError, match=r"names 'model-2\.safetensors', which is not a file inside"):
        tensors_of_folder(folder)


@pytest.mark.parametrize(
    "source", ["hf://../a/b", "hf://a/b/../../c", "hf://a/../c", "hf://a/b//etc/x", "hf://a/b/"]
)
def test_a_source_on_the_hub_stays_in_its_cache(source: str) -> None:
    with pytest.raises(HeadwiseError, match=r"^(hf://|'hf://)"):
        read_source(source)
