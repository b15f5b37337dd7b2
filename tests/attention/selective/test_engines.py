"""The switch-by-engine table covers every switch, is the one in the docs, and agrees with what runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from headwise.attention.selective.config import PenaltyConfig, ProtectionConfig, SelectiveConfig
from headwise.attention.selective.engines import SWITCHES, engine_table, engines, fallback
from headwise.cli.main import main
from headwise.config.run import flatten

PAGE = Path(__file__).parents[3] / "docs" / "selective.md"


def test_every_switch_is_in_the_table() -> None:
    assert set(SWITCHES) == {key for key, _ in flatten(dataclasses.asdict(SelectiveConfig()))}


def test_every_value_sets_its_switch() -> None:
    default = SelectiveConfig()
    for switch, values in SWITCHES.items():
        found = [_value(SelectiveConfig(**given), switch) for given in values.values()]
        other = [value for value in found if value != _value(default, switch)]
        assert other or len(values) > 1 or switch.endswith("normalize_layers"), switch


def _value(config: SelectiveConfig, switch: str) -> object:
    return dict(flatten(dataclasses.asdict(config)))[switch]


def test_the_page_has_the_table_as_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "--engines"]) == 0
    printed = capsys.readouterr().out
    assert printed == engine_table()
    assert f"\n{printed}\n" in PAGE.read_text(encoding="utf-8")


def test_what_is_fused_and_what_is_not() -> None:
    assert engines(SelectiveConfig())[:2] == ("fused", "fused")
    for plain in ({"residual_logits": True}, {"accumulate": "float64"}, {"accumulate": "sequential"}):
        assert engines(SelectiveConfig(**plain))[0] == "plain"  # type: ignore[arg-type]
    biased = SelectiveConfig(source="linear_combo", combination_init="head_zero_and_bias")
    assert engines(biased)[0] == "fused"
    leaky = dataclasses.replace(biased, protection=ProtectionConfig("leaky_relu"))
    assert engines(leaky)[0] == "plain"
    wide = SelectiveConfig(source="latent", n_masks=4, mask_heads="one_each")
    assert engines(wide)[2] == "T x T a mask, some heads at a time"
    latent = SelectiveConfig(source="latent", n_masks=4)
    assert engines(latent)[2] == "nothing"
    for more in ({"memory_penalty": PenaltyConfig(0.1)}, {"protection": ProtectionConfig("head_two")}):
        assert engines(dataclasses.replace(latent, **more))[2] != "nothing"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "engine", "cuda", "width", "words"),
    [
        (SelectiveConfig(), "selective-plain", False, 64, ["no CUDA device", "201.3 MB", "a head"]),
        (SelectiveConfig(accumulate="torch"), "selective-plain", False, 64, ["no CUDA", "accumulate=torch"]),
        (
            SelectiveConfig(residual_logits=True), "selective-plain-mask", True, 64,
            ["residual_logits has no kernel", "16.8 MB", "a mask"],
        ),
    ],
)  # fmt: skip
def test_a_fallback_is_one_line_with_the_reason_and_the_cost(
    config: SelectiveConfig, engine: str, cuda: bool, width: int, words: list[str]
) -> None:
    line = fallback(config, engine, cuda=cuda, n_heads=12, head_dim=width, batch=4, tokens=1024)
    assert line is not None
    assert "\n" not in line
    for word in [engine, *words]:
        assert word in line


@pytest.mark.parametrize("engine", ["selective-fused", "sdpa", None])
def test_the_fast_engine_is_no_fallback(engine: str | None) -> None:
    sizes = {"n_heads": 12, "head_dim": 64, "batch": 4, "tokens": 64}
    assert fallback(SelectiveConfig(), engine, cuda=True, **sizes) is None
