"""The trainer: what a step computes, what it never applies, how a run ends, what it leaves behind."""

from __future__ import annotations

import csv
import itertools
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from headwise.data.corpus import Corpus
from headwise.errors import HeadwiseError
from headwise.runs import checkpoint
from headwise.runs.folder import RunFolder
from headwise.training.distributed import World
from headwise.training.heartbeat import beating
from headwise.training.trainer import Trainer

Make = Callable[..., Trainer]


def rows(trainer: Trainer, split: str = "train") -> list[dict[str, str]]:
    with trainer.folder.metrics.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 110, 4000, dtype=np.uint8).tobytes())
    return str(path)


# -- a step ---------------------------------------------------------------------------------------


def test_accumulation_equals_one_big_batch(make_trainer: Make) -> None:
    """On the copy task, whose passes have different numbers of targets."""
    whole = make_trainer(**{"data.batch_size": 4})
    parts = make_trainer(**{"data.batch_size": 1, "training.total_batch_tokens": 64})
    whole.run(), parts.run()
    for one, other in zip(rows(whole), rows(parts), strict=True):
        for column in ("loss", "grad_norm", "tokens", "lr"):
            assert float(one[column]) == pytest.approx(float(other[column]), rel=1e-5), column
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_over_the_targets_that_are_there(make_trainer: Make) -> None:
    """Rows of token shards as long as a sequence have one target less than tokens."""
    tokens = np.random.default_rng(0).integers(0, 16, (20, 16))
    data = Corpus(
        {"train": tokens, "val": tokens[:3], "test": tokens[:3]}, seq_len=16, seed=0, vocab_size=16,
        identity={"name": "shards", "checksum": "0"},
    )  # fmt: skip
    trainer = make_trainer(data, **{"training.max_steps": 1, "training.grad_clip": 0.0})
    inputs, targets = data.batch("train", data.train_indices(0, 4))
    loss = F.cross_entropy(trainer.model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
    trainer.optimizer.zero_grad()
    trainer.run()
    assert float(rows(trainer)[0]["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    assert float(rows(trainer)[0]["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_gradients_are_clipped_after_their_norm_is_taken(make_trainer: Make, clip: float) -> None:
    trainer = make_trainer(**{"training.grad_clip": clip})
    applied = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        applied.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]).item())

    trainer.optimizer.register_step_pre_hook(look)
    trainer.run()
    seen = [float(row["grad_norm"]) for row in rows(trainer)]
    assert min(seen) > 0.05
    assert applied == pytest.approx([clip] * len(seen) if clip else seen, rel=1e-4)


def spoil(trainer: Trainer, *steps: int) -> None:
    """Make the model's last hidden layer NaN in training at these steps (from 0)."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        spoiled = trainer.model.training and trainer.step in steps
        return output * math.nan if spoiled else output

    trainer.model.blocks[1].mlp.up.register_forward_hook(hook)  # type: ignore[union-attr, operator]


def test_a_non_finite_step_is_skipped_and_counted(make_trainer: Make) -> None:
    trainer = make_trainer()
    spoil(trainer, 2)
    before: list[dict[str, Tensor]] = []
    trainer.should_stop = lambda: before.append(weights(trainer)) is not None
    state, _ = trainer.run()
    assert state == "finished"
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(before)]
    assert changed == [True, False, True, True, True]  # after steps 2 to 6
    assert trainer.telemetry.totals()["nonfinite_share"] == pytest.approx(1 / 6)
    assert [row["loss"] for row in rows(trainer)].count("nan") == 1
    assert all(math.isfinite(float(row["smooth_loss"])) for row in rows(trainer))


def test_a_run_that_stays_non_finite_has_diverged(make_trainer: Make) -> None:
    trainer = make_trainer(**{"training.max_nonfinite": 3, "training.max_steps": 50})
    spoil(trainer, *range(1, 50))
    state, reason = trainer.run()
    assert (state, trainer.step) == ("diverged", 4)
    assert reason.startswith("3 steps in a row had a non-finite loss or gradient, the last at step 4")
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert checkpoint.latest(trainer.folder.checkpoints) is None


def test_the_debug_switch_names_the_first_module_that_fails(make_trainer: Make) -> None:
    trainer = make_trainer(**{"training.debug_steps": 3})
    spoil(trainer, 1)
    state, reason = trainer.run()
    assert state == "diverged"
    assert reason.startswith(
        "step 2: blocks.1.mlp.up (Linear) is the first module with a non-finite output: "
    )
    assert not any(module._forward_hooks for module in trainer.model.blocks[0].modules())


# -- the end of a run -----------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "steps"), [("max_tokens", 5), ("max_flops", 3)])
def test_tokens_and_flops_end_a_run(make_trainer: Make, limit: str, steps: int) -> None:
    one = make_trainer()
    per_step = {"max_tokens": 64, "max_flops": 64 * one.flops_per_token}[limit]
    trainer = make_trainer(**{f"training.{limit}": int(per_step * (steps + 0.9)), "training.max_steps": 9})
    state, reason = trainer.run()
    assert (state, trainer.step, reason) == ("finished", steps, f"{steps} steps")
    assert int(rows(trainer)[-1]["tokens"]) == 64 * steps
    assert int(rows(trainer)[-1]["flops"]) == 64 * steps * one.flops_per_token


def test_a_timeout_evaluates_and_saves_what_is_there(make_trainer: Make) -> None:
    trainer = make_trainer(**{"training.timeout_s": 1e-9})
    state, reason = trainer.run()
    assert (state, reason) == ("timed_out", "1e-09 s passed at step 1")
    assert [row["step"] for row in rows(trainer, "val")] == ["0", "1"]
    assert checkpoint.latest(trainer.folder.checkpoints) == trainer.folder.checkpoints / "step_00000001"


# -- what it leaves behind ------------------------------------------------------------------------


def test_evaluations_are_exact_and_say_the_same_in_every_unit(make_trainer: Make, text: str) -> None:
    trainer = make_trainer(**{
        "data.name": "text", "data.path": text, "data.eval_seq_lens": [40], "training.max_steps": 3,
    })  # fmt: skip
    trainer.run()
    split = torch.tensor(trainer.data.splits["val"][0].astype(np.int64))  # type: ignore[attr-defined]
    trainer.model.eval()
    for name, length in (("val", 16), ("val@40", 40)):
        losses = []  # every byte but the first, each predicted within its window
        for start in range(0, len(split) - 1, length):
            window = split[start : start + length + 1]
            with torch.no_grad():
                logits = trainer.model(window[None, :-1])[0]
            losses.append(F.cross_entropy(logits.double(), window[1:], reduction="none"))
        direct = torch.cat(losses)
        assert len(direct) == len(split) - 1
        last = rows(trainer, name)[-1]
        loss = float(last["loss"])
        assert loss == pytest.approx(direct.mean().item(), rel=1e-5)
        assert float(last["perplexity"]) == pytest.approx(math.exp(loss))
        assert float(last["bits_per_byte"]) == pytest.approx(loss / math.log(2))
    assert [row["step"] for row in rows(trainer, "val")] == ["0", "3"]
    assert [row["step"] for row in rows(trainer, "val@40")] == ["3"]


def test_a_length_that_the_data_lacks_is_refused_before_training(make_trainer: Make, text: str) -> None:
    with pytest.raises(HeadwiseError, match=r"data\.seq_len=4000 is longer than"):
        make_trainer(**{"data.name": "text", "data.path": text, "data.eval_seq_lens": [4000]})


def test_smoothed_loss_in_the_log(make_trainer: Make) -> None:
    trainer = make_trainer(**{"training.smoothing": 0.5})
    trainer.run()
    losses = [float(row["loss"]) for row in rows(trainer)]
    weights = [0.5**n for n in range(len(losses))]
    mean = sum(w * x for w, x in zip(weights, reversed(losses), strict=True)) / sum(weights)
    assert float(rows(trainer)[-1]["smooth_loss"]) == pytest.approx(mean)


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(make_trainer: Make) -> None:
    trainer = make_trainer(**{
        "training.checkpoint_every": 2, "training.max_steps": 12, "training.keep_checkpoints": 1,
        "training.lr": 0.3, "training.schedule": "constant",
    })  # fmt: skip
    trainer.run()
    losses = {int(row["step"]): float(row["loss"]) for row in rows(trainer, "val") if row["step"] != "0"}
    best = min(losses, key=losses.__getitem__)
    assert best < 12, "the test needs a run whose best is not its last"
    kept = sorted(p.name for p in trainer.folder.checkpoints.glob("step_*"))
    assert kept == [f"step_{best:08d}", "step_00000012"]
    marked = json.loads((trainer.folder.checkpoints / "best.json").read_text())
    assert marked == {"checkpoint": f"step_{best:08d}", "val_loss": losses[best]}


def test_a_profile_writes_a_trace_and_the_hottest_operators(make_trainer: Make) -> None:
    trainer = make_trainer(**{"training.profile_steps": 2})
    trainer.run()
    profile = trainer.folder.path / "profile"
    assert sorted(path.name for path in profile.iterdir()) == ["operators.txt", "trace.json"]
    assert "aten::mm" in (profile / "operators.txt").read_text()
    assert json.loads((profile / "trace.json").read_text())["traceEvents"]


def test_processes_must_share_a_batch_equally(make_trainer: Make, tmp_path: Path) -> None:
    alone = make_trainer()
    with pytest.raises(HeadwiseError, match=r"data\.batch_size 4 cannot be shared equally by 3 processes"):
        Trainer(alone.config, alone.model, alone.data, World(0, 3, torch.device("cpu")), alone.folder)


def test_a_heart_beats_while_the_run_is_busy_with_something_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start("seed: 1\n")
    asked, again = threading.Event(), threading.Event()

    def about() -> dict[str, Any]:
        (again if asked.is_set() else asked).set()
        return {"step": 7}

    with beating(folder, about, every_s=0.001):
        assert again.wait(10)  # the first beat is written by then
        assert folder.read_status()["step"] == 7
    beat = folder.read_status()
    assert beat["state"] == "running"
    assert not [t for t in threading.enumerate() if t.name == "heartbeat"]
