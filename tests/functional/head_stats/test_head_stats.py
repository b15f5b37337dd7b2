"""`head_stats` against the definition in float64, its laws, and the memory it may use."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headwise.bench.head_stats import definition, errors
from headwise.functional import head_stats, weights_stats
from headwise.functional.head_stats.reference import k_eff_by_sorting
from headwise.measures.table import MEASURES

# float32 measures agree with float64 to this, relative to 1 + |value|; k_eff exactly, but for rows
# whose sum meets the mass within 1e-6, which may differ by one.
TOLERANCE = 1e-5


def queries_and_keys(
    tokens: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, width: int = 24, sharp: float = 3.0
) -> tuple[Tensor, Tensor]:
    q = sharp * torch.randn(batch, tokens, heads, width).transpose(1, 2)
    return q, torch.randn(batch, kv_heads, tokens, width)


def holes(*shape: int) -> Tensor:
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -torch.inf)


WAYS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 5},
    "wide window": {"window": 70},
    "full window": {"window": 9, "causal": False},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.05},
    "scales": {"q_scales": [0.0, 0.5, 1.0, -2.0]},
    "mass": {"mass": 0.5},
}


@pytest.mark.parametrize("tokens", [1, 7, 65, 130])
@pytest.mark.parametrize("way", WAYS)
def test_agrees_with_the_definition_in_float64(tokens: int, way: str) -> None:
    torch.manual_seed(tokens)
    q, k = queries_and_keys(tokens)
    found = errors(head_stats(q, k, **WAYS[way]).columns(), definition(q, k, **WAYS[way]))
    assert len(found) == 12
    assert found.pop("k_eff") == 0
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("way", ["causal", "full", "softcap", "window"])
def test_agrees_under_bias_and_padding(batch: int, heads: int, way: str) -> None:
    torch.manual_seed(0)
    q, k = queries_and_keys(67)
    masks = {"bias": holes(batch, heads, 67, 67), "key_mask": torch.rand(2, 67) < 0.7}
    for some in (masks, {"bias": masks["bias"]}, {"key_mask": masks["key_mask"]}):
        found = errors(head_stats(q, k, **some, **WAYS[way]).columns(), definition(q, k, **some, **WAYS[way]))
        assert found.pop("k_eff") == 0
        assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("width", [16, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_measured_in_float32(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = (x.to(dtype) for x in queries_and_keys(50, width=width))
    stats = head_stats(q, k)
    assert stats.entropy.dtype == torch.float32
    found = errors(stats.columns(), definition(q, k))
    assert max(found.values()) <= TOLERANCE, found
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = head_stats(q, k)
    assert torch.equal(again.entropy, stats.entropy)


def test_float64_inputs_are_measured_in_float64() -> None:
    torch.manual_seed(0)
    q, k = (x.double() for x in queries_and_keys(60))
    found = errors(head_stats(q, k, softcap=4.0).columns(), definition(q, k, softcap=4.0))
    assert max(found.values()) <= 1e-12, found


def test_names_are_the_head_tables_columns() -> None:
    q, k = queries_and_keys(5)
    stats = head_stats(q, k)
    assert set(stats.columns()) == {
        name for name, known in MEASURES.items() if known.source in ("weights", "logits", "query")
    }
    assert stats.columns()["entropy"].shape == (2, 4, 5)
    assert head_stats(q, k, k_eff=False).k_eff is None
    assert "k_eff" not in head_stats(q, k, k_eff=False).columns()
    assert head_stats(q, k, q_scales=[1.0, 2.0, 3.0]).k_eff.shape == (3, 2, 4, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.entropy = stats.k_eff


def test_shared_keys_equal_repeated_keys() -> None:
    torch.manual_seed(0)
    q, k = queries_and_keys(40, heads=6, kv_heads=2)
    shared, repeated = head_stats(q, k).columns(), head_stats(q, k.repeat_interleave(3, 1)).columns()
    for name, value in shared.items():
        torch.testing.assert_close(value, repeated[name])


def test_a_query_scale_is_a_scaled_query() -> None:
    torch.manual_seed(0)
    q, k = queries_and_keys(40)
    several, one = head_stats(q, k, q_scales=[0.5, 1.5]).columns(), head_stats(1.5 * q, k).columns()
    for name, value in several.items():
        torch.testing.assert_close(value[1], one[name], rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_has_only_a_norm() -> None:
    torch.manual_seed(0)
    q, k = queries_and_keys(9)
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[0, :3] = False  # the first three queries of the first sequence see nothing
    for name, value in head_stats(q, k, key_mask=key_mask).columns().items():
        blind = torch.zeros_like(value, dtype=torch.bool)
        blind[0, :, :3] = name != "query_norm"
        assert torch.equal(value.isnan(), blind), name


def test_keys_that_are_not_there_weigh_nothing() -> None:
    q, k = queries_and_keys(12)
    stats = head_stats(q, k, window=3)
    assert (stats.previous_weight[..., 0] == 0).all()
    assert (stats.sink_weight[..., 3:] == 0).all()
    assert (stats.sink_weight[..., :3] > 0).all()


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_bias_at_the_lowest_number_hides_like_padding(lowest: float) -> None:
    torch.manual_seed(0)
    q, k = queries_and_keys(33)
    key_mask = torch.rand(2, 33) < 0.5
    bias = torch.zeros(2, 1, 33, 33).masked_fill(~key_mask[:, None, None], lowest)
    masked, biased = head_stats(q, k, key_mask=key_mask).columns(), head_stats(q, k, bias=bias).columns()
    for name, value in masked.items():
        torch.testing.assert_close(value, biased[name], equal_nan=True)


def test_nan_stays_with_the_queries_that_see_it() -> None:
    q, k = queries_and_keys(70)
    k[:, :, 66] = torch.nan
    stats = head_stats(q, k)
    for name, value in stats.columns().items():
        assert torch.isfinite(value[..., :66]).all(), name
        assert name == "query_norm" or value[..., 66:].isnan().all(), name


def test_equal_keys_share_the_weight() -> None:
    stats = head_stats(torch.zeros(1, 1, 200, 8), torch.randn(1, 1, 200, 8))
    visible = torch.arange(1.0, 201.0)
    assert torch.equal(stats.k_eff[0, 0], torch.ceil(visible * 9 / 10))
    torch.testing.assert_close(stats.entropy[0, 0], visible.log())
    torch.testing.assert_close(stats.mean_distance[0, 0], (visible - 1) / 2)


def test_explicit_weights_give_the_measures_of_the_logits_they_came_from() -> None:
    torch.manual_seed(0)
    q, k = queries_and_keys(41, kv_heads=4)
    hidden = torch.ones(41, 41, dtype=torch.bool).triu(1)
    logits = (q @ k.mT * 24**-0.5).masked_fill(hidden, -torch.inf)
    weights = logits.softmax(-1)
    weights[:, :, 5] = 0.0
    explicit, softmax = weights_stats(weights), head_stats(q, k).columns()
    assert explicit.query_norm is None
    assert explicit.logit_mean is None
    for name, value in explicit.columns().items():
        assert value[:, :, 5].isnan().all()
        kept = torch.arange(41) != 5
        torch.testing.assert_close(value[..., kept], softmax[name][..., kept], rtol=1e-4, atol=1e-5)


@st.composite
def heads_and_masks(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict]:
    tokens = draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    sharp = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    q, k = queries_and_keys(tokens, batch=1, heads=kv_heads * group, kv_heads=kv_heads, width=16, sharp=sharp)
    options: dict = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 45))
    if draw(st.booleans()):
        options["key_mask"] = torch.rand(1, tokens) < 0.8
    return q, k, options


@settings(max_examples=60, deadline=None)
@given(heads_and_masks())
def test_laws_of_a_distribution(drawn: tuple[Tensor, Tensor, dict]) -> None:
    q, k, options = drawn
    stats = head_stats(q, k, **options)
    tokens = q.shape[2]
    i, j = torch.arange(tokens).unsqueeze(-1), torch.arange(tokens)
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    seen &= (j <= i) if options["causal"] else True
    seen &= (i - j).abs() < options.get("window", tokens + 1)
    seen = seen & options.get("key_mask", torch.ones(1, tokens, dtype=torch.bool))[:, None, None]
    visible = seen.sum(-1).expand_as(stats.entropy)
    some = visible > 0
    assert torch.equal(stats.entropy.isnan(), ~some)
    n, rounding = visible[some].double(), 1e-5
    entropy, largest, k_eff = (x[some].double() for x in (stats.entropy, stats.max_weight, stats.k_eff))
    assert (entropy >= -rounding).all()
    assert (entropy <= n.log() + rounding).all()
    assert (largest >= 1 / n - rounding).all()
    assert (largest <= 1 + rounding).all()
    assert (k_eff >= 0.9 / largest - rounding).all()
    assert (k_eff <= torch.ceil(0.9 * n)).all()
    total = stats.sink_weight + stats.self_weight + stats.previous_weight
    first = int(options.get("key_mask", torch.ones(1, tokens)).int().argmax())  # the sink, where there is one
    assert (total[..., first + 2 :][some[..., first + 2 :]] <= 1 + rounding).all()
    assert (stats.mean_distance[some] <= tokens - 1 + rounding).all()


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 2**31))
def test_permuting_heads_permutes_results(order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    q, k = queries_and_keys(21, kv_heads=4)
    plain, permuted = head_stats(q, k).columns(), head_stats(q[:, order], k[:, order]).columns()
    for name, value in plain.items():
        torch.testing.assert_close(value[:, order], permuted[name])


@settings(max_examples=25, deadline=None)
@given(heads_and_masks())
def test_scaling_the_query_up_only_sharpens(drawn: tuple[Tensor, Tensor, dict]) -> None:
    q, k, options = drawn
    stats = head_stats(q, k, q_scales=[0.5, 0.75, 1.0, 1.25, 1.5], **options)
    assert not (stats.entropy.diff(dim=0) > 1e-5).any()
    assert not (stats.k_eff.diff(dim=0) > 0).any()
    assert not (stats.max_weight.diff(dim=0) < -1e-5).any()


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize(
    "options", [{}, {"causal": False, "k_eff": False}, {"window": 64, "q_scales": [1.0, 2.0]}]
)
def test_no_tensor_grows_with_the_square_of_the_sequence(options: dict) -> None:
    sizes = {}
    for tokens in (1024, 2048):
        q, k = queries_and_keys(tokens, batch=1, heads=8, kv_heads=8, width=16)
        with LargestTensor() as recorded:
            head_stats(q, k, **options)
        sizes[tokens] = recorded.largest
    assert sizes[2048] <= 2 * sizes[1024]
    assert sizes[2048] <= 2048 * 512
    with LargestTensor() as recorded:  # the record itself can tell
        definition(*queries_and_keys(1024, batch=1, heads=1, kv_heads=1, width=16))
    assert recorded.largest >= 1024**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 8, 16)}, "divisible by key heads.*2, 3, 8, 16"),
        ({"q": torch.zeros(2, 4, 8, 12)}, "agree in B and D"),
        ({"k": torch.zeros(8, 16)}, r"k \(B, K, T, D\)"),
        ({"bias": torch.zeros(1, 1, 8, 9)}, "bias must be"),
        ({"bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, "bias must be a float"),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, "key_mask must be"),
        ({"key_mask": torch.ones(2, 8)}, "key_mask must be bool"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"mass": 1.0}, r"mass must lie in \(0, 1\), got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 8, 16), "k": torch.zeros(2, 2, 8, 16)} | change
    with pytest.raises(ValueError, match=message):
        head_stats(arguments.pop("q"), arguments.pop("k"), **arguments)


def test_weights_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, H, T, T\), got \(1, 2, 3, 4\)"):
        weights_stats(torch.zeros(1, 2, 3, 4))


def test_gradients_are_neither_needed_nor_kept() -> None:
    q, k = queries_and_keys(8)
    stats = head_stats(q.requires_grad_(), k.requires_grad_())
    assert not any(value.requires_grad for value in stats.columns().values())


def test_entropy_of_two_keys_by_hand() -> None:
    stats = head_stats(torch.tensor([[[[0.0], [1.0]]]]), torch.tensor([[[[0.0], [math.log(3)]]]]), scale=1.0)
    assert stats.entropy[0, 0, 1].item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert stats.self_weight[0, 0, 1].item() == pytest.approx(0.75)
    assert stats.sink_weight[0, 0, 1].item() == pytest.approx(0.25)
    assert stats.previous_weight[0, 0, 1].item() == pytest.approx(0.25)
    assert stats.mean_distance[0, 0, 1].item() == pytest.approx(0.25)
    assert stats.k_eff[0, 0].tolist() == [1.0, 2.0]
    assert stats.logit_std[0, 0, 1].item() == pytest.approx(math.log(3) / 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 0.9]), st.floats(-6, 6))
def test_k_eff_of_explicit_weights_is_that_of_a_full_sort(
    tokens: int, seed: int, mass: float, decades: float
) -> None:
    """Of normalised rows, and of rows that sum to something else: then of the row's sum."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, 2, tokens, tokens, generator=generator) ** 8
    weights = weights / weights.sum(-1, keepdim=True)
    for given_weights in (weights, weights * 10.0**decades):
        right, near = k_eff_by_sorting(given_weights, mass)
        found = weights_stats(given_weights, mass=mass).k_eff
        assert ((found - right).abs() <= near.float()).all()


def test_k_eff_of_rows_by_hand() -> None:
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0] = torch.tensor([[0.5, 0.25, 0.2, 0.05], [1, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    assert weights_stats(weights).k_eff[0, 0, :3].tolist() == [3, 1, 2]
    assert weights_stats(weights).k_eff[0, 0, 3].isnan()
    assert k_eff_by_sorting(weights, 0.9)[0][0, 0, :3].tolist() == [3, 1, 2]


@pytest.mark.parametrize("way", ["causal", "softcap", "scales"])
def test_a_sink_takes_its_share_and_no_part_in_the_rest(way: str) -> None:
    torch.manual_seed(0)
    q, k = queries_and_keys(40)
    key_mask = torch.ones(2, 40, dtype=torch.bool)
    key_mask[0, :3] = False  # three queries that see nothing but the sink
    options = WAYS[way] | {"bias": holes(1, 1, 40, 40), "key_mask": key_mask}
    plain = head_stats(q, k, **options).columns()
    for sink in (torch.randn(4), torch.randn(2, 4, 40)):
        found = head_stats(q, k, sink=sink, **options).columns()
        null = found.pop("null_weight")
        exact = definition(q, k, sink=sink, **options)["null_weight"]
        torch.testing.assert_close(null.double(), exact, rtol=TOLERANCE, atol=TOLERANCE)
        assert (null[..., 0, :, :3] == 1).all()
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"sink must be \(H,\) or \(B, H, Tq\), got \(5,\)"):
        head_stats(q, k, sink=torch.zeros(5))


LENGTHS = {
    "after a cache": (5, 40, {}),
    "one token": (1, 40, {}),
    "one token, window at its edge": (1, 9, {"window": 9}),
    "window past a cache": (3, 70, {"window": 8}),
    "window, ahead too": (6, 30, {"window": 8, "causal": False, "offset": 11}),
    "in the middle": (7, 90, {"offset": 20}),
    "before and at the keys": (9, 12, {"offset": -4}),
    "past the keys": (80, 20, {"offset": 3}),
    "past the window": (30, 20, {"offset": 5, "window": 4}),
    "all of another sequence": (70, 13, {"causal": False, "offset": None}),
}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
def test_queries_and_keys_of_different_lengths(case: str, masked: bool) -> None:
    torch.manual_seed(0)
    queries, keys, options = LENGTHS[case]
    q, k = queries_and_keys(queries)[0], queries_and_keys(keys)[1]
    if masked:
        options = options | {"bias": holes(2, 4, queries, keys), "key_mask": torch.rand(2, keys) < 0.8}
        options |= {"sink": torch.randn(4), "softcap": 4.0}
    stats = head_stats(q, k, **options).columns()
    assert ("mean_distance" in stats) == (options.get("offset", 0) is not None)
    found = errors(stats, definition(q, k, **options))
    assert found.pop("k_eff") == 0
    assert max(found.values()) <= TOLERANCE, found


def test_the_last_queries_alone_are_measured_as_among_all() -> None:
    torch.manual_seed(0)
    q, k = queries_and_keys(50)
    documents = torch.arange(50).expand(2, 50) // 17
    whole = head_stats(q, k, documents=documents, window=12).columns()
    for first, last in ((43, 50), (20, 33)):
        part = head_stats(q[:, :, first:last], k, documents=documents, window=12, offset=first).columns()
        for name, value in part.items():
            torch.testing.assert_close(value, whole[name][..., first:last], msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": None}, "take causal=False"),
        ({"offset": None, "causal": False, "window": 3}, "neither window nor documents"),
        ({"documents": torch.zeros(2, 9, dtype=torch.int64), "offset": 6}, "4 queries from 6 on"),
    ],
)
def test_what_positions_need_is_said(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_stats(torch.zeros(2, 4, 4, 8), torch.zeros(2, 2, 9, 8), **options)
