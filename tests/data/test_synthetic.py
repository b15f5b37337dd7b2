"""Synthetic tasks: what counts can be known, what does not cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.data import IGNORE, DataConfig, open_data

names = st.sampled_from(["copy", "repeat", "ngram"])


def task(name: str, seed: int = 0, **values: int):
    return open_data(DataConfig(name=name, **values), seed)


@given(name=names, seed=st.integers(0, 2**31), picks=st.lists(st.integers(0, 2**40), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_a_sequence_is_a_pure_function_of_seed_split_and_index(name: str, seed: int, picks: list) -> None:
    data = task(name, seed, seq_len=20)
    together = data.batch("train", np.array(picks))
    for row, pick in enumerate(picks):
        alone = task(name, seed, seq_len=20).batch("train", np.array([pick]))
        assert (alone.inputs[0] == together.inputs[row]).all()
        assert (alone.targets[0] == together.targets[row]).all()


@pytest.mark.parametrize("name", ["copy", "repeat", "ngram"])
def test_seeds_differ_in_training_and_agree_in_validation(name: str) -> None:
    one, other = task(name, 1), task(name, 2)
    some = np.arange(4)
    assert (one.batch("val", some).inputs == other.batch("val", some).inputs).all()
    assert (one.batch("train", some).inputs != other.batch("train", some).inputs).any()
    assert (one.batch("val", some).inputs != one.batch("test", some).inputs).any()
    assert one.identity == other.identity


@pytest.mark.parametrize("seq_len", [2, 3, 20, 128, 1000])
@pytest.mark.parametrize("name", ["copy", "repeat", "ngram"])
def test_targets_that_count_are_the_next_tokens(name: str, seq_len: int) -> None:
    data = task(name, seq_len=seq_len)
    for split in ("train", "val"):
        inputs, targets = data.batch(split, np.arange(8))
        assert inputs.shape == targets.shape == (8, seq_len)
        assert inputs.min() >= 0
        assert inputs.max() < data.vocab_size
        counted = targets[:, :-1] != IGNORE
        assert (targets[:, :-1][counted] == inputs[:, 1:][counted]).all()


@given(seq_len=st.integers(2, 200), index=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_copy_counts_exactly_the_second_payload(seq_len: int, index: int) -> None:
    data = task("copy", seq_len=seq_len)
    inputs, targets = data.batch("train", np.array([index]))
    sequence, separator = inputs[0].tolist(), data.vocab_size - 1
    length = sequence.index(separator)
    assert 1 <= length <= seq_len // 2
    wanted = targets[0].tolist()
    assert wanted[length : 2 * length] == sequence[:length]
    assert wanted[:length] == [IGNORE] * length
    assert wanted[2 * length :] == [IGNORE] * (seq_len - 2 * length)


def test_copy_validates_payloads_of_full_length_and_trains_on_all_lengths() -> None:
    data = task("copy", seq_len=128)
    assert ((data.batch("val", np.arange(50)).targets != IGNORE).sum(1) == 64).all()
    lengths = (data.batch("train", np.arange(3000)).targets != IGNORE).sum(1)
    assert set(lengths.tolist()) == set(range(1, 65))


def test_repeat_is_foretold_by_its_own_past() -> None:
    inputs, targets = task("repeat", seq_len=64).batch("train", np.arange(200))
    for sequence, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        skipped = wanted.count(IGNORE)  # the segment's length - 1: a shift by one
        period = skipped + 1
        assert 2 <= period <= 16
        assert wanted[:skipped] == [IGNORE] * skipped
        assert wanted[skipped:] == sequence[: 64 - skipped]


@pytest.mark.parametrize(("order", "vocab_size"), [(2, 256), (3, 32)])
def test_ngram_follows_its_table_with_the_stated_entropy(order: int, vocab_size: int) -> None:
    data = task("ngram", seq_len=256, vocab_size=vocab_size, ngram_order=order)
    batch = data.batch("val", np.arange(128))
    tokens, wanted = batch.inputs.numpy(), batch.targets.numpy()
    context = tokens[:, order - 2 :]
    if order == 3:
        context = tokens[:, :-1] * vocab_size + tokens[:, 1:]
    wanted = wanted[:, order - 2 :]
    followers = data.followers[context]  # (B, T', branching)
    hits = followers == wanted[..., None]
    assert hits.sum(-1).min() == hits.sum(-1).max() == 1
    shares = hits.mean((0, 1))
    np.testing.assert_allclose(shares, data.probabilities, atol=0.01)
    loss = -np.log(data.probabilities[hits.argmax(-1)]).mean()
    assert loss == pytest.approx(data.entropy_floor, abs=0.02)


def test_copy_tokens_are_evenly_drawn() -> None:
    data = task("copy", seq_len=128)
    payload = data.batch("val", np.arange(128)).inputs[:, :64]
    counts = np.bincount(payload.flatten().numpy(), minlength=256)
    assert counts[255] == 0  # the separator
    expected = payload.numel() / 255
    assert ((counts[:255] - expected) ** 2 / expected).sum() < 340  # chi-squared, p > 1e-3


@pytest.mark.parametrize("name", ["copy", "repeat", "ngram"])
def test_another_length_is_another_task_with_about_as_many_tokens(name: str) -> None:
    data = task(name, seq_len=64)
    longer = data.at_length(1024)
    assert longer.batch("val", np.arange(3)).inputs.shape == (3, 1024)
    assert longer.n_sequences("val") * 1024 == data.n_sequences("val") * 64
    assert longer.identity["checksum"] != data.identity["checksum"]
    assert data.seq_len == 64


def test_parameters_change_the_checksum() -> None:
    checksums = {
        task(name, **values).identity["checksum"]
        for name, values in [
            ("copy", {}),
            ("repeat", {}),
            ("ngram", {}),
            ("ngram", {"ngram_branching": 4}),
            ("copy", {"vocab_size": 128}),
            ("copy", {"seq_len": 64}),
        ]
    }
    assert len(checksums) == 6
