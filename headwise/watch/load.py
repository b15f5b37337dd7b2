"""A model to look at, by folder, name on the Hugging Face hub, or headwise run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from headwise.model.config import ModelConfig
from headwise.pretrained import load_config, load_model, no_weights
from headwise.watch.weight_map import refuse_outside

VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "use_cache")
"""Of a configuration: where it is from, and what does not change what a head computes."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        """Tells other models apart: a checksum of the configuration and of every byte of every tensor.

        Buffers count, also those that a checkpoint leaves out. Equal models have equal fingerprints on
        every device.
        """
        about = f"{type(self.model).__name__} {self._configuration()}"
        values = dict(self.model.named_buffers()) | self.model.state_dict()
        tensors = sorted((name, v) for name, v in values.items() if isinstance(v, Tensor))
        with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
            digests = pool.map(_digest, [value for _, value in tensors])
            parts = [f"{name} {digest}" for (name, _), digest in zip(tensors, digests, strict=True)]
        return hashlib.sha256("\n".join([about, *parts]).encode()).hexdigest()[:32]

    def _configuration(self) -> str:
        """What decides what the weights compute, as text that does not depend on where they lie."""
        own = self.model.config if self.run is None else self.run.model
        if isinstance(own, ModelConfig):
            settings = dataclasses.asdict(own) | {"attention": own.attention.chosen()}
        else:
            settings = own.to_dict()  # type: ignore[union-attr, operator]
        return json.dumps(_without(settings, VOLATILE), sort_keys=True, default=str)


def is_run(name: str) -> bool:
    """Whether `name` is the folder of a headwise run."""
    return (local(name) / "config.yaml").is_file()


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Loaded:
    """The model of that name, without the output layer where a checkpoint has one.

    Args:
        name: a folder with config.json and *.safetensors, a name on the hub, or a headwise run.
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        device: where it computes.
        trust_remote_code: run code of the checkpoint where it names some.

    Raises:
        HeadwiseError: nothing of that name, no weights, or an architecture that is not known.
    """
    one_of("dtype", dtype, ("auto", *DTYPES))
    path = local(name)
    if is_run(name):
        from headwise.runs.weights import load_model as load_run

        model, config = load_run(path, device)
        if dtype != "auto":
            model = model.to(DTYPES[dtype])
        return Loaded(name, model.requires_grad_(False), config, model.hidden)
    loaded = _pretrained(name, path, dtype, trust_remote_code).eval().requires_grad_(False).to(device)
    return Loaded(name, loaded, None, lambda ids: loaded(input_ids=ids))


def _pretrained(name: str, path: Path, dtype: str, trust: bool) -> nn.Module:
    if path.is_dir():
        _check_folder(path)
    elif path.exists() or name.startswith((".", "/", "~")):
        raise HeadwiseError(f"{name} is no folder with a model; give a folder, a hub name or a headwise run")
    try:
        if not path.is_dir():
            ask_for(name, "config.json")
        source = path if path.is_dir() else name
        config = load_config(source, trust=trust)
        if getattr(config, "is_encoder_decoder", False):
            raise HeadwiseError(
                f"{name} is an encoder with a decoder, which needs two inputs; use headwise.watch on it"
            )
        config.use_cache = False
        wanted = dtype if dtype == "auto" else DTYPES[dtype]
        model, info = load_model(
            "AutoModel", source, config, trust=trust, dtype=wanted, output_loading_info=True
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
    if not any(path.glob("*.safetensors")):
        raise no_weights(path)
    refuse_outside(path)


def _why_not_loaded(name: str, path: Path, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if path.is_dir():
        return f"{name} could not be loaded ({reason})"
    return (
        f"no folder {name!r} here, and it could not be had from the Hugging Face hub ({reason}); "
        "give a folder, or a hub name while the network is there"
    )


def _without(values: Any, names: tuple[str, ...]) -> Any:
    """`values` without the keys `names`, at any depth."""
    if isinstance(values, dict):
        return {str(key): _without(value, names) for key, value in values.items() if key not in names}
    return [_without(value, names) for value in values] if isinstance(values, list | tuple) else values


def _digest(value: Tensor) -> str:
    """A checksum of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
