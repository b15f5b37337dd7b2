"""The study of modifiers: valid, each variant one modifier apart from the baseline, equal tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.config.run import flatten, to_dict
from headwise.model.decoder import Decoder
from headwise.study.plan import plan
from headwise.study.read import read_study

PRESET = Path(__file__).parents[2] / "configs" / "studies" / "modifiers.yaml"


def test_each_variant_is_one_modifier_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(PRESET)
    study.device = "cpu"
    runs = [run for run in plan(study, tmp_path) if run.config.seed == study.seeds[0]]
    configs = {run.variant: dict(flatten(to_dict(run.config))) for run in runs}
    baseline = configs.pop(study.baseline)
    changed = {}
    for variant, config in configs.items():
        changed[variant] = {key for key in baseline if config[key] != baseline[key] and key != "out"}
    assert {key for keys in changed.values() for key in keys} == {
        f"model.attention.{name}" for name in ("qk_norm", "sink", "output_gate", "value_residual", "windows")
    }
    assert all(len(keys) == 1 for keys in changed.values())
    parameters = {}
    for run in runs:
        run.config.model.vocab_size = 256
        parameters[run.variant] = sum(p.numel() for p in Decoder(run.config.model).parameters())
    assert max(parameters.values()) < 1.1 * min(parameters.values())
