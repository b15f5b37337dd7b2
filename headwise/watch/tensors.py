"""Where weights are found: a model in memory, a folder of safetensors, the hub, a headwise run.

Tensors are read one at a time, so a checkpoint may be larger than memory. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import local
from headwise.watch.weight_map import refuse_outside

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Tensors:
    """Named tensors of one model, read one at a time, with its configuration."""

    name: str
    names: list[str]
    get: Callable[[str], Tensor]
    config: dict[str, Any]


def find(model: str | Path) -> Path | nn.Module:
    """A checkpoint folder, downloaded if `model` is a name on the hub; or the model of a headwise run.

    Raises:
        HeadwiseError: there is nothing of that name, here or on the hub.
    """
    path = local(model)
    if (path / "config.yaml").is_file():
        from headwise.runs.weights import load_model

        return load_model(path)[0]
    if path.exists():
        return path
    return _download(str(model))


def tensors_of_module(model: nn.Module) -> Tensors:
    """The tensors of a transformers model.

    Raises:
        HeadwiseError: it has no configuration that says how many heads it has.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise HeadwiseError(f"{type(model).__name__} is neither a headwise model nor a transformers model")
    state = model.state_dict()
    return Tensors(type(model).__name__, list(state), state.__getitem__, config.to_dict())  # type: ignore[union-attr]


def tensors_of_folder(folder: Path) -> Tensors:
    """The tensors of the safetensors files in `folder`, beside its `config.json`.

    Raises:
        HeadwiseError: weights or configuration are missing or damaged, or would have to be unpickled.
    """
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise HeadwiseError(f"{folder} is a file; give the folder that holds config.json and *.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise HeadwiseError(_no_weights(folder))
    refuse_outside(folder)
    home: dict[str, Path] = {}
    for file in files:
        try:
            headers, _ = reading.read_tensor_headers(file)
            with safe_open(file, framework="pt"):
                home |= dict.fromkeys(headers, file)
        except (reading.Unreadable, SafetensorError, OSError) as error:
            reason = error.reason if isinstance(error, reading.Unreadable) else reading.first_line(error)
            raise HeadwiseError(f"{file} is damaged ({reason}); download or export it again") from error

    def get(name: str) -> Tensor:
        with safe_open(home[name], framework="pt") as opened:
            return opened.get_tensor(name)

    return Tensors(str(folder), list(home), get, _config(folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return reading.read_json(path, dict[str, Any])
    except reading.Missing:
        raise HeadwiseError(f"{folder} has no config.json, which says how many heads the model has") from None


def _no_weights(folder: Path) -> str:
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} holds its weights as {pickled[0]}, which would have to be unpickled and could run "
            "anything; convert them to safetensors first"
        )
    return f"{folder} holds no weights: no *.safetensors file is there"


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "config.json"]))
    except HFValidationError as error:
        raise HeadwiseError(f"no folder {name!r}, and it is not a name on the hub (owner/name)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HeadwiseError(
            f"no folder {name!r}, and it could not be had from the Hugging Face hub ({reason})"
        ) from error
