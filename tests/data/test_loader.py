"""The loader: workers, ranks, accumulation and resuming change nothing about what is seen."""

from __future__ import annotations

import multiprocessing
import os
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.data import DataConfig, eval_batches, open_data, train_loader
from headwise.data.base import Data


@pytest.fixture(params=["pystdlib", "copy"])
def data(request: pytest.FixtureRequest) -> Data:
    return open_data(DataConfig(name=request.param, seq_len=32), seed=3)


def rows(batches: list) -> torch.Tensor:
    return torch.cat([torch.cat(tuple(batch), dim=1) for batch in batches])


def test_workers_change_nothing(data: Data) -> None:
    plain = list(islice(train_loader(data, 8, 2), 12))
    loader = train_loader(data, 8, 2, num_workers=2)
    assert (rows(plain) == rows(list(islice(loader, 12)))).all()
    loader.close()
    assert not multiprocessing.active_children()


def test_ctrl_c_leaves_the_workers_to_the_trainer(data: Data) -> None:
    loader = train_loader(data, 8, 8, num_workers=1)
    next(loader)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(islice(loader, 12))) == 12
    assert worker.is_alive()
    loader.close()


def test_resuming_continues_the_order(data: Data) -> None:
    whole = list(islice(train_loader(data, 8, 4), 20))
    resumed = list(islice(train_loader(data, 8, 4, start_step=3), 14))
    assert (rows(whole[6:]) == rows(resumed)).all()


@given(world_size=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]), step=st.integers(0, 400))
@settings(max_examples=20, deadline=None)
def test_ranks_partition_the_global_batch(world_size: int, micro: int, step: int) -> None:
    data = open_data(DataConfig(name="ngram", seq_len=8), seed=0)
    whole = next(train_loader(data, 16, 16, start_step=step))
    parts = []
    for rank in range(world_size):
        loader = train_loader(data, 16, micro, start_step=step, rank=rank, world_size=world_size)
        parts += islice(loader, 16 // world_size // micro)
    assert (rows(parts) == rows([whole])).all()


def test_sizes_that_do_not_divide_are_refused(data: Data) -> None:
    with pytest.raises(ValueError, match="batch_sequences=6 is not a multiple"):
        train_loader(data, 6, 2, world_size=2)


def test_no_random_state_is_touched(data: Data) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = train_loader(data, 4, 4, num_workers=1)
    next(loader)
    loader.close()
    next(train_loader(data, 4, 4))
    assert (torch.get_rng_state() == before[0]).all()
    assert (np.random.get_state()[1] == before[1]).all()


def test_evaluation_is_shared_among_ranks_and_deterministic(data: Data) -> None:
    whole = rows(list(eval_batches(data, "val", 64)))
    assert (whole == rows(list(eval_batches(data, "val", 7)))).all()
    parts = [rows(list(eval_batches(data, "val", 16, rank=rank, world_size=3))) for rank in range(3)]
    assert sum(len(part) for part in parts) == len(whole)
    for rank, part in enumerate(parts):
        assert (part == whole[rank::3]).all()


@given(fraction=st.floats(0.001, 1.0))
@settings(max_examples=30, deadline=None)
def test_a_share_is_evenly_spread(fraction: float) -> None:
    data = open_data(DataConfig(name="repeat", seq_len=8), seed=0)
    total = data.n_sequences("val")
    share = rows(list(eval_batches(data, "val", 16, fraction=fraction)))
    assert len(share) == max(1, round(total * fraction))
    assert len(share.unique(dim=0)) == len(share)


def test_a_task_has_no_end_to_evaluate_on() -> None:
    data = open_data(DataConfig(name="copy"), seed=0)
    with pytest.raises(ValueError, match="endless"):
        next(eval_batches(data, "train", 4))


def test_a_batch_counts_its_targets(data: Data) -> None:
    batch = next(train_loader(data, 4, 4))
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.counted == (batch.targets >= 0).sum()
