"""The language model: shapes, initialisation, positions, masks, and every switch of its configuration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.attention import AttentionConfig
from headwise.model.config import MLPS, NORMS, POSITIONS, ModelConfig
from headwise.model.count import parameters_by_part
from headwise.model.decoder import Decoder, Mlp, make_norm, sinusoids

TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 29}


def build(seq_len: int = 8, kind: str = "mha", **values: Any) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(**(TINY | values), attention=AttentionConfig(kind=kind))
    config.validate()
    return Decoder(config, seq_len).eval()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_logits_of_every_combination(position: str, mlp: str, norm: str, bias: bool) -> None:
    model = build(position=position, mlp=mlp, norm=norm, bias=bias)
    tokens = torch.randint(29, (3, 8))
    logits = model(tokens)
    assert logits.shape == (3, 8, 29)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert any(p.endswith("bias") for p, _ in model.named_parameters()) == bias


def test_thirteen_heads_of_64_at_width_768() -> None:
    model = build(d_model=768, n_layers=1, n_heads=13, head_dim=64)
    assert parameters_by_part(model)["attention"] == 4 * 768 * 13 * 64
    assert model(torch.randint(29, (1, 4))).shape == (1, 4, 29)


def test_a_vocabulary_is_needed() -> None:
    with pytest.raises(ValueError, match=r"model.vocab_size is not set; take it from the data"):
        Decoder(ModelConfig(**(TINY | {"vocab_size": None})))


# --- parts


@torch.no_grad()
def test_mlps_by_their_formulas() -> None:
    x = torch.randn(3, 16)
    for name, activation in (("gelu", lambda y: y * torch.special.ndtr(y)), ("gelu_tanh", tanh_gelu)):
        mlp = Mlp(ModelConfig(d_model=16, mlp=name, bias=True))
        torch.testing.assert_close(mlp(x), mlp.down(activation(mlp.up(x))))
    gated = Mlp(ModelConfig(d_model=16, mlp="swiglu"))
    gate, up = (x @ half.T for half in gated.up.weight.chunk(2))
    torch.testing.assert_close(gated(x), (gate * gate.sigmoid() * up) @ gated.down.weight.T)


def tanh_gelu(y: Tensor) -> Tensor:
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


@torch.no_grad()
def test_rmsnorm_by_its_formula() -> None:
    norm, x = make_norm(ModelConfig(d_model=16, norm="rmsnorm")), torch.randn(3, 16) + 2
    norm.weight.uniform_(0.5, 2)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)


# --- embeddings


def test_a_tied_output_layer_is_the_token_embedding() -> None:
    tied, untied = build(), build(tie_embeddings=False)
    assert tied.head.weight is tied.tokens.weight
    assert untied.head.weight is not untied.tokens.weight
    assert not torch.equal(untied.head.weight, untied.tokens.weight)
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 29 * 16


# --- initialisation


@pytest.mark.parametrize("init_std", [0.02, 0.1])
def test_weights_start_as_gpt2(init_std: float) -> None:
    model = build(
        d_model=128, n_layers=3, n_heads=4, vocab_size=300, bias=True, norm="layernorm", position="learned",
        seq_len=200, tie_embeddings=False, init_std=init_std,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (parameter == expected).all(), name
            continue
        ends_branch = name.endswith(("attention.out.weight", "mlp.down.weight"))
        std = init_std / math.sqrt(6) if ends_branch else init_std
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name  # 16,384 draws or more
        assert abs(parameter.mean().item()) < 0.03 * std, name


def test_an_untrained_model_knows_nothing() -> None:
    model, tokens = build(d_model=64, vocab_size=256, seq_len=64), torch.randint(256, (8, 64))
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), rel=0.02)


# --- positions


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_the_order_of_earlier_tokens_matters_where_there_are_positions(position: str) -> None:
    model = build(position=position, n_layers=1, init_std=0.5)  # one layer: deeper ones see causality itself
    tokens = torch.tensor([[3, 5, 7, 11, 13]])
    shuffled = torch.tensor([[7, 3, 11, 5, 13]])
    same = torch.allclose(model(tokens)[:, -1], model(shuffled)[:, -1], atol=1e-4)
    assert same == (position == "none")


def test_learned_positions_refuse_a_longer_input() -> None:
    model = build(seq_len=8, position="learned")
    assert model(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 29)
    with pytest.raises(ValueError, match="9 tokens exceed the 8 learned positions"):
        model(torch.zeros(1, 9, dtype=torch.long))
    longer = build(seq_len=8, position="learned", max_seq_len=12)
    assert longer(torch.zeros(1, 12, dtype=torch.long)).shape == (1, 12, 29)


@pytest.mark.parametrize("position", ["rope", "sinusoidal", "none"])
@torch.no_grad()
def test_other_positions_extend_beyond_the_training_length(position: str) -> None:
    model, tokens = build(seq_len=8, position=position), torch.randint(29, (1, 20))
    logits = model(tokens)
    torch.testing.assert_close(logits[:, :8], model(tokens[:, :8]))
    torch.testing.assert_close(logits, build(seq_len=20, position=position)(tokens))


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoids_are_those_of_the_paper(width: int) -> None:
    table = sinusoids(5, width, torch.device("cpu"))
    half = math.ceil(width / 2)
    assert table.shape == (5, width)
    for t in range(5):
        for d in range(width):
            angle = t / 10_000 ** (d % half / half)
            assert table[t, d].item() == pytest.approx(
                math.sin(angle) if d < half else math.cos(angle), abs=1e-6
            )


@torch.no_grad()
def test_sinusoids_are_added_to_embeddings_scaled_as_in_the_paper() -> None:
    model, tokens, entering = build(position="sinusoidal"), torch.randint(29, (2, 8)), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    model(tokens)
    expected = 4 * model.tokens(tokens) + sinusoids(8, 16, tokens.device)
    torch.testing.assert_close(entering[0], expected)


# --- attention inside


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_no_token_sees_the_future(position: str) -> None:
    model, tokens = build(position=position, n_kv_heads=1), torch.randint(29, (2, 8))
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 29
    assert torch.equal(model(other)[:, :5], model(tokens)[:, :5])
    assert not torch.equal(model(other)[:, 5:], model(tokens)[:, 5:])
    assert not torch.equal(model(other, causal=False)[:, :5], model(tokens, causal=False)[:, :5])


@torch.no_grad()
def test_a_mask_reaches_every_layer() -> None:
    model, tokens = build(init_std=0.2), torch.randint(29, (1, 8))
    itself = torch.eye(8, dtype=torch.bool)[None]
    logits = model(tokens, attn_mask=itself)
    alone = torch.cat([model(tokens[:, i : i + 1]) for i in range(8)], dim=1)
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_engines_give_one_model() -> None:
    models = {
        kind: build(kind=kind, init_std=0.2, n_heads=4, n_kv_heads=2) for kind in ("mha", "flash", "flex")
    }
    tokens = torch.randint(29, (2, 8))
    expected = models["mha"](tokens)
    for kind in ("flash", "flex"):
        models[kind].load_state_dict(models["mha"].state_dict())
        torch.testing.assert_close(models[kind](tokens), expected, atol=2e-5, rtol=1e-4)
        assert [layer.kind for layer in models[kind].attentions()] == [kind, kind]


def test_dropout_acts_in_training_only() -> None:
    model, tokens = build(dropout=0.5), torch.randint(29, (1, 8))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_layers_know_their_place() -> None:
    assert [layer.shape.layer for layer in build(n_layers=3).attentions()] == [0, 1, 2]
