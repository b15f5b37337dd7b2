"""Notebooks that run: what runs again and what does not, what is put aside, what a kill leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headwise.cli import notebook as cli
from headwise.cli.main import main
from headwise.errors import HeadwiseError
from headwise.notebook import identity, watching
from headwise.notebook.document import parse
from headwise.notebook.identity import code_revision
from headwise.notebook.naming import named
from headwise.notebook.watching import _own, _wait
from headwise.runs.folder import RunFolder

CONFIG = (
    "model: {d_model: 8, n_layers: 1, n_heads: 2}\n"
    "data: {name: copy, vocab_size: 8, seq_len: 8, batch_size: 2, eval_sequences: 2}\n"
    "training: {max_steps: 2, eval_every: 1, warmup_steps: 0, checkpoint_every: 0}\n"
    "measure: {sequences: 2}\ndevice: cpu\n"
)
NOTEBOOK = """# Notebook

```headwise base
headwise train --config c.yaml --seed 0
headwise train --config c.yaml --seed 1
```

Hypothesis: a larger step is better.

```headwise fast
headwise train --config c.yaml --training.lr 0.01 --seed=0
headwise train --config c.yaml --training.lr 0.01 --seed=1
```

```headwise shards
headwise data prepare text.txt --tokenizer bytes --keep all --length 16 --out shards --shard-sequences 200
```

Compare: fast vs base, val_loss, lower
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A notebook that has run once; the tests go on with it, each from where the last ended."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("def f(x):\n    return x\n" * 200)
    (folder / "nb.md").write_text(NOTEBOOK)
    assert run(folder, "--workers", "2") == 0
    return folder


def run(folder: Path, *flags: str) -> int:
    return main(["notebook", "run", str(folder / "nb.md"), *flags])


def states(folder: Path) -> dict[str, str]:
    return {name: fence.state for name, fence in named(parse((folder / "nb.md").read_text())).items()}


def ends(folder: Path) -> dict[str, int]:
    """When each run and verb ended, as the times of its last file."""
    found = [*folder.glob("runs/nb/**/summary.json"), *folder.glob("runs/nb/**/result.json")]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in found}


def test_everything_ran_and_is_written_under_its_fence(home: Path) -> None:
    document = parse((home / "nb.md").read_text())
    assert states(home) == {"base": "finished", "fast": "finished", "shards": "finished"}
    assert len(ends(home)) == 5
    base, fast, shards, decision = document.marks
    assert "| base | 2 of 2 |" in base.text
    assert "(n = 2)" in fast.text
    assert (home / "runs/nb/base/loss.png").is_file()
    assert "finished" in shards.text
    assert (home / "shards/manifest.json").is_file()
    assert re.search(r"\*\*(supported|refuted|not resolved)\*\* \(planned\)", decision.text)
    memory = json.loads((home / "nb.headwise.json").read_text())
    (compare,) = memory["compares"].values()
    assert not compare["exploratory"]
    assert [look["n"] for look in compare["looks"]] == [2]


def test_nothing_runs_again_until_its_own_commands_change(home: Path) -> None:
    before, text = ends(home), (home / "nb.md").read_text()
    assert run(home) == 0
    assert (ends(home), (home / "nb.md").read_text()) == (before, text)
    more = "headwise train --config c.yaml --seed 2\n```\n<!-- headwise:result base"
    (home / "nb.md").write_text(text.replace("```\n<!-- headwise:result base", more))
    assert run(home, "--only", "base") == 0
    after = ends(home)
    assert {path: after[path] for path in before} == before, "the seeds that had run did not run again"
    assert set(after) - set(before) == {"runs/nb/base/seed_2/summary.json"}
    assert "| base | 3 of 3 |" in (home / "nb.md").read_text()


def test_a_comparison_that_is_added_after_its_runs_is_exploratory(home: Path) -> None:
    with (home / "nb.md").open("a") as file:
        file.write("\nCompare: base vs fast, val_accuracy, higher\n")
    assert run(home) == 0
    first, second = (mark for mark in parse((home / "nb.md").read_text()).marks if "/" in mark.name)
    assert "(planned)" in first.text
    assert "(exploratory" in second.text


def test_other_code_puts_runs_aside_and_brings_them_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ends(home)
    own, other = code_revision(), "f" * 40
    monkeypatch.setattr("headwise.notebook.running.code_revision", lambda: other)
    assert run(home, "--only", "fast") == 0
    assert len(list(home.glob("runs/nb/fast/old/*/seed_*/summary.json"))) == 2
    assert own != other
    monkeypatch.undo()
    assert run(home, "--only", "fast") == 0
    after = ends(home)
    assert all(after[path] == before[path] for path in before), (
        "the first runs are back, and did not run again"
    )


def test_a_changed_configuration_file_runs_again(home: Path) -> None:
    (home / "c.yaml").write_text(CONFIG.replace("d_model: 8", "d_model: 16"))
    before = ends(home)
    assert run(home, "--only", "base") == 0
    assert len(list(home.glob("runs/nb/base/old/*/seed_*/summary.json"))) == 3
    fresh = ends(home)
    assert all(fresh[path] != before[path] for path in before if "/base/seed_" in path)
    (home / "c.yaml").write_text(CONFIG)
    assert run(home, "--only", "base") == 0


def test_status_and_page_say_what_is_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "nb.md"
    path.write_text(path.read_text().replace("| fast | 2 of 2", "| fast | <script>alert(1)</script> 9 of 2"))
    assert main(["notebook", "status", str(path)]) == 0
    said = capsys.readouterr()
    assert re.search(r"base +finished +3/3", said.out)
    assert "the result of 'fast'" in said.err
    assert main(["notebook", "report", str(path)]) == 0
    page = (home / "nb.html").read_text()
    assert page.index('id="floor"') < page.index('id="decisions"') < page.index('id="notebook"')
    assert "a larger step is better" in page
    assert "<script>alert" not in page
    assert page.count("data:image/png;base64,") == 2
    assert run(home) == 0
    assert "9 of 2" in path.read_text(), "an edited result stays"
    assert run(home, "--replace-edited") == 0


def test_kill_9_of_the_driver_loses_nothing_and_runs_nothing_twice(home: Path) -> None:
    path = home / "nb.md"
    line = "headwise train --config c.yaml --training.max_steps 150 --training.eval_every 150"
    path.write_text(path.read_text() + f"\n```headwise slow\n{line}\n```\n")
    before = ends(home)
    command = [sys.executable, "-m", "headwise.cli.main", "notebook", "run", str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    folder = RunFolder(home / "runs/nb/slow/seed_0")
    while folder.read_status()["state"] != "running":
        assert driver.poll() is None
        time.sleep(0.02)
    with pytest.raises(
        HeadwiseError, match=rf"runs the notebook nb.md \(process {driver.pid} of .*, since 20"
    ):
        cli.main(["run", str(path)])
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert states(home)["slow"] in ("planned", "running"), "as the kill left it"
    assert run(home) == 0
    assert states(home)["slow"] == "finished"
    assert "resumed at step" in folder.log.read_text()
    after = ends(home)
    assert set(after) - set(before) == {"runs/nb/slow/seed_0/summary.json"}
    assert all(after[key] == before[key] for key in before)


def test_data_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = identity.Identities("code")._named(str(file))
    os.utime(file, (1, 1))
    assert identity.Identities("code")._named(str(file)) == first
    file.write_text("two")
    assert identity.Identities("code")._named(str(file)) != first


def test_a_watch_runs_what_was_written_while_the_last_pass_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "PAUSE_S", 0.01)
    path = tmp_path / "nb.md"
    path.write_text(NOTEBOOK)
    before = _own(path)
    path.write_text(NOTEBOOK.replace("```headwise base", "```headwise:finished/0123abcd base"))
    assert _own(path) == before, "what headwise wrote is no change"
    path.write_text(NOTEBOOK.replace("--seed 0", "--seed 7"))
    _wait(path, before)
    path.unlink()
    with pytest.raises(HeadwiseError, match=r"nb.md was deleted or renamed"):
        _wait(path, before)
