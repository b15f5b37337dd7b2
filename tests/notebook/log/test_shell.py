"""Commands of a log's fences, as a shell would read them, and those that a shell would not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.notebook.log.fences import Fence, split
from headwise.notebook.log.notebook import import_log
from headwise.notebook.log.shell import Call, read_script
from headwise.notebook.log.write import notebook_text

TRAIN = "context_compression.train"


def call(text: str) -> Call:
    (found,) = read_script(text, 1).calls
    return found


@pytest.mark.parametrize(
    "text",
    [
        f"torchrun --nproc_per_node 4 -m {TRAIN} --a 1",
        f"torchrun --standalone --nproc_per_node=gpu -m {TRAIN} --a 1 &> out.txt",
        f"torchrun -m {TRAIN} --a 1 > out.txt 2>&1 &",
        f"nohup python3 -u -m {TRAIN} --a 1 | tee log",
        f"python -m torch.distributed.run --nproc_per_node=2 -m {TRAIN} --a 1",
        f"cd /w; git pull && \\\n torchrun -m {TRAIN} \\\n --a 1  # why",
        f"ssh host 'cd /w && torchrun -m {TRAIN} --a 1'",
        f'bash -c "torchrun -m {TRAIN} \\\n --a 1"',
        f"./x/run_in_remote.sh 17 \"echo hi && torchrun -m {TRAIN} --a '1' &> o.txt\"",
        "python context_compression/train.py '--a' \"1\"",
    ],
)
def test_forms_of_a_run(text: str) -> None:
    assert call(text).words == ["--a", "1"]


def test_environment_reaches_the_run_that_it_is_set_for() -> None:
    text = f"export LOG_DIR=a\nMAX_STEPS=5 X='b c' torchrun -m {TRAIN}\ntorchrun -m {TRAIN}"
    first, second = read_script(text, 1).calls
    assert first.environment == [("LOG_DIR", "a"), ("MAX_STEPS", "5"), ("X", "b c")]
    assert second.environment == [("LOG_DIR", "a")]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (f"torchrun -m {TRAIN} --a 1\n--b 2", 2, ["--a", "1", "--b", "2"]),
        (f"torchrun -m {TRAIN} --a 1 \\ \n--b 2", 1, ["--a", "1", "--b", "2"]),
        (f"torchrun -m {TRAIN} --a 'x y", 1, ["--a", "x y"]),
        (f'run_in_remote.sh 1 "torchrun -m {TRAIN} --a 1', 1, ["--a", "1"]),
    ],
)
def test_broken_commands_are_read_as_meant_and_told(text: str, line: int, words: list[str]) -> None:
    script = read_script(text, 1)
    assert script.calls[0].words == words
    assert [at for at, _ in script.broken] == [line]


@pytest.mark.parametrize(
    "text",
    ["pip install x", "scp a b:c", "cd x && ls", "python train.py", "torchrun -m other.train", "", "# x"],
)
def test_other_commands_are_no_runs(text: str) -> None:
    assert not read_script(text, 1).calls


def test_a_longer_close_closes_and_a_shorter_one_does_not() -> None:
    (first, _, second) = split("```a\nx\n````\nprose\n````b\n```\n````\n")
    assert isinstance(first, Fence)
    assert isinstance(second, Fence)
    assert (first.body, second.body) == (("x",), ("```",))


WORDS = st.sampled_from(
    [
        "```", "````", "~~~", "\n", "\n", " ", "\\\n", "\\ \n", "'", '"', "`", "&&", ";", "&>", "2>&1",
        "$(x)", "<!--", "-->", "# ", "torchrun", "python", "-m", TRAIN, "perplexity_loss_only.py",
        "run_in_remote.sh", "--log_dir", "../x", "--max_steps", "3", "3", "--n_heads", "1e9", "é",
        "--seq_len=64", "headwise", "Compare:", "MAX_STEPS=2", "--add_a_head", "--resume_checkpoint", "hf://a/b",
        "--attention_kind", "self", "<pre>", "\x0b", "\r",
    ]
)  # fmt: skip


@given(st.lists(WORDS, max_size=60).map(" ".join))
@settings(max_examples=100, deadline=None)
def test_any_log_is_imported_or_kept(text: str) -> None:
    found = import_log(f"```\nx\n```\n{text}", "notebook", preset="smallest")
    counts = found.counts
    assert counts.fences == 1 + sum(isinstance(part, Fence) for part in split(f"{text}"))
    assert counts.runs == counts.translated + len(counts.untranslated)
    again = [part for part in split(notebook_text(found)) if isinstance(part, Fence)]
    ours = [part.info for part in again if part.info.startswith("headwise")]
    written = len(re.findall(r"^```headwise:planned ", notebook_text(found), re.M))
    assert written == len(ours) <= counts.translated + counts.sources
