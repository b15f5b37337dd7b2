"""Configurations, models and tokenizers of Hugging Face transformers, loaded without running anything.

A model's folder can name code of its own (`auto_map` in config.json or tokenizer_config.json, a kernel of
the hub as attention). transformers runs it after a question on standard input. Every load of headwise goes
through this module: that code is refused in one sentence before it is fetched, unless it is trusted
explicitly; standard input is never read; weights are never unpickled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headwise import reading
from headwise.errors import HeadwiseError

FLAG = "--trust-remote-code"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CodeRefused(HeadwiseError):
    """The checkpoint cannot be read without code of its own."""


def refused(name: str | Path, what: str) -> CodeRefused:
    """The error for a checkpoint that needs `what`, code of its own."""
    return CodeRefused(
        f"{str(name)!r} needs code of its own ({what}), and headwise does not run code out of a model's "
        f"folder; if you have read and trust it, pass {FLAG} to profile, intervene, show-config or data"
    )


@contextmanager
def guarded(name: str | Path, trust: bool) -> Iterator[None]:
    """Keep transformers from prompting for trust, also for a part of a larger model.

    Raises:
        CodeRefused: transformers wants to run code that is not trusted.
    """
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # its question then is an error at once
    try:
        yield
    except HeadwiseError:
        raise
    except Exception as error:
        if not trust and "trust_remote_code" in str(error):
            raise refused(name, "auto_map in its configuration") from error
        raise
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def load_config(name: str | Path, *, trust: bool = False) -> Any:
    """`AutoConfig.from_pretrained` of a folder or a name on the hub.

    Args:
        trust: run code of the checkpoint where it names some.

    Raises:
        CodeRefused: only code of its own can read it.
        Exception: of many libraries, where there is no configuration.
    """
    from transformers import AutoConfig, PreTrainedConfig

    with guarded(name, trust):
        if not trust:
            written, _ = PreTrainedConfig.get_config_dict(str(name))
            _check_written(name, written)
        return AutoConfig.from_pretrained(str(name), trust_remote_code=trust)


def load_model(kind: str, name: str | Path, config: Any, *, trust: bool = False, **options: Any) -> Any:
    """The model that `kind` (`AutoModel`, `AutoModelForCausalLM`, …) makes of safetensors.

    Args:
        config: what `load_config` returned.
        options: of `from_pretrained`.

    Raises:
        CodeRefused: only code of its own can build it.
        Exception: of many libraries, where it cannot be loaded.
    """
    import transformers

    with guarded(name, trust):
        if not trust and (code := getattr(config, "auto_map", None)):
            mapping = getattr(transformers, kind)._model_mapping
            if type(config) not in mapping and kind in code:
                raise refused(name, f"auto_map: {code[kind]}")
            print(
                f"headwise: {name} brings code of its own ({_first(code)}), which is not run; "
                f"transformers' own {config.model_type} reads it",
                file=sys.stderr,
            )
        return getattr(transformers, kind).from_pretrained(
            str(name), config=config, trust_remote_code=trust, use_safetensors=True, **options
        )


def empty_model(config: Any) -> Any:
    """The model of a configuration without its weights, on the meta device.

    Raises:
        Exception: of many libraries, where transformers has no such model.
    """
    import torch
    from transformers import AutoModel

    with guarded(config.name_or_path, False), torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False)


def load_tokenizer(name: str | Path, *, trust: bool = False, **options: Any) -> Any:
    """`AutoTokenizer.from_pretrained` of a folder or a name on the hub.

    Raises:
        CodeRefused: only code of its own can read it.
        Exception: of many libraries, where there is no tokenizer.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    with guarded(name, trust):
        if not trust and (code := tokenizer_code(get_tokenizer_config(str(name), **options))):
            raise refused(name, code)
        return AutoTokenizer.from_pretrained(str(name), trust_remote_code=trust, **options)


def tokenizer_code(settings: Any) -> str | None:
    """Which code a tokenizer_config.json needs: its auto_map, where transformers lacks its class."""
    code = settings.get("auto_map") if isinstance(settings, dict) else None
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if not code:
        return None
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    own = settings.get("tokenizer_class")
    if isinstance(own, str) and tokenizer_class_from_name(own) is not None:
        return None
    return f"auto_map in tokenizer_config.json: {_first(code)}"


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json in `folder` holds; empty where there is none.

    Raises:
        HeadwiseError: it cannot be read as an object of JSON.
    """
    try:
        settings: dict[str, Any] = reading.read_json(folder / "tokenizer_config.json", dict[str, Any])
    except reading.Missing:
        return {}
    return settings


def no_weights(folder: Path) -> HeadwiseError:
    """The error for a folder without safetensors; names weights that would have to be unpickled."""
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        return HeadwiseError(
            f"{folder} holds its weights as {pickled[0]}, which would have to be unpickled and could run "
            "anything; convert them to safetensors first"
        )
    return HeadwiseError(f"{folder} holds no weights: no *.safetensors file is there")


def _check_written(name: str | Path, written: dict[str, Any]) -> None:
    """Refuse code that a configuration or one inside it needs: a class, or a kernel from the hub."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if (code := written.get("auto_map")) and written.get("model_type") not in CONFIG_MAPPING:
        raise refused(name, f"auto_map in config.json: {_first(code)}")
    for key, value in written.items():
        if "attn_implementation" in key or "experts_implementation" in key:
            for one in value.values() if isinstance(value, dict) else [value]:
                if isinstance(one, str) and "/" in one:
                    raise refused(name, f"{key}: {one}")
        elif isinstance(value, dict):
            _check_written(name, value)


def _first(code: Any) -> str:
    """One of the classes that an auto_map names."""
    values = code.values() if isinstance(code, dict) else code if isinstance(code, list | tuple) else [code]
    return str(next((value for value in values if value), code))
