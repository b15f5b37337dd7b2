"""Weights in: the model of a run, and first weights for a new one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from headwise.config import Config, load
from headwise.errors import HeadwiseError
from headwise.model.convert import from_nanogpt
from headwise.model.decoder import Decoder
from headwise.storage.run_folder import RunFolder
from headwise.training import checkpoint


def load_model(run: str | Path, device: str | torch.device = "cpu") -> tuple[Decoder, Config]:
    """The model of a run at its best checkpoint, or its latest where none is marked, in eval mode.

    Raises:
        HeadwiseError: no run there, or no checkpoint that can be read.
    """
    folder = RunFolder(Path(run))
    if not folder.holds_run():
        raise HeadwiseError(f"{run} is no run folder: it has no config.yaml")
    config = load(folder.config)
    saved = checkpoint.load(find_checkpoint(folder))
    model = Decoder(config.model, config.data.seq_len)
    checkpoint.load_weights(model, saved.model, f"checkpoint of {run}")
    return model.to(device).eval(), config


def find_checkpoint(folder: RunFolder) -> Path:
    """The best checkpoint of a run, or its latest.

    Raises:
        HeadwiseError: it has none.
    """
    path = checkpoint.best(folder.checkpoints)
    path = path if path and path.is_dir() else checkpoint.latest(folder.checkpoints)
    if path is None:
        raise HeadwiseError(f"{folder.path} has no checkpoint yet")
    return path


def initialise_from(source: str, model: Decoder, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Give `model` the weights of `source`, and `optimizer` the state of parameters that still exist.

    Args:
        source: a run folder, a checkpoint folder, a nanoGPT-layout `.pt` file, or
            `hf://owner/name/file`.

    Raises:
        HeadwiseError: it cannot be found or read, or does not fit the model.
    """
    path = _download(source) if source.startswith("hf://") else Path(source)
    slots: dict[str, Tensor] = {}
    if path.is_dir():
        folder = RunFolder(path)
        saved = checkpoint.load(find_checkpoint(folder) if folder.holds_run() else path)
        weights, slots = saved.model, saved.optimizer
    elif path.is_file():
        state, n_heads = _read_pt(path)
        if n_heads not in (None, model.config.n_heads):
            raise HeadwiseError(f"{path} has {n_heads} heads, and model.n_heads is {model.config.n_heads}")
        weights = from_nanogpt(state, model, str(path))
    else:
        raise HeadwiseError(f"--init-from {source!r} is not there: give a run folder or a .pt file")
    checkpoint.load_weights(model, weights, f"--init-from {source}")
    if optimizer is not None:
        if not slots:
            raise HeadwiseError(
                f"training.keep_optimizer is set, but {source} holds no optimizer state; leave it out"
            )
        checkpoint.restore_optimizer(model, optimizer, slots)


def _read_pt(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The tensors of a `.pt` file, and the number of heads where it says; nothing else is unpickled."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        raise HeadwiseError(f"{path} cannot be read as tensors alone: {_first_line(error)}") from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise HeadwiseError(f"{path} holds no model: expected a dictionary of tensors, or one under 'model'")
    about = loaded.get("model_args")
    n_heads = about.get("n_head") if isinstance(about, dict) else None
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}, n_heads


def _download(source: str) -> Path:
    parts = source.removeprefix("hf://").split("/", 2)
    if len(parts) != 3:
        raise HeadwiseError(f"--init-from {source!r} is no hf://owner/name/file")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2]))
    except Exception as error:  # the hub's client raises many kinds
        raise HeadwiseError(f"{source} could not be fetched: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
