"""Configurations: YAML under flags, exact round trips, and refusals that name the key and the way out."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from headwise.config.run import (
    Config,
    add_arguments,
    flatten,
    from_dict,
    keys,
    load,
    make_parser,
    parse,
    to_dict,
    to_yaml,
)
from headwise.errors import HeadwiseError


@functools.cache
def parser() -> ArgumentParser:
    parser = make_parser()
    add_arguments(parser)
    return parser


def read(*argv: str) -> Config:
    return parse(parser(), argv)[0]


def test_flags_win_over_files_and_later_over_earlier(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {d_model: 64, attention: {kind: mha}}\ntraining: {max_steps: 3, lr: 0.5}\n")
    second.write_text("training: {lr: 0.25}\nseed: 7\n")
    config = read(
        "--model.n_layers=1", f"--config={first}", "--training.max_steps", "4", f"--config={second}",
        "--training.max_steps=5", "--model.attention.dropout=0.5",
    )  # fmt: skip
    assert (config.model.d_model, config.model.n_layers) == (64, 1)
    assert (config.model.attention.kind, config.model.attention.dropout) == ("mha", 0.5)
    assert (config.training.max_steps, config.training.lr, config.seed) == (5, 0.25, 7)


def test_a_file_may_name_the_file_of_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.yaml").write_text("d_model: 64\n")
    (tmp_path / "run.yaml").write_text("model: model.yaml\ntraining: {max_steps: 3}\n")
    monkeypatch.chdir(tmp_path)
    assert load("run.yaml").model.d_model == 64


words = st.text("aB1 /._-:,'\"{}[]é注𝛼", max_size=12)


@given(
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**63 - 1),
    prompts=st.lists(words, max_size=3),
    out=st.none() | words.filter(str.strip),
    flops=st.none() | st.floats(1, 1e24),
    lengths=st.lists(st.integers(2, 10**6), max_size=2),
)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_configuration_survives_its_yaml(
    tmp_path: Path,
    lr: float,
    seed: int,
    prompts: list[str],
    out: str | None,
    flops: float | None,
    lengths: list[int],
) -> None:
    config = Config(seed=seed, out=out, init_from=out)
    config.training = dataclasses.replace(
        config.training, max_steps=1, lr=lr, max_flops=flops, trackers=["wandb"]
    )
    config.measure.prompts = prompts
    config.data.eval_seq_lens = lengths
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config


def test_dotted_and_nested_keys_say_the_same() -> None:
    nested = from_dict(
        {"model": {"attention": {"kind": "mha"}}, "training": {"max_steps": 2, "trackers": ["wandb"]}}
    )
    dotted = from_dict(
        {"model.attention.kind": "mha", "training.max_steps": 2, "training.trackers": ["wandb"]}
    )
    assert nested == dotted
    assert dict(flatten(to_dict(nested)))["training.trackers"] == ["wandb"]
    with pytest.raises(
        HeadwiseError, match=r"'model.attention.knid' \(did you mean 'model.attention.kind'\?\)"
    ):
        from_dict({"model.attention.knid": "mha"})


ENDS = "--training.max_steps=2"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--modle.d_model=3", "unknown key 'modle.d_model' (did you mean 'model.d_model'?)"),
        ("--model.attention.kindd=mha", "(did you mean 'model.attention.kind'?)"),
        ("--training.max_step=3", "(did you mean 'training.max_steps'?)"),  # no silent abbreviations
        ("--sed=3", "(did you mean 'seed'?)"),
        ("--model.attention.kind=flsh", "model.attention.kind 'flsh' is not known (did you mean 'flash'?)"),
        ("--data.name=enwiki8", "data.name 'enwiki8' is not known (did you mean 'enwik8'?)"),
        ("--training.schedule=cosin", "(did you mean 'cosine'?)"),
        ("--seed=x", "seed: got x, expected int"),
        ("--training.lr=fast", "training.lr: got fast, expected float"),
        ("--training.max_steps=1e3", "training.max_steps: got 1e3, expected int or null"),
        ("--training.compile=maybe", "training.compile: got maybe, expected bool"),
        ("--training.trackers=wandb", "training.trackers: got wandb, expected list, such as [wandb]"),
        ("--model=3", "model: got 3, expected a section of keys"),
        ("--out", "expected one argument"),
        ("stray", "unrecognized arguments: stray"),
        ("--model.n_heads=4 --model.n_kv_heads=3", "model.n_heads 4 is not divisible by model.n_kv_heads 3"),
        ("--model.d_model=30 --model.n_heads=4", "model.d_model 30 is not divisible by model.n_heads 4"),
        ("--model.head_dim=7", "model.head_dim is 7, and RoPE rotates pairs"),
        ("--model.d_model=28", "model.head_dim is 7, and RoPE rotates pairs"),
        ("--model.position=learned --data.eval_seq_lens=[999]", "sequences of 999 tokens exceed the 256"),
        ("--training.total_batch_tokens=1000", "training.total_batch_tokens is 1000, no multiple of"),
        ("--training.lr=.inf", "training.lr is inf"),
        ("--training.min_lr_share=2", "training.min_lr_share is 2.0; it must be in [0, 1]"),
        ("--training.grad_clip=-1", "training.grad_clip is -1.0"),
        ("--training.trackers=[wanb]", "training.trackers 'wanb' is not known (did you mean 'wandb'?)"),
        ("--measure.scores=rope", "measure.scores 'rope' is not known"),
        ("--seed=-1", "seed is -1"),
        (f"--seed={2**63}", f"seed is {2**63}"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(argv: str, said: str) -> None:
    with pytest.raises(HeadwiseError) as error:
        read(ENDS, *argv.split())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle:\n  d_model: 3\n", "(did you mean 'model.d_model'?)"),
        (
            "model:\n  attention:\n    kindd: mha\n",
            "'model.attention.kindd' (did you mean 'model.attention.kind'?)",
        ),
        ("seeds: 3\n", "(did you mean 'seed'?)"),
        ("training:\n  lr: fast\n", "training.lr: got fast, expected float"),
        ("training: 5\n", "training: got 5, expected keys below it"),
        ("model:\n  attention: null\n", "model.attention: got None, expected keys below it"),
        ("model:\n  attention: mha\n", "model.attention: got mha, expected a section of keys"),
        ("a: b: c\n", "it is no YAML: mapping values are not allowed"),
        ("- 1\n", "is no YAML of keys and values: it holds a list"),
        ("", "is no YAML of keys and values: it is empty"),
        ("\udcff", "it is not UTF-8 text"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(HeadwiseError) as error:
        read(f"--config={path}", ENDS)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_configurations_share_nothing() -> None:
    one, other = (from_dict({"training.max_steps": 2}) for _ in range(2))
    one.training.trackers.append("wandb")
    one.model.attention.kind = "mha"
    assert (other.training.trackers, other.model.attention.kind) == ([], "flash")
    assert from_dict({"training.max_steps": 2}) == other


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")


def test_a_run_needs_an_end() -> None:
    with pytest.raises(HeadwiseError, match="the run has no end"):
        read()


def test_every_key_explains_itself() -> None:
    pytest.importorskip("docstring_parser", reason="it reads the sections' docstrings for --help")
    helps = {flag.removeprefix("--"): a.help for a in parser()._actions for flag in a.option_strings}
    assert [key for key in keys() if not helps[key]] == []
