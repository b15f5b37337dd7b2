"""A trainer of a tiny model, in parts that a test can reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.config.run import Config, from_dict, to_yaml
from headwise.data import Data, open_data
from headwise.model.decoder import Decoder
from headwise.runs.folder import RunFolder
from headwise.training.distributed import World
from headwise.training.run import with_vocabulary
from headwise.training.trainer import Trainer

TINY = {
    "model.d_model": 32, "model.n_layers": 2, "model.n_heads": 2, "model.attention.kind": "mha",
    "data.name": "copy", "data.seq_len": 16, "data.batch_size": 4, "data.vocab_size": 16,
    "data.eval_sequences": 6, "training.max_steps": 6, "training.warmup_steps": 2, "training.log_every": 1,
    "training.eval_every": 0, "training.checkpoint_every": 0,
}  # fmt: skip

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def tiny_config() -> Callable[..., Config]:
    """A configuration with dotted keys over the tiny ones."""
    return lambda **overrides: from_dict(TINY | overrides)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer in a folder of its own, with dotted keys over the tiny ones, or on data of the test's."""

    def make(data: Data | None = None, **overrides: Any) -> Trainer:
        given = {"data.vocab_size": None} if overrides.get("data.name", "copy") != "copy" else {}
        config = from_dict(TINY | given | overrides)
        data = data or open_data(config.data, config.seed)
        config = with_vocabulary(config, data)
        torch.manual_seed(config.seed)
        folder = RunFolder(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        folder.start(to_yaml(config))
        return Trainer(config, Decoder(config.model, config.data.seq_len), data, ALONE, folder)

    return make
