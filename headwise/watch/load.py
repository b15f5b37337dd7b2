"""A model to look at, by folder, name on the Hugging Face hub, or headwise run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise import reading
from headwise.attention.base import Attention
from headwise.data.hub import ask_for
from headwise.errors import HeadwiseError, one_of
from headwise.files import local
from headwise.watch.weight_map import refuse_outside

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, without gradients.

    Attributes:
        name: as it was asked for.
        model: a transformers model, or headwise's own.
        run: `model` as in training, its data included, for a headwise run (a `headwise.config.run.Config`).
        forward: token ids `(B, T)` through every attention layer.
    """

    name: str
    model: nn.Module
    run: Any
    forward: Callable[[Tensor], Any]

    @property
    def vocab_size(self) -> int:
        """Ids the model has an embedding for."""
        if self.run is not None:
            return self.model.tokens.num_embeddings  # type: ignore[union-attr, return-value]
        return self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]

    @property
    def n_layers(self) -> int | None:
        """Attention layers, where the configuration tells."""
        if self.run is not None:
            return sum(isinstance(module, Attention) for module in self.model.modules())
        return getattr(self.model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr, operator]

    @property
    def rotates(self) -> bool:
        """Whether positions enter as a rotation of queries and keys."""
        if self.run is not None:
            return self.model.rope is not None
        names = {type(module).__name__ for module in self.model.modules()}
        return any("Rotary" in name or "Rope" in name for name in names)

    @property
    def longest(self) -> int | None:
        """The longest sequence that learned positions allow; None where there is no such limit."""
        if self.run is not None:
            return self.model.max_seq_len if self.model.positions is not None else None  # type: ignore[return-value]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
        if limit is None:
            return None
        words = self.model.get_input_embeddings()  # type: ignore[operator]
        tables = {
            m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not words
        }
        learned = tables & {limit, limit + 1, limit + 2}  # OPT's and RoBERTa's begin with unused rows
        return limit if learned else None

    def fingerprint(self) -> str:
        """Tells other weights apart: a checksum over the first values of every tensor."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            first = value.flatten()[:16].float().cpu().numpy().tobytes()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + first)
        return digest.hexdigest()[:16]


def is_run(name: str) -> bool:
    """Whether `name` is the folder of a headwise run."""
    return (local(name) / "config.yaml").is_file()


def load(name: str, *, dtype: str = "auto", device: torch.device | str = "cpu") -> Loaded:
    """The model of that name, without the output layer where a checkpoint has one.

    Args:
        name: a folder with config.json and *.safetensors, a name on the hub, or a headwise run.
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        device: where it computes.

    Raises:
        HeadwiseError: nothing of that name, no weights, or an architecture that is not known.
    """
    one_of("dtype", dtype, ("auto", *DTYPES))
    path = local(name)
    if is_run(name):
        from headwise.runs.weights import load_model

        model, config = load_model(path, device)
        if dtype != "auto":
            model = model.to(DTYPES[dtype])
        return Loaded(name, model.requires_grad_(False), config, model.hidden)
    loaded = _pretrained(name, path, dtype).eval().requires_grad_(False).to(device)
    return Loaded(name, loaded, None, lambda ids: loaded(input_ids=ids))


def _pretrained(name: str, path: Path, dtype: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    if path.is_dir():
        _check_folder(path)
    elif path.exists() or name.startswith((".", "/", "~")):
        raise HeadwiseError(f"{name} is no folder with a model; give a folder, a hub name or a headwise run")
    try:
        if not path.is_dir():
            ask_for(name, "config.json")
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "is_encoder_decoder", False):
            raise HeadwiseError(
                f"{name} is an encoder with a decoder, which needs two inputs; use headwise.watch on it"
            )
        config.use_cache = False
        wanted = dtype if dtype == "auto" else DTYPES[dtype]
        model, info = AutoModel.from_pretrained(
            name, config=config, dtype=wanted, use_safetensors=True, output_loading_info=True
        )
    except HeadwiseError:
        raise
    except Exception as error:  # transformers and the hub raise errors of many libraries
        raise HeadwiseError(_why_not_loaded(name, path, error)) from error
    missing = info["missing_keys"]
    if len(missing) > len(model.state_dict()) // 2:
        raise HeadwiseError(
            f"{name} holds weights of another model: {len(missing)} tensors of {type(model).__name__} "
            f"are not in it, {sorted(missing)[0]} for one"
        )
    return model


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise HeadwiseError(f"{path} holds no model: it has neither config.json nor config.yaml")
    reading.read_json(path / "config.json", dict[str, Any])
    if any(path.glob("*.safetensors")):
        refuse_outside(path)
        return
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        raise HeadwiseError(
            f"{path} holds its weights as {pickled[0]}, which would have to be unpickled and could run "
            "anything; convert them to safetensors first"
        )
    raise HeadwiseError(f"{path} holds no weights: no *.safetensors file is there")


def _why_not_loaded(name: str, path: Path, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if path.is_dir():
        return f"{name} could not be loaded ({reason})"
    return (
        f"no folder {name!r} here, and it could not be had from the Hugging Face hub ({reason}); "
        "give a folder, or a hub name while the network is there"
    )
