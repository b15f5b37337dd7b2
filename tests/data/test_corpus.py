"""Laws of a corpus: exact evaluation, whole epochs, an order that needs no memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.data import IGNORE, eval_batches
from headwise.data.base import whole_sequences
from headwise.data.config import DataConfig
from headwise.data.corpus import Corpus
from headwise.data.synthetic import CopyTask
from headwise.errors import HeadwiseError


def corpus(rows: int, width: int, seq_len: int, seed: int = 0) -> Corpus:
    """Every token is its own place in the split, so that a test can see where it comes from."""
    tokens = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    return Corpus(
        dict.fromkeys(("train", "val", "test"), tokens),
        seq_len=seq_len,
        seed=seed,
        vocab_size=rows * width,
        identity={"name": "made", "checksum": "0"},
    )


shapes = st.tuples(st.integers(1, 5), st.integers(2, 90), st.integers(2, 40)).filter(
    lambda shape: shape[2] <= shape[1]
)


@given(shape=shapes, batch_size=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_evaluation_predicts_every_token_but_the_first_of_a_row_once(
    shape: tuple[int, int, int], batch_size: int
) -> None:
    rows, width, seq_len = shape
    data = corpus(rows, width, seq_len)
    predicted = []
    for inputs, targets in eval_batches(data, "val", batch_size):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == seq_len
        counted = targets != IGNORE
        assert (inputs[counted] + 1 == targets[counted]).all()
        predicted += targets[counted].tolist()
    every = np.arange(rows * width).reshape(rows, width)[:, 1:].ravel()
    assert sorted(predicted) == every.tolist()


@given(shape=shapes, n=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_whole_sequences_are_those_that_nothing_fills_up(shape: tuple[int, int, int], n: int) -> None:
    rows, width, seq_len = shape
    found = whole_sequences(corpus(rows, width, seq_len), "val", n)
    starts = [row * width + at for row in range(rows) for at in range(0, width - seq_len + 1, seq_len)]
    full = [start for start in starts if start % width < width - 1]  # the last token alone predicts nothing
    assert found.inputs.tolist() == [list(range(start, start + seq_len)) for start in full[:n]]
    assert found.targets.shape == found.inputs.shape


def test_sequences_of_a_task_are_whole_whatever_of_them_counts() -> None:
    data = CopyTask(DataConfig(name="copy", seq_len=8, vocab_size=5), seed=0)
    every = data.batch("val", np.arange(4))
    assert whole_sequences(data, "val", 4).inputs.equal(every.inputs)


@given(shape=shapes, seed=st.integers(0, 99), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_window_once(shape: tuple[int, int, int], seed: int, epoch: int) -> None:
    rows, width, seq_len = shape
    data = corpus(rows, width, seq_len, seed)
    n = data.n_sequences("train")
    indices = data.train_indices(epoch, n)
    assert sorted(indices) == list(range(epoch * n, (epoch + 1) * n))
    inputs, targets = data.batch("train", indices)
    assert inputs.unique().numel() == n * seq_len  # no token twice
    assert (inputs // width == inputs[:, :1] // width).all()  # no window over a row's border
    counted = targets != IGNORE
    assert (inputs[counted] + 1 == targets[counted]).all()
    if width > seq_len:
        assert counted.all()


@given(seed=st.integers(0, 99), step=st.integers(0, 50), n=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_a_step_does_not_depend_on_the_steps_before(seed: int, step: int, n: int) -> None:
    one_by_one = [corpus(1, 200, 16, seed).train_indices(s * 1, 1)[0] for s in range((step + 1) * n)]
    assert corpus(1, 200, 16, seed).train_indices(step, n).tolist() == one_by_one[step * n :]


def test_borders_move_and_order_changes_from_epoch_to_epoch() -> None:
    data = corpus(1, 4000, 16)
    n = data.n_sequences("train")
    starts = [data.batch("train", data.train_indices(epoch, n)).inputs[:, 0] for epoch in range(6)]
    assert len({int(start.min()) for start in starts}) > 3
    assert not (starts[0].argsort() == starts[1].argsort()).all()


def test_seeds_give_other_orders() -> None:
    orders = [corpus(1, 4000, 16, seed).train_indices(0, 50).tolist() for seed in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_at_length_is_the_same_corpus_in_other_windows() -> None:
    data = corpus(1, 1000, 16)
    longer = data.at_length(300)
    assert longer.seq_len == 300
    assert data.seq_len == 16
    assert longer.identity == data.identity
    assert sum(batch.counted for batch in eval_batches(longer, "val", 2)) == 999


@pytest.mark.parametrize("rows", [1, 4])
def test_a_sequence_longer_than_the_data_is_refused(rows: int) -> None:
    with pytest.raises(HeadwiseError, match=r"data\.seq_len=33 is longer than the train split"):
        corpus(rows, 32, 33)


def test_an_index_beyond_the_validation_split_is_refused() -> None:
    with pytest.raises(ValueError, match="val has 2 sequences"):
        corpus(1, 32, 16).batch("val", np.array([2]))
