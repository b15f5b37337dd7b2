"""Devices by name. Several processes: tests/cli/test_train.py runs them under torchrun."""

from __future__ import annotations

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.training.distributed import World, find_device


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpu", "'gpu' is not known"), ("", "'' is not known"), ("cuda:99", "absent"), ("meta", "absent")],
)
def test_a_device_that_is_not_here_is_refused(name: str, said: str) -> None:
    with pytest.raises(HeadwiseError, match=said):
        find_device(name)


@pytest.mark.parametrize(("precision", "on"), [("fp32", False), ("auto", False), ("bf16", True)])
def test_autocast_on_a_cpu_is_asked_for(precision: str, on: bool) -> None:
    with World(0, 1, torch.device("cpu")).autocast(precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if on else torch.float32)
