"""What a notebook plans: groups by what their flags say, folders that are nobody else's, stages to come."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from headwise.cli.notebook import _load_plugins, _read_study
from headwise.config.run import Config, from_flags
from headwise.errors import HeadwiseError
from headwise.files import write_text
from headwise.notebook.document import Document, parse
from headwise.notebook.identity import Identities, bring_back, make_room
from headwise.notebook.naming import named
from headwise.notebook.planning import Block, Item, Options, _parsed, plan_blocks
from headwise.runs.folder import RunFolder

STUDY = """
name: st
baseline: base
base: {data.name: copy, data.seq_len: 8, data.batch_size: 2, training.max_steps: 2, training.warmup_steps: 0}
device: cpu
variants:
  base: {}
  fast: {overrides: {training.lr: 0.01}}
  best: {best_of: {among: [base, fast], take: [training.lr], by: val_loss}}
"""


def planned(folder: Path, text: str) -> list[Block]:
    document: Document = parse(text)
    options = Options(folder, "nb", (), None, _read_study, _load_plugins)
    return plan_blocks(document, named(document), options, Identities("code"))


def fence(*lines: str) -> str:
    commands = "".join(f"headwise train --training.max_steps 2 {line}\n" for line in lines)
    return f"```headwise a\n{commands}```\n"


def groups(block: Block) -> list[str]:
    return [item.group for item in block.items]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("--seed 0 --training.lr 0.1 --d 1", "--d=1 --training.lr=0.1 --seed=1"), ["a", "a"]),
        (("--training.lr 0.1 --training.lr 0.2", "--training.lr 0.2 --seed 1"), ["a", "a"]),
        (
            ("--training.lr 0.1 --training.lr 0.2", "--training.lr 0.2 --training.lr 0.1"),
            ["a/training.lr=0.2", "a/training.lr=0.1"],
        ),
    ],
)
def test_a_group_is_what_its_flags_come_to(
    tmp_path: Path, lines: tuple[str, ...], expected: list[str]
) -> None:
    lines = tuple(line.replace("--d", "--model.n_layers") for line in lines)
    (block,) = planned(tmp_path, fence(*lines))
    assert groups(block) == expected
    by_group: dict[str, set[float]] = {}
    for item in block.items:
        by_group.setdefault(item.group, set()).add(item.run.config.training.lr)
    assert all(len(rates) == 1 for rates in by_group.values())


FLAGS = (
    "--training.max_steps=3 --training.lr=0.01",
    "--training.max_steps=3 --training.lr=0.02",  # not parsed
    "--training.max_steps=3 --training.lr=1",  # not a float
    "--training.max_steps=3 --training.lr=0.03 --training.lr=0.04",
    "--training.lr=0.02 --config=c.yaml",  # the file is the later one
    "--training.lr 0.03 --config c.yaml",
    "--config c.yaml --training.max_steps 9 --training.lr 0.03",
    "--config c.yaml --training.lr 0.04 --training.max_steps 5",  # not parsed
)


def test_numbers_that_are_not_parsed_are_what_the_parser_makes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text("c.yaml", "training: {lr: 0.5, max_steps: 3}\n")
    read: dict[tuple[str, ...], Config] = {}
    parsed: list[tuple[str, ...]] = []

    def count(flags: tuple[str, ...]) -> Config:
        parsed.append(flags)
        return from_flags(flags)

    monkeypatch.setattr("headwise.notebook.planning.from_flags", count)
    for line in FLAGS:
        flags = tuple(line.split())
        assert _parsed(flags, read) == from_flags(flags)
    assert len(parsed) == len(FLAGS) - 2


def test_a_comparison_may_name_what_a_study_has_not_planned_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text("st.yaml", STUDY)
    text = "```headwise s\nheadwise study st.yaml\n```\nCompare: s/best vs s/base, val_loss, lower\n"
    (block,) = planned(tmp_path, text)
    assert set(groups(block)) == {"s/base", "s/fast"}
    with pytest.raises(HeadwiseError, match="s/bets"):
        planned(tmp_path, text.replace("s/best", "s/bets"))


@pytest.mark.parametrize(
    ("outs", "reason"),
    [
        (("x", "y/../x"), "have the same folder"),
        (("x", "x/y"), "line 2: --out .*x holds that of line 3"),
        ((".",), "line 2: --out .* holds the notebook"),
        (("..",), "line 2: --out .* holds the notebook"),
    ],
)
def test_no_run_is_in_the_way_of_another(tmp_path: Path, outs: tuple[str, ...], reason: str) -> None:
    lines = [f"--out '{out}' --seed {n}" for n, out in enumerate(outs)]
    with pytest.raises(HeadwiseError, match=reason):
        planned(tmp_path, fence(*lines))


def item_of(folder: Path) -> Item:
    (block,) = planned(folder, fence("--out mine"))
    return block.items[0]


def test_only_a_run_is_put_aside(tmp_path: Path) -> None:
    item = item_of(tmp_path)
    folder: RunFolder = item.run.folder
    write_text(folder.path / "thesis.txt", "years of work")
    for known in (None, "01234567"):
        with pytest.raises(HeadwiseError, match="is no run folder"):
            make_room(folder, item.id, known, item.run.config, "code")
    assert (folder.path / "thesis.txt").exists()


def test_a_run_comes_back_when_its_identity_does(tmp_path: Path) -> None:
    item = item_of(tmp_path)
    folder = item.run.folder
    write_text(folder.config, "seed: 0\n")
    other = dataclasses.replace(item.run.config, seed=5)
    aside = make_room(folder, "b" * 8, "a" * 8, other, "code")
    assert aside == tmp_path / "old" / ("a" * 8) / "mine"
    bring_back(folder, "b" * 8)
    assert not folder.path.exists()
    bring_back(folder, "a" * 8)
    assert folder.holds_run()
    bring_back(folder, "a" * 8)
