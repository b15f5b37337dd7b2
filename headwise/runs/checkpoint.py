"""Checkpoints: whole or absent, verified when read, never unpickled.

    step_<n>/model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest holds the format's version, the configuration's shape and each file's SHA-256. The
last k stay and the best; `best.json` names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.files import remove_folder, replacing, write_json, writing

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class Checkpoint:
    """What one checkpoint holds.

    Attributes:
        model: parameters by name.
        optimizer: `<parameter>.<slot>` for each slot of AdamW.
        state: plain values: step, totals, telemetry.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step_{step:08d}"


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step_<n>` whole and return it.

    Raises:
        HeadwiseError: the disk is full; what was saved before is kept.
    """
    path = folder / folder_name(checkpoint.state["step"])
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.mkdir()
        _save_tensors(checkpoint.model, draft / "model.safetensors")
        _save_tensors(checkpoint.optimizer, draft / "optimizer.safetensors")
        (draft / "state.json").write_text(json.dumps(checkpoint.state))
        manifest = {"format": FORMAT, "sha256": {file: _digest(draft / file) for file in FILES}}
        (draft / "manifest.json").write_text(json.dumps(manifest))
    return path


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        HeadwiseError: it is missing, truncated, altered, or of a newer format.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] > FORMAT:
            raise HeadwiseError(
                f"checkpoint {path} has format {manifest['format']} and this headwise reads up to {FORMAT}; "
                "upgrade headwise to use it"
            )
        for name in FILES:
            if _digest(path / name) != manifest["sha256"][name]:
                raise HeadwiseError(
                    f"checkpoint {path} is damaged: {name} does not match its checksum; "
                    "delete that folder to resume from the one before"
                )
        model, optimizer = load_file(path / FILES[0]), load_file(path / FILES[1])
        return Checkpoint(model, optimizer, json.loads((path / "state.json").read_text()))
    except FileNotFoundError as error:
        raise HeadwiseError(
            f"checkpoint {path} is incomplete: {Path(error.filename).name} is missing"
        ) from error
    except OSError as error:
        raise HeadwiseError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, SafetensorError) as error:
        raise HeadwiseError(
            f"checkpoint {path} is damaged ({error}); delete that folder to resume from the one before"
        ) from error


def weights_digest(path: Path) -> str | None:
    """SHA-256 of a checkpoint's weights, by its manifest; None where there is none to read."""
    try:
        return str(json.loads((path / "manifest.json").read_text())["sha256"]["model.safetensors"])
    except (OSError, ValueError, TypeError, LookupError):
        return None


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step below `folder`, or None."""
    return max(_all(folder), default=None)


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, or None where none was marked."""
    try:
        return folder / json.loads((folder / "best.json").read_text())["checkpoint"]
    except (OSError, ValueError, TypeError, LookupError):
        return None


def mark_best(folder: Path, checkpoint: str, loss: float) -> None:
    """Say that the checkpoint of this name is the best so far."""
    write_json(folder / "best.json", {"checkpoint": checkpoint, "val_loss": loss})


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints and the best."""
    kept = best(folder)
    for path in sorted(_all(folder))[:-keep]:
        if path != kept:
            remove_folder(path)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]
) -> Iterable[str]:
    """Give the optimizer its state back; returns the names of parameters that had none of their shape."""
    missing = []
    for name, parameter in model.named_parameters():
        slots = {
            key.rpartition(".")[2]: value for key, value in saved.items() if key.rpartition(".")[0] == name
        }
        if slots and slots["exp_avg"].shape == parameter.shape:
            optimizer.state[parameter] = {
                slot: value.to(parameter.device).clone() for slot, value in slots.items()
            }
        else:
            missing.append(name)
    return missing


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str, *, may_lack: Collection[str] = ()
) -> list[str]:
    """Copy `weights` into `model`.

    Args:
        may_lack: parameters that stay as they are where `weights` has none.

    Returns:
        Those that stayed.

    Raises:
        HeadwiseError: names the first parameter that is missing, unknown or of another shape.
    """
    own = dict(model.named_parameters())
    stay = [name for name in own if name not in weights and name in may_lack]
    for name, parameter in own.items():
        if name in stay:
            continue
        if name not in weights:
            raise HeadwiseError(f"{source} is from another configuration: it has no parameter {name}")
        if weights[name].shape != parameter.shape:
            raise HeadwiseError(
                f"{source} is from another configuration: {name} is {tuple(weights[name].shape)} there "
                f"and {tuple(parameter.shape)} here"
            )
    unknown = next((name for name in weights if name not in own), None)
    if unknown:
        raise HeadwiseError(f"{source} is from another configuration: this model has no parameter {unknown}")
    with torch.no_grad():
        for name, parameter in own.items():
            if name not in stay:
                parameter.copy_(weights[name])
    return stay


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step_*") if path.is_dir()] if folder.is_dir() else []


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
