"""The importance of a head is the loss without it, as a projection that ignores the head shows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from headwise.config.run import Config
from headwise.data import open_data
from headwise.model.decoder import Decoder
from headwise.runs import checkpoint
from headwise.training.loss import TokenLoss
from headwise.training.run import train


def without(model: Decoder, layer: int, head: int, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean loss with the head's columns of the output projection set to 0."""
    out = model.attentions()[layer].out
    width = model.attentions()[layer].shape.head_dim
    kept = out.weight.detach().clone()
    with torch.no_grad():
        out.weight[:, head * width : (head + 1) * width] = 0
        summed, _, _ = TokenLoss(model)(inputs, targets)
        out.weight.copy_(kept)
    return float(summed) / int((targets >= 0).sum())


@pytest.mark.parametrize("kind", ["mha", "selective"])
def test_importance_is_the_loss_without_each_head(
    tiny_config: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "run"
    config = tiny_config(
        out=str(out), device="cpu",
        **{"model.attention.kind": kind, "measure.importance": True, "measure.maps": 0},
    )  # fmt: skip
    found = train(config)["importance"]
    assert found == json.loads((out / "summary.json").read_text())["importance"]
    data = open_data(config.data, config.seed)
    batch = data.batch("val", np.arange(config.measure.sequences))
    model = Decoder(dataclasses.replace(config.model, vocab_size=data.vocab_size), 16).eval()
    saved = checkpoint.load(out / "checkpoints" / checkpoint.folder_name(6))
    checkpoint.load_weights(model, saved.model, "here")
    with torch.no_grad():
        whole = float(TokenLoss(model)(batch.inputs, batch.targets)[0]) / int((batch.targets >= 0).sum())
    assert found["loss"] == pytest.approx(whole, abs=1e-5)
    expected = [[without(model, i, h, batch.inputs, batch.targets) - whole for h in (0, 1)] for i in (0, 1)]
    if kind == "selective":  # its first head also selects; it keeps selecting when its output is removed
        assert found["delta_loss"][0][0] != 0
    np.testing.assert_allclose(found["delta_loss"], expected, atol=2e-6)


def test_measuring_importance_changes_nothing_that_is_learned(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    losses = []
    for name, more in (("with", {"measure.importance": True}), ("without", {})):
        summary = train(tiny_config(out=str(tmp_path / name), device="cpu", **{"measure.maps": 0}, **more))
        losses.append((summary["val_loss"], summary["train_loss"]))
        assert ("importance" in summary) == (name == "with")
    assert losses[0] == losses[1]


def test_a_run_that_ended_before_it_could_say_so_measures_when_it_is_resumed(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = tiny_config(out=str(out), device="cpu", **{"measure.importance": True, "measure.maps": 0})
    first = train(config)["importance"]
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(status | {"state": "interrupted"}))
    (out / "summary.json").unlink()
    assert train(config, resume=True)["importance"] == first
