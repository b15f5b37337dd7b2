"""The configuration of a run: typed dataclasses, filled from YAML and dotted overrides.

    headwise train --config configs/exp.copy.mha.yaml --model.attention.kind=flash --seed 1337

Everything is checked before anything starts; a wrong key names the nearest right one.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from headwise.data.config import DataConfig
from headwise.errors import HeadwiseError, did_you_mean
from headwise.model.config import ModelConfig
from headwise.training.config import MeasureConfig, TrainingConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


@dataclass
class Config:
    """One run, complete.

    Attributes:
        model: the decoder and its attention.
        data: what it reads.
        training: how it learns.
        measure: what is recorded of its heads.
        seed: of initialisation, data order and dropout.
        device: cpu, cuda, cuda:1, …, or auto: a GPU where there is one.
        out: the run folder; a new one below `runs/` where not given.
        expected_engine: fail unless this attention engine ran (eager, sdpa, flex); any where not given.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    seed: int = 0
    device: str = "auto"
    out: str | None = None
    expected_engine: str | None = None

    def validate(self) -> None:
        """Refuse what cannot run, whichever section is at fault.

        Raises:
            HeadwiseError: one line with the value received and what to do.
        """
        for section in (self.model, self.data, self.training, self.measure):
            section.validate()
        tokens = self.training.total_batch_tokens
        per_pass = self.data.batch_size * self.data.seq_len
        if tokens is not None and tokens % per_pass:
            raise HeadwiseError(
                f"training.total_batch_tokens is {tokens}, no multiple of the {per_pass} tokens of one pass "
                f"(data.batch_size {self.data.batch_size} x data.seq_len {self.data.seq_len})"
            )
        if self.seed < 0:
            raise HeadwiseError(f"seed is {self.seed}; it must not be negative")


def to_dict(config: Config) -> dict[str, Any]:
    """`config` as nested plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """`config` as YAML that `parse` reads back to the same value."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested dictionary."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


KEYS = [key for key, _ in flatten(to_dict(Config()))]
"""Every dotted key of the configuration."""


def add_arguments(parser: ArgumentParser) -> None:
    """Give a jsonargparse parser `--config` and every key of `Config`."""
    from jsonargparse import ActionConfigFile

    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later flags override it")
    for key in dataclasses.fields(Config):
        default = getattr(Config(), key.name)
        kind = type(default) if dataclasses.is_dataclass(default) else str | None
        parser.add_argument(f"--{key.name}", type=int if key.name == "seed" else kind, default=default)


def make_parser(**kwargs: Any) -> ArgumentParser:
    """A parser of run configurations that raises instead of printing and leaving."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(exit_on_error=False, **kwargs)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Config, Namespace]:
    """Read the command line and the files it names.

    Returns:
        The configuration, validated, and the namespace with the parser's further flags.

    Raises:
        HeadwiseError: one line: the key or value at fault and the nearest right key.
    """
    try:
        namespace = parser.instantiate(parser.parse_args(list(argv)))
    except (argparse.ArgumentError, TypeError, ValueError, yaml.YAMLError) as error:
        raise HeadwiseError(explain(str(error), _flags(parser))) from None
    names = [f.name for f in dataclasses.fields(Config)]
    config = Config(**{name: getattr(namespace, name) for name in names})
    config.validate()
    return config, namespace


def from_dict(values: dict[str, Any]) -> Config:
    """The configuration with the nested (or dotted) `values` over its defaults.

    Raises:
        HeadwiseError: as `parse`.
    """
    import json

    parser = make_parser()
    add_arguments(parser)
    arguments = []
    for key, value in flatten(values):
        if key not in KEYS:
            raise HeadwiseError(f"unknown key {key!r}{did_you_mean(key, KEYS)}")
        if value is not None:
            arguments.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    return parse(parser, arguments)[0]


def load(path: str | Path) -> Config:
    """Read a configuration file.

    Raises:
        HeadwiseError: it is missing, unreadable, or not a configuration.
    """
    parser = make_parser()
    add_arguments(parser)
    return parse(parser, ["--config", str(path)])[0]


def explain(message: str, keys: Sequence[str]) -> str:
    """A parser's message as one line that names the nearest right key."""
    message = " ".join(message.split())
    for pattern in (r"arguments?: --([\w.\-]+)", r"[Oo]ption '([\w.]+)'", r"Key '([\w.]+)'"):
        found = re.search(pattern, message)
        if found:
            group = re.search(r"Group '([\w.]+)'", message)
            key = f"{group[1]}.{found[1]}" if group else found[1]
            return f"unknown key {key!r}{did_you_mean(key, keys)}; `headwise train --help` lists them all"
    found = re.match(r"Parser key \"?([\w.]+)\"?: (.*)", message)
    if found and found[1] == "config":
        return found[2]
    if found:
        return f"{found[1]}: {_expectation(found[2])}"
    return message


def _expectation(message: str) -> str:
    types = re.findall(r"<class '(\w+)'>", message)
    value = re.search(r"(?:Got value|Given value): (.*)$", message)
    if types and value:
        wanted = " or ".join(dict.fromkeys("null" if t == "NoneType" else t for t in types))
        return f"got {value[1].strip()}, expected {wanted}"
    return message


def _flags(parser: ArgumentParser) -> list[str]:
    flags = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    return KEYS + [flag for flag in flags if flag not in KEYS]
