from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from headwise.attention.config import AttentionConfig
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.questions.intervene.ablate import mean_outputs, remove
from headwise.watch.effect import Speaker, compare, speaker_of
from headwise.watch.hooks import attention_layers
from headwise.watch.load import Loaded
from headwise.watch.removal import removed
from tests.fixtures.samples import Rows

HEADS = ((0, 1), (1, 2), (1, 3))
WIDTH = 8


def output_projections(model: nn.Module, name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Weight `(d_model, H·D)` and bias of every layer's output projection."""
    found = {
        "llama": lambda: [layer.self_attn.o_proj for layer in model.model.layers],
        "gpt_neox": lambda: [layer.attention.dense for layer in model.gpt_neox.layers],
        "phi3": lambda: [layer.self_attn.o_proj for layer in model.model.layers],
        "bert": lambda: [layer.attention.output.dense for layer in model.encoder.layer],
        "gpt2": lambda: [block.attn.c_proj for block in model.transformer.h],
        "headwise": lambda: [block.attention.out for block in model.blocks],
        "selective": lambda: [block.attention.out for block in model.blocks],
    }[name]()
    return [(m.weight.T if name == "gpt2" else m.weight, m.bias) for m in found]


NAMES = ["llama", "gpt2", "gpt_neox", "phi3", "bert", "headwise", "selective"]


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, hf_model: Callable[[str], nn.Module]) -> tuple[str, Speaker]:
    name = request.param
    if name not in ("headwise", "selective"):
        return name, speaker_of(copy.deepcopy(hf_model(name)), name)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64}
    attention = AttentionConfig("selective" if name == "selective" else "mha")
    shape = ModelConfig(**sizes, bias=True, init_std=0.3, attention=attention)  # type: ignore[arg-type]
    model = Decoder(shape).eval().requires_grad_(False)
    return name, Speaker(Loaded("own", model, None, model), True, True)


@torch.no_grad()
def test_zero_equals_zero_columns_of_the_output_projection(case: tuple[str, Speaker], rows: Rows) -> None:
    name, speaks = case
    layers = attention_layers(speaks.loaded.model, speaks, rows.tokens)
    plain = speaks(rows.tokens)
    with removed([(layers[layer], head) for layer, head in HEADS]):
        without = speaks(rows.tokens)
    assert torch.equal(speaks(rows.tokens), plain)
    projections = output_projections(speaks.loaded.model, name)
    for layer, head in HEADS:
        projections[layer][0][:, head * WIDTH : (head + 1) * WIDTH] = 0
    torch.testing.assert_close(without, speaks(rows.tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, plain)


@torch.no_grad()
def test_mean_equals_a_constant_in_place_of_the_head(case: tuple[str, Speaker], rows: Rows) -> None:
    """The head's part of the output projection, fed its mean, is a constant: a change of the bias."""
    name, speaks = case
    layers = attention_layers(speaks.loaded.model, speaks, rows.tokens)
    key = (layers[1], 2)
    means = mean_outputs(speaks, rows, {key}, batch_size=2)
    projections = output_projections(speaks.loaded.model, name)
    seen: list[Tensor] = []
    hook = [m for m in speaks.loaded.model.modules() if getattr(m, "weight", None) is not None]
    inputs = [m for m in hook if m.weight.data_ptr() == projections[1][0].data_ptr()]
    handle = inputs[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    speaks(rows.tokens)
    handle.remove()
    own = slice(2 * WIDTH, 3 * WIDTH)
    expected = seen[0][..., own].mean((0, 1))
    torch.testing.assert_close(means[key].float(), expected, rtol=1e-5, atol=1e-6)
    with removed([key], means):
        without = speaks(rows.tokens)
    weight = projections[1][0]
    constant = weight[:, own] @ expected
    weight[:, own] = 0
    handle = inputs[0].register_forward_hook(lambda m, args, y: y + constant)
    torch.testing.assert_close(without, speaks(rows.tokens), rtol=1e-4, atol=1e-4)
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("how", ["zero", "mean"])
def test_each_set_is_measured_against_the_whole_model(
    hf_model: Callable[[str], nn.Module], rows: Rows, how: str
) -> None:
    speaks = speaker_of(copy.deepcopy(hf_model("llama")), "llama")
    layers = attention_layers(speaks.loaded.model, speaks, rows.tokens)
    heads = [(layers[layer], head) for layer, head in HEADS]
    passes: list[int] = []
    found = remove(speaks, rows, [heads[:1], heads], how=how, batch_size=2, advance=passes.append)
    assert [r.name for r in found] == ["0.1", "0.1 1.2 1.3"]
    assert sum(passes) == 2 * (2 + (how == "mean"))
    means = mean_outputs(speaks, rows, set(heads)) if how == "mean" else None
    with removed(heads, means):
        after = speaks(rows.tokens)
    expected = compare(speaks, rows.tokens, speaks(rows.tokens), after)
    assert found[1].effect.delta_loss == pytest.approx(expected["delta_loss"], abs=1e-4)
    assert found[1].effect.kl == pytest.approx(expected["kl"], rel=1e-3)
    assert found[0].effect.mean("delta_loss") != found[1].effect.mean("delta_loss")
    assert len(found[0].effect.base_loss) == 3


def test_an_unknown_way_is_refused(hf_model: Callable[[str], nn.Module], rows: Rows) -> None:
    speaks = speaker_of(copy.deepcopy(hf_model("llama")), "llama")
    with pytest.raises(HeadwiseError, match=r"how 'maen' is not known.*did you mean 'mean'"):
        remove(speaks, rows, [], how="maen")
