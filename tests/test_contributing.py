"""CONTRIBUTING.md's page on adding a kind of attention is true: its code runs and keeps the contract."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import torch

from headwise.attention import KINDS, AttentionShape


def test_the_example_kind_runs_and_keeps_causality(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    path = tmp_path / "nothing.py"
    path.write_text(block[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("nothing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nothing"] = module
    try:
        spec.loader.exec_module(module)
        layer = KINDS["nothing"](AttentionShape(32, 4, 2, 8), module.NothingConfig(offset=0.5)).double()
        x = torch.randn(2, 9, 32, dtype=torch.float64)
        changed = x.clone()
        changed[:, 6] += 1
        y, y_changed = layer(x), layer(changed)
        assert torch.equal(y[:, :6], y_changed[:, :6])
        assert not torch.equal(y[:, 6], y_changed[:, 6])

        mask = torch.ones(1, 9, 9, dtype=torch.bool)
        mask[:, 4] = False
        assert torch.equal(layer(x, attn_mask=mask)[:, 4], torch.zeros(2, 32, dtype=torch.float64))
    finally:
        KINDS.pop("nothing", None)
        sys.modules.pop("nothing", None)
