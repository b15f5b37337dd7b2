"""A kind of another package, installed into a fresh environment, through the command line.

The environment sees this one's packages and, besides, examples/outside_kind as pip installs it.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    "--data.name=copy", "--data.seq_len=16", "--data.batch_size=4", "--data.eval_sequences=8",
    "--model.d_model=16", "--model.n_heads=2", "--model.vocab_size=258", "--training.max_steps=4",
    "--training.eval_every=2", "--measure.maps=0", "--device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the fresh environment."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "env", symlinks=True)
    own = next((folder / "env").glob("lib/python*/site-packages"))
    paths = [*site.getsitepackages(), str(ROOT)]
    (own / "shared.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in paths))
    source = folder / "outside_kind"
    shutil.copytree(ROOT / "examples" / "outside_kind", source)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", str(own), str(source)],
        check=True,
    )  # fmt: skip
    return folder / "env" / "bin" / "python"


@pytest.fixture(scope="module")
def run(python: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Runs `python -m …` in a folder of its own, and gives what it printed."""
    folder = tmp_path_factory.mktemp("work")

    def call(*arguments: str, code: int = 0) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        done = subprocess.run(
            [str(python), "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    call.folder = folder  # type: ignore[attr-defined]
    return call


def test_it_trains_and_writes_text(run) -> None:  # type: ignore[no-untyped-def]
    out = run("headwise", "train", *SMALL, "--model.attention.kind=nothing", "--out=run")
    assert "finished after 4 steps" in out
    heads = run("headwise", "train", "--resume", "--out=run")
    assert "nothing is left to do" in heads
    out = run("headwise", "generate", "run", "--prompt", "5 6 7", "--tokens", "4", "--budget", "0.5")
    assert out.strip()
    table = (
        "from headwise.measures import table; t = table.read('run/heads')\n"
        "print({'nothing_weight', 'nothing_lead'} <= set(t.columns), "
        "t['nothing_weight'].is_between(0, 1).all())"
    )
    assert (run.folder / "run" / "config.yaml").read_text().count("nothing:") == 1
    (run.folder / "read.py").write_text(table + "\n")
    assert "True True" in run("read")


def test_a_study_compares_it_and_its_section_is_in_the_report(run) -> None:  # type: ignore[no-untyped-def]
    base = "".join(f"  {flag[2:].replace('=', ': ')}\n" for flag in SMALL if "device" not in flag)
    (run.folder / "study.yaml").write_text(
        f"name: with_nothing\ndevice: cpu\nbaseline: flash\nseeds: [0, 1]\nbase:\n{base}"
        "variants:\n  flash: {overrides: {model.attention.kind: flash}}\n"
        "  nothing: {overrides: {model.attention.kind: nothing, model.attention.nothing.offset: 0.5}}\n"
    )
    out = run("headwise", "study", "study.yaml")
    assert "nothing:" in out
    run("headwise", "report", "runs/with_nothing")
    report = (run.folder / "runs" / "with_nothing" / "report.md").read_text()
    assert "## Weight on nothing" in report
    assert (run.folder / "runs" / "with_nothing" / "figures" / "nothing.png").is_file()
    assert 'id="nothing"' in (run.folder / "runs" / "with_nothing" / "report.html").read_text()


def test_its_options_are_shown_checked_and_its_name_is_suggested(run) -> None:  # type: ignore[no-untyped-def]
    assert "--model.attention.nothing.offset" in run("headwise", "train", "--help")
    assert "nothing_weight" in run("headwise", "show-config", "--list-measures")
    wrong = run("headwise", "train", *SMALL, "--model.attention.kind=nothin", code=2)
    assert "did you mean 'nothing'" in wrong
    wrong = run("headwise", "train", *SMALL, "--model.attention.nothing.offset=inf", code=2)
    assert "model.attention.nothing.offset: got inf" in wrong
    wrong = run("headwise", "train", *SMALL, "--model.attention.nothing.ofset=1", code=2)
    assert "model.attention.nothing.offset" in wrong


def test_it_is_watched_and_benchmarked(run) -> None:  # type: ignore[no-untyped-def]
    (run.folder / "look.py").write_text(
        "import torch, headwise\n"
        "from headwise.attention import AttentionConfig\n"
        "from headwise.model.config import ModelConfig\n"
        "from headwise.model.decoder import Decoder\n"
        "model = Decoder(ModelConfig(vocab_size=11, attention=AttentionConfig('nothing')), 8).eval()\n"
        "with headwise.watch(model) as seen, torch.no_grad():\n"
        "    model(torch.zeros(1, 8, dtype=torch.int64))\n"
        "print('nothing_lead' in seen.table().columns)\n"
    )
    assert "True" in run("look")
    out = run("headwise", "bench", "nothing", "--device", "cpu", "--tokens", "64", "--out", "bench")
    assert "sdpa_x" in out
    assert (run.folder / "bench" / "nothing-cpu.json").is_file()


def test_it_passes_the_tests_of_every_kind_and_its_own(run) -> None:  # type: ignore[no-untyped-def]
    assert " passed" in run("headwise.testing", "nothing")
    tests = ROOT / "examples" / "outside_kind" / "tests"
    assert " passed" in run("pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tests), str(tests))
