"""The command line's frame: verbs, exit codes, and help that needs nothing heavy."""

from __future__ import annotations

import subprocess
import sys

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


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "unknown verb 'trian' (did you mean 'train'?)" in err
