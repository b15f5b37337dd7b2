"""A run of any kind, option or modifier that a kill -9 cut off goes on bit for bit as if nothing had been."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.attention import KINDS
from headwise.attention.modifiers import MODIFIERS
from headwise.config.run import from_dict
from headwise.runs import checkpoint
from headwise.runs.folder import RunFolder
from headwise.training.run import train
from tests.fixtures.kills import cut_back

TINY = {
    "model.d_model": 16, "model.n_layers": 2, "model.n_heads": 4, "model.n_kv_heads": 2, "data.name": "copy",
    "data.seq_len": 8, "data.batch_size": 2, "data.vocab_size": 8, "data.eval_sequences": 2,
    "training.max_steps": 4, "training.warmup_steps": 1, "training.log_every": 1, "training.eval_every": 2,
    "training.checkpoint_every": 2, "training.keep_checkpoints": 9, "seed": 7, "device": "cpu",
    "measure.maps": 0, "measure.heads": False, "data.num_workers": 0,
}  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "differential": [{"version": 1}, {"version": 2}],
    "holo": [{"form": "boundary"}, {"form": "hrr"}],
    "selective": [{"source": "latent"}],
    "tt": [{"rank": 16}, {"rank": 16, "share_cores": "qkv"}],
}
"""Of kinds with options that add parameters or state; of the others the usual ones."""
MODIFIED: dict[str, Any] = {
    "qk_norm": True, "sink": "learned", "output_gate": "element", "value_residual": True,
    "windows": "[3, full]",
}  # fmt: skip


def cases() -> Iterator[Any]:
    """Every kind that trains here, with its options; one with each modifier and with dropout of heads."""
    for kind, cls in KINDS.items():
        if cls.__module__.startswith("headwise.") and "cpu_training" in cls.supports:
            for options in OPTIONS.get(kind, [{}]):
                own = {f"model.attention.{kind}.{key}": value for key, value in options.items()}
                yield pytest.param({"model.attention.kind": kind} | own, id=f"{kind} {options}")
    for name in MODIFIERS:
        yield pytest.param({f"model.attention.{name}": MODIFIED[name]}, id=name)
    yield pytest.param({"model.attention.head_dropout": 0.3, "model.attention.dropout": 0.2}, id="dropout")


@pytest.mark.parametrize("own", cases())
def test_it_goes_on_bit_for_bit(own: dict[str, Any], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config = from_dict(TINY | {"model.attention.kind": "flash"} | own)
    train(dataclasses.replace(config, out=str(whole)))
    shutil.copytree(whole, cut)
    cut_back(cut, 2)
    assert train(dataclasses.replace(config, out=str(cut)), resume=True)["step"] == 4
    rows = [
        [(row["step"], row["split"], row["loss"]) for row in RunFolder(f).read_metrics()]
        for f in (whole, cut)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) > 6
    ours, theirs = (checkpoint.load(f / "checkpoints" / checkpoint.folder_name(4)) for f in (cut, whole))
    assert ours.model.keys() == theirs.model.keys()
    different = [name for name, value in ours.model.items() if not torch.equal(value, theirs.model[name])]
    assert different == []
