"""Where weights are found: a model in memory, a folder of safetensors, the hub, a headwise run.

Tensors are read one at a time, so a checkpoint may be larger than memory. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headwise.errors import HeadwiseError
from headwise.pretrained import no_weights


@dataclass(frozen=True)
class Tensors:
    """Named tensors of one model, read one at a time, with its configuration."""

    name: str
    names: list[str]
    get: Callable[[str], Tensor]
    config: dict[str, Any]


def find(model: str | Path, *, with_code: bool = False) -> Path | nn.Module:
    """A checkpoint folder, downloaded if `model` is a name on the hub; or the model of a headwise run.

    Args:
        with_code: download Python files too.

    Raises:
        HeadwiseError: there is nothing of that name, here or on the hub.
    """
    path = Path(model).expanduser()
    if (path / "config.yaml").is_file():
        from headwise.runs.weights import load_model

        return load_model(path)[0]
    if path.exists():
        return path
    return _download(str(model), with_code)


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
        raise no_weights(folder)
    home: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                home |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise HeadwiseError(f"{file} is damaged ({error}); download or export it again") from error

    def get(name: str) -> Tensor:
        with safe_open(home[name], framework="pt") as opened:
            return opened.get_tensor(name)

    return Tensors(str(folder), list(home), get, _config(folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HeadwiseError(f"{folder} has no config.json, which says how many heads the model has") from None
    except (OSError, ValueError) as error:
        raise HeadwiseError(f"{path} is not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise HeadwiseError(f"{path} holds a {type(config).__name__}, not a model's configuration")
    return config


def _download(name: str, with_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", *(["*.py"] if with_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except HFValidationError as error:
        raise HeadwiseError(f"no folder {name!r}, and it is not a name on the hub (owner/name)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HeadwiseError(
            f"no folder {name!r}, and it could not be had from the Hugging Face hub ({reason})"
        ) from error
