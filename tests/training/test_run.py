"""Runs from a configuration: resumed exactly, started from weights, measured head by head."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from headwise.config.run import Config, from_dict
from headwise.errors import HeadwiseError
from headwise.measures import table as head_table
from headwise.runs import checkpoint
from headwise.runs.folder import RunFolder
from headwise.runs.weights import load_model
from headwise.training.evaluate import evaluate_run
from headwise.training.progress import Silent
from headwise.training.run import train
from tests.fixtures.kills import cut_back

TINY = {
    "model.d_model": 32, "model.n_layers": 2, "model.n_heads": 4, "model.n_kv_heads": 2,
    "model.dropout": 0.1, "model.attention.kind": "flash", "model.attention.dropout": 0.1,
    "data.name": "copy", "data.seq_len": 16, "data.batch_size": 2, "data.vocab_size": 16,
    "data.eval_sequences": 6, "training.total_batch_tokens": 64, "training.max_steps": 12,
    "training.warmup_steps": 2, "training.log_every": 1, "training.eval_every": 5,
    "training.checkpoint_every": 3, "training.keep_checkpoints": 9, "seed": 7, "device": "cpu",
    "measure.map_tokens": 8,
}  # fmt: skip
TIMINGS = ("tokens_per_sec", "step_time_ms", "flops_per_sec", "data_wait")


def tiny(out: Path, **overrides: Any) -> Config:
    return from_dict(TINY | {"out": str(out)} | overrides)


def log(folder: Path) -> list[dict[str, str]]:
    """metrics.csv as text, without what a clock decides."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def tensors(folder: Path, step: int) -> dict[str, Tensor]:
    saved = checkpoint.load(folder / "checkpoints" / checkpoint.folder_name(step))
    return saved.model | saved.optimizer


def assert_same_run(one: Path, other: Path, step: int = 12) -> None:
    """Bit for bit: every number in the log, the weights, the optimizer, the head table."""
    assert log(one) == log(other)
    ours, theirs = tensors(one, step), tensors(other, step)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    tables = [head_table.read(folder / "heads").drop("run") for folder in (one, other)]
    assert tables[0].equals(tables[1])
    summaries = [RunFolder(folder).read_summary() for folder in (one, other)]
    for key in ("val_loss", "best_val_loss", "train_loss", "step", "tokens", "flops", "spike_share"):
        assert summaries[0][key] == summaries[1][key], key


class Press(Silent):
    """Presses Ctrl-C, or sends another signal, when a step is done."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.at, self.said, self.number = step, "", number

    def update(self, step: int, values: dict[str, Any]) -> None:
        if step == self.at:
            self.at = -1
            signal.raise_signal(self.number)

    def say(self, line: str) -> None:
        self.said += line


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny(out))["state"] == "finished"
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


# -- resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "number"), [(4, signal.SIGINT), (6, signal.SIGTERM)])
def test_ctrl_c_saves_the_step_and_a_resume_is_exact(
    whole: Path, tmp_path: Path, step: int, number: int
) -> None:
    """In the middle of everything, and on a step that is evaluated and saved anyway."""
    press = Press(step, number)
    before = signal.getsignal(signal.SIGINT)
    summary = train(tiny(tmp_path / "run"), progress=press)
    assert (summary["state"], summary["step"], summary["signal"]) == ("interrupted", step, number)
    assert "finishing this step" in press.said
    assert signal.getsignal(signal.SIGINT) is before
    folder = RunFolder(tmp_path / "run")
    assert folder.read_status()["state"] == "interrupted"
    assert not folder.summary.exists()
    assert train(tiny(folder.path), resume=True)["state"] == "finished"
    assert_same_run(folder.path, whole)
    status = folder.read_status()
    assert (status["state"], status["reason"]) == ("finished", "12 steps")


@pytest.mark.parametrize("step", [-1, 3, 9, 12])
def test_a_killed_run_resumes_from_whatever_it_had(whole: Path, copied: Path, step: int) -> None:
    """Before the first checkpoint, in between, and after the last one but before the summary."""
    cut_back(copied, step)
    draft = copied / "checkpoints" / ".step_00000099.abcd1234.draft" / "step_00000099"
    draft.mkdir(parents=True)
    with (copied / "metrics.csv").open("a") as file:
        file.write("12,tra")
    assert train(tiny(copied), resume=True)["step"] == 12
    assert not draft.parent.exists()
    assert_same_run(copied, whole)


def test_a_kill_between_saving_the_best_and_marking_it_is_mended(copied: Path) -> None:
    marked = (copied / "checkpoints" / "best.json").read_text()
    best = int(json.loads(marked)["checkpoint"].removeprefix("step_"))
    cut_back(copied, best)
    (copied / "checkpoints" / "best.json").unlink()
    train(tiny(copied), resume=True)
    assert (copied / "checkpoints" / "best.json").read_text() == marked


def test_a_kill_before_anything_but_the_configuration_is_mended(whole: Path, copied: Path) -> None:
    for path in copied.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(tiny(copied), resume=True)
    assert_same_run(copied, whole)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training.lr", 0.5, "holds a run with training.lr=0.001, and this command says 0.5"),
        ("data.eval_sequences", 8, "holds a run with data.eval_sequences=6"),
        ("model.n_layers", 1, "holds a run with model.n_layers=2"),
        ("seed", 8, "holds a run with seed=7"),
    ],
)
def test_a_resume_refuses_another_configuration(copied: Path, key: str, value: Any, said: str) -> None:
    """Whether it has finished or not, and before anything of it is touched."""
    for state in ("finished", "interrupted"):
        if state == "interrupted":
            cut_back(copied, 6)
        before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
        with pytest.raises(HeadwiseError, match=said):
            train(tiny(copied, **{key: value}), resume=True)
        assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_a_resume_refuses_other_data_of_the_same_name(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_bytes(b"abcd" * 400)
    own = {"data.name": "text", "data.path": str(text), "data.vocab_size": None, "training.max_steps": 3}
    train(tiny(out, **own), progress=Press(2))
    text.write_bytes(b"abce" * 400)
    with pytest.raises(HeadwiseError, match="was trained on other data"):
        train(tiny(out, **own), resume=True)
    text.write_bytes(b"abcd" * 400)
    moved = text.rename(tmp_path / "moved.txt")  # where it lies does not matter
    assert train(tiny(out, **own | {"data.path": str(moved)}), resume=True)["state"] == "finished"


def test_a_finished_run_stays_as_it_is(copied: Path) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in copied.rglob("*") if p.is_file()}
    summary = train(tiny(copied), resume=True)
    assert "nothing is left to do" in summary["reason"]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in copied.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_refused_and_the_one_before_taken_once_it_is_gone(
    whole: Path, copied: Path
) -> None:
    cut_back(copied, 9)
    last = copied / "checkpoints" / "step_00000009"
    (last / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(HeadwiseError, match="delete that folder to resume from the one before"):
        train(tiny(copied), resume=True)
    shutil.rmtree(last)
    train(tiny(copied), resume=True)
    assert_same_run(copied, whole)


def test_a_folder_with_another_run_is_refused(copied: Path) -> None:
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    with pytest.raises(HeadwiseError, match="holds another run; pass --resume"):
        train(tiny(copied))
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.training.run.SAME_PRESS_S", -1.0)  # else it is an echo

    class Twice(Press):
        def say(self, line: str) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path / "run"), progress=Twice(2))
    assert RunFolder(tmp_path / "run").read_status()["state"] == "interrupted"


# -- first weights --------------------------------------------------------------------------------


def first_loss(folder: Path) -> float:
    return float(next(row for row in log(folder) if row["split"] == "val")["loss"])


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_starts_from_the_best_weights_of_another(whole: Path, tmp_path: Path, keep: bool) -> None:
    own = {"init_from": str(whole), "training.keep_optimizer": keep, "training.max_steps": 1, "seed": 8}
    summary = train(tiny(tmp_path / "run", **own))
    best = json.loads((whole / "checkpoints" / "best.json").read_text())
    assert first_loss(tmp_path / "run") == pytest.approx(best["val_loss"], rel=1e-6)
    assert summary["step"] == 1
    steps = {v.item() for k, v in tensors(tmp_path / "run", 1).items() if k.endswith(".step")}
    assert steps == {int(best["checkpoint"].removeprefix("step_")) + 1 if keep else 1}


def test_a_resume_before_the_first_checkpoint_has_the_same_first_weights(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny(out, **{"init_from": str(whole), "training.max_steps": 3, "seed": 8})
    train(config)
    before = log(out)
    cut_back(out, -1)
    train(config, resume=True)
    assert log(out) == before


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"init_from": "nowhere"}, "'nowhere' is not there"),
        ({"model.d_model": 16}, r"tokens.weight is \(16, 32\) there and \(16, 16\) here"),
        ({"model.n_layers": 3}, r"it has no parameter blocks\.2\.attention_norm\.weight"),
        ({"model.n_layers": 1}, r"this model has no parameter blocks\.1\."),
    ],
)
def test_weights_that_do_not_fit_claim_no_folder(
    whole: Path, tmp_path: Path, overrides: dict[str, Any], said: str
) -> None:
    with pytest.raises(HeadwiseError, match=said):
        train(tiny(tmp_path / "run", **{"init_from": str(whole)} | overrides))
    assert list(tmp_path.iterdir()) == []


# -- heads ----------------------------------------------------------------------------------------


def entropies(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """Directly: attention weights of the saved model on the first validation sequences, (L, S, H, T)."""
    from headwise.data import open_data
    from headwise.model.decoder import Decoder

    assert config.out is not None
    model = Decoder(dataclasses.replace(config.model, vocab_size=16), 16).eval()
    saved = checkpoint.load(Path(config.out) / "checkpoints" / checkpoint.folder_name(step))
    checkpoint.load_weights(model, saved.model, "here")
    tokens = open_data(config.data, config.seed).batch("val", np.arange(config.measure.sequences)).inputs
    weights: list[Tensor] = []

    def look(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        q, k, _ = module.heads(args[0])
        q, k = kwargs["rope"](q, k)
        k = k.repeat_interleave(2, dim=1)
        hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
        logits = (q @ k.transpose(-1, -2)).double() * module.scale
        weights.append(logits.masked_fill(hidden, -torch.inf).softmax(-1))

    for layer in model.attentions():
        layer.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(tokens)
    p = torch.stack(weights)
    return p, -torch.special.xlogy(p, p).sum(-1)


def test_every_head_is_measured_at_every_evaluation(whole: Path) -> None:
    table = head_table.read(whole / "heads")
    steps = sorted({int(row["step"]) for row in log(whole) if row["split"] == "val"})
    assert table["step"].unique().sort().to_list() == steps == [0, 3, 5, 6, 9, 10, 12]
    assert table.group_by("step").len()["len"].unique().to_list() == [2 * 4]
    assert table["token"].null_count() == table["sample"].null_count() == len(table)
    p, entropy = entropies(tiny(whole), 9)
    rows = table.filter(pl.col("step") == 9).sort("layer", "head")
    np.testing.assert_allclose(
        rows["entropy"].to_numpy(), entropy[..., 2:].mean((1, 3)).flatten(), rtol=1e-5
    )  # the first tokens see too little to count
    np.testing.assert_allclose(rows["max_weight"].to_numpy(), p.amax(-1).mean((1, 3)).flatten(), rtol=1e-5)
    maps = np.load(whole / "maps" / "step_00000009.npz", allow_pickle=False)
    np.testing.assert_allclose(maps["weights_0"], p[:, 0, :, :8, :8], atol=1e-3)
    assert maps["tokens_0"].shape == (8,)


def test_heads_token_by_token(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", **{"measure.per_token": True, "measure.maps": 0, "training.max_steps": 1})
    train(config)
    rows = head_table.read(tmp_path / "run" / "heads").filter(pl.col("step") == 1)
    assert len(rows) == 2 * 4 * 4 * 16  # L · S · H · T
    rows = rows.sort("layer", "sample", "head", "token")
    _, entropy = entropies(config, 1)
    seen = rows["entropy"].to_numpy().reshape(entropy.shape)
    assert np.isnan(seen[..., :2]).all()
    np.testing.assert_allclose(seen[..., 2:], entropy[..., 2:], rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "run" / "maps").exists()


def test_heads_are_not_measured_on_what_fills_up_a_window(tmp_path: Path) -> None:
    """A validation text of 52 bytes has three whole windows of 16, and four bytes that begin another."""
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 11)
    about = {"data.name": "text", "data.path": str(tmp_path / "text.txt"), "data.cache": str(tmp_path / "c")}
    config = from_dict(
        {k: v for k, v in TINY.items() if k not in ("data.vocab_size", "data.eval_sequences")}
        | about
        | {"out": str(tmp_path / "run"), "measure.per_token": True, "measure.maps": 4,
           "training.max_steps": 1, "measure.sequences": 8}
    )  # fmt: skip
    train(config)
    rows = head_table.read(tmp_path / "run" / "heads").filter(pl.col("step") == 1)
    assert rows.group_by("layer", "head").len()["len"].unique().to_list() == [3 * 16]
    assert len(np.load(tmp_path / "run" / "maps" / "step_00000001.npz", allow_pickle=False).files) == 3 * 2


def test_heads_are_not_measured_where_nobody_asks(whole: Path, tmp_path: Path) -> None:
    """Watching changes nothing that is computed."""
    train(tiny(tmp_path / "run", **{"measure.heads": False, "measure.maps": 0}))
    assert not (tmp_path / "run" / "heads").exists()
    assert log(tmp_path / "run") == log(whole)


# -- what a run says ------------------------------------------------------------------------------


def test_the_folder_says_what_ran(whole: Path) -> None:
    folder = RunFolder(whole)
    environment, summary = folder.read_environment(), folder.read_summary()
    assert environment["engine"] == summary["engine"] == "sdpa"
    assert environment["data"]["checksum"] == summary["data_checksum"]
    assert summary["chance_loss"] == pytest.approx(np.log(16))
    assert summary["params_total"] == sum(summary["params"].values())
    assert summary["peak_vram_mb"] is None
    assert (summary["n_kv_heads"], summary["head_dim"], summary["batch_size"]) == (2, 8, 4)
    assert "finished: 12 steps" in folder.log.read_text()


def test_an_engine_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="ran on engine 'sdpa', but expected_engine is 'flex'"):
        train(tiny(tmp_path / "run", expected_engine="flex"))
    assert list(tmp_path.iterdir()) == []


def test_evaluation_afterwards_gives_the_losses_of_the_best_checkpoint(copied: Path) -> None:
    found = evaluate_run(tiny(copied, **{"data.eval_seq_lens": [32]}))
    assert list(found) == ["val", "val@32", "test", "test@32"]
    assert found["val"]["loss"] == pytest.approx(RunFolder(copied).read_summary()["best_val_loss"], rel=1e-6)
    assert json.loads((copied / "eval.json").read_text()) == found
    with pytest.raises(HeadwiseError, match=r"the data has 99 tokens and the model .* knows 16"):
        evaluate_run(tiny(copied, **{"data.vocab_size": 99}))
    model, _ = load_model(copied)
    assert not model.training


@pytest.mark.parametrize("who", [{}, {"pid": None, "host": "elsewhere"}, {"host": "elsewhere"}])
def test_a_run_whose_process_is_not_known_is_still_not_resumed(tmp_path: Path, who: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start("seed: 0\n")
    status = {"state": "running", "heartbeat": time.time()} | who
    (folder.path / "status.json").write_text(json.dumps(status))
    with pytest.raises(HeadwiseError, match="is running in process"):
        train(tiny(tmp_path / "run"), resume=True)
