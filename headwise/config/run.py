"""The configuration of a run: typed dataclasses, filled from YAML and dotted overrides.

    headwise train --config configs/exp.copy.flash.yaml --training.lr=1e-3 --seed 1337

Everything is checked before anything starts; a wrong key names the nearest right one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from headwise import reading
from headwise.attention.kinds import KINDS, LOADED, load_plugins
from headwise.config.training import MeasureConfig, TrainingConfig
from headwise.data.config import DataConfig
from headwise.errors import HeadwiseError, did_you_mean
from headwise.model.config import ModelConfig
from headwise.reading.yaml_values import LONGEST_NUMBER

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
        init_from: first weights: a run folder, a nanoGPT-layout .pt file, or hf://owner/name/file.
        plugins: modules outside of this package whose import registers attention kinds.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    seed: int = 0
    device: str = "auto"
    out: str | None = None
    expected_engine: str | None = None
    init_from: str | None = None
    plugins: list[str] = field(default_factory=list)

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
        entanglement = self.measure.entanglement
        if entanglement.enabled and entanglement.window > self.data.seq_len:
            raise HeadwiseError(
                f"measure.entanglement.window is {entanglement.window} and data.seq_len is "
                f"{self.data.seq_len}; a window lies within a sequence: lower it"
            )
        if not 0 <= self.seed < 2**63:
            raise HeadwiseError(f"seed is {self.seed}; it must be at least 0 and less than 2**63")
        if self.model.position == "learned":
            table = self.model.max_seq_len or self.data.seq_len
            for length in (self.data.seq_len, *self.data.eval_seq_lens):
                if length > table:
                    raise HeadwiseError(
                        f"sequences of {length} tokens exceed the {table} learned positions of the model; "
                        "set model.max_seq_len, or choose another model.position"
                    )


def to_dict(config: Config) -> dict[str, Any]:
    """`config` as nested plain values."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """`config` as YAML that `parse` reads back to the same value.

    Options of kinds that are not chosen are left out where they are the default, so that a run can be read
    where such a kind is not installed.
    """
    values = to_dict(config)
    attention = values["model"]["attention"]
    default = dataclasses.asdict(type(config.model.attention)())
    for kind, options in list(attention.items()):
        if isinstance(options, dict) and kind != config.model.attention.kind and options == default[kind]:
            del attention[kind]
    return reading.to_yaml(values)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested dictionary."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def keys() -> list[str]:
    """Every dotted key of the configuration, the options of every registered kind among them."""
    return [key for key, _ in flatten(to_dict(Config()))]


def type_of(key: str) -> Any:
    """The type of a dotted key of the configuration, as its section annotates it."""
    *sections, name = key.split(".")
    holder: Any = Config()
    for section in sections:
        holder = getattr(holder, section)
    return get_type_hints(type(holder))[name]


def add_arguments(parser: ArgumentParser, argv: Sequence[str] = ()) -> None:
    """Give a jsonargparse parser `--config` and every key of `Config`.

    Args:
        argv: the command line, whose configuration files may name plug-ins that add keys.

    Raises:
        HeadwiseError: a plug-in that cannot be imported.
    """
    from jsonargparse import ActionConfigFile

    for name, value in _flags_of(argv):
        if name == "--config":
            _load_plugins_of(Path(value))
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later flags override it")
    types = get_type_hints(Config)
    for key in dataclasses.fields(Config):
        flags = dict.fromkeys((f"--{key.name}", f"--{key.name.replace('_', '-')}"))
        parser.add_argument(
            *flags, type=types[key.name], default=getattr(Config(), key.name), help=_explanation(key.name)
        )


def _explanation(key: str) -> str | None:
    """What the docstring of `Config` says of a top-level key; a section's is its own docstring."""
    if key in ("model", "data", "training", "measure"):
        return None
    found = re.search(rf"^        {key}: (.+(?:\n         +.+)*)", Config.__doc__ or "", re.MULTILINE)
    return " ".join(found[1].split()) if found else None


def make_parser(**kwargs: Any) -> ArgumentParser:
    """A parser of run configurations that raises instead of printing and leaving."""
    from jsonargparse import ArgumentParser, set_loader

    set_loader(YAML, _load_value, exceptions=(reading.Unreadable,))
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, parser_mode=YAML, **kwargs)


YAML = "headwise"
"""The parser's mode: YAML as `headwise.reading` reads it."""


def _load_value(text: str) -> Any:
    """The value of a flag or a file. `key:` and `{a, b}`, mappings to nothing, are meant as text."""
    value = reading.parse_yaml(text)
    if isinstance(value, dict) and value and all(inner is None for inner in value.values()):
        bare = text.strip(" {}").replace(" ", "").split(",")
        if text.strip() == f"{next(iter(value))}:" or set(bare) == set(value):
            return text
    return value


def _plain_parser() -> ArgumentParser:
    return _parser_with(tuple(KINDS))


@functools.cache  # building one takes longer than parsing with it
def _parser_with(kinds: tuple[str, ...]) -> ArgumentParser:
    parser = make_parser()
    add_arguments(parser)
    return parser


def _flags_of(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every argument with the value it has, if it is a flag: after its `=`, or the argument that follows."""
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        yield name, value if equals else following


def _load_plugins_of(path: Path) -> None:
    """Import the plug-ins that a configuration file names; of a run's own file, which `config.yaml` is, only
    those that are installed."""
    try:
        values = reading.read_yaml(path)
    except reading.Unreadable:
        return  # the parser says what is wrong with it
    named = values.get("plugins") if isinstance(values, dict) else None
    if isinstance(named, list):
        load_plugins(named, recorded_in=str(path) if path.name == "config.yaml" else None)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Config, Namespace]:
    """Read the command line and the files it names.

    Returns:
        The configuration, validated, and the namespace with the parser's further flags.

    Raises:
        HeadwiseError: one line: the key or value at fault and the nearest right key.
    """
    _check_files(list(argv))
    try:
        _refuse_nothing(argv)
        namespace = parser.parse_args(list(argv))
        namespace = parser.instantiate(namespace)
    except (argparse.ArgumentError, TypeError, ValueError, OverflowError, reading.Unreadable) as error:
        raise HeadwiseError(explain(str(error), _flags(parser))) from None
    except RecursionError:
        raise HeadwiseError("a flag is nested too deeply to be read; give plain values") from None
    names = [f.name for f in dataclasses.fields(Config)]
    config = Config(**{name: getattr(namespace, name) for name in names})
    config.plugins = list(dict.fromkeys([*config.plugins, *LOADED]))
    try:
        reading.check(to_dict(config), Config)  # the parser takes null for what is not optional
    except reading.Unreadable as error:
        raise HeadwiseError(error.reason) from None
    config.validate()
    return config, namespace


def _refuse_nothing(arguments: Sequence[str]) -> None:
    """Refuse a value that YAML reads as nothing although something is written: a folder `#x`, or `&x`."""
    for argument in arguments:
        value = argument.partition("=")[2] if argument.startswith("--") else argument
        if value[:1] in ("#", "&") and reading.parse_yaml(value) is None:
            raise HeadwiseError(
                f"{argument!r} reads as nothing, for YAML takes {value[0]} as its own: "
                f"write ./{value} if it is a file or folder"
            )


def _check_files(argv: Sequence[str]) -> None:
    """Read every file that flags name for `--config` or a section, before the parser opens it.

    Raises:
        HeadwiseError: it is not a regular file, too large, or no YAML of keys and values.
    """
    sections = to_dict(Config())
    for flag, value in _flags_of(argv):
        name = flag.removeprefix("--")
        _refuse_no_number(name.replace("-", "_"), value)
        section = sections if name == "config" else _section(sections, name)
        if flag.startswith("--") and section is not None and not value.lstrip().startswith("{"):
            _check_file(Path(value), section, f"--{name}", "" if name == "config" else f"{name}.")


def _refuse_no_number(key: str, value: Any) -> None:
    """Refuse text that the parser would read as YAML of its own for a number: 1:30 is 90 there.

    Raises:
        HeadwiseError: names the key.
    """
    if isinstance(value, str) and key in _numeric_keys() and (":" in value or len(value) > LONGEST_NUMBER):
        shown = value if len(value) <= LONGEST_NUMBER else f"{value[:20]}… ({len(value)} characters)"
        raise HeadwiseError(f"{key}: got {shown}, expected a number")


@functools.cache
def _numeric_keys() -> frozenset[str]:
    """Dotted keys of `Config` that hold a number."""

    def of(kind: Any, prefix: str) -> Iterator[str]:
        for name, hint in get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                yield from of(hint, f"{prefix}{name}.")
            elif {int, float} & {hint, *get_args(hint)}:
                yield f"{prefix}{name}"

    return frozenset(of(Config, ""))


def _section(sections: dict[str, Any], name: str) -> dict[str, Any] | None:
    found: Any = sections
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _check_file(path: Path, section: dict[str, Any], flag: str, prefix: str) -> None:
    try:
        values = reading.read_yaml(path)
    except reading.Missing:
        return  # the parser tells what it looked for
    except reading.Unreadable as error:
        raise HeadwiseError(f"{flag}: {error}") from error
    if not isinstance(values, dict):
        what = "it is empty" if values is None else f"it holds a {type(values).__name__}"
        raise HeadwiseError(f"{flag} {path} is no YAML of keys and values: {what}")
    _check_sections(values, section, prefix, path.parent)


def _check_sections(values: dict[str, Any], sections: dict[str, Any], prefix: str, folder: Path) -> None:
    """Refuse `training: 5` in a file: the parser reads past it. A string names a file with the section."""
    for key, value in values.items():
        section = sections.get(key)
        if not isinstance(section, dict):
            for inner in value if isinstance(value, list) else [value]:
                _refuse_no_number(f"{prefix}{key}", inner)
            continue
        if isinstance(value, dict):
            _check_sections(value, section, f"{prefix}{key}.", folder)
        elif isinstance(value, str):
            _check_file(folder / value, section, f"{prefix}{key}", f"{prefix}{key}.")
        else:
            raise HeadwiseError(
                f"{prefix}{key}: got {value}, expected keys below it, such as {next(iter(section))}"
            )


def from_dict(values: dict[str, Any]) -> Config:
    """The configuration with the nested (or dotted) `values` over its defaults.

    Raises:
        HeadwiseError: as `parse`.
    """
    load_plugins(values.get("plugins") or ())
    known = keys()
    arguments = []
    for key, value in flatten(values):
        if key not in known:
            raise HeadwiseError(f"unknown key {key!r}{did_you_mean(key, known)}")
        if value is not None:
            arguments.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    return parse(_plain_parser(), arguments)[0]


def from_flags(arguments: Sequence[str]) -> Config:
    """The configuration of a command line of keys and `--config FILE`.

    Raises:
        HeadwiseError: as `parse`.
    """
    for name, value in _flags_of(arguments):
        if name == "--config":
            _load_plugins_of(Path(value))
    return parse(_plain_parser(), arguments)[0]


def load(path: str | Path) -> Config:
    """Read a configuration file.

    Raises:
        HeadwiseError: it is missing, unreadable, or not a configuration.
    """
    _load_plugins_of(Path(path))
    return parse(_plain_parser(), [f"--config={path}"])[0]


def explain(message: str, keys: Sequence[str]) -> str:
    """A parser's message as one line that names the nearest right key."""
    message = " ".join(message.split())
    for pattern in (r"arguments?: --([\w.\-]+)", r"[Oo]ption '([\w.]+)'", r"Key '([\w.]+)'"):
        found = re.search(pattern, message)
        if found:
            group = re.search(r"Group '([\w.]+)'", message)
            key = f"{group[1]}.{found[1]}" if group else found[1]
            return f"unknown key {key!r}{did_you_mean(key, keys)}; `headwise train --help` lists them all"
    found = re.match(r"(Unexpected config|Problems parsing config): ?(.*)", message)
    if found:
        return f"--config is no YAML of keys and values: {found[2][:200] or 'it is empty'}"
    found = re.match(r"Parser key \"?([\w.]+)\"?: (.*)", message)
    if found and found[1] == "config":
        return f"--config: {found[2]}"
    if found:
        return f"{found[1]}: {_expectation(found[2])}"
    return message


def _expectation(message: str) -> str:
    """`got 1e3, expected int or null` of what jsonargparse says of a value."""
    section = re.match(r"Unable to load config '(.*?)'", message)
    if section:
        return f"got {section[1]}, expected a section of keys, or a YAML file with one"
    subtypes = re.search(r"Subtypes: \[(.*?)\] Errors", message)
    types = re.findall(r"<class '(\w+)'>", subtypes[1] if subtypes else message.partition("Got value")[0])
    value = re.search(r"Given value: (.*)$", message) or re.search(r"Got value: (.*)$", message)
    if not types or not value:
        return message
    named = dict.fromkeys("null" if t == "NoneType" else t for t in types)
    wanted = " or ".join(sorted(named, key="null".__eq__))  # its releases differ in where they put null
    example = f", such as [{value[1]}]" if wanted == "list" else ""
    return f"got {value[1]}, expected {wanted}{example}"


def _flags(parser: ArgumentParser) -> list[str]:
    flags = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    known = keys()
    return known + [flag for flag in flags if flag not in known]
