"""Several processes on one run, as `torchrun` starts them; one process is the same code with a world of 1."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headwise.errors import HeadwiseError


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        rank: 0 writes files.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, text: str | None) -> list[str | None]:
        """What every process says."""
        said: list[str | None] = [text] * self.size
        if self.size > 1:
            dist.all_gather_object(said, text)
        return said

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def autocast(self, precision: str) -> torch.autocast:
        """bf16 where `precision` says so, or says auto on a GPU that has it."""
        auto = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        on = precision == "bf16" or (precision == "auto" and auto)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with its gradients averaged over all processes."""
        if self.size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # torch 2.13 renames the option; 2.11 lacks the new name
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            return nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def find_device(name: str) -> torch.device:
    """The device called `name`: cpu, cuda, cuda:1, mps, or auto.

    Raises:
        HeadwiseError: it is not known, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise HeadwiseError(f"--device {name!r} is not known; use cpu, cuda, cuda:0 or auto") from None
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if (device.index or 0) >= count:
        raise HeadwiseError(
            f"--device {name} is absent: this machine has {count} CUDA devices; use --device cpu"
        )
    return device


def join(device_name: str) -> World:
    """Join the processes that `torchrun` started, or be alone.

    Raises:
        HeadwiseError: the device is absent.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = find_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
        find_device(str(device))
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


def leave() -> None:
    """End what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
