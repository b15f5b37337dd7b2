"""Files that are not what they should be: every verb that reads one ends in a sentence, soon.

A valid world is made once. One file of it is altered at a time, a verb that reads the file is run, and the
file is put back. The verb may succeed, where the change is harmless or is what the verb reports on. It may
refuse, with one line and exit code 2, and leaves nothing behind then. Anything else is a fault.

`HEADWISE_MALFORMED=20 pytest tests/malformed` draws twenty times as many changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from headwise.cli.main import main
from headwise.runs import schemas
from headwise.runs.read import Run
from tests.malformed import mutations

RUN = "study/a/seed_0"
LAST = f"{RUN}/checkpoints/step_00000002"
REPORTED = ["status.json", "summary.json", "env.json", "config.yaml", "metrics.csv", "study.yaml"]
"""What the listing and the report read; damage is what they tell of."""

GENERATE = ["generate", RUN, "--prompt", "1 2", "--tokens", "2"]
PROFILE = ["profile", RUN, "--n-samples", "2", "--context-length", "16", "--out", "profile"]
PREPARE = ["--tokenizer", "bytes", "--keep", "all", "--length", "4", "--out", "OUT"]
PRUNE = ["prune", RUN, "--mode", "low", "--fraction", "0.5", "--by", "entanglement", "--zero",
         "--sequences", "2", "--draws", "1", "--device", "cpu", "--out", "OUT"]  # fmt: skip
SWEEP = "q_scale_intervention_results.csv"

CASES = [
    *((f"{RUN}/{name}", ["runs", "study"], 12) for name in REPORTED[:-1]),
    (f"{RUN}/config.yaml", GENERATE, 8),
    (f"{LAST}/manifest.json", GENERATE, 6),
    (f"{LAST}/model.safetensors", GENERATE, 6),
    (f"{RUN}/checkpoints/best.json", GENERATE, 6),
    (f"{RUN}/budget.json", ["budget", RUN, "--budgets", "1", "0.5", "--sequences", "2", "--out", "OUT"], 6),
    (f"{RUN}/entanglement/step_00000002.parquet", PRUNE, 3),
    ("pruned/prune.json", ["report", "pruned", "--out", "OUT"], 3),
    ("heads.json", ["geometry", "correlate", "heads.json"], 20),
    ("profile/heads/part_000000.parquet", ["geometry", RUN, "--json", "OUT", "--profile", "profile"], 12),
    (SWEEP, ["intervene", "gain", SWEEP, "--out", "OUT"], 6),
    ("shards/manifest.json", ["data", "inspect", "shards"], 12),
    ("shards/shard_00000.npz", ["data", "inspect", "shards"], 20),
    ("study/max_lengths.json", ["report", "study", "--out", "OUT"], 3),
    ("copied/headwise-copy.json", ["runs", "pull", "copied", "--out", "OUT"], 12),
    (f"{RUN}/copies.json", ["runs", "push", RUN, "copied"], 12),
    ("study-file.yaml", ["study", "study-file.yaml", "--plan", "--out", "OUT"], 20),
    ("model/config.json", ["show-config", "model"], 12),
    ("results/a.json", ["bench", "page", "--results", "results", "--out", "OUT"], 12),
    ("nb.headwise.json", ["notebook", "status", "nb.md"], 12),
    ("records.jsonl", ["data", "prepare", "records.jsonl", *PREPARE], 12),
    ("profile/profile.json", PROFILE, 6),
    ("profile/moments/part_000000.safetensors", PROFILE, 6),
    ("profile/heads/part_000000.parquet", PROFILE, 6),
]

MORE = int(os.environ.get("HEADWISE_MALFORMED", "1"))
PHASES = [Phase.explicit, Phase.generate]  # the first counterexample tells enough
examples = settings(suppress_health_check=list(HealthCheck), derandomize=True, database=None, phases=PHASES)


def outcome(argv: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a verb; nothing else may come of it, and that soon."""
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()  # what waits for ever is ended by the time limit of the test
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    assert time.process_time() - began < 5
    if code == 2:
        refusals = [line for line in err.getvalue().splitlines() if line.startswith("headwise: ")]
        assert len(refusals) == 1, err.getvalue()
        assert len(refusals[0]) < 1500
        assert "Traceback" not in err.getvalue()
    assert code in (0, 1, 2)
    return code, out.getvalue() + err.getvalue()


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch):
    """The world as the working folder."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HEADWISE_CACHE", str(world / "cache"))
    yield world
    shutil.rmtree(world / "OUT", ignore_errors=True)


@contextlib.contextmanager
def instead(path: Path, content: bytes | None):
    """Other bytes in a file, or a pipe in its place; then what was there before and nothing else."""
    before, around = path.read_bytes(), set(Path().iterdir())
    try:
        if content is None:
            path.unlink()
            os.mkfifo(path)
        else:
            path.write_bytes(content)
        yield
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(before)
        for made in set(Path().iterdir()) - around:
            shutil.rmtree(made) if made.is_dir() else made.unlink()


@pytest.mark.parametrize(
    ("file", "argv", "times"), CASES, ids=[f"{file}-{argv[0]}" for file, argv, _ in CASES]
)
def test_an_altered_file_is_refused_or_harmless(here: Path, file: str, argv: list[str], times: int) -> None:
    path = here / file
    original = path.read_bytes()
    with instead(path, original):
        main(argv)  # imports what it needs

    @settings(examples, max_examples=MORE * times)
    @given(mutations.of_file(path.name, original) | st.none())
    def check(content: bytes | None) -> None:
        with instead(path, content):
            code, _ = outcome(argv)
            assert code == 0 or not (here / "OUT").exists()

    check()
    with instead(path, None):
        outcome(argv)
    with instead(path, original):
        code, said = outcome(argv)
        assert code == 0, said


@pytest.mark.parametrize(("name", "schema"), [
    ("status", schemas.Status), ("summary", schemas.Summary), ("env", schemas.Environment),
])  # fmt: skip
def test_every_key_of_a_run_folder_has_its_type(tmp_path: Path, name: str, schema: type) -> None:
    (tmp_path / "summary.json").write_text('{"state": "finished"}')
    for key, kind in get_type_hints(schema).items():
        text = [] if str in (kind, *get_args(kind)) else ["text"]
        wrong = [[[1]], {"checksum": [], "commit": [], "a": [1]}, *text]
        for junk in wrong:
            (tmp_path / f"{name}.json").write_text(json.dumps({"state": "finished", key: junk}))
            assert f"unreadable {name}.json: {key}" in str(Run(tmp_path).problem), (key, junk)


def checkpoint_with(run: Path, changed) -> None:
    """Alter the last checkpoint by `changed(folder)`, and give it the checksums of what is there then."""
    folder = run / "checkpoints" / "step_00000002"
    changed(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def copied(here: Path, target: Path) -> list[str]:
    """A copy of the run that has two steps to go, and the command that goes on with it."""
    shutil.copytree(here / RUN, target)
    config = (target / "config.yaml").read_text().replace("max_steps: 2", "max_steps: 4")
    (target / "config.yaml").write_text(config)
    status = json.loads((target / "status.json").read_text()) | {"state": "interrupted"}
    (target / "status.json").write_text(json.dumps(status))
    (target / "summary.json").unlink()
    return ["train", "--resume", "--out", str(target)]


def tensors(name: str, **changes):
    """A change of one file of tensors: a new tensor, or None to take one away."""

    def change(folder: Path) -> None:
        found = load_file(folder / name) | {key.replace("__", "."): value for key, value in changes.items()}
        save_file({key: value for key, value in found.items() if value is not None}, folder / name)

    return change


EXP_AVG = "blocks__0__attention__qkv__weight__exp_avg"


@pytest.mark.parametrize("change", [
    tensors("optimizer.safetensors", **{EXP_AVG: torch.zeros(3)}),
    tensors("optimizer.safetensors", **{EXP_AVG: None}),
    tensors("optimizer.safetensors", **{EXP_AVG: torch.zeros(24, 8, dtype=torch.float16)}),
    tensors("optimizer.safetensors", **{EXP_AVG + "_sq": torch.zeros(1, 1)}),
    tensors("optimizer.safetensors", nobody__exp_avg=torch.zeros(3)),
    tensors("optimizer.safetensors", blocks__0__attention__qkv__weight__step=torch.zeros(2)),
    tensors("model.safetensors", blocks__0__attention__qkv__weight=torch.zeros(24, 8, dtype=torch.int64)),
    tensors("model.safetensors", blocks__0__attention__qkv__weight=torch.zeros(2, 2)),
    tensors("model.safetensors", other=torch.zeros(2, 2)),
], ids=lambda change: None)  # fmt: skip
def test_tensors_that_are_not_the_runs_are_refused_by_name(here: Path, tmp_path: Path, change) -> None:
    argv = copied(here, tmp_path / "run")
    checkpoint_with(tmp_path / "run", change)
    code, said = outcome(argv)
    assert code == 2
    assert "qkv.weight" in said or "nobody" in said or "other" in said


def test_a_run_that_was_not_altered_goes_on(here: Path, tmp_path: Path) -> None:
    assert outcome(copied(here, tmp_path / "run"))[0] == 0


@settings(examples, max_examples=MORE * 5)
@given(data=st.data())
@pytest.mark.parametrize("name", ["state.json", "../../status.json", "../../env.json", "../../config.yaml"])
def test_a_resume_of_an_altered_run_is_refused_or_harmless(
    here: Path, tmp_path_factory, name: str, data
) -> None:
    run = tmp_path_factory.mktemp("resume") / "run"
    argv = copied(here, run)

    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(data.draw(mutations.of_file(path.name, path.read_bytes())))

    checkpoint_with(run, change)
    outcome(argv)


@settings(examples, max_examples=MORE * 6)
@given(data=st.data())
@pytest.mark.parametrize("name", [*REPORTED[:-1], "heads/step_00000002.parquet", "maps/step_00000002.npz"])
def test_a_report_of_an_altered_run_is_written_or_refused(here: Path, name: str, data) -> None:
    from headwise.report import html, maps, markdown
    from headwise.report.collect import collect
    from headwise.runs.read import Study

    path = here / RUN / name
    with instead(path, data.draw(mutations.of_file(path.name, path.read_bytes()))):
        study = Study.read(here / "study")
        found = collect(study)
        json.dumps(found, allow_nan=False)
        markdown.render(found, {})
        html.render(found, {})
        for run in study.runs:
            maps.read(run)


@settings(examples, max_examples=MORE * 20)
@given(data=st.data())
def test_a_study_of_an_altered_plan_is_read_or_refused(here: Path, data) -> None:
    path = here / "study" / "study.yaml"
    with instead(path, data.draw(mutations.of_file(path.name, path.read_bytes()))):
        outcome(["runs", "study"])
        outcome(["budget", "study", "--budgets", "1", "--sequences", "2", "--out", "OUT"])


NUMBERS = st.sampled_from([
    "-1", "0", str(10**9), str(2**63 - 1), str(10**30), "1e300", "nan", ".nan", "inf", ".inf", "-1e-9",
    "1e-400", "9" * 5_000, "1:30", "[1]", "{a: 1}", "null", "true", "''", "x",
])  # fmt: skip


def numeric_keys() -> list[str]:
    """Every key of the configuration that holds a number."""
    from headwise.config.run import _numeric_keys

    return sorted(_numeric_keys() - {"data.eval_seq_lens"})


@settings(examples, max_examples=MORE * 150)
@given(st.sampled_from(numeric_keys()), NUMBERS)
def test_numbers_that_no_run_can_have_are_refused_by_name(key: str, number: str) -> None:
    from headwise.config.run import _plain_parser, parse
    from headwise.errors import HeadwiseError

    began = time.monotonic()
    message, config = "", None
    flags = ["--training.max_steps=2", "--data.name=copy", f"--{key}={number}"]
    try:
        config, _ = parse(_plain_parser(), flags)
    except HeadwiseError as error:
        message = str(error)
    if config is None:
        assert key.rpartition(".")[2] in message, (key, number, message)
        assert len(message.splitlines()) == 1
    else:
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value is None or (np.isfinite(value) and abs(value) < 1e31), (key, number)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("flag", [
    "--training.eps=-1", "--training.max_flops=1e300", f"--model.d_model={10**9}",
    f"--model.vocab_size={2**63 - 1}", f"--model.n_layers={10**7}", "--model.d_model=131072",
    f"--data.seq_len={2**24}", f"--data.batch_size={10**9}",
    f"--seed={2**63}", "--training.beta2=1", "--training.lr=inf", "--model.attention.selective.source=foo",
    "--model.attention.selective.protection.kind=foo", "--data.ngram_order=1000000000",
    "--model.attention.selective.memory_penalty.tau=-1", "--model.vocab_size=16777216",
])  # fmt: skip
def test_a_run_that_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    out = ["--out", "out", "--training.max_steps=2", "--data.name=copy", "--device=cpu"]
    sizes = (
        ["--model.n_layers=400"] if "131072" in flag else ["--data.batch_size=1024", "--data.seq_len=1024"]
    )
    code, said = outcome(["train", *out, *(s for s in sizes if s.partition("=")[0] not in flag), flag])
    assert code == 2
    assert flag.removeprefix("--").partition("=")[0].removeprefix("model.attention.") in said
    assert not (tmp_path / "out").exists()


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("content", [
    b"model: {d_model: 8}\n" * 600_000, LAUGHS.encode(), b"[" * 500_000, b"seed: 1\nseed: 2\n",
    b"seed: !!python/name:os.x", b"model: {attention: {kind: mha, kind: flash}}", b"1: 2", b"\xff",
    b"---\na: 1\n---\nb: 1", b"model: sections.yaml", b"", b"model: [1]", b"seed: 1:30", b"? {a: 1}\n: 2",
], ids=lambda content: str(len(content)))  # fmt: skip
@pytest.mark.parametrize("verb", ["train", "study", "section", "surgery"])
def test_yaml_that_is_none_of_ours(here: Path, tmp_path: Path, content: bytes, verb: str) -> None:
    (tmp_path / "file.yaml").write_bytes(content)
    (tmp_path / "sections.yaml").write_bytes(b"[" * 500_000)
    file = str(tmp_path / "file.yaml")
    argv = {
        "train": ["train", "--config", file, "--out", "OUT"],
        "section": ["train", "--model", file, "--out", "OUT", "--training.max_steps=1"],
        "study": ["study", file, "--out", "OUT"],
        "surgery": ["surgery", RUN, "--add-head", "end", "--init", "zero", "--config", file, "--out", "OUT"],
    }[verb]
    assert outcome(argv)[0] == 2
    assert not (here / "OUT").exists()


@pytest.mark.parametrize("argv", [
    ["train", "--config", "PIPE"], ["train", "--model", "PIPE", "--training.max_steps=1"],
    ["study", "PIPE"], ["geometry", "correlate", "PIPE"], ["intervene", "gain", "PIPE", "--out", "OUT"],
    ["data", "inspect", "PIPE"],
    ["masks", RUN, "--file", "PIPE"], ["profile", RUN, "--data", "PIPE", "--out", "OUT"],
    ["data", "prepare", "PIPE", "--tokenizer", "bytes", "--out", "OUT"],
    ["data", "prepare", "text.txt", "--tokenizer", "PIPE", "--out", "OUT"],
    ["train", "--data.name=text", "--data.path=PIPE", "--training.max_steps=1", "--out", "OUT"],
    ["train", "--data.name=shards", "--data.path=PIPE", "--training.max_steps=1", "--out", "OUT"],
    ["train", "--init_from=PIPE", "--data.name=copy", "--training.max_steps=1", "--out", "OUT"],
    ["geometry", "PIPE"], ["report", "PIPE"],
    ["surgery", "PIPE", "--add-head", "end", "--init", "zero", "--out", "OUT"],
], ids=lambda argv: " ".join(argv)[:40])  # fmt: skip
def test_a_pipe_is_refused_and_not_waited_for(here: Path, argv: list[str]) -> None:
    os.mkfifo("PIPE")
    try:
        assert outcome(argv)[0] == 2
        assert not (here / "OUT").exists()
    finally:
        Path("PIPE").unlink()
        shutil.rmtree("OUT", ignore_errors=True)
