"""The command line's frame: verbs, exit codes, and help that needs nothing heavy."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headwise import __version__
from headwise.cli.main import VERBS, main


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from headwise.cli.main import main; code = main(['--help']); "
        "heavy = {'torch', 'numpy', 'jsonargparse', 'yaml', 'rich', 'polars'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"], ["help"]])
def test_help_is_the_list_of_verbs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "usage: headwise VERB" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"headwise {__version__}\n"


def test_sigterm_ends_any_verb_as_ctrl_c_does_and_sweeps_its_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "writes_and_is_ended.py").write_text(
        "import signal, sys\n"
        "from headwise.files import replacing\n"
        "with replacing('out/made.txt') as draft:\n"
        "    draft.write_text('half')\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    finally:\n"
        "        signal.raise_signal(signal.SIGTERM)  # again, while it cleans up\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    assert main(["runs", "--plugins", "writes_and_is_ended"]) == 143
    assert "what was finished is kept" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) is before is signal.SIG_DFL


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "unknown verb 'trian' (did you mean 'train'?)" in err


@pytest.mark.parametrize(
    "body", ["raise RuntimeError('one\\ntwo')", "import sys; sys.exit(3)", "raise SystemExit('a\\nb')"]
)
def test_a_plugin_that_fails_or_leaves_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], body: str
) -> None:
    (tmp_path / "leaves_at_once.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "--plugins", "leaves_at_once"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "'leaves_at_once' cannot be imported" in said
