"""From observations to rows of the head table, and the watch of headwise's own models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.attention.observation import Margins, Scores, Unmeasured, Weights
from headwise.errors import HeadwiseError
from headwise.functional.head_stats import head_stats
from headwise.measures.collector import Collector, measure
from headwise.measures.table import MEASURES
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.watch import watch

KEYS = ("sample", "layer", "head", "token")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(n_layers=3, n_heads=4, n_kv_heads=2, d_model=32, vocab_size=50, init_std=0.4)
    return Decoder(config, seq_len=20).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))


def scores(seed: int = 0, batch: int = 2, **options) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(batch, 4, 9, 8, generator=draw), torch.randn(batch, 2, 9, 8, generator=draw)
    return Scores(q, k, 0.5, **options)


def test_scores_before_rotation_replace_q_and_k_and_the_norm_is_always_of_before():
    other = scores(1)
    seen = scores(q_pre=other.q, k_pre=other.k)
    for choice, q, k in (("post_rope", seen.q, seen.k), ("pre_rope", other.q, other.k)):
        got = measure(seen, scores=choice)
        expected = head_stats(q, k, scale=0.5).columns() | {"query_norm": other.q.norm(dim=-1)}
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=name)


def test_only_what_is_asked_for():
    assert set(measure(scores(), measures=["entropy", "k_eff"])) == {"entropy", "k_eff"}
    assert set(measure(scores(), measures=["entropy", "k_eff"], k_eff=False)) == {"entropy"}
    assert set(measure(scores(), measures=["query_norm"])) == {"query_norm"}
    assert measure(Unmeasured("it is linear")) == {}


def test_memory_is_what_a_mask_leaves_of_the_keys_and_is_there_for_kinds_with_one():
    taken = torch.tensor([[[[0.0, 0, 0], [0, 0, 0], [0.25, 7, 0]]]])
    seen = Scores(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0.5, bias=-taken, taken=taken)
    for measures in (["kept_context"], ["kept_context", "entropy"], None):
        got = measure(seen, measures=measures)["kept_context"]
        torch.testing.assert_close(got, torch.tensor([1.0, 2.0, 1.75]).expand(1, 2, 3))
    assert "kept_context" not in measure(seen, measures=["entropy"])
    assert "kept_context" not in measure(scores())


def test_kinds_without_scores_offer_what_they_have():
    weights = torch.rand(1, 2, 5, 5).tril()
    weights /= weights.sum(-1, keepdim=True)
    assert "query_norm" not in measure(Weights(weights, 5))
    assert set(measure(Margins(torch.ones(1, 2, 5)))) == {"margin", "margin_min"}


def test_watching_a_headwise_model(decoder, tokens):
    with torch.no_grad():
        plain = decoder(tokens)
        with watch(decoder, per_token=True, ignore_first=2) as seen:
            assert torch.equal(decoder(tokens), plain)
            decoder(tokens[:1])
    columns = seen.columns()
    assert len(columns["layer"]) == 3 * 3 * 4 * 20
    order = np.lexsort([columns[key] for key in reversed(KEYS)])
    assert (order == np.arange(len(order))).all()
    early = columns["token"] < 2
    assert np.isnan(columns["entropy"][early]).all()
    assert np.isfinite(columns["entropy"][~early]).all()
    assert (columns["max_weight"][columns["token"] == 0] == 1).all()
    np.testing.assert_allclose(
        columns["k_eff"][columns["sample"] == 0], columns["k_eff"][columns["sample"] == 2]
    )
    assert all(layer.observer is None for layer in decoder.attentions())


def test_a_watch_is_taken_off_also_after_an_exception(decoder):
    with watch(decoder):
        assert all(layer.observer is not None for layer in decoder.attentions())
    with pytest.raises(IndexError), watch(decoder):
        decoder(torch.full((1, 4), 50))
    assert all(layer.observer is None for layer in decoder.attentions())


def test_the_table_has_the_head_tables_columns(decoder, tokens):
    import polars

    with torch.no_grad(), watch(decoder, measures=["k_eff", "entropy"]) as seen:
        decoder(tokens)
    table = seen.table()
    assert table.columns == ["run", "step", "sample", "layer", "head", "part", "token", "entropy", "k_eff"]
    assert table.schema["layer"] == polars.Int32
    assert table.schema["entropy"] == polars.Float32
    assert table["token"].is_null().all()
    assert table.height == 12


def test_gradients_are_neither_built_nor_broken(decoder, tokens):
    with watch(decoder) as seen:
        decoder(tokens).sum().backward()
    assert not any(sums.total.requires_grad for sums in seen.collector._sums.values())
    decoder.zero_grad()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3))
def test_means_equal_the_mean_of_the_rows(batches, ignore_first):
    whole = Collector(ignore_first=ignore_first)
    rows = Collector(ignore_first=ignore_first, per_token=True)
    for seed, batch in enumerate(batches):
        padding = torch.ones(batch, 9, dtype=torch.bool)
        padding[0, 5 + seed % 4 :] = False
        for layer in range(2):
            seen = scores(seed + 10 * layer, batch, key_mask=padding)
            whole.add(layer, seen)
            rows.add(layer, seen)
    means, every = whole.columns(), rows.columns()
    for name in set(means) - {"layer", "head"}:
        for n in range(8):
            of_head = (every["layer"] == n // 4) & (every["head"] == n % 4)
            expected = np.nanmean(every[name][of_head].astype(np.float64))
            np.testing.assert_allclose(means[name][n], expected, rtol=1e-5)


def test_a_mean_ignores_margins_that_do_not_exist_but_not_nan():
    collector = Collector()
    collector.add(0, Margins(torch.tensor([[[math.inf, 1.0, 3.0], [math.inf, math.nan, 3.0]]])))
    mean = collector.columns()["margin"]
    assert mean[0] == 2.0
    assert np.isnan(mean[1])


def test_nan_weights_give_nan_measures():
    seen = scores()
    collector = Collector()
    collector.add(0, Scores(seen.q * torch.nan, seen.k, 0.5))
    columns = collector.columns()
    assert all(np.isnan(columns[name]).all() for name in set(columns) - {"layer", "head"})


def test_layers_of_different_kinds_share_one_table():
    collector = Collector()
    collector.add(0, Unmeasured("it has no weights"))
    collector.add(1, scores())
    collector.add(2, Margins(torch.ones(2, 3, 9)))
    columns = collector.columns()
    assert columns["layer"].tolist() == [1] * 4 + [2] * 3
    assert np.isnan(columns["margin"]).tolist() == [True] * 4 + [False] * 3
    assert collector.reasons == {0: "it has no weights"}


def test_errors_name_what_was_received(decoder):
    with pytest.raises(HeadwiseError, match=r"measure 'entrpy' is not known \(did you mean 'entropy'\?\)"):
        next(watch(decoder, measures=["entrpy"]).gen)
    with pytest.raises(HeadwiseError, match=r"scores 'pre' is not known.*pre_rope"):
        next(watch(decoder, scores="pre").gen)
    with (
        pytest.raises(HeadwiseError, match="no head was measured: the model has not run"),
        watch(decoder) as seen,
    ):
        seen.table()
    with pytest.raises(HeadwiseError, match="Linear has no attention to watch"):
        next(watch(torch.nn.Linear(2, 2)).gen)
    assert set(MEASURES) >= {"entropy", "margin"}
