"""The selective kind: its switches, the identities between them, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.attention import AttentionShape, Carry
from headwise.attention.flash import FlashAttention
from headwise.attention.observation import Observation, Scores
from headwise.attention.selective.config import PenaltyConfig, ProtectionConfig, SelectiveConfig
from headwise.attention.selective.layer import SelectiveAttention
from headwise.config.run import Config, from_dict
from headwise.config.training import TrainingConfig
from headwise.errors import HeadwiseError
from headwise.functional.selective import memory_penalty, selection_mask, selective_attention
from headwise.model.decoder import Decoder
from headwise.model.rope import Rope
from headwise.training.optim import make_optimizer, set_learning_rate

D_MODEL, HEADS, HEAD_DIM, TOKENS = 24, 6, 4, 9

SWITCHES: dict[str, dict[str, Any]] = {
    "head_zero": {},
    "dedicated": {"source": "dedicated"},
    "two masks": {"source": "dedicated", "n_masks": 2, "mask_heads": "one_each"},
    "one mask per head": {"source": "dedicated", "n_masks": 6, "mask_heads": "one_each"},
    "two slices": {"source": "dedicated", "n_masks": 2},
    "linear_combo": {"source": "linear_combo"},
    "linear_combo of two masks": {"source": "linear_combo", "n_masks": 2},
    "linear_combo from head zero and bias": {
        "source": "linear_combo", "combination_init": "head_zero_and_bias",
    },
    "latent": {"source": "latent", "n_masks": 2},
    "latent heads": {"source": "latent", "n_masks": 3, "mask_heads": "one_each", "latent_bias": True},
    "latent ones": {"source": "latent", "n_masks": 4, "latent_init": "ones", "latent_scale": 0.5},
    "latent inverse": {"source": "latent", "n_masks": 4, "latent_init": "inverse"},
    "unprotected": {"protect_bos": False, "protect_self": False},
    "leaky": {"relu_leak": 0.25},
    "relu moved": {"relu_leak": 1.0, "relu_after_cumsum": True},
    "residual": {"residual_logits": True},
    "layernorm": {"source": "dedicated", "n_masks": 2, "mask_layernorm": True},
    "float64": {"accumulate": "float64"},
    "sequential": {"accumulate": "sequential"},
    "penalty": {"memory_penalty": PenaltyConfig(epsilon=0.1)},
    "disabled": {"enabled": False},
    "another layer's": {"layers": [1], "residual_logits": True},
} | {
    f"protection {kind}": {"protection": ProtectionConfig(kind)}
    for kind in (
        "zero", "head_two", "linear_combo", "linear_combo_head_two", "leaky_relu", "big_constant",
    )
}  # fmt: skip

every_switch = pytest.mark.parametrize("switches", list(SWITCHES.values()), ids=list(SWITCHES))


def shape(layer: int = 0, **sizes: Any) -> AttentionShape:
    default = {"d_model": D_MODEL, "n_heads": HEADS, "n_kv_heads": HEADS, "head_dim": HEAD_DIM, "n_layers": 2}
    return AttentionShape(**(default | sizes), layer=layer)


def make(
    seed: int = 0, layer: int = 0, n_kv_heads: int = HEADS, n_layers: int = 2, **switches: Any
) -> SelectiveAttention:
    torch.manual_seed(seed)
    sizes = shape(layer, n_kv_heads=n_kv_heads, n_layers=n_layers)
    return SelectiveAttention(sizes, SelectiveConfig(**switches)).eval()


def inputs(seed: int = 1) -> Tensor:
    return 3 * torch.randn(2, TOKENS, D_MODEL, generator=torch.Generator().manual_seed(seed))


def taken_by(layer: SelectiveAttention, x: Tensor, carry: Carry | None = None) -> Tensor:
    q, k, _ = layer.heads(x)
    return layer.taken(x, q, k, None, carry or Carry())


@every_switch
@pytest.mark.parametrize("n_kv_heads", [HEADS, 2])
def test_every_switch_trains(switches: dict[str, Any], n_kv_heads: int) -> None:
    """Finite outputs, and a gradient at every parameter that the switch does not cut off."""
    layer = make(layer=1, n_kv_heads=n_kv_heads, **switches)
    carry = Carry(logits=taken_by(make(n_kv_heads=n_kv_heads), inputs()).detach())
    y = layer(inputs(), rope=Rope(HEAD_DIM), carry=carry)
    assert y.isfinite().all()
    (y.square().sum() + carry.penalty).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@every_switch
def test_nothing_leaks_from_the_future(switches: dict[str, Any]) -> None:
    if switches.get("mask_layernorm"):
        pytest.skip("it divides by the number of later queries, which is the sequence's length")
    layer, x = make(**switches), inputs()
    other = x.clone()
    other[:, 5] = 9
    with torch.no_grad():
        assert torch.equal(layer(other)[:, :5], layer(x)[:, :5])


def test_switched_off_it_is_flash() -> None:
    layer = make(enabled=False)
    flash = FlashAttention(shape()).eval()
    flash.load_state_dict(layer.state_dict())
    assert torch.equal(layer(inputs()), flash(inputs()))
    assert layer.engine == "sdpa"


def test_a_layer_that_is_not_named_is_flash_and_the_others_select() -> None:
    x = inputs()
    for layer in range(2):
        chosen, everywhere = make(layer=layer, layers=[1]), make(layer=layer)
        flash = FlashAttention(shape(layer)).eval()
        flash.load_state_dict(chosen.state_dict())
        assert torch.equal(chosen(x), everywhere(x) if layer == 1 else flash(x))
        assert chosen.selects == (layer == 1)
    assert not torch.allclose(everywhere(x), flash(x), atol=1e-3)


def test_logits_are_mixed_into_layers_behind_the_first_that_selects() -> None:
    mixed = [
        make(layer=layer, layers=[1, 2], n_layers=4, residual_logits=True).residual for layer in range(4)
    ]
    assert [matrix is not None for matrix in mixed] == [False, False, True, True]


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(HeadwiseError, match=r"layers is \[0, 2\]: the model has layers 0 to 1"):
        SelectiveAttention.check(shape(), SelectiveConfig(layers=[0, 2]))


def test_switched_off_it_trains_nothing_but_flash() -> None:
    layer = make(enabled=False, source="dedicated", protection=ProtectionConfig("linear_combo"))
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in FlashAttention(shape()).named_parameters()}


@every_switch
def test_a_seed_gives_what_it_shares_with_flash_the_same_start(switches: dict[str, Any]) -> None:
    """Or variants of one seed would be no pair."""

    def model(kind: str) -> Decoder:
        keys = {f"model.attention.selective.{name}": value for name, value in switches.items()
                if not isinstance(value, PenaltyConfig | ProtectionConfig)}  # fmt: skip
        if isinstance(protection := switches.get("protection"), ProtectionConfig):
            keys["model.attention.selective.protection.kind"] = protection.kind
        shapes = {"model.d_model": D_MODEL, "model.n_heads": HEADS, "model.vocab_size": 16}
        torch.manual_seed(0)
        config = from_dict({"model.attention.kind": kind, "training.max_steps": 1} | shapes | keys)
        return Decoder(config.model, TOKENS)

    other = dict(model("selective").named_parameters())
    assert all(torch.equal(other[name], value) for name, value in model("flash").named_parameters())


def test_head_zero_is_the_definition() -> None:
    layer, x = make(), inputs()
    q, k, v = layer.heads(x)
    logits = (q[:, :1] @ k[:, :1].transpose(-2, -1) * layer.scale).tril()
    y = selective_attention(q, k, v, selection_mask(logits))
    torch.testing.assert_close(layer(x), layer.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("n_kv_heads", [HEADS, 3, 1])
def test_a_combination_is_the_weighted_sum_of_all_heads_logits(n_kv_heads: int) -> None:
    layer, x = make(n_kv_heads=n_kv_heads, source="linear_combo", n_masks=2), inputs()
    assert layer.combination is not None
    q, k, _ = layer.heads(x)
    every = q @ k.repeat_interleave(HEADS // n_kv_heads, dim=1).transpose(-2, -1) * layer.scale
    expected = torch.einsum("mh,bhij->bmij", layer.combination, every).tril()
    torch.testing.assert_close(layer.selector(x, q, k, None).logits(False), expected)


def test_latent_logits_are_mapped_to_one_logit_per_head() -> None:
    layer, x = make(source="latent", n_masks=2, latent_scale=0.5, latent_bias=True), inputs()
    assert layer.select is not None
    assert layer.combination is not None
    assert layer.combination_bias is not None
    with torch.no_grad():
        layer.combination_bias.uniform_()
    select_q, select_k = layer.select(x).chunk(2, dim=-1)
    q, k = (part.unflatten(-1, (2, HEAD_DIM // 2)).transpose(1, 2) for part in (select_q, select_k))
    latents = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5
    mapped = 0.5 * torch.einsum("hn,bnij->bhij", layer.combination, latents)
    expected = (mapped + layer.combination_bias[:, None, None]).tril()
    own_q, own_k, _ = layer.heads(x)
    torch.testing.assert_close(layer.selector(x, own_q, own_k, None).logits(False), expected)


def test_one_slice_is_a_dedicated_head_and_a_combination_frozen_at_head_zero_is_head_zero() -> None:
    x = inputs()
    sliced = make(source="dedicated", n_masks=1, mask_heads="sliced")
    torch.testing.assert_close(sliced(x), make(source="dedicated", mask_heads="one_each")(x))
    combined = make(source="linear_combo", combination_init="head_zero", combination_lr=0.0)
    torch.testing.assert_close(combined(x), make()(x))


def test_protections_that_change_nothing_and_everything() -> None:
    x = inputs()
    torch.testing.assert_close(make(protection=ProtectionConfig("zero"))(x), make()(x))
    torch.testing.assert_close(make(protection=ProtectionConfig("head_two", scale=0.0))(x), make()(x))
    huge = make(protection=ProtectionConfig("big_constant"))
    torch.testing.assert_close(huge(x), make(enabled=False)(x))
    # another sign of head two would make protected keys weaker than without protection
    protected, plain = taken_by(make(protection=ProtectionConfig("head_two")), x), taken_by(make(), x)
    assert (protected <= plain + 1e-5).all()
    assert (protected < plain - 0.1).any()


@pytest.mark.parametrize("n_kv_heads", [HEADS, 3])
def test_head_two_protects_with_its_own_logits(n_kv_heads: int) -> None:
    layer = make(n_kv_heads=n_kv_heads, protection=ProtectionConfig("head_two", scale=0.5, bias=-0.1))
    q, k, _ = layer.heads(inputs())
    second = k.repeat_interleave(HEADS // n_kv_heads, dim=1)[:, 1:2]
    logits = q[:, 1:2] @ second.transpose(-2, -1) * layer.scale
    protection = layer.protection(layer.selector(inputs(), q, k, None), q, k)
    assert protection is not None
    torch.testing.assert_close(protection.of(logits), (0.5 * logits.relu() - 0.1).relu().tril())


def test_leaky_relu_protects_where_selection_is_negative() -> None:
    layer = make(protection=ProtectionConfig("leaky_relu", alpha=0.2, offset=0.05))
    q, k, _ = layer.heads(inputs())
    selector = layer.selector(inputs(), q, k, None)
    logits, protection = selector.logits(precise=False), layer.protection(selector, q, k)
    assert protection is not None
    torch.testing.assert_close(protection.of(logits), (0.05 - 0.2 * logits).relu().tril())


@pytest.mark.parametrize("switches", [{"source": "latent", "n_masks": 2}, {
    "source": "dedicated", "n_masks": 6, "mask_heads": "one_each",
    "memory_penalty": PenaltyConfig(epsilon=0.2), "protection": ProtectionConfig("leaky_relu"),
}])  # fmt: skip
@pytest.mark.parametrize("n_kv_heads", [HEADS, 3, 1])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_heads_with_masks_of_their_own_may_be_taken_in_groups(
    switches: dict[str, Any], n_kv_heads: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = HEADS // n_kv_heads
    if step % group and group % step:
        pytest.skip("a group would span part of a key/value head")
    layer, x = make(n_kv_heads=n_kv_heads, **switches), inputs()
    found = []
    for heads in (HEADS, step):
        monkeypatch.setattr(SelectiveAttention, "masks_at_once", lambda self, selector, q, n=heads: n)
        carry = Carry()
        y = layer(x, carry=carry)
        gradients = torch.autograd.grad(y.square().sum() + carry.penalty, list(layer.parameters()))
        found.append([y, torch.as_tensor(carry.penalty), *gradients])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_the_previous_layers_logits_are_mixed_in_before_the_mask() -> None:
    x = inputs()
    first, second = (make(layer=index, residual_logits=True) for index in range(2))
    assert first.residual is None
    assert second.residual is not None
    with torch.no_grad():
        second.residual.fill_(0.7)
    carry = Carry()
    first(x, carry=carry)
    before = carry.logits
    assert before is not None
    second(x, carry=carry)
    assert carry.logits is not None
    alone = Carry()
    make(layer=1, residual_logits=True)(x, carry=alone)
    assert alone.logits is not None
    torch.testing.assert_close(carry.logits, alone.logits + 0.7 * before)


def test_layers_hand_their_penalties_to_the_loss() -> None:
    x, carry = inputs(), Carry()
    penalised = make(memory_penalty=PenaltyConfig(epsilon=0.3))
    penalised(x, carry=carry)
    expected = 0.3 / 2 * memory_penalty(taken_by(make(), x))
    torch.testing.assert_close(carry.penalty, expected)
    log = PenaltyConfig(epsilon=0.3, reduce="mean", normalize_layers=False)
    make(memory_penalty=log)(x, carry=carry)
    torch.testing.assert_close(
        carry.penalty, expected + 0.3 * memory_penalty(taken_by(make(), x), reduce="mean")
    )


@pytest.mark.parametrize("masks", [1, 2, 6])
def test_an_observer_sees_the_mask_as_the_bias_it_is(masks: int) -> None:
    layer = make(source="dedicated", n_masks=masks, mask_heads="one_each")
    x, seen = inputs(), list[Observation]()
    layer.observer = seen.append
    y = layer(x)
    (scores,) = seen
    assert isinstance(scores, Scores)
    assert scores.bias is not None
    logits = scores.q @ scores.k.transpose(-2, -1) * scores.scale + scores.bias
    weights = logits.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf).softmax(-1)
    _, _, v = layer.heads(x)
    torch.testing.assert_close(layer.out((weights @ v).transpose(1, 2).flatten(2)), y)
    assert scores.taken is not None
    assert torch.equal(scores.taken, -scores.bias)


def test_selection_parameters_have_their_own_rate_and_do_not_decay() -> None:
    layer = make(source="linear_combo", combination_init="head_zero_and_bias", combination_lr=0.25)
    optimizer = make_optimizer(layer, TrainingConfig(weight_decay=0.5))
    set_learning_rate(optimizer, 1e-2)
    names = {parameter: name for name, parameter in layer.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "qkv.weight": (1e-2, 0.5), "out.weight": (1e-2, 0.5),
        "combination": (2.5e-3, 0.0), "combination_bias": (2.5e-3, 0.0),
    }  # fmt: skip


def test_a_model_starts_its_combinations_as_asked() -> None:
    values = {
        "model.vocab_size": 11, "model.n_heads": 4, "model.attention.kind": "selective",
        "model.attention.selective.source": "linear_combo", "model.attention.selective.n_masks": 2,
        "model.attention.selective.combination_init": "head_zero", "training.max_steps": 1,
    }  # fmt: skip
    model = Decoder(from_dict(values).model)
    for attention in model.attentions():
        assert isinstance(attention, SelectiveAttention)
        assert attention.combination is not None
        assert attention.combination.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"relu_leak": 0.1, "protection.kind": "leaky_relu"}, "attacks of at least 0"),
        ({"source": "dedicated", "n_masks": 3}, "sliced equally"),
        ({"source": "latent", "n_masks": 5}, "sliced equally"),
        ({"mask_layernorm": True}, "remove F of a single mask"),
        ({"n_masks": 2}, "makes one mask"),
        ({"layers": []}, "names no layer"),
        ({"layers": [-1]}, "numbered from 0"),
        ({"layers": [1, 1]}, "names a layer twice"),
        ({"source": "dedicated", "mask_heads": "one_each", "n_masks": 9}, "more than 4 masks"),
        ({"source": "dedicatd"}, "did you mean 'dedicated'"),
        ({"protection.kind": "huge"}, "protection.kind"),
        ({"memory_penalty.epsilon": -1}, "must not be negative"),
        ({"memory_penalty.tau": 0}, "greater than 0"),
    ],
)
def test_meaningless_combinations_are_refused_when_the_configuration_is_read(
    values: dict[str, Any], reason: str
) -> None:
    keys = {f"model.attention.selective.{key}": value for key, value in values.items()}
    with pytest.raises(HeadwiseError, match=reason):
        from_dict({"model.attention.kind": "selective", "training.max_steps": 1} | keys)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (SelectiveConfig(relu_leak=float("nan")), "relu_leak is nan"),
        (SelectiveConfig(combination_lr=float("inf")), "combination_lr is inf"),
        (SelectiveConfig(memory_penalty=PenaltyConfig(0.1, tau=float("inf"))), "memory_penalty.tau is inf"),
        (SelectiveConfig(protection=ProtectionConfig("zero", bias=float("nan"))), "protection.bias is nan"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(config: SelectiveConfig, key: str) -> None:
    with pytest.raises(HeadwiseError, match=key):
        config.validate(n_heads=HEADS, head_dim=HEAD_DIM)


def test_the_command_lines_latents_are_accepted() -> None:
    keys = {"model.attention.selective.source": "latent", "model.attention.selective.n_masks": 2}
    config: Config = from_dict({"model.attention.kind": "selective", "training.max_steps": 1} | keys)
    assert config.model.attention.selective.n_masks == 2
