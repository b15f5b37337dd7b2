"""Memory of a run: batches that shrink, runs that do not fit, and the longest sequence that does."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.config.run import Config, from_dict
from headwise.errors import HeadwiseError
from headwise.runs.read import Run
from headwise.study.fit import Fit, adopted, smaller, train_to_fit
from headwise.study.longest import longest, search_length
from headwise.study.memory_size import parse_size
from headwise.study.plan import PlannedRun, count_parameters
from headwise.training.memory import OutOfMemory, is_out_of_memory, training_peak
from headwise.training.run import train

CPU = torch.device("cpu")
TINY = {
    "model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2, "data.name": "copy", "data.seq_len": 32,
    "data.batch_size": 8, "data.eval_sequences": 4, "model.vocab_size": 256,
    "training.max_steps": 2, "training.eval_every": 0,
    "training.checkpoint_every": 0, "measure.heads": False, "measure.maps": 0, "device": "cpu",
    "training.warmup_steps": 0,
}  # fmt: skip


def config(**more: object) -> Config:
    return from_dict(TINY | more)  # type: ignore[operator]


@settings(max_examples=25)
@given(st.integers(1, 200), st.integers(1, 6))
def test_half_the_batch_keeps_the_tokens_of_a_step(size: int, passes: int) -> None:
    tokens = size * 32 * passes
    one: Config | None = config(**{"data.batch_size": size, "training.total_batch_tokens": tokens})
    sizes = []
    while one is not None:
        one.validate()  # whole passes make a step
        sizes.append(one.data.batch_size)
        assert (one.training.total_batch_tokens or one.data.batch_size * 32) == tokens
        one = smaller(one)
    assert sizes[-1] == 1
    assert all(after <= before // 2 for before, after in itertools.pairwise(sizes))


@given(st.integers(0, 3000), st.integers(1, 70), st.integers(1, 3000))
def test_the_search_finds_the_longest_that_fits(true: int, multiple: int, until: int) -> None:
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= true

    found = longest(fits, multiple, until)
    assert found == min(true, until) // multiple * multiple
    assert len(set(tried)) == len(tried) <= 2 * max(1, until // multiple).bit_length() + 1
    assert all(length % multiple == 0 and length <= until for length in tried)


def test_the_peak_counts_what_two_steps_hold() -> None:
    """Of weights alone: value, gradient and two means, each in float32; and longer sequences hold more."""
    big = config(**{"model.d_model": 256, "data.seq_len": 2, "data.batch_size": 1})
    weights = 4 * 4 * count_parameters(big)
    assert weights <= training_peak(big, CPU) <= 1.35 * weights
    peaks = [training_peak(config(**{"data.seq_len": length}), CPU) for length in (64, 128, 256)]
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.2)
    assert training_peak(config(), CPU) == training_peak(config(), CPU)


def planned(tmp_path: Path, limit: int | None, *, shrink: bool = True) -> PlannedRun:
    one = dataclasses.replace(config(), out=str(tmp_path / "run"))
    return PlannedRun("a", one, None, Fit(shrink, limit))


def peak_at(batch: int) -> int:
    one = config(**{"data.batch_size": batch, "training.total_batch_tokens": 8 * 32})
    return training_peak(one, CPU)


def test_a_run_above_the_limit_goes_on_with_a_smaller_batch_and_learns_the_same(tmp_path: Path) -> None:
    run = planned(tmp_path, (peak_at(4) + peak_at(2)) // 2)
    train_to_fit(run)
    found = Run(run.folder.path)
    assert (found.state, found.config["data"]["batch_size"]) == ("finished", 2)
    fit = json.loads((run.folder.path / "status.json").read_text())["fit"]
    assert fit["wanted"] == 8
    assert [one["batch_size"] for one in fit["tried"]] == [8, 4]
    assert all(one["peak_mb"] > run.fit.limit / 1e6 for one in fit["tried"])
    assert "starting again with data.batch_size=2" in run.folder.log.read_text()
    whole = train(dataclasses.replace(config(), out=str(tmp_path / "whole")))
    assert found.summary["tokens"] == whole["tokens"]
    assert found.summary["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)
    again = adopted(run)
    assert again.config.data.batch_size == 2
    train_to_fit(again)  # finished: nothing is run again


def test_a_run_that_fits_at_no_batch_is_out_of_memory_and_says_what_it_needs(tmp_path: Path) -> None:
    run = planned(tmp_path, 10_000)
    train_to_fit(run)
    found = Run(run.folder.path)
    assert found.state == "out_of_memory"
    assert "MB at data.batch_size=1, and memory_limit is 0.01 MB (tensors: " in found.reason
    assert [one["batch_size"] for one in found.status["fit"]["tried"]] == [8, 4, 2, 1]


def test_without_shrinking_the_first_batch_decides(tmp_path: Path) -> None:
    run = planned(tmp_path, 10_000, shrink=False)
    train_to_fit(run)
    assert [one["batch_size"] for one in Run(run.folder.path).status["fit"]["tried"]] == [8]


def test_the_search_on_a_model_is_bounded_by_its_memory() -> None:
    one = config()
    limit = training_peak(from_dict(TINY | {"data.seq_len": 256, "data.batch_size": 1}), CPU) + 1000
    found = search_length(one, limit, 1024)
    assert found["max_seq_len"] == 256
    assert not found["capped"]
    assert all(row["fits"] == (row["peak_mb"] <= limit / 1e6) for row in found["tried"])
    assert search_length(one, 10**9, 128)["capped"]


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("1.5 MB", 1_500_000), ("100", 100), ("2kb", 2000)]
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_size("memory_limit", text) == size


@pytest.mark.parametrize("text", ["", "24 parsecs", "-1GB", "0", "GiB", "1e9", "9999999999TB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(HeadwiseError, match="give a size of memory, such as 24GiB"):
        parse_size("memory_limit", text)


def test_both_allocators_errors_are_running_out() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, device="cpu")
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(OutOfMemory("x"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
