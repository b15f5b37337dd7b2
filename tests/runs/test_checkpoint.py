"""Checkpoints: bit-equal when whole, refused when anything about them is not."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headwise.config.training import TrainingConfig
from headwise.errors import HeadwiseError
from headwise.runs import checkpoint
from headwise.runs.checkpoint import FILES, Checkpoint
from headwise.training.optim import make_optimizer


def made(step: int = 3) -> Checkpoint:
    torch.manual_seed(step)
    model = {"a.weight": torch.randn(4, 3), "b": torch.randn(5).bfloat16(), "t": torch.randn(3, 2).T}
    slots = {"a.weight.exp_avg": torch.randn(4, 3), "a.weight.step": torch.tensor(float(step))}
    return Checkpoint(model, slots, {"step": step, "best_loss": 0.1 + 0.2})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = made()
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved))
    assert same(loaded.model, saved.model)
    assert same(loaded.optimizer, saved.optimizer)
    assert loaded.state == saved.state


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "emptied"])
def test_damage_to_any_file_is_found(tmp_path: Path, name: str, damage: str) -> None:
    path = checkpoint.save(tmp_path, made())
    content = (path / name).read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        (path / name).unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (path / name).write_bytes({"truncated": content[:-1], "flipped": flipped, "emptied": b""}[damage])
    with pytest.raises(HeadwiseError, match=r"incomplete|damaged") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_a_manifest_with_any_byte_flipped_never_lets_wrong_content_through(tmp_path: Path, flip: int) -> None:
    saved = made()
    path = checkpoint.save(tmp_path, saved)
    content = (path / "manifest.json").read_bytes()
    for place in range(len(content)):
        (path / "manifest.json").write_bytes(
            content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
        )
        try:
            loaded = checkpoint.load(path)
        except HeadwiseError:
            continue
        assert same(loaded.model, saved.model)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, made())
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": checkpoint.FORMAT + 1}))
    with pytest.raises(HeadwiseError, match="upgrade headwise"):
        checkpoint.load(path)


def test_no_folder_there_is_an_error_of_the_users(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=r"incomplete: manifest\.json is missing"):
        checkpoint.load(tmp_path / "step_00000001")


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (15, 2.2)):
        path = checkpoint.save(tmp_path, made(step))
        if loss <= 1.0:
            checkpoint.mark_best(tmp_path, path.name, loss)
        checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.json", "step_00000002", "step_00000004", "step_00000015",
    ]  # fmt: skip
    latest, best = checkpoint.latest(tmp_path), checkpoint.best(tmp_path)
    assert latest is not None
    assert best is not None
    assert (latest.name, best.name) == ("step_00000015", "step_00000002")
    shutil.rmtree(best)
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.latest(tmp_path) == latest


def test_a_draft_of_a_killed_writer_is_no_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, made(1))
    draft = tmp_path / ".step_00000002.abcd1234.draft" / "step_00000002"
    shutil.copytree(path, draft)
    assert checkpoint.latest(tmp_path) == path


def test_a_full_disk_keeps_what_was_saved(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, made(1))
    big = made(2)
    big.optimizer["a.weight.exp_avg"] = torch.zeros(1000, 1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(HeadwiseError, match="step_00000002 was not written; free space there"):
            checkpoint.save(tmp_path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [first]
    checkpoint.load(first)


def net(width: int = 4) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2, bias=False))


def test_the_optimizer_goes_on_as_if_it_had_never_stopped() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
        model(torch.full((2, 3), float(n))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole = net()
    optimizer = make_optimizer(whole, TrainingConfig(lr=0.1))
    for n in (1, 2):
        step(whole, optimizer, n)
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    slots = {name: t.clone() for name, t in checkpoint.optimizer_tensors(whole, optimizer).items()}
    step(whole, optimizer, 3)

    second = net()
    again = make_optimizer(second, TrainingConfig(lr=0.1))
    checkpoint.load_weights(second, weights, "here")
    assert checkpoint.restore_optimizer(second, again, slots) == []
    step(second, again, 3)
    assert same(dict(second.named_parameters()), dict(whole.named_parameters()))

    wider = net(5)
    missing = checkpoint.restore_optimizer(wider, make_optimizer(wider, TrainingConfig()), slots)
    assert missing == ["0.weight", "0.bias", "1.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0.bias": None}, "it has no parameter 0.bias"),
        ({"0.weight": torch.zeros(5, 3)}, r"0.weight is \(5, 3\) there and \(4, 3\) here"),
        ({"2.weight": torch.zeros(1)}, "this model has no parameter 2.weight"),
    ],
)
def test_weights_of_another_model_name_the_first_that_differs(
    change: dict[str, Tensor | None], said: str
) -> None:
    model = net()
    weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()} | change
    with pytest.raises(HeadwiseError, match=f"FILE is from another configuration: {said}"):
        checkpoint.load_weights(model, {k: v for k, v in weights.items() if v is not None}, "FILE")
    assert all(p.any() for p in model.parameters())  # nothing was copied
