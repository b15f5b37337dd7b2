"""`headwise train` as it is typed: what is refused and how, kills and Ctrl-C, several processes."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from headwise.cli.main import main
from headwise.cli.train import _conclusion
from headwise.config.run import from_dict
from headwise.runs import checkpoint

TINY = """
model: {d_model: 32, n_layers: 1, n_heads: 2, dropout: 0.1, attention: {kind: mha, dropout: 0.1}}
data: {name: copy, seq_len: 16, batch_size: 2, vocab_size: 16, eval_sequences: 4}
training:
  {max_steps: 40, total_batch_tokens: 64, warmup_steps: 2, log_every: 1, eval_every: 10, checkpoint_every: 4}
measure: {maps: 0}
"""
TIMINGS = ("tokens_per_sec", "step_time_ms", "flops_per_sec", "data_wait")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def whole(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", "--config", config, "--device", "cpu", "--out", str(out)]) == 0
    return out


def log(folder: Path) -> list[dict[str, str]]:
    """metrics.csv as text, without what a clock decides."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def assert_same_run(one: Path, other: Path) -> None:
    assert log(one) == log(other)
    ours, theirs = (checkpoint.load(f / "checkpoints" / "step_00000040").model for f in (one, other))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def wait_for(path: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    ends = time.monotonic() + 120
    while not path.exists():
        assert process is None or process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < ends, f"{path} did not come"
        time.sleep(0.002)


# -- stopped --------------------------------------------------------------------------------------


def test_kill_9_and_resume_give_the_run_that_was_never_killed(
    config: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "headwise", "train", "--config", config, "--device=cpu", f"--out={out}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for(out / "checkpoints" / "step_00000008", process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert_same_run(out, whole)
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(
    config: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a run"  # the command to go on has to survive a shell

    def press() -> None:
        wait_for(out / "checkpoints" / "step_00000004")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    code = main(["train", "--config", config, "--device", "cpu", "--out", str(out)])
    thread.join()
    assert code == 130
    said = capsys.readouterr()
    assert "finishing this step, then saving" in said.err
    assert f"to go on: headwise train --resume --out '{out}'" in said.out
    step = json.loads((out / "status.json").read_text())["step"]
    assert (out / "checkpoints" / f"step_{step:08d}").is_dir()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert_same_run(out, whole)


def test_ctrl_c_before_the_run_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(verb: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("headwise.cli.main.importlib.import_module", press)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "headwise: stopped; what was finished is kept\n"


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model.attention.kindd=mha", "(did you mean 'model.attention.kind'?)"),
        ("--model.attention.kind=mhaa", "(did you mean 'mha'?)"),
        ("--training.lr=fast", "training.lr: got fast, expected float"),
        ("--model.n_heads=4 --model.n_kv_heads=3", "not divisible by model.n_kv_heads 3"),
        ("--model.d_model=33", "model.d_model 33 is not divisible by model.n_heads 2"),
        ("--model.head_dim=7", "RoPE rotates pairs"),
        ("--model.vocab_size=8", "model.vocab_size is 8, but the data has 16 tokens"),
        ("--model.attention.kind=flex --model.attention.dropout=0", "'flex' cannot be trained on a CPU"),
        ("--device=cuda:7", "--device cuda:7 is absent"),
        (
            "TEXTS --data.path=TEXT --data.seq_len=999",
            "data.seq_len=999 is longer",
        ),
        ("TEXTS --data.path=EMPTY", "is empty"),
        ("TEXTS --data.path=ABSENT", "does not exist"),
        ("TEXTS --data.path=BINARY", "is not text"),
        ("--init-from=ABSENT", "is not there"),
        ("--init-from=TEXT", "cannot be read as tensors alone"),
        ("--resume", "holds no run"),
        ("--eval_only", "holds no run"),
        ("--config=ABSENT", "File does not exist"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_folder(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    for name, content in {"TEXT": b"words " * 900, "EMPTY": b"", "BINARY": b"\x7fELF\0\0"}.items():
        (tmp_path / name).write_bytes(content)
    flags = flags.replace(
        "TEXTS", "--data.name=text --data.vocab_size=null --training.total_batch_tokens=null"
    )
    for name in ("TEXT", "EMPTY", "BINARY", "ABSENT"):
        flags = flags.replace(name, str(tmp_path / name))
    out = tmp_path / "run"
    argv = ["train", "--config", config, "--device", "cpu", "--training.max_steps=1", "--out", str(out)]
    assert main(argv + flags.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("headwise: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert captured.out == ""
    assert not out.exists()


def test_what_is_there_is_left_alone(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path):
        assert main(["train", "--config", config, "--device", "cpu", "--out", str(out)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_later(
    config: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files may be as large as the model's weights but not as its optimizer's state: the checkpoint fails."""
    out = tmp_path / "run"
    size = (whole / "checkpoints" / "step_00000040" / "model.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        assert main(["train", "--config", config, "--device", "cpu", "--out", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert "step_00000004 was not written; free space there" in err
    assert err.count("\n") == 1
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    assert not list((out / "checkpoints").glob("*"))
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert_same_run(out, whole)


# -- the rest -------------------------------------------------------------------------------------


def test_eval_only_prints_and_writes(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--eval_only", "--out", str(whole)]) == 0
    found = json.loads((whole / "eval.json").read_text())
    assert f"val: loss {found['val']['loss']:.6f}, perplexity" in capsys.readouterr().out
    assert set(found) == {"val", "test"}


def test_a_run_without_a_name_gets_a_folder_of_its_own(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        flags = ["--device=cpu", "--training.max_steps=1", "--seed=3", "--model.init_std=1e-5"]
        assert main(["train", "--config", config, *flags]) == 0
    said = capsys.readouterr().out
    for name in ("seed_3", "seed_3-2"):
        assert (tmp_path / "runs" / "tiny.mha" / name / "summary.json").exists()
        assert f"runs/tiny.mha/{name}\n" in said
    assert "at chance: nothing was learned (ln 16 = 2.7726)" in said


def test_help_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: headwise train --config FILE [--SECTION.KEY=VALUE ...]")
    assert "--training.total_batch_tokens" in out


def test_two_processes_give_the_losses_of_one(config: str, tmp_path: Path) -> None:
    """The copy task's passes differ in how many targets count, so a mean of means would be wrong."""
    flags = ["train", "--config", config, "--device=cpu", "--training.max_steps=6"]
    flags += ["--model.dropout=0", "--model.attention.dropout=0"]
    flags += ["--data.batch_size=4", "--training.total_batch_tokens=128"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "headwise"]
    two, one = tmp_path / "two", tmp_path / "one"
    done = subprocess.run(
        [sys.executable, *torchrun, *flags, f"--out={two}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 6 steps") == 1
    assert main([*flags, f"--out={one}"]) == 0
    for ours, theirs in zip(log(two), log(one), strict=True):
        for column in ("step", "split", "tokens", "flops", "lr"):
            assert ours[column] == theirs[column]
        for column in ("loss", "grad_norm", "accuracy", "smooth_loss"):
            if theirs[column]:
                assert float(ours[column]) == pytest.approx(float(theirs[column]), rel=1e-5), column


@pytest.mark.parametrize(
    ("evaluated", "said"), [(0, "val loss 5.5000 at step 0, the last"), (10, "5.5000, acc")]
)
def test_an_interrupted_run_says_which_step_its_loss_is_of(evaluated: int, said: str) -> None:
    summary = {
        "state": "interrupted", "step": 10, "reason": "stopped", "val_step": evaluated, "val_loss": 5.5,
        "val_bits_per_byte": None, "val_accuracy": 0.1, "tokens_per_sec": None, "chance_loss": 5.5,
        "vocab_size": 245,
    }  # fmt: skip
    line = _conclusion(summary, from_dict({"training.max_steps": 20}))
    assert said in line
    assert ("at chance" in line) == (evaluated == 10)
