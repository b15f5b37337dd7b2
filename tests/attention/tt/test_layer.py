"""Kind `tt`: its projections against the dense matrices that they stand for, and what they start as."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from headwise.attention import KINDS, AttentionConfig, AttentionShape
from headwise.attention.tt import TensorTrainAttention, TensorTrainConfig
from headwise.attention.tt.trains import TensorTrainProjection, layer_sizes
from headwise.config.run import Config, from_dict, load
from headwise.config.training import TrainingConfig
from headwise.errors import HeadwiseError
from headwise.functional.tensor_train import op
from headwise.model.config import ModelConfig
from headwise.model.count import attention_block, forward_flops_by_part, parameters_by_part
from headwise.model.decoder import Decoder
from headwise.model.rope import Rope
from headwise.model.surgery import refuse
from headwise.questions.geometry.projections import read_weights
from headwise.questions.surgery.operate import with_new_head
from headwise.runs.weights import Source, initialise_from
from headwise.training.optim import make_optimizer

COMPUTE = {getattr(torch.ops.headwise_tensor_train, name).default: f for name, f in op.COMPUTE.items()}
SHAPES = {
    "usual": AttentionShape(24, 4, 4, 6),
    "grouped, bias": AttentionShape(24, 6, 2, 8, bias=True),
    "prime width": AttentionShape(13, 3, 1, 4, bias=True),
    "one head": AttentionShape(16, 1, 1, 16),
}
VARIANTS = [*itertools.product((2, 3), ("none", "heads", "qkv"))]


def layer_of(shape: AttentionShape, **options: Any) -> TensorTrainAttention:
    config = TensorTrainConfig(**options)
    config.validate_values()
    return TensorTrainAttention(shape, config).eval()


def dense_twin(layer: TensorTrainAttention, kind: str = "flash") -> Any:
    """The layer of another kind with the matrices of `layer`."""
    twin = KINDS[kind](layer.shape, None).eval().to(next(layer.parameters()).dtype)
    with torch.no_grad():
        for ours, theirs in ((layer.qkv, twin.qkv), (layer.out, twin.out)):
            theirs.weight.copy_(ours.dense())
            if ours.bias is not None:
                torch.nn.init.normal_(ours.bias)
                theirs.bias.copy_(ours.bias)
    return twin


def model_of(kind: str = "tt", seed: int = 0, d_model: int = 32, **options: Any) -> Decoder:
    attention = AttentionConfig(kind=kind, tt=TensorTrainConfig(**options))
    config = ModelConfig(
        d_model=d_model, n_layers=2, n_heads=4, vocab_size=17, mlp="swiglu", attention=attention
    )
    config.validate()
    torch.manual_seed(seed)
    return Decoder(config, 16).eval()


# --- the function


@pytest.mark.parametrize(("n_factors", "share"), VARIANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_dense_layer_with_the_same_matrices(name: str, n_factors: int, share: str) -> None:
    if (name, n_factors, share) == ("prime width", 3, "none"):
        pytest.skip("its keys are too narrow for three factors")
    layer = layer_of(SHAPES[name], rank=3, n_factors=n_factors, share_cores=share).double()
    twin = dense_twin(layer)
    x = torch.randn(2, 7, layer.shape.d_model, dtype=torch.float64)
    rope = Rope(layer.shape.head_dim)
    torch.testing.assert_close(layer(x, rope=rope), twin(x, rope=rope))


@pytest.mark.parametrize("engine", ["flash", "mha"])
def test_scores_and_values_take_the_engine_of_that_kind(engine: str) -> None:
    layer = layer_of(SHAPES["usual"], engine=engine)
    twin = dense_twin(layer, engine)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(layer(x), twin(x))
    assert layer.engine == twin.engine


def test_heads_share_all_cores_but_the_first() -> None:
    layer = layer_of(SHAPES["grouped, bias"], rank=4, share_cores="heads")
    x = torch.randn(1, 3, 24)
    before = layer.heads(x)
    with torch.no_grad():
        layer.qkv.trains[0][0][:, 2] += 1  # head 2's slice of W_Q's first core
    after = layer.heads(x)
    changed = (after[0] - before[0]).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [False, False, True, False, False, False]
    assert torch.equal(after[1], before[1])
    with torch.no_grad():
        layer.qkv.trains[0][1] += 1
    assert ((layer.heads(x)[0] - after[0]).abs().amax((0, 2, 3)) > 0).all()


def test_queries_keys_and_values_share_cores() -> None:
    shape = SHAPES["grouped, bias"]
    apart, shared = (layer_of(shape, rank=4, share_cores=how).qkv for how in ("heads", "qkv"))
    assert [len(qkv.trains) for qkv in (apart, shared)] == [3, 1]
    assert shared.trains[0][0].shape[1] == shape.n_heads + 2 * shape.n_kv_heads
    x = torch.randn(1, 3, 24)
    layer = layer_of(shape, rank=4, share_cores="qkv")
    before = layer.heads(x)
    with torch.no_grad():
        layer.qkv.trains[0][1] += 1
    for old, new in zip(before, layer.heads(x), strict=True):
        assert not torch.allclose(old, new)


def test_autocast_compiled_gives_what_it_gives_otherwise() -> None:
    layer = layer_of(SHAPES["grouped, bias"]).train()
    x = torch.randn(2, 7, 24)
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.float().square().sum().backward()
        found.append([y.float(), *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 0.01 * theirs.norm()


# --- what they start as


@pytest.mark.parametrize(("n_factors", "share"), VARIANTS)
def test_random_cores_give_entries_of_the_models_variance(n_factors: int, share: str) -> None:
    sizes = layer_sizes(AttentionShape(64, 4, 2, 16), TensorTrainConfig(4, n_factors, share_cores=share))
    for matrix in sizes.all():
        projection = TensorTrainProjection([matrix], "random", bias=True)
        drawn = []
        for _ in range(60):
            projection.draw(0.02)
            drawn.append(projection.dense())
        assert torch.stack(drawn).std().item() == pytest.approx(0.02, rel=0.1)
        assert torch.stack(drawn).mean().abs().item() < 1e-3


def test_a_model_draws_its_projections_as_its_matrices() -> None:
    models = [model_of(seed=seed, d_model=64, rank=8) for seed in range(8)]
    for layer, (part, spread) in itertools.product(range(2), (("qkv", 0.02), ("out", 0.01))):
        dense = torch.stack([getattr(model.attentions()[layer], part).dense() for model in models])
        assert dense.std().item() == pytest.approx(spread, rel=0.1)


def test_svd_at_full_rank_is_the_dense_model_of_the_same_seed() -> None:
    ours, theirs = model_of(rank=32, init="svd"), model_of("flash")
    for a, b in zip(ours.attentions(), theirs.attentions(), strict=True):
        torch.testing.assert_close(a.qkv.dense(), b.qkv.weight.detach())
        torch.testing.assert_close(a.out.dense(), b.out.weight.detach())
    tokens = torch.randint(17, (2, 9))
    torch.testing.assert_close(ours(tokens), theirs(tokens))


@pytest.mark.parametrize("init", ["random", "svd"])
def test_one_seed_gives_the_same_model_around_the_attention(init: str) -> None:
    ours, theirs = model_of(rank=4, init=init), model_of("flash")
    for name, parameter in theirs.named_parameters():
        if ".attention." not in name:
            assert torch.equal(ours.get_parameter(name), parameter), name


def test_svd_keeps_the_best_and_balances_the_cores() -> None:
    layer, dense = model_of(rank=8, init="svd").attentions()[0], model_of("flash").attentions()[0]
    sizes = layer.qkv.matrices[0]
    (m1, m2), (n1, n2) = sizes.rows, sizes.columns
    matrix = dense.qkv.weight.detach()[: sizes.out_features]
    pairs = matrix.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
    least = torch.linalg.svdvals(pairs)[8:].norm()
    error = (layer.qkv.dense()[: sizes.out_features] - matrix).norm()
    torch.testing.assert_close(error, least, rtol=1e-3, atol=0)  # Eckart and Young
    spread = [core.square().mean().item() for core in layer.qkv.trains[0].parameters()]
    assert spread[0] == pytest.approx(spread[1], rel=1e-4)


# --- memory and counts


class Sizes(TorchDispatchMode):
    """Numbers of every tensor that any operation makes, also inside of the contraction's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COMPUTE:
            with self:
                return COMPUTE[func](*args)
        made = func(*args, **(kwargs or {}))
        self.seen += [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        return made


@pytest.mark.parametrize("share", ["none", "heads", "qkv"])
def test_training_never_makes_a_dense_matrix(share: str) -> None:
    layer = layer_of(AttentionShape(64, 4, 4, 16), rank=2, share_cores=share).train()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    kept: list[Tensor] = []
    with (
        Sizes() as sizes,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        layer(torch.randn(1, 8, 64)).sum().backward()
        optimizer.step()
    assert max(sizes.seen) < 64 * 64
    assert max(t.numel() for t in kept) <= 8 * 3 * 64  # nothing larger than q, k and v together


def test_the_projections_keep_one_copy_of_x_under_autocast() -> None:
    layer = layer_of(AttentionShape(64, 4, 4, 16), rank=2).train()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer.qkv(torch.randn(1, 40, 64))
    cores = sum(core.numel() for core in layer.qkv.parameters())
    assert sum(t.numel() for t in kept.values()) == 40 * 64 + cores


def test_parameters_by_hand_and_as_they_are_told() -> None:
    attention = AttentionConfig(kind="tt", tt=TensorTrainConfig(rank=16))
    config = ModelConfig(d_model=768, n_layers=1, n_heads=12, vocab_size=11, attention=attention)
    config.validate()
    with torch.device("meta"):
        model = Decoder(config)
    assert parameters_by_part(model)["attention"] == 4 * 2 * 24 * 32 * 16
    assert attention_block(config) == "98,304 parameters, dense would be 2,359,296"
    assert attention_block(replace(config, attention=AttentionConfig())) == "2,359,296 parameters"
    assert config.least_parameters() == sum(p.numel() for p in model.parameters()) - 3 * 768


@pytest.mark.parametrize(("n_factors", "share"), VARIANTS)
def test_sizes_told_beforehand_are_those_of_the_layer(n_factors: int, share: str) -> None:
    shape, options = SHAPES["grouped, bias"], TensorTrainConfig(3, n_factors, share_cores=share)
    layer = TensorTrainAttention(shape, options)
    cores = sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))
    assert layer.projection_parameters(shape, options) == cores


def test_flops_are_those_of_the_contraction() -> None:
    model = model_of(rank=4)
    rows, columns, ranks = (8, 4), (4, 8), (4,)
    sizes = model.attentions()[0].out.matrices[0]
    assert (set(sizes.rows), set(sizes.columns), sizes.ranks) == (set(rows), set(columns), ranks)
    one = 4 * sizes.rows[0] * sizes.columns[1] * (sizes.columns[0] + sizes.rows[1])
    assert forward_flops_by_part(model, 8)["attention_projections"] == 2 * 2 * 4 * one


def test_flops_of_a_model_as_pytorch_counts_them() -> None:
    model, tokens = model_of(rank=4, engine="mha"), torch.randint(17, (2, 9))
    with FlopCounterMode(display=False, custom_mapping=model.attentions()[0].flop_formulas) as counter:
        model(tokens)
    assert counter.get_total_flops() == tokens.numel() * sum(forward_flops_by_part(model, 9).values())


def test_cores_decay_as_matrices_do() -> None:
    optimizer = make_optimizer(model_of(rank=4), TrainingConfig(max_steps=1, weight_decay=0.1))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    layer = layer_of(SHAPES["usual"])
    assert len(decays) > 8
    cores = [p for group in optimizer.param_groups for p in group["params"] if p.dim() == 4]
    assert len(cores) == 2 * 4 * 2
    assert {decays[id(core)] for core in cores} == {0.1}
    assert layer.lr_multipliers() == {}


# --- what others do with a model


def test_geometry_sees_the_matrices() -> None:
    model = model_of(rank=4)
    weights = read_weights(model).read(1)
    q = torch.from_numpy(weights.q).flatten(0, 1)
    o = torch.from_numpy(weights.o).transpose(0, 1).flatten(1)
    torch.testing.assert_close(q, model.attentions()[1].qkv.dense()[:32], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(o, model.attentions()[1].out.dense(), atol=1e-6, rtol=1e-4)


def test_heads_are_neither_added_nor_taken_out() -> None:
    with pytest.raises(HeadwiseError, match=r"run: no head can be added .* all heads share cores"):
        refuse(model_of().config, "normal", "run")


# --- refusals


@pytest.mark.parametrize(("values", "message"), [
    ({"rank": 0}, "model.attention.tt.rank is 0; it must be at least 1"),
    ({"rank": 65}, "rank is 65, but the matrices of this layer allow at most 64: W_Q is 64 x 64"),
    ({"n_factors": 1}, "n_factors is 1; it must be at least 2"),
    ({"n_factors": 5}, "n_factors is 5; it must be at most 4"),
    ({"init": "svg"}, r"init 'svg' is not known \(did you mean 'svd'"),
    ({"share_cores": "head"}, "share_cores 'head' is not known"),
    ({"engine": "flex"}, "engine 'flex' is not known"),
])  # fmt: skip
def test_refuses_values_by_name(values: dict[str, Any], message: str) -> None:
    keys = {f"model.attention.tt.{name}": value for name, value in values.items()}
    with pytest.raises(HeadwiseError, match=message):
        from_dict(
            {"model.attention.kind": "tt", "model.d_model": 64, "model.n_heads": 4, "training.max_steps": 1}
            | keys
        )


def test_refuses_dimensions_that_have_no_such_factors() -> None:
    with pytest.raises(HeadwiseError, match=r"model.d_model is 7, which is too small for 3 factors"):
        layer_sizes(AttentionShape(7, 2, 2, 8), TensorTrainConfig(n_factors=3))
    with pytest.raises(HeadwiseError, match=r"model.head_dim is 13, which is not a product of 2 factors"):
        layer_sizes(AttentionShape(32, 2, 2, 13), TensorTrainConfig(n_factors=3, share_cores="heads"))


def test_a_place_that_allows_less_takes_its_maximum() -> None:
    sizes = layer_sizes(AttentionShape(64, 8, 1, 8), TensorTrainConfig(rank=32))
    q, k = sizes.qkv[:2]
    assert q.ranks == (32,)
    assert k.ranks == tuple(k.maximal())
    assert k.ranks[0] < 32


def test_the_arrangement_of_factors_is_the_cheapest() -> None:
    q = layer_sizes(AttentionShape(768, 12, 12, 64), TensorTrainConfig(rank=16)).qkv[0]
    assert (q.rows, q.columns) in {((24, 32), (32, 24)), ((32, 24), (24, 32))}
    assert q.parameters == 2 * 24 * 32 * 16
    assert math.prod(q.rows) == 768


def test_a_model_exports_with_its_matrices_written_out(tmp_path: Path) -> None:
    from headwise.model.export import export

    model = model_of(rank=4, share_cores="heads")
    assert export(model, tmp_path / "out", "the run") < 1e-4  # read back by transformers
    weights = load_file(tmp_path / "out" / "model.safetensors")
    dense = model.attentions()[0].qkv.dense()
    torch.testing.assert_close(weights["model.layers.0.self_attn.k_proj.weight"], dense[32:64])


@pytest.mark.parametrize(("source", "target"), [("tt", "flash"), ("flash", "tt")])
def test_weights_of_another_kind_are_refused(source: str, target: str) -> None:
    weights = {name: value.detach() for name, value in model_of(source).named_parameters()}
    with pytest.raises(HeadwiseError, match=r"the run .*attention\.(qkv|out)"):
        initialise_from(Source("the run", weights), model_of(target))


def test_a_head_is_refused_where_the_new_run_is_of_this_kind() -> None:
    before = model_of("flash").config
    after = Config(
        model=replace(before, attention=AttentionConfig("tt")), training=TrainingConfig(max_steps=1)
    )
    with pytest.raises(HeadwiseError, match="run: no head can be added"):
        with_new_head(after, before, "run")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "configs").glob("*.tt*.yaml")), ids=lambda path: path.name
)
def test_presets_are_those_of_flash_with_other_projections(path: Path) -> None:
    ours = load(path)
    theirs = load(path.with_name(f"{path.name.partition('.tt')[0]}.flash.yaml"))
    assert ours.model.attention.kind == "tt"
    assert ours.model.attention.tt.rank in (8, 16, 32)
    assert replace(ours, model=replace(ours.model, attention=theirs.model.attention)) == theirs
