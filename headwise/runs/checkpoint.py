"""Checkpoints: whole or absent, verified when read, never unpickled.

    step_<n>/model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest holds the format's version, the configuration's shape and each file's SHA-256. The
last k stay and the best; `best.json` names it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import remove_folder, replacing, write_json, writing
from headwise.runs.folder import known_format
from headwise.runs.schemas import Best, CheckpointState, Manifest

FORMAT = 1
FLOATS = ("F64", "F32", "BF16", "F16")
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
        accept = known_format(f"checkpoint {path}", known=FORMAT)
        manifest = reading.read_json(path / "manifest.json", Manifest, accept=accept)
        for name in FILES:
            if _digest(path / name) != manifest["sha256"].get(name):
                raise HeadwiseError(
                    f"checkpoint {path} is damaged: {name} does not match its checksum; "
                    "delete that folder to resume from the one before"
                )
        state = reading.read_json(path / "state.json", CheckpointState)
        _refuse_misfit(path, state)
        return Checkpoint(load_file(path / FILES[0]), load_file(path / FILES[1]), state)
    except reading.Missing as error:
        raise HeadwiseError(
            f"checkpoint {path} is incomplete: {Path(str(error.path)).name} is missing"
        ) from error
    except (reading.Unreadable, SafetensorError, OSError, ValueError) as error:
        reason = error.reason if isinstance(error, reading.Unreadable) else reading.first_line(error)
        name = Path(str(error.path)).name if isinstance(error, reading.Unreadable) else "a file"
        raise HeadwiseError(
            f"checkpoint {path} is damaged ({name}: {reason}); "
            "delete that folder to resume from the one before"
        ) from error


def _refuse_misfit(path: Path, state: dict[str, Any]) -> None:
    """Refuse, by their headers, tensors that are no weights and an optimizer state that is not theirs.

    Such a state is read past its end by the optimizer's kernels, which ends the process.
    """
    weights, _ = reading.read_tensor_headers(path / FILES[0])
    slots, _ = reading.read_tensor_headers(path / FILES[1])
    for name, header in weights.items():
        if header.dtype not in FLOATS:
            raise reading.Unreadable(path / FILES[0], f"{name} is {header.dtype}, and weights are floats")
    owners: dict[str, dict[str, reading.TensorHeader]] = {}
    for key, header in slots.items():
        owners.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = header
    for name, found in owners.items():
        if name not in weights:
            raise reading.Unreadable(path / FILES[1], f"it has a state of {name!r}, which is no parameter")
        expected = {
            "step": reading.TensorHeader("F32", ()),
            "exp_avg": weights[name],
            "exp_avg_sq": weights[name],
        }
        for slot in expected | found:
            if found.get(slot) != expected.get(slot):
                is_now, should_be = _described(found.get(slot)), _described(expected.get(slot))
                raise reading.Unreadable(path / FILES[1], f"{name}.{slot} is {is_now}, expected {should_be}")
    number = path.name.removeprefix("step_")
    if number.isdecimal() and int(number) != state["step"]:
        raise reading.Unreadable(
            path / FILES[2], f"its step is {state['step']}, and the folder is {path.name}"
        )


def _described(header: reading.TensorHeader | None) -> str:
    return "not there" if header is None else f"{header.dtype} {header.shape}"


def weights_digest(path: Path) -> str | None:
    """SHA-256 of a checkpoint's weights, by its manifest; None where there is none to read."""
    try:
        manifest: Manifest = reading.read_json(path / "manifest.json", Manifest)
    except reading.Unreadable:
        return None
    return manifest["sha256"].get(FILES[0])


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step below `folder`, or None."""
    return max(_all(folder), key=_step, default=None)


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, or None where none was marked."""
    try:
        found: Best = reading.read_json(folder / "best.json", Best)
        return folder / found["checkpoint"]
    except reading.Unreadable:
        return None


def mark_best(folder: Path, checkpoint: str, loss: float) -> None:
    """Say that the checkpoint of this name is the best so far."""
    write_json(folder / "best.json", {"checkpoint": checkpoint, "val_loss": loss})


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints and the best; none where best.json is damaged."""
    kept = best(folder)
    if kept is None and os.path.lexists(folder / "best.json"):
        return
    for path in sorted(_all(folder), key=_step)[:-keep]:
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
            if slots["exp_avg"].dtype != parameter.dtype:
                raise HeadwiseError(
                    f"the optimizer state of {name} is {slots['exp_avg'].dtype}, and the parameter "
                    f"{parameter.dtype}; start a new run with --init-from instead"
                )
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
        if not weights[name].is_floating_point():
            raise HeadwiseError(f"{source} holds {name} as {weights[name].dtype}, and weights are floats")
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
    return [path for path in folder.glob("step_*") if path.is_dir() and _is_checkpoint(path)]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _is_checkpoint(path: Path) -> bool:
    number = path.name.removeprefix("step_")
    return number.isascii() and number.isdecimal() and len(number) < 20


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def _digest(path: Path) -> str:
    with reading.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
