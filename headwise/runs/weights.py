"""Weights in: the model of a run, and first weights for a new one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from headwise.config.run import Config, load
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.convert import from_nanogpt
from headwise.model.decoder import Decoder
from headwise.runs import checkpoint
from headwise.runs.folder import RunFolder

SHARED = ("qkv", "out")
"""The parts of an attention that every kind has."""


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
    least, held = config.model.least_parameters(), sum(tensor.numel() for tensor in saved.model.values())
    if least > held:
        raise HeadwiseError(
            f"{folder.config} makes a model of at least {least:,} parameters, and its checkpoint holds "
            f"{held:,}: they are of two runs"
        )
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


@dataclass(frozen=True)
class Source:
    """Weights to begin with, as found.

    Attributes:
        name: as the user gave it.
        weights: by name; in nanoGPT's names where `nanogpt`.
        optimizer: `<parameter>.<slot>`; empty where there is none.
        config: of the run that the weights are from, where known.
        n_heads: where a nanoGPT file says.
        nanogpt: whether it is a `.pt` file in nanoGPT's layout.
    """

    name: str
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    config: Path | None = None
    n_heads: int | None = None
    nanogpt: bool = False


def read_source(source: str) -> Source:
    """Read a run folder, a checkpoint folder, a nanoGPT-layout `.pt` file, or `hf://owner/name/file`.

    Raises:
        HeadwiseError: it cannot be found or read.
    """
    path = _download(source) if source.startswith("hf://") else Path(source)
    if path.is_dir():
        folder = RunFolder(path)
        at = find_checkpoint(folder) if folder.holds_run() else path
        saved = checkpoint.load(at)
        config = RunFolder(at.absolute().parents[1]).config
        return Source(source, saved.model, saved.optimizer, config if config.is_file() else None)
    if path.is_file():
        state, n_heads = _read_pt(path)
        return Source(source, state, n_heads=n_heads, nanogpt=True)
    raise HeadwiseError(f"{source!r} is not there: give a run folder or a .pt file")


def initialise_from(
    source: str | Source, model: Decoder, optimizer: torch.optim.Optimizer | None = None
) -> list[str]:
    """Give `model` the weights of `source`, and `optimizer` the state of parameters that still exist.

    What the model's kind of attention adds to the projections that all kinds share, and the source has
    not, keeps its own init.

    Args:
        source: as `read_source` takes it, or returned.

    Returns:
        The parameters that kept their own init.

    Raises:
        HeadwiseError: it cannot be found or read, or does not fit the model.
    """
    source = read_source(source) if isinstance(source, str) else source
    weights = from_nanogpt(source.weights, model, source.name) if source.nanogpt else source.weights
    stayed = checkpoint.load_weights(model, weights, source.name, may_lack=own_parameters(model))
    _refuse_other_heads(source, model.config)
    if optimizer is not None:
        refuse_no_optimizer(source)
        checkpoint.restore_optimizer(model, optimizer, source.optimizer)
    return stayed


def own_parameters(model: Decoder) -> list[str]:
    """What the kind of attention has beside the projections that all kinds share."""
    return [
        f"blocks.{layer}.attention.{name}"
        for layer, attention in enumerate(model.attentions())
        for name, _ in attention.named_parameters()
        if name.partition(".")[0] not in SHARED
    ]


def refuse_no_optimizer(source: Source) -> None:
    """Refuse to keep an optimizer's state where there is none.

    Raises:
        HeadwiseError: that is so.
    """
    if not source.optimizer:
        raise HeadwiseError(
            f"training.keep_optimizer is set, but {source.name} holds no optimizer state; leave it out"
        )


def _refuse_other_heads(source: Source, config: ModelConfig) -> None:
    """Refuse heads of another number: their projections can have the same shape."""
    theirs = load(source.config).model if source.config else None
    for key, there, here in (
        ("n_heads", theirs.n_heads if theirs else source.n_heads, config.n_heads),
        ("n_kv_heads", theirs.kv_heads() if theirs else None, config.kv_heads()),
    ):
        if there not in (None, here):
            raise HeadwiseError(f"{source.name} has {there} heads, and model.{key} is {here}")


def _read_pt(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The tensors of a `.pt` file, and the number of heads where it says; nothing else is unpickled."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        raise HeadwiseError(f"{path} cannot be read as tensors alone: {_first_line(error)}") from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise HeadwiseError(f"{path} holds no model: expected a dictionary of tensors, or one under 'model'")
    about = loaded.get("model_args")
    n_heads = about.get("n_head") if isinstance(about, dict) else None
    if n_heads is not None and (type(n_heads) is not int or n_heads < 1):
        raise HeadwiseError(f"{path} says n_head is {n_heads!r}; it must be a whole number of at least 1")
    for name, value in state.items():
        if value.is_sparse or value.numel() > value.untyped_storage().nbytes():
            raise HeadwiseError(
                f"{path} holds {name} as {value.dtype} {tuple(value.shape)}, which is no weight"
            )
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}, n_heads


def _download(source: str) -> Path:
    parts = source.removeprefix("hf://").split("/", 2)
    if len(parts) != 3:
        raise HeadwiseError(f"{source!r} is no hf://owner/name/file")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2]))
    except Exception as error:  # the hub's client raises many kinds
        raise HeadwiseError(f"{source} could not be fetched: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
