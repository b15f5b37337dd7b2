"""Which files belong to a checkpoint, and the adapters that change it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.questions.geometry.projections import read_weights
from tests.fixtures.checkpoints import build, reasons, save


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = save(build("llama"), tmp_path / "model", max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_the_index_decides_which_shards_belong(sharded: Path) -> None:
    before = {n: layer.q for n, layer in read_weights(sharded)}
    other = {f"model.layers.{n}.self_attn.q_proj.weight": torch.zeros(24, 24) for n in range(9)}
    for name in ("zz.safetensors", "model-00001-of-00002.safetensors", "a.safetensors"):
        save_file(other, sharded / name)
    weights = read_weights(sharded)
    assert weights.layers == [0, 1, 2, 3]
    for number, layer in weights:
        np.testing.assert_array_equal(layer.q, before[number])
    assert reasons(weights)["zz.safetensors"][1] == "it is not named by the checkpoint's index"


def test_a_missing_shard_is_an_error(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(HeadwiseError, match=rf"lacks {re.escape(shard.name)}, which its index names"):
        read_weights(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(HeadwiseError, match=rf"lacks {re.escape(shard.name)}, a shard of its weights"):
        read_weights(sharded)


INDICES = [
    ('{"weight_map": {"x": "../y.safetensors"}}', "which is not a file inside"),
    ('{"weight_map": {"x": 3}}', "expected text, got a whole number"),
    ('{"weight_map": []}', "expected a mapping, got a list"), ("{}", "'weight_map' is missing"),
    ("[]", "expected a mapping, got a list"), ("{", "it is no JSON"), ("[" * 9999, "nested deeper than"),
    ('{"weight_map": {"absent": "model-00001-of-N"}}', "lacks absent, which the index places there"),
]  # fmt: skip


@pytest.mark.parametrize(("index", "message"), INDICES)
def test_an_index_that_is_wrong_says_so(sharded: Path, index: str, message: str) -> None:
    first = sorted(sharded.glob("*.safetensors"))[0].name
    (sharded / "model.safetensors.index.json").write_text(index.replace("model-00001-of-N", first))
    with pytest.raises(HeadwiseError, match=message):
        read_weights(sharded)


def test_two_models_in_one_folder_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file(load_file(folder / "a.safetensors"), folder / "b.safetensors")
    with pytest.raises(HeadwiseError, match=r"a\.safetensors and b\.safetensors both hold"):
        read_weights(folder)


# Adapters


def adapter(
    folder: Path, base: Path, module: str, shape: tuple[int, int], **settings: Any
) -> tuple[Tensor, Tensor]:
    """A LoRA adapter on one projection, as PEFT writes it; returns A and B."""
    folder.mkdir(exist_ok=True)
    a, b = torch.randn(3, shape[1]), torch.randn(shape[0], 3)
    names = {"A": a, "B": b}
    tensors = {f"base_model.model.{module}.lora_{n}.weight": t for n, t in names.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(content | settings))
    return a, b


Q = "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 4.0), ({"use_rslora": True}, 12 / 3**0.5), ({"alpha_pattern": {"q_proj": 6}}, 2.0)],
)
def test_an_adapter_is_merged_into_its_base(checkpoint, tmp_path: Path, options: dict, scale: float) -> None:
    base = checkpoint("llama")
    a, b = adapter(tmp_path / "adapter", base, Q, (24, 24), **options)
    plain, weights = dict(read_weights(base)), read_weights(tmp_path / "adapter")
    for number, layer in weights:
        delta = scale * (b @ a).reshape(4, 6, 24) if number == 2 else torch.zeros(1)
        np.testing.assert_allclose(layer.q, plain[number].q + delta.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(layer.k, plain[number].k)
    assert any("LoRA adapter is merged into 1 projections" in note for note in weights.notes)


def test_an_adapter_of_a_transposed_projection_and_one_beside_its_base_are_merged(
    checkpoint, tmp_path: Path
) -> None:
    base, module = checkpoint("gpt2"), "transformer.h.1.attn.c_attn"
    folder = save(build("gpt2"), tmp_path / "gpt2")
    a, b = adapter(folder, base, module, (72, 24), fan_in_fan_out=True)
    plain, found = dict(read_weights(base))[1], dict(read_weights(folder))[1]
    delta = (4.0 * (b @ a)).reshape(3, 4, 6, 24).numpy()
    for role, change in zip("qkv", delta, strict=True):
        np.testing.assert_allclose(getattr(found, role), getattr(plain, role) + change, rtol=1e-4, atol=1e-4)


REFUSED = [
    ({"base_model_name_or_path": "./nowhere"}, "its base './nowhere' is not to be had"),
    ({"base_model_name_or_path": None}, "names no base model"),
    ({"peft_type": "IA3"}, "of type 'IA3', and only LORA can be merged"),
    ({"use_dora": True}, "with DoRA"), ({"r": 5}, "has rank 3, and adapter_config.json says 5"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_an_adapter_that_cannot_be_merged_is_refused(
    checkpoint, tmp_path: Path, monkeypatch, options, message
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter(tmp_path / "adapter", checkpoint("llama"), Q, (24, 24), **options)
    with pytest.raises(HeadwiseError, match=message) as caught:
        read_weights(tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(checkpoint, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", checkpoint("llama"), "model.layers.7.self_attn.q_proj", (24, 24))
    with pytest.raises(HeadwiseError, match=r"changes model\.layers\.7.*, which its base does not have"):
        read_weights(tmp_path / "adapter")


@pytest.mark.parametrize("known", [True, False])
def test_adapters_inside_a_checkpoint_are_merged_or_named(checkpoint, tmp_path: Path, known: bool) -> None:
    base = checkpoint("llama")
    tensors = load_file(base / "model.safetensors")
    a, b = torch.randn(3, 24), torch.randn(24, 3)
    tensors[f"{Q}.base_layer.weight"] = tensors.pop(f"{Q}.weight")
    tensors |= {f"{Q}.lora_A.default.weight": a, f"{Q}.lora_B.default.weight": b}
    save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    if known:
        settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 12}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    plain, weights = dict(read_weights(base)), read_weights(tmp_path)
    if not known:
        assert weights.layers == [0, 1, 3]
        assert reasons(weights)["model.layers.N.self_attn"] == (
            [2], "a LoRA adapter of unknown scale changes it (no adapter_config.json tells)"
        )  # fmt: skip
        return
    assert weights.layers == [0, 1, 2, 3]
    expected = plain[2].q + 4.0 * (b @ a).reshape(4, 6, 24).numpy()
    np.testing.assert_allclose(dict(weights)[2].q, expected, rtol=1e-5, atol=1e-5)


def test_code_of_a_checkpoint_is_not_run_to_read_its_weights(checkpoint, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(settings | own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    weights = read_weights(folder)
    assert len(weights) == 4
    assert any("own code is not run" in note for note in weights.notes)
    assert not (tmp_path / "marker").exists()
