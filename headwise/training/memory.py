"""Memory of training: its peak over two steps, a limit, and running out of it."""

from __future__ import annotations

import os

import torch
from torch import nn

from headwise.config.run import Config
from headwise.errors import HeadwiseError
from headwise.model.decoder import Decoder
from headwise.training.distributed import World
from headwise.training.loss import TokenLoss
from headwise.training.optim import make_optimizer

MEASURED_BY = {
    "cpu": "tensors: every allocation of PyTorch's CPU allocator, added up by its profiler",
    "cuda": "tensors: the peak of PyTorch's CUDA allocator",
}
"""How the peak of a device's memory is measured; libraries and the CUDA context are not in it."""


class OutOfMemory(HeadwiseError):
    """Training needs more memory than there is.

    Attributes:
        peak_mb: MB in use when it ran out, or that it needs; None where that is not known.
    """

    def __init__(self, message: str, peak_mb: float | None = None) -> None:
        super().__init__(message)
        self.peak_mb = peak_mb


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


BYTES_OF_PARAMETER = 16
"""In training: the value, its gradient and AdamW's two means, each in float32."""


def refuse_too_large(config: Config, world: World) -> None:
    """Refuse, before anything is allocated, a model or a batch that the device cannot hold whatever is done.

    Args:
        config: with its vocabulary.

    Raises:
        OutOfMemory: names the sizes, what they need at least, and what there is.
    """
    model, data = config.model, config.data
    room = memory_of(world.device)
    if (needed := BYTES_OF_PARAMETER * model.least_parameters()) > room:
        raise OutOfMemory(
            f"model.d_model {model.d_model}, model.n_layers {model.n_layers} and model.vocab_size "
            f"{model.vocab_size} need at least {needed / 1e9:,.0f} GB to train, and {world.device} has "
            f"{room / 1e9:,.0f} GB: lower them"
        )
    tokens = max(1, data.batch_size // world.size) * data.seq_len
    if (needed := 4 * tokens * max(model.vocab_size or 0, model.d_model)) > room:
        raise OutOfMemory(
            f"data.batch_size {data.batch_size} x data.seq_len {data.seq_len} tokens and model.vocab_size "
            f"{model.vocab_size} need at least {needed / 1e9:,.0f} GB in one pass, and {world.device} has "
            f"{room / 1e9:,.0f} GB: lower data.batch_size"
        )


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limit_memory(limit: int | None, device: torch.device) -> None:
    """Let PyTorch allocate at most `limit` bytes on a GPU, in this process; nothing on a CPU."""
    if limit is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def training_peak(config: Config, device: torch.device) -> int:
    """Bytes at the peak of two training steps on random tokens: weights, gradients, optimizer, activations.

    The model is made for it and run in eager mode. From the second step on the optimizer's state is there, so
    that further steps have the same peak.

    Args:
        config: with its vocabulary; one pass has `data.batch_size` sequences of `data.seq_len`.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        if device.type == "cuda":
            return _cuda_peak(config, device)
        return _cpu_peak(config, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory on {device} at data.batch_size={config.data.batch_size} and "
            f"data.seq_len={config.data.seq_len}"
        ) from None


def _cuda_peak(config: Config, device: torch.device) -> int:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _two_steps(config, device)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(config: Config, device: torch.device) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write to the terminal
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        _two_steps(config, device)
    now = peak = 0
    results = profile.profiler.kineto_results
    for _, size in sorted(
        ((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"),
        key=lambda event: event[0],
    ):
        now += size
        peak = max(peak, now)
    return peak


def _two_steps(config: Config, device: torch.device) -> None:
    data, vocabulary = config.data, config.model.vocab_size or 256
    model = Decoder(config.model, data.seq_len).to(device)
    optimizer, loss = make_optimizer(model, config.training), TokenLoss(model)
    autocast = World(0, 1, device).autocast(config.training.precision)
    tokens = torch.randint(vocabulary, (data.batch_size, data.seq_len + 1), device=device)
    accumulates = (config.training.total_batch_tokens or 0) > data.batch_size * data.seq_len
    for _ in range(2):
        for _ in range(1 + accumulates):
            with autocast:
                summed, _, penalty = loss(tokens[:, :-1], tokens[:, 1:])
            (summed / tokens[:, 1:].numel() + penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.training.grad_clip or 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
