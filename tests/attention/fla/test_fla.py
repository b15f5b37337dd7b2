"""The adapter to flash-linear-attention, with a package of the same interface in place of the real one.

The real kernels need a GPU; `test_real_layers.py` builds and runs the real layers where they are installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.attention import AttentionConfig, AttentionShape
from headwise.attention.fla import INSTALL, FlaAttention, FlaConfig
from headwise.attention.observation import Unmeasured
from headwise.cli.main import main
from headwise.config.run import from_dict
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.model.generate import make_cache
from headwise.model.surgery import refuse
from headwise.training.run import refuse_device

PACKAGE = {
    "__init__.py": """
from .gated_deltanet import GatedDeltaNet
from .linear_attn import LinearAttention
from .rodimus import RodimusAttention, SlidingWindowSharedKeyAttention
from .rwkv7 import RWKV7Attention
__all__ = ["GatedDeltaNet", "LinearAttention", "RodimusAttention", "RWKV7Attention"]
__all__ += ["SlidingWindowSharedKeyAttention"]
""",
    "gated_deltanet.py": """
import torch
from torch import nn

class GatedDeltaNet(nn.Module):
    def __init__(self, hidden_size=2048, expand_v=2, head_dim=256, num_heads=6, mode="chunk",
                 layer_idx=None, **kwargs):
        super().__init__()
        assert mode in ["chunk", "fused_recurrent"], f"Not supported mode `{mode}`."
        self.head_dim, self.num_heads, self.layer_idx = head_dim, num_heads, layer_idx
        self.v_proj = nn.Linear(hidden_size, int(num_heads * head_dim * expand_v), bias=False)
        self.A_log = nn.Parameter(torch.full((num_heads,), 0.7))
        self.table = nn.Parameter(torch.full((2, 3), 0.25))
        self.o_proj = nn.Linear(int(num_heads * head_dim * expand_v), hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False,
                output_attentions=False, **kwargs):
        assert hidden_states.dtype != torch.float64, "it does not support float64."
        mean = self.v_proj(hidden_states).cumsum(1) * torch.sigmoid(self.A_log.sum() + self.table.sum())
        return self.o_proj(mean), None, past_key_values
""",
    "linear_attn.py": """
from torch import nn

class LinearAttention(nn.Module):
    def __init__(self, mode="chunk", hidden_size=1024, num_heads=8, num_kv_heads=None, layer_idx=None):
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads

    def forward(self, hidden_states, **kwargs):
        return hidden_states
""",
    "rodimus.py": """
from torch import nn

class RodimusAttention(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states[:, :1], None, None

class SlidingWindowSharedKeyAttention(RodimusAttention):
    pass
""",
    "rwkv7.py": """
from torch import nn

class RWKV7Attention(nn.Module):
    def __init__(self, hidden_size=1024, layer_idx=None):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, v_first=None, **kwargs):
        return hidden_states, None, None, v_first
""",
}

SHAPE = AttentionShape(16, 4, 2, 4, layer=1, n_layers=2)


def forget() -> None:
    for name in [name for name in sys.modules if name == "fla" or name.startswith("fla.")]:
        del sys.modules[name]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `fla` of the same interface, whose layers compute on a CPU."""
    folder = tmp_path / "site" / "fla" / "layers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    forget()
    monkeypatch.syspath_prepend(str(folder.parents[1]))
    monkeypatch.setattr(FlaAttention, "needs_cuda", False)
    yield
    forget()


def make(**options: Any) -> FlaAttention:
    return FlaAttention(SHAPE, FlaConfig(**options)).eval()


def model(**options: Any) -> Decoder:
    attention = AttentionConfig(kind="fla", fla=FlaConfig(**options))  # type: ignore[call-arg]
    return Decoder(ModelConfig(d_model=16, n_heads=4, vocab_size=8, position="none", attention=attention), 8)


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="the package is installed")
def test_a_missing_package_is_one_sentence_that_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HeadwiseError) as raised:
        make()
    assert str(raised.value) == INSTALL
    flags = ["--data.name=copy", "--data.seq_len=8", "--training.max_steps=1", f"--out={tmp_path / 'run'}"]
    assert main(["train", *flags, "--device=cpu", "--model.attention.kind=fla"]) == 2
    assert "pip install 'headwise[fla]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_layer_is_built_with_what_its_constructor_takes(package: None) -> None:
    layer = make()
    assert (layer.inner.num_heads, layer.inner.head_dim, layer.inner.layer_idx) == (4, 4, 1)
    assert layer.inner.v_proj.weight.shape == (32, 16)
    assert make(arguments="{expand_v: 1}").inner.v_proj.weight.shape == (16, 16)
    linear = make(layer="linear_attn").inner
    assert (linear.num_heads, linear.num_kv_heads) == (4, 2)
    assert make(layer="rwkv7").inner.layer_idx == 0
    names = set(dict(layer.named_parameters()))
    assert not any(name.startswith(("qkv", "out")) for name in names)


def test_it_maps_a_sequence_and_records_its_engine(package: None) -> None:
    layer, seen = make(), []
    layer.observer = seen.append
    x = torch.randn(2, 5, 16)
    assert layer(x).shape == x.shape
    assert layer.engine == "fla-gated_deltanet"
    assert isinstance(seen[0], Unmeasured)
    assert torch.equal(make(layer="linear_attn")(x), x)  # a layer that gives a tensor alone


def test_matrices_are_drawn_as_the_models_and_the_rest_stays_as_the_layer_starts_it(package: None) -> None:
    torch.manual_seed(0)
    inner = model().attentions()[1].inner
    assert (inner.A_log == 0.7).all()
    assert (inner.table == 0.25).all()
    assert inner.v_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert inner.o_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.2)  # two layers


def test_it_trains(package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlaAttention, "supports", FlaAttention.supports | {"cpu_training"})
    out = tmp_path / "run"
    flags = [
        "--data.name=copy",
        "--data.seq_len=8",
        "--model.d_model=16",
        "--model.position=none",
        "--device=cpu",
    ]
    flags += ["--training.max_steps=2", f"--out={out}", "--model.attention.kind=fla"]
    assert main(["train", *flags]) == 0
    assert math.isfinite(json.loads((out / "summary.json").read_text())["val_loss"])
    assert "returns no weights" in (out / "log.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "gated_delta_net"}, r"did you mean 'gated_deltanet'\?"),
        ({"layer": "Rodimus"}, r"did you mean 'RodimusAttention'\?"),
        ({"arguments": "{mode: slow}"}, "cannot be built with .*Not supported mode `slow`"),
        ({"layer": "linear_attn", "arguments": "{mod: chunk}"}, r"did you mean 'mode'\?"),
    ],
)
def test_what_cannot_be_built_is_told(package: None, options: dict[str, str], message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        make(**options)


def test_what_a_layer_cannot_do_is_refused(package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(), torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match="'fla' does not support padding"):
        layer(x, attn_mask=torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="'fla' does not support full"):
        layer(x, causal=False)
    with pytest.raises(HeadwiseError, match="encode positions themselves"):
        layer(x, rope=lambda q, k: (q, k))
    with pytest.raises(
        HeadwiseError, match=r"refuses its input \(torch.float64, \(1, 4, 16\)\): it does not"
    ):
        layer.double()(x.double())
    with pytest.raises(
        HeadwiseError, match=r"returns \(1, 1, 16\) for \(1, 4, 16\): it cannot be used alone"
    ):
        make(layer="RodimusAttention")(x)
    decoder = model()
    with pytest.raises(HeadwiseError, match=r"cannot be decoded token by token: .*cache of their own"):
        make_cache(decoder, 1, 4)
    with pytest.raises(HeadwiseError, match="no heads to add or to cut"):
        refuse(decoder.config, "normal", "the model")
    with pytest.raises(HeadwiseError, match="they have no q, k and v"):
        layer.heads(x)
    monkeypatch.setattr(FlaAttention, "needs_cuda", True)
    for ask in (
        lambda: make()(x),
        lambda: refuse_device(
            from_dict({"model.attention.kind": "fla", "training.max_steps": 1}), torch.device("cpu")
        ),
    ):
        with pytest.raises(HeadwiseError, match="runs only on a CUDA device"):
            ask()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer", "fla:gla", "give a name such as gated_deltanet"),
        ("arguments", "expand_v", "give a mapping of plain values"),
        ("arguments", "{a: [1]}", "give a mapping of plain values"),
        ("arguments", "{a: 1", "give a mapping of plain values"),
    ],
)
def test_values_without_a_meaning_are_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(HeadwiseError, match=message):
        from_dict({f"model.attention.fla.{key}": value, "training.max_steps": 1})


def test_flops_are_an_estimate_by_the_form_of_the_layer() -> None:
    state, square = FlaConfig("gated_deltanet"), FlaConfig("forgetting_attn")
    counts = [
        FlaAttention.flops_per_token(SHAPE, options, t) for options in (state, square) for t in (64, 128)
    ]
    assert counts == [4 * 4 * 16, 4 * 4 * 16, 4 * 64 * 16, 4 * 128 * 16]
