"""The selective attention log's questions as studies: valid, complete, of any size, with their identities."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwise.attention.selective.layer import SelectiveAttention
from headwise.cli.main import main
from headwise.config.run import Config, flatten, to_dict
from headwise.errors import HeadwiseError
from headwise.model.decoder import Decoder
from headwise.study.plan import plan
from headwise.study.read import override, read_study
from headwise.study.study import Study
from headwise.training.loss import TokenLoss
from headwise.training.optim import make_optimizer, set_learning_rate

FOLDER = Path(__file__).parents[2] / "configs" / "studies"
PRESETS = sorted(path.stem for path in FOLDER.glob("selective-*.yaml"))
SAME = {
    "selective-protection": {"unselective": "leaky_relu_of_the_log"},
}
"""Variants with one configuration: what the log called by two names and ran as one."""


def configs(study: Study, root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Config]:
    """The configurations of the study's first seed, in a folder where what they start from exists."""
    monkeypatch.chdir(root)
    for variant in study.variants.values():
        if "init_from" in variant.overrides:
            Path(variant.overrides["init_from"]).mkdir(parents=True, exist_ok=True)
    study.seeds, study.device = study.seeds[:1], "cpu"
    return {run.variant: run.config for run in plan(study, root)}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_study_of_different_variants(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(FOLDER / f"{name}.yaml")
    assert study.title
    assert study.question.endswith("?")
    assert len(study.hypothesis) > 100
    assert len(study.seeds) >= 3
    assert study.budget
    found = configs(study, tmp_path, monkeypatch)
    assert study.baseline in found
    selecting = [c for c in found.values() if c.model.attention.kind == "selective"]
    assert any(config.model.attention.selective.enabled for config in selecting)
    texts: dict[str, str] = {}
    for variant, config in found.items():
        text = str([item for item in flatten(to_dict(config)) if item[0] != "out"])
        assert texts.setdefault(text, variant) in (variant, *SAME.get(name, {})), variant
    assert len({variant.label for variant in study.variants.values()}) == len(study.variants)


def test_a_preset_runs_at_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(FOLDER / "selective-13-heads.yaml")
    for key, value in {
        "model.d_model": "768", "model.head_dim": "64", "model.n_layers": "12", "data.seq_len": "1024",
        "budget.kind": "tokens", "budget.value": "1e9", "training.lr": "6e-4",
        "variants.thirteen.training.lr": "3e-4", "axes.training.weight_decay": "[0.1, 0.2]",
    }.items():  # fmt: skip
        override(study, key, value)
    found = configs(study, tmp_path, monkeypatch)
    thirteen, twelve = (found[f"{name}@weight_decay=0.2"] for name in ("thirteen", "twelve_two_masks"))
    assert [c.model.width_of_head() for c in (thirteen, twelve)] == [64, 64]
    assert [c.model.n_heads for c in (thirteen, twelve)] == [13, 12]
    assert [c.training.lr for c in (thirteen, twelve)] == [3e-4, 6e-4]
    assert twelve.training.max_tokens == 1_000_000_000
    assert twelve.training.max_steps is None


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model.dmodel=8"], "did you mean 'model.d_model'"),
        (["--training.max_steps=8"], "the budget decides"),
        (["--model.attention.selective.source=latent", "--model.attention.kind"], "is not --KEY=VALUE"),
        (["--axes.data.seq_len=8"], "a list of values"),
        (["--variants.nine.training.lr=1"], "variant 'nine"),
        (["--budget.sort=tokens"], "did you mean 'kind'|choose from kind, value"),
        (["--model.n_heads=[1"], "not a YAML value"),
        (["--data.seq_len=x"], "data.seq_len"),
        (["--axes.data.seq_len=[8,16]", "--data.seq_len=8"], "is an axis"),
    ],
)
def test_an_override_that_changes_nothing_is_refused(
    flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(FOLDER / "selective-token-protection.yaml")
    assert main(["study", file, "--plan", "--out", str(tmp_path / "runs"), *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(reason, error), error
    assert error.count("\n") == 1


def test_a_study_says_what_its_runs_start_from_before_any_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(FOLDER / "selective-new-head.yaml")
    study.device = "cpu"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HeadwiseError, match=r"runs/new-head/ko_zero, which is not there"):
        plan(study, tmp_path)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("selective-protection", "none", "zero"),
        ("selective-protection", "unselective", "big_constant"),
        ("selective-linear-combination", "head_zero", "from_head_zero_lr_0"),
        ("selective-running-sums", "torch", "fused"),
        ("selective-running-sums", "torch", "float64"),
        ("selective-running-sums", "torch", "zero_sequential"),
    ],
)
def test_what_is_one_function_learns_alike(
    name: str, one: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = configs(read_study(FOLDER / f"{name}.yaml"), tmp_path, monkeypatch)
    ours, theirs = (learned(found[variant]) for variant in (one, other))
    assert ours[0] - ours[-1] > 0.1
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_a_penalty_changes_what_is_learned_and_nothing_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = configs(read_study(FOLDER / "selective-memory-penalty.yaml"), tmp_path, monkeypatch)
    losses = {name: learned(found[name]) for name in ("none", "max_0.1", "mean_0.1")}
    assert losses["none"][0] == losses["max_0.1"][0] == losses["mean_0.1"][0]
    assert len({loss[-1].item() for loss in losses.values()}) == 3


def test_equal_bytes_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of width D that a token costs in keys, values and selection keys, as the labels say."""
    study = read_study(FOLDER / "selective-13-heads.yaml")
    for name, config in configs(study, tmp_path, monkeypatch).items():
        layer = model_of(config).attentions()[0]
        assert isinstance(layer, SelectiveAttention)
        kept = 2 * layer.shape.n_kv_heads * layer.shape.head_dim
        if layer.config.enabled and layer.select is not None:
            kept += layer.select.out_features // 2
        assert f"({kept / layer.shape.head_dim:g} D)" in study.variants[name].label


def model_of(config: Config) -> Decoder:
    torch.manual_seed(0)
    return Decoder(dataclasses.replace(config.model, vocab_size=32), config.data.seq_len)


def learned(config: Config, steps: int = 4) -> Tensor:
    """Losses of the first steps on random tokens that repeat."""
    model = model_of(config)
    loss, optimizer = TokenLoss(model), make_optimizer(model, config.training)
    set_learning_rate(optimizer, config.training.lr)
    tokens = torch.randint(32, (2, 25), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        summed, _, penalty = loss(tokens[:, :-1], tokens[:, 1:])
        mean = summed / tokens[:, 1:].numel()
        (mean + penalty).backward()
        optimizer.step()
        found.append(mean.detach())
    return torch.stack(found)
