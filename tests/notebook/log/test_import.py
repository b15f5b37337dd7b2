"""A log with one case of every form, imported whole; every line of the result is one that headwise takes."""

from __future__ import annotations

import functools
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from headwise.cli import surgery
from headwise.cli import train as train_verb
from headwise.config import run as configuration
from headwise.config.run import Config
from headwise.errors import HeadwiseError, one_of
from headwise.model.surgery import INITS, PLACES
from headwise.notebook.document import parse
from headwise.notebook.log.command import LIMIT, main
from headwise.notebook.log.notebook import Block, Imported, import_log
from headwise.notebook.log.write import notebook_text
from headwise.notebook.naming import named

LOG = Path(__file__).with_name("selective-log.md")
S = "model.attention.selective"


def imported(text: str, **options: str) -> Imported:
    return import_log(text, "notebook", **options)


def blocks(found: Imported) -> dict[str, Block]:
    return {part.name: part for part in found.parts if isinstance(part, Block)}


def fence(*words: str, program: str = "torchrun -m context_compression.train", info: str = "") -> str:
    return f"```{info}\n{program} {' '.join(words)}\n```\n"


def values(*words: str, **options: str) -> dict[str, str]:
    """The flags of the one run of a log."""
    (block,) = blocks(imported(fence("--log_dir x", *words), **options)).values()
    return dict(word[2:].split("=", 1) for word in block.commands[-1] if "=" in word)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("imported")
    for preset, reading in (("full", "meant"), ("full", "ran"), ("smallest", "meant")):
        out = folder / f"{preset}-{reading}.md"
        assert main([str(LOG), "--out", str(out), "--preset", preset, "--reading", reading]) == 0
    return {path.stem: path for path in folder.glob("*.md")}


def commands(notebook: Path) -> list[list[str]]:
    """The words of every command of a notebook."""
    bodies = re.findall(r"^```headwise:planned \S+\n(.*?)^```$", notebook.read_text(), re.M | re.S)
    lines = [line for body in bodies for line in body.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if not line.startswith("#")]


@functools.cache  # making one takes longer than the rest
def parser_of_surgery() -> Any:
    parser = configuration.make_parser()
    surgery._add_own(parser)
    configuration.add_arguments(parser)
    return parser


def config_of(words: list[str]) -> Config:
    """What headwise itself makes of a command."""
    rest = words[2:]
    if words[1] == "train":
        return configuration.parse(configuration._plain_parser(), rest)[0]
    own = surgery._own(rest[0], rest[1:])
    one_of("place", own.add_head, PLACES)
    one_of("init", own.init, INITS)
    return configuration.parse(parser_of_surgery(), rest[1:])[0]


@pytest.mark.parametrize("which", ["full-meant", "full-ran", "smallest-meant"])
def test_every_line_is_a_configuration(
    written: dict[str, Path], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(written[which].parent)
    found = commands(written[which])
    assert len(found) == {"full": 18, "smallest": 19}[which.partition("-")[0]]
    assert {words[0] for words in found} == {"headwise"}
    for words in found:
        config_of(words)


def test_counts() -> None:
    counts = imported(LOG.read_text()).counts
    assert (counts.fences, counts.runs, counts.translated) == (15, 14, 14)
    assert (counts.distinct, counts.without_kind, counts.sources) == (13, 8, 1)
    assert counts.numbered == [("game", "game-2"), ("masks", "masks-2")]
    assert [what for _, what in counts.not_runs] == ["pip, scp, cd"]
    assert [line for line, _ in counts.broken] == [79, 92]
    assert counts.inferred["attention_kind"] == 8
    flags = {flag: count for flag, count, _ in counts.flags()}
    assert (flags["--mup"], flags["git checkout"], flags["clear"], flags["--master_port"]) == (2, 1, 1, 1)
    assert (counts.untranslated, counts.changed) == ([], [])


def test_prose_and_states() -> None:
    text = notebook_text(imported(LOG.read_text()))
    assert all(fence.state == "planned" for fence in named(parse(text)).values())
    prose = re.sub(r"^(`{3,})[^`\n]*\n.*?^\1`*$", "", LOG.read_text(), flags=re.M | re.S)
    for line in filter(None, prose.splitlines()):
        assert f"\n{line}\n" in f"\n{text}"
    assert "```bash\npip install torch tiktoken" in text
    assert text.count("```headwise:planned ") == 15
    assert "its state in the log is vastrunning/17952360; without its results here" in text
    between = text[
        text.index("Hypothesis: as good as without.") : text.index("```headwise:planned scratch_0.02")
    ]
    assert "```" not in between, "the hypothesis belongs to the run, not to the weights it starts from"


def test_the_smallest_preset_has_every_distinct_configuration_once() -> None:
    found = imported(LOG.read_text(), preset="smallest")
    assert {name: block.same for name, block in blocks(found).items() if block.same} == {"masks-2": "masks"}
    assert sum(not block.same and not block.made for block in blocks(found).values()) == found.counts.distinct


def test_runs_of_the_smallest_preset_train(
    written: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = written["smallest-meant"]
    monkeypatch.chdir(notebook.parent)
    verbs = {"train": train_verb.main, "surgery": surgery.main}
    wanted = ("fresh_1337", "scratch_0.02", "game", "7fb24853684d6")
    for block in blocks(import_log(LOG.read_text(), notebook.stem, preset="smallest")).values():
        if block.name not in wanted:
            continue
        for _, verb, *words in block.commands:
            out = [] if verb == "surgery" else ["--out", f"runs/{notebook.stem}/{block.name}/seed_1337"]
            assert verbs[verb]([*words, *out, "--device", "cpu", "--measure.heads=false"]) == 0
        last = notebook.parent / "runs" / notebook.stem / block.name / "seed_1337"
        assert (last / "summary.json").is_file()
    assert "the function is preserved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--attention_kind self", {"model.attention.kind": "flash"}),
        ("--selection_head_linear_combo", {f"{S}.source": "linear_combo"}),
        ("--selection_head_linear_combo two_masks", {f"{S}.n_masks": "2", f"{S}.mask_heads": "one_each"}),
        ("--selection_head_linear_combo n_sliced_masks --n_sliced_masks 2", {f"{S}.source": "dedicated"}),
        ("--protection_kind zero_fp64", {f"{S}.protection.kind": "zero", f"{S}.accumulate": "float64"}),
        ("--protection_kind zero --group debugging_protection", {f"{S}.accumulate": "sequential"}),
        ("--protection_kind zero --group later", {f"{S}.accumulate": "fused"}),
        ("--protection_kind leaky_relu --leaky_relu_bias -0.05", {f"{S}.protection.offset": "-0.05"}),
        ("--protection_head_scaling_factor 0.2 --protection_kind head_two", {f"{S}.protection.scale": "0.2"}),
        ("--no_protect_bos_token --allow_masking_myself", {f"{S}.protect_bos": "false"}),
        ("--residual_attention_masks", {f"{S}.residual_logits": "true"}),
        ("--no_use_compile --seq_len=128", {"training.compile": "false", "data.seq_len": "128"}),
        ("--n_heads 12", {"model.n_heads": "12"}),
        ("--n_heads 12 --head_dim 32 --n_embd 384", {"model.d_model": "384", "model.head_dim": "32"}),
        ("--max_steps 7 --max_steps 9", {"training.max_steps": "9"}),
    ],
)
def test_flags_become_keys(words: str, expected: dict[str, str]) -> None:
    found = values(words)
    assert {key: found.get(key) for key in expected} == expected


def test_heads_are_the_width_in_runs_of_the_mini_model() -> None:
    mini = blocks(
        imported(fence("--log_dir x --n_heads 4 --mup", program="python -m context_compression.train"))
    )
    assert {"--model.d_model=256", "--model.n_heads=4"} <= set(mini["x"].commands[0])
    assert "model.d_model" not in values("--n_heads 4", "--max_steps 3")


def test_what_ran_differs_from_what_was_meant() -> None:
    leaky = "--attention_kind selective --relu_leak 0.1 --add_a_head"
    assert f"{S}.enabled" not in values(leaky)
    assert values(leaky, reading="ran")[f"{S}.enabled"] == "false"
    penalty = values("--attention_kind selective_with_memory_penalty", reading="ran")
    assert penalty[f"{S}.memory_penalty.reduce"] == "mean"


def test_weights_come_from_runs_of_the_log_where_they_keep_them() -> None:
    first = fence(program="USE_SELECTIVE=true LOG_DIR=a torchrun perplexity_loss_only.py")

    def resumed(step: str) -> str:
        return fence("--attention_kind self --log_dir b", f"--resume_checkpoint a/model_{step}.pt")

    for step, ends in (
        ("07500", "seed_1337/checkpoints/step_00007500"),
        ("00002", "runs/notebook/a/seed_1337"),
    ):
        (train,) = blocks(imported(first + resumed(step)))["b"].commands
        assert next(word for word in train if word.startswith("--init_from=")).endswith(ends)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--max_steps many", "--max_steps is 'many', but must be a whole number"),
        ("--max_lr nan", "must be a number"),
        ("--attention_kind banana", "the import knows only self, selective"),
        ("--random_seed -1", "a seed is at least 0"),
        ("--selection_head_linear_combo n_latent_masks", "which is missing"),
        ("--n_heads 0", "model.n_heads is 0"),
        ("--batch_size 7", "training.total_batch_tokens"),
        ("--max_steps", "--max_steps has no value"),
        ("--resume_checkpoint -x --attention_kind self", "not the name of a file"),
    ],
)
def test_what_cannot_be_translated_is_kept_with_the_reason(words: str, reason: str) -> None:
    found = imported(fence("--log_dir x", words))
    ((_, why),) = found.counts.untranslated
    assert reason in why
    text = notebook_text(found)
    assert "Not translated: " in text
    assert "```headwise" not in text


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/tmp/..", "a/b/c", "..", "-x--y", "'<b>|`x`'", "x" * 300, "é" * 90, "NUL.", "old"],
)
def test_names_stay_in_their_folder(name: str) -> None:
    text = notebook_text(imported(fence(f"--log_dir {name}") * 2))
    found = re.findall(r"^```headwise:planned (.*)$", text, re.M)
    assert len(set(map(str.casefold, found))) == 2
    for one in found:
        assert re.fullmatch(r"(?!.*(--|\.\.))[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", one)


def test_prose_that_a_notebook_would_read_as_its_own_is_changed_and_told() -> None:
    hostile = (
        "<!-- headwise:result x abc -->\n- Compare: a vs b\n> ```headwise\n<!-- never closed\n<script>\n"
    )
    found = imported(hostile + fence("--log_dir x") + "```headwise:finished/abc x\nrm -rf /\n```\n")
    text = notebook_text(found)
    assert found.counts.changed == [1, 2, 3, 4, 5]
    assert not re.search("<!--|<script|Compare:", text)
    assert text.count("```headwise") == 1
    assert "```text:finished/abc x\nrm -rf /" in text


def test_a_fence_in_a_comment_is_prose() -> None:
    hidden = f"<!--\n{fence('--log_dir hidden')}-->\n"
    found = imported(hidden + fence("--log_dir x"))
    assert found.counts.fences == 1
    assert notebook_text(found).startswith(hidden)


def test_thousands_of_fences() -> None:
    found = imported("".join(fence("--log_dir x", f"--max_steps {n % 50 + 1}") for n in range(1000)))
    assert (found.counts.translated, found.counts.distinct, len(found.counts.numbered)) == (1000, 50, 999)


def test_odd_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    log, out = tmp_path / "log.md", tmp_path / "out.md"

    def refused(content: bytes | None, reason: str) -> None:
        if content is not None:
            log.write_bytes(content)
        with pytest.raises(HeadwiseError, match=reason):
            main([str(log), "--out", str(out)])
        assert not list(tmp_path.glob("out.*"))

    refused(None, "log.md")
    refused(b"\xff\xfe", "not UTF-8")
    refused(b"a\0b", "NUL")
    refused(b"no fences", "no fences")
    os.truncate(log, LIMIT + 1)
    refused(None, "larger|at most|MB")
    log.unlink()
    log.mkdir()
    refused(None, "folder|directory")
    for taken in ("out.md", "out.yaml"):
        (tmp_path / taken).write_text("mine")
        with pytest.raises(HeadwiseError, match="exists"):
            main([str(LOG), "--out", str(out)])
        assert (tmp_path / taken).read_text() == "mine"
        (tmp_path / taken).unlink()
    for name, reason in (
        ("out.txt", "not a Markdown file"),
        ("-x.md", "begins with"),
        ("#x.md", "begins with"),
    ):
        with pytest.raises(HeadwiseError, match=reason):
            main([str(LOG), "--out", str(tmp_path / name)])
