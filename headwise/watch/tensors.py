"""Where weights are found: a model in memory, a folder of safetensors, the hub, a headwise run.

Tensors are read one at a time, so a checkpoint may be larger than memory. Nothing is unpickled. Which files
belong to a checkpoint is what its index says; LoRA adapters are merged (`headwise/watch/adapters.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headwise import reading
from headwise.data.text import files_checksum
from headwise.errors import HeadwiseError
from headwise.files import local
from headwise.pretrained import no_weights
from headwise.watch.weight_map import refuse_outside

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")


@dataclass(frozen=True)
class Tensors:
    """Named tensors of one model, read one at a time, with its configuration.

    Attributes:
        module: the model in memory that they are of.
        folder: the folder that they lie in.
        notes: what was done to them, for the reader of a number drawn from them.
        left_out: what lies beside them and is not of this model, by name, with the reason.
        unmerged: projections that an adapter changes in a way that is not known, with the reason.
    """

    name: str
    names: list[str]
    get: Callable[[str], Tensor]
    config: dict[str, Any]
    module: nn.Module | None = None
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unmerged: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._known


def find(model: str | Path, *, with_code: bool = False) -> Path | nn.Module:
    """A checkpoint folder, downloaded if `model` is a name on the hub; or the model of a headwise run.

    Args:
        with_code: download Python files too.

    Raises:
        HeadwiseError: there is nothing of that name, here or on the hub.
    """
    path = local(model)
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
    from headwise.watch.adapters import merged_in_memory

    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise HeadwiseError(f"{type(model).__name__} is neither a headwise model nor a transformers model")
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    about = config.to_dict()  # type: ignore[union-attr]
    plain = Tensors(type(model).__name__, list(state), state.__getitem__, about, module=model)
    return merged_in_memory(plain, model)


def tensors_of_folder(folder: Path) -> Tensors:
    """The tensors of the checkpoint in `folder`, its adapters merged.

    Raises:
        HeadwiseError: weights or configuration are missing or damaged, or would have to be unpickled; or an
            adapter whose base is not there or that cannot be merged.
    """
    from headwise.watch.adapters import merged

    if not folder.is_dir():
        raise HeadwiseError(f"{folder} is a file; give the folder that holds config.json and *.safetensors")
    own = any(path.name != ADAPTER for path in folder.glob("*.safetensors"))
    if (folder / ADAPTER_CONFIG).is_file():
        return merged(folder, _plain(folder) if own else None)
    return merged(folder, _plain(folder), beside=False)


def checksum_of(model: str | Path) -> str | None:
    """A checksum of the files of a checkpoint folder: configuration, adapters and every byte of its weights.

    None where `model` is none: a name on the hub, a headwise run.
    """
    folder = local(model)
    if not (folder / "config.json").is_file():
        return None
    used = {*_homes(folder).values(), folder / "config.json"}
    adapters = {folder / name for name in (ADAPTER_CONFIG, ADAPTER)}
    return files_checksum(sorted(used | {path for path in adapters if path.is_file()}))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        HeadwiseError: it is not there, not JSON, or holds something else.
    """
    content: dict[str, Any] = reading.read_json(path, dict[str, Any])
    return content


def names_in(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        HeadwiseError: it is damaged.
    """
    try:
        headers, _ = reading.read_tensor_headers(file)
    except reading.Unreadable as error:
        raise HeadwiseError(f"{file} is damaged ({error.reason}); download or export it again") from error
    return list(headers)


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file.

    Raises:
        HeadwiseError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise HeadwiseError(f"{name} in {file} is damaged ({error}); download it again") from error


def _plain(folder: Path) -> Tensors:
    home = _homes(folder)
    used = set(home.values())
    left_out = {
        file.name: "it is not named by the checkpoint's index"
        if (folder / INDEX).is_file()
        else f"{SINGLE} holds the model"
        for file in sorted(folder.glob("*.safetensors"))
        if file not in used and file.name != ADAPTER
    }
    return Tensors(
        str(folder), list(home), lambda name: read_tensor(home[name], name), _config(folder), folder=folder,
        left_out=left_out,
    )  # fmt: skip


def _homes(folder: Path) -> dict[str, Path]:
    """The file that each tensor of a checkpoint lies in: as its index says, where it has one.

    Raises:
        HeadwiseError: no weights, a file that is missing or damaged, or a tensor in two files.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != ADAPTER]
    if not files and (folder / ADAPTER).is_file():
        raise HeadwiseError(f"{folder} holds an adapter without {ADAPTER_CONFIG}, which names its base")
    if not files:
        raise no_weights(folder)
    refuse_outside(folder)
    if folder / SINGLE in files:
        files = [folder / SINGLE]
    for shard in filter(None, (SHARD.match(file.name) for file in files)):
        for number in range(1, int(shard["count"]) + 1):
            name = f"{shard['stem']}-{number:05}-of-{shard['count']}.safetensors"
            if not (folder / name).is_file():
                raise HeadwiseError(f"{folder} lacks {name}, a shard of its weights; download it again")
    home: dict[str, Path] = {}
    for file in files:
        for name in names_in(file):
            if name in home:
                raise HeadwiseError(
                    f"{folder} has no {INDEX}, and {home[name].name} and {file.name} both hold {name}; "
                    "leave only the files of one model there"
                )
            home[name] = file
    return home


def _indexed(folder: Path) -> dict[str, Path]:
    refuse_outside(folder)
    index = read_object(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise HeadwiseError(f"{folder / INDEX} has no weight_map, which names the file of each tensor")
    held: dict[str, set[str]] = {}
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise HeadwiseError(
                f"{folder / INDEX} places {name} in {file!r}, not a *.safetensors file beside it"
            )
        if file not in held:
            if not (folder / file).is_file():
                raise HeadwiseError(f"{folder} lacks {file}, which its index names; download it again")
            held[file] = set(names_in(folder / file))
        if name not in held[file]:
            raise HeadwiseError(
                f"{folder / file} lacks {name}, which the index places there; download it again"
            )
    return {name: folder / file for name, file in index.items()}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return read_object(path)
    except reading.Missing:
        raise HeadwiseError(f"{folder} has no config.json, which says how many heads the model has") from None


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
