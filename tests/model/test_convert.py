"""nanoGPT checkpoints: the same logits as a GPT of that layout, written here independently."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.attention import AttentionConfig
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.runs.weights import initialise_from

VOCAB, WIDTH, HEADS, LAYERS, LENGTH = 17, 12, 3, 2, 10


class TheirLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.3) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class TheirNorm(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y * self.weight + (0 if self.bias is None else self.bias)


class TheirAttention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.c_attn = TheirLinear(WIDTH, 3 * WIDTH, bias)
        self.c_proj = TheirLinear(WIDTH, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (y.view(batch, length, HEADS, -1).transpose(1, 2) for y in self.c_attn(x).split(WIDTH, 2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)
        scores = scores.masked_fill(torch.ones(length, length).tril() == 0, float("-inf"))
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH))


class TheirMlp(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.c_fc = TheirLinear(WIDTH, 4 * WIDTH, bias)
        self.c_proj = TheirLinear(4 * WIDTH, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class TheirBlock(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = TheirNorm(bias), TheirAttention(bias)
        self.ln_2, self.mlp = TheirNorm(bias), TheirMlp(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TheirGpt(nn.Module):
    """A GPT with nanoGPT's names: `transformer.wte`, `transformer.h.0.attn.c_attn`, …"""

    def __init__(self, *, bias: bool = True, tied: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(LENGTH, WIDTH),
                "h": nn.ModuleList(TheirBlock(bias) for _ in range(LAYERS)),
                "ln_f": TheirNorm(bias),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def ours(kind: str = "mha", **values: Any) -> Decoder:
    shape = {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "vocab_size": VOCAB}
    layout = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}
    config = ModelConfig(**(shape | layout | values), attention=AttentionConfig(kind=kind))
    return Decoder(config, LENGTH).eval()


def saved(path: Path, contents: Any) -> str:
    torch.save(contents, path)
    return str(path)


@pytest.mark.parametrize("kind", ["mha", "flash"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_are_theirs(tmp_path: Path, kind: str, bias: bool, tied: bool) -> None:
    theirs = TheirGpt(bias=bias, tied=tied)
    checkpoint = {"model": theirs.state_dict(), "iter_num": 7, "config": {"n_layer": LAYERS}}
    model = ours(kind, bias=bias, tie_embeddings=tied)
    initialise_from(saved(tmp_path / "ckpt.pt", checkpoint), model)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    torch.testing.assert_close(model(tokens), theirs(tokens), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_compiled_and_old_checkpoints_and_bare_dictionaries(tmp_path: Path) -> None:
    theirs = TheirGpt()
    state = {f"_orig_mod.{name}": value for name, value in theirs.state_dict().items()}
    mask = torch.ones(1, 1, LENGTH, LENGTH).tril()
    state |= {f"_orig_mod.transformer.h.{i}.attn.bias": mask for i in range(LAYERS)}
    tokens = torch.randint(VOCAB, (2, LENGTH))
    for contents in ({"model": state}, state):
        model = ours()
        initialise_from(saved(tmp_path / "ckpt.pt", contents), model)
        torch.testing.assert_close(model(tokens), theirs(tokens), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_tied_checkpoint_fits_an_untied_model(tmp_path: Path) -> None:
    theirs, model = TheirGpt(), ours(tie_embeddings=False)
    initialise_from(saved(tmp_path / "ckpt.pt", theirs.state_dict()), model)
    tokens = torch.randint(VOCAB, (1, LENGTH))
    torch.testing.assert_close(model(tokens), theirs(tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"position": "none"}, r"nanoGPT layout, which needs model.position=learned; it is none"),
        ({"norm": "rmsnorm"}, r"needs model.norm=layernorm; it is rmsnorm"),
        ({"mlp": "swiglu"}, r"needs model.mlp=gelu or gelu_tanh; it is swiglu"),
        ({"n_layers": LAYERS + 1}, r"no parameter blocks.2"),
        ({"n_layers": LAYERS - 1}, r"this model has no parameter blocks.1"),
        ({"bias": False}, r"this model has no parameter"),
        ({"n_kv_heads": 1}, r"qkv.weight is \(36, 12\) there and \(20, 12\) here"),
        ({"max_seq_len": 5}, r"positions.weight is \(10, 12\) there and \(5, 12\) here"),
    ],
    ids=str,
)
def test_a_model_of_another_shape_is_refused_and_keeps_its_weights(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    path, model = saved(tmp_path / "ckpt.pt", TheirGpt().state_dict()), ours(**values)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(HeadwiseError, match=message):
        initialise_from(path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_output_layer_of_its_own_is_not_dropped(tmp_path: Path) -> None:
    path = saved(tmp_path / "ckpt.pt", TheirGpt(tied=False).state_dict())
    with pytest.raises(HeadwiseError, match=r"set model.tie_embeddings=false to keep it"):
        initialise_from(path, ours())


@pytest.mark.parametrize(
    "name", ["h.0.attn.c_attn.weight", "transformer.h.0.attn.rotary.inv_freq", "model.embed_tokens.weight"]
)
def test_other_layouts_are_refused(tmp_path: Path, name: str) -> None:
    state = TheirGpt().state_dict() | {name: torch.zeros(3)}
    with pytest.raises(HeadwiseError, match=rf"no nanoGPT layout: it holds '{name}'"):
        initialise_from(saved(tmp_path / "ckpt.pt", state), ours())


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_objects_are_refused_and_never_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    path = saved(tmp_path / "ckpt.pt", {"model": TheirGpt().state_dict(), "extra": Trap(sprung)})
    with pytest.raises(HeadwiseError, match="cannot be read as tensors alone") as caught:
        initialise_from(path, ours())
    assert not sprung.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("contents", [[1, 2], {"model": 3}, {"epoch": 3}, torch.zeros(2)], ids=str)
def test_files_without_a_model_are_refused(tmp_path: Path, contents: Any) -> None:
    with pytest.raises(HeadwiseError, match="holds no model"):
        initialise_from(saved(tmp_path / "ckpt.pt", contents), ours())


@pytest.mark.parametrize("keep", [0, 0.5])
def test_damaged_files_are_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "ckpt.pt"
    saved(path, TheirGpt().state_dict())
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(HeadwiseError, match=r"ckpt.pt cannot be read"):
        initialise_from(str(path), ours())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=r"is not there: give a run folder or a .pt file"):
        initialise_from(str(tmp_path / "none.pt"), ours())
