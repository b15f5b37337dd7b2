"""What no model can be built from is refused in one line that quotes it and says what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from headwise.attention import AttentionConfig
from headwise.errors import HeadwiseError
from headwise.model.config import COUNTS, ModelConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 100, "n_heads": 3}, r"d_model 100 .*n_heads 3; .* set model.head_dim"),
        ({"n_heads": 4, "n_kv_heads": 3}, r"n_heads 4 is not divisible by model.n_kv_heads 3"),
        ({"n_heads": 2, "n_kv_heads": 4}, r"n_heads 2 is not divisible by model.n_kv_heads 4"),
        ({"head_dim": 7}, r"head_dim is 7, and RoPE .* make it even, or choose another model.position"),
        ({"d_model": 12, "n_heads": 4}, r"head_dim is 3, and RoPE"),
        ({"position": "rotary"}, r"model.position 'rotary' .* choose from rope, "),
        ({"norm": "rmsnrom"}, r"model.norm 'rmsnrom' .*did you mean 'rmsnorm'\?"),
        ({"mlp": "swigelu"}, r"model.mlp 'swigelu' .*did you mean 'swiglu'\?"),
        ({"dropout": 1.0}, r"model.dropout is 1.0; .* 0 <= dropout < 1"),
        ({"dropout": -0.1}, r"model.dropout is -0.1"),
        ({"dropout": math.nan}, r"model.dropout is nan"),
        ({"rope_theta": 0.0}, r"model.rope_theta is 0.0; it must be above 0"),
        ({"init_std": -0.02}, r"model.init_std is -0.02; it must be above 0"),
        ({"init_std": math.inf}, r"model.init_std is inf; it must be a number above 0"),
        ({"attention": AttentionConfig(kind="falsh")}, r"'falsh' .*did you mean 'flash'\?"),
        ({"attention": AttentionConfig(dropout=1.5)}, r"model.attention.dropout is 1.5; .* dropout < 1"),
        (
            {"attention": AttentionConfig(kind="flex", dropout=0.1)},
            r"dropout is 0.1, but kind 'flex' cannot .* set it to 0 or choose flash",
        ),
        *(({name: 0}, rf"model.{name} is 0; it must be at least 1") for name in COUNTS),
    ],
    ids=str,
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadwiseError, match=message) as caught:
        ModelConfig(**values).validate()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"d_model": 768, "n_heads": 13, "head_dim": 64},
        {"n_heads": 4, "n_kv_heads": 1},
        {"head_dim": 7, "position": "learned"},
        {"mlp": "swiglu", "norm": "layernorm", "bias": True, "tie_embeddings": False},
    ],
    ids=str,
)
def test_accepted(values: dict[str, Any]) -> None:
    ModelConfig(**values).validate()


def test_sizes_that_are_not_given() -> None:
    config = ModelConfig(d_model=768, n_heads=12)
    assert (config.kv_heads(), config.width_of_head(), config.width_of_mlp()) == (12, 64, 3072)
    assert ModelConfig(d_model=768, mlp="swiglu").width_of_mlp() == 2048
    assert ModelConfig(d_model=100, mlp="swiglu").width_of_mlp() == 288  # 266.7 up to a multiple of 32
    assert ModelConfig(d_model=100, mlp="swiglu", d_ff=11).width_of_mlp() == 11
