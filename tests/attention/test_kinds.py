"""Kinds by name: registration, plug-ins by name, what a run's own file may import, and their options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwise.attention import KINDS, AttentionConfig, AttentionShape, kinds, register
from headwise.attention.config import declare_sections
from headwise.attention.flash import FlashAttention
from headwise.attention.kinds import BROKEN, LOADED, attention_kind, load_plugins
from headwise.cli.main import main
from headwise.config.run import from_dict, keys, load, to_yaml
from headwise.errors import HeadwiseError

MODULE = '''
from dataclasses import dataclass
from headwise.attention import register
from headwise.attention.config import declare_sections
from headwise.attention.flash import FlashAttention

@dataclass
class Options:
    """model.attention.{name}.*

    Attributes:
        strength: how much.
    """

    strength: float = 0.5

@register("{name}")
class Mine(FlashAttention):
    options = Options
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working folder that registers a kind of its own name."""
    name = "mine_of_the_test"
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    monkeypatch.chdir(tmp_path)
    yield name
    KINDS.pop(name, None)
    declare_sections()
    sys.modules.pop(name, None)
    if name in LOADED:
        LOADED.remove(name)


def test_a_plugin_adds_a_kind_with_options(plugin: str) -> None:
    load_plugins([plugin])
    assert attention_kind(plugin).__module__ == plugin
    assert f"model.attention.{plugin}.strength" in keys()
    config = from_dict(
        {"model.attention.kind": plugin, f"model.attention.{plugin}.strength": 2, "training.max_steps": 1}
    )
    assert config.model.attention.options().strength == 2
    assert config.plugins == [plugin]
    layer = attention_kind(plugin)(AttentionShape(8, 2, 2, 4), config.model.attention.options())
    assert isinstance(layer, FlashAttention)


def test_a_run_records_the_plugin_and_trains_again(plugin: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny = ["--data.name=copy", "--data.seq_len=8", "--model.d_model=16", "--measure.maps=0"]
    flags = [*tiny, f"--model.attention.kind={plugin}", "--training.max_steps=2", f"--out={out}"]
    assert main(["train", "--plugins", plugin, *flags]) == 0
    assert f"- {plugin}" in (out / "config.yaml").read_text()
    assert load(out / "config.yaml").model.attention.kind == plugin


def test_a_run_folder_imports_nothing_that_is_not_installed(plugin: str, tmp_path: Path) -> None:
    folder = tmp_path / "from_somebody"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"plugins: [{plugin}]\nmodel: {{attention: {{kind: {plugin}}}}}\n")
    with pytest.raises(HeadwiseError, match=f"needs the plug-in '{plugin}'.*--plugins {plugin}"):
        load(folder / "config.yaml")
    assert plugin not in sys.modules


def test_a_configuration_that_the_user_names_imports_its_plugins(plugin: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"plugins: [{plugin}]\nmodel: {{attention: {{kind: {plugin}, {plugin}: {{strength: 3}}}}}}\n"
        "training: {max_steps: 1}\n"
    )
    assert load(tmp_path / "mine.yaml").model.attention.options().strength == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_to_be_found", "it is neither installed nor below"),
        ("../elsewhere", "is not a module's name"),
        ("registers_nothing", "registers no attention kind"),
        ("", "names no module"),
    ],
)
def test_a_plugin_that_cannot_be_is_one_sentence(
    name: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "registers_nothing.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    assert main(["show-config", "--plugins", name, "--engines"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_plugin_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_when_imported.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HeadwiseError, match="'fails_when_imported' cannot be imported: ZeroDivisionError"):
        load_plugins(["fails_when_imported"])


def test_a_broken_package_stops_only_its_own_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BROKEN, "theirs", "their.module: ImportError: no")
    with pytest.raises(HeadwiseError, match=r"'theirs' is installed, but .* their\.module"):
        attention_kind("theirs")
    assert attention_kind("flash") is FlashAttention


def test_a_misspelt_kind_names_the_nearest_plugin(plugin: str) -> None:
    load_plugins([plugin])
    with pytest.raises(HeadwiseError, match=f"did you mean '{plugin}'"):
        from_dict({"model.attention.kind": plugin[:-1], "training.max_steps": 1})


@pytest.mark.parametrize("name", ["flash", "kind", "two words", ""])
def test_a_name_that_is_taken_or_cannot_be_a_key_is_refused(name: str) -> None:
    class Other(FlashAttention):
        """Of another module."""

    with pytest.raises(ValueError, match="attention kind"):
        register(name)(Other)


def test_options_of_other_kinds_are_written_only_where_they_are_not_the_default() -> None:
    config = from_dict({"model.attention.kind": "mha", "training.max_steps": 1})
    assert "selective" not in to_yaml(config)
    config = from_dict(
        {"model.attention.kind": "mha", "model.attention.selective.relu_leak": 0.5, "training.max_steps": 1}
    )
    assert "relu_leak: 0.5" in to_yaml(config)


def test_every_field_of_the_section_is_declared_once() -> None:
    assert AttentionConfig() == AttentionConfig()
    with_options = [name for name, kind in kinds.KINDS.items() if kind.options is not None]
    assert [name for name in kinds.KINDS if hasattr(AttentionConfig(), name)] == with_options
