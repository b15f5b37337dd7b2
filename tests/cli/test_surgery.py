"""`headwise surgery` as it is typed: what it writes and says, training on, other sources, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from headwise import report
from headwise.cli.main import main
from headwise.config.run import load
from headwise.questions.sections import sections
from headwise.runs import checkpoint
from headwise.runs import operation as new_head
from headwise.runs.folder import RunFolder
from headwise.runs.weights import load_model

TINY = """
model: {d_model: 32, n_layers: 2, n_heads: 4, attention: {kind: flash}}
data: {name: copy, seq_len: 16, batch_size: 4, vocab_size: 16, eval_sequences: 8}
training: {max_steps: 6, warmup_steps: 1, lr: 0.01, log_every: 1, eval_every: 3}
measure: {maps: 0, heads: false}
device: cpu
"""
HEAD = ("--add-head", "start", "--init")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def source(config: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained run."""
    out = str(tmp_path_factory.mktemp("source") / "X")
    assert main(["train", "--config", config, "--out", out]) == 0
    return out


def record(folder: Path) -> dict:
    return json.loads((folder / "surgery.json").read_text())


def saved(folder: Path, step: int = 0) -> checkpoint.Checkpoint:
    return checkpoint.load(folder / "checkpoints" / checkpoint.folder_name(step))


def test_the_loss_is_unchanged_before_training_and_the_run_trains_from_there(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "Y"
    assert main(["surgery", source, *HEAD, "o_zero", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "4 heads of 8 become 5, kind flash" in said
    assert "the function is preserved: the new head's output is 0" in said
    assert "(unchanged: " in said
    assert f"to train it: headwise train --resume --out {out}" in said
    losses = record(out)["val_loss"]
    assert losses["operated"] == pytest.approx(losses["source"], abs=1e-6)
    log = (out / "log.txt").read_text()
    assert "preserved" in log
    assert "validation loss before any step" in log
    assert (load(out / "config.yaml").model.n_heads, load(out / "config.yaml").model.head_dim) == (5, 8)
    assert RunFolder(out).read_status()["state"] == "planned"

    assert main(["train", "--resume", "--out", str(out)]) == 0
    rows = [row for row in RunFolder(out).read_metrics() if row["split"] == "val"]
    assert float(rows[0]["loss"]) == pytest.approx(losses["source"], abs=1e-6)
    assert float(rows[-1]["loss"]) != pytest.approx(losses["source"], abs=1e-6)
    step, moved = new_head.movement(out)
    assert step == 6
    assert {(m.layer, m.part) for m in moved} == {(layer, part) for layer in (0, 1) for part in "qkvo"}
    assert all(m.moved == 1 and m.nonzero == 1 and m.norm_end > 0 for m in moved)


def test_a_length_trains_at_once_with_another_kind_and_the_report_tells_the_story(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "Y"
    flags = ["--model.attention.kind=selective", "--training.max_tokens=256", "--training.lr=0.02"]
    assert main(["surgery", source, *HEAD, "ko_zero", *flags, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.index("kind flash becomes selective") < said.index("finished after 4 steps")
    assert "every weight of the new head moved in 4 steps, and none is 0" in said
    assert record(out)["unchanged"]
    assert load(out / "config.yaml").training.max_steps is None  # the source's length is not this run's
    paths = report.build(out, sections=sections())
    assert "## Head surgery" in paths["markdown"].read_text()
    assert "flash → selective" in paths["markdown"].read_text()
    assert (out / "figures" / "surgery.png").exists()
    assert 'id="surgery-plots"' in paths["html"].read_text()
    (entry,) = json.loads(paths["json"].read_text())["surgery"]
    assert entry["curve"]["steps"] == [0, 3, 4]
    assert len(entry["movement"]) == 8


def test_a_head_of_zeros_is_warned_of_and_stays(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "Y"
    assert main(["surgery", source, *HEAD, "zero", "--training.max_steps=3", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.index("warning: init zero never learns") < said.index("finished after 3 steps")
    assert "no weight of the new head moved in 3 steps" in said
    assert not any(m.moved or m.norm_end for m in new_head.movement(out)[1])


@pytest.mark.parametrize("place", ["start", "end"])
def test_a_change_of_the_function_is_said_before_and_measured(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    out = tmp_path / "Y"
    flags = ["--add-head", place, "--init", "o_zero", "--model.attention.kind=selective"]
    assert main(["surgery", source, *flags, "--out", str(out)]) == 0
    assert "warning: the function is not preserved: " in capsys.readouterr().out
    assert not record(out)["preserves"]
    assert not record(out)["unchanged"]


def test_the_optimizer_is_kept_with_zeros_for_the_new_head(source: str, tmp_path: Path) -> None:
    out = tmp_path / "Y"
    assert main(["surgery", source, *HEAD, "ko_zero", "--keep-optimizer", "--out", str(out)]) == 0
    before, after = saved(Path(source), 6).optimizer, saved(out).optimizer
    assert before.keys() == after.keys()
    moments = after["blocks.1.attention.qkv.weight.exp_avg"]
    kept = torch.cat([moments[8:40], moments[48:80], moments[88:]])
    assert torch.equal(kept, before["blocks.1.attention.qkv.weight.exp_avg"])
    assert not any(moments[at : at + 8].any() for at in (0, 40, 80))
    assert torch.equal(
        after["blocks.0.attention.out.weight.exp_avg_sq"][:, 8:],
        before["blocks.0.attention.out.weight.exp_avg_sq"],
    )
    assert after["norm.weight.step"] == before["norm.weight.step"] == 6
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert saved(out, 6).optimizer["norm.weight.step"] == 12


def test_others_start_from_it_and_take_the_record_along(source: str, tmp_path: Path) -> None:
    first, second = tmp_path / "Y", tmp_path / "Z"
    assert main(["surgery", source, "--add-head", "end", "--init", "ko_zero", "--out", str(first)]) == 0
    flags = ["--model.attention.kind=selective", "--model.attention.selective.source=linear_combo"]
    command = ["train", "--config", str(first / "config.yaml"), "--init-from", str(first), *flags]
    assert main([*command, "--training.max_steps=2", "--out", str(second)]) == 0
    log = (second / "log.txt").read_text()
    assert f"first weights from {first}; the kind adds attention.{{combination}}, which keep" in log
    assert record(second)["operated_in"] == str(first)
    assert new_head.movement(second)[0] == 2
    assert main([*command, "--model.n_heads=4", "--model.head_dim=10", "--out", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


class TheirBlock(nn.Module):
    """One block of nanoGPT: names and shapes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def nanogpt() -> dict[str, Tensor]:
    """Weights of a nanoGPT of width 12 and two layers; heads are not among what they tell."""
    torch.manual_seed(0)
    gpt = nn.Module()
    gpt.transformer = nn.ModuleDict(
        {"wte": nn.Embedding(16, 12), "wpe": nn.Embedding(20, 12), "ln_f": nn.LayerNorm(12)}
    )
    gpt.transformer["h"] = nn.ModuleList(TheirBlock(12) for _ in range(2))
    return gpt.state_dict() | {"lm_head.weight": gpt.transformer["wte"].weight.detach()}


@pytest.mark.parametrize("how", ["model_args", "--source-heads", "hub"])
def test_a_nanogpt_file(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    data = tmp_path / "data.yaml"
    data.write_text(TINY.replace(TINY.splitlines()[1], ""))
    path, out = tmp_path / "ckpt.pt", tmp_path / "Y"
    torch.save({"model": nanogpt()} | ({"model_args": {"n_head": 3}} if how == "model_args" else {}), path)
    name = str(path)
    if how == "hub":
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: f"{tmp_path}/{file}")
        name = "hf://somebody/something/ckpt.pt"
    heads = [] if how == "model_args" else ["--source-heads=3"]
    command = ["surgery", name, *HEAD, "ko_zero", "--config", str(data), *heads]
    assert main([*command, "--model.attention.kind=selective", "--out", str(out)]) == 0
    assert record(out)["unchanged"]
    model = load_model(out)[0].config
    assert (model.n_heads, model.head_dim, model.d_ff, model.max_seq_len, model.bias) == (4, 4, 48, 20, True)


def test_a_selective_nanogpt_file_loses_its_mask(config: str, tmp_path: Path) -> None:
    data, path = tmp_path / "data.yaml", tmp_path / "ckpt.pt"
    data.write_text(TINY.replace(TINY.splitlines()[1], ""))
    torch.save(nanogpt(), path)
    flags = ["--source-heads=3", "--source-kind=selective", "--model.attention.kind=selective"]
    out = tmp_path / "Y"
    assert main(["surgery", str(path), *HEAD, "zero", "--config", str(data), *flags, "--out", str(out)]) == 0
    assert "trained mask is lost" in record(out)["why"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--add-head start --init ozero", "--init 'ozero' is not known (did you mean 'o_zero'?)"),
        ("--add-head first --init zero", "--add-head 'first' is not known"),
        ("--add-head start", "--init is missing"),
        ("--init zero", "--add-head is missing"),
        ("--add-head end --init zero --model.n_heads=7", "model.n_heads is 7, and with a head added"),
        (
            "--add-head end --init zero --model.d_model=16",
            "tokens.weight is (16, 32) there and (16, 16) here",
        ),
        ("--add-head end --init zero --model.bias=true", "it has no parameter blocks.0.attention.qkv.bias"),
        ("--add-head end --init zero --model.rope=1", "unknown key 'model.rope'"),
        ("--add-head end --init zero --source-heads=4", "--source-heads is for .pt files"),
        (
            "--add-head end --init zero --model.attention.kind=selective --training.max_steps=2 "
            "--model.attention.selective.n_masks=2",
            "source head_zero makes one mask",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    assert main(["surgery", source, *flags.split(), "--out", str(tmp_path / "Y")]) == 2
    captured = capsys.readouterr().err
    assert said in captured
    assert captured.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_sources_and_folders_that_will_not_do(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*command: str) -> str:
        assert main(["surgery", *command]) == 2
        return capsys.readouterr().err

    out = ("--out", str(tmp_path / "Y"))
    torch.save(nanogpt(), tmp_path / "ckpt.pt")
    empty = tmp_path / "empty"
    RunFolder(empty).start((Path(source) / "config.yaml").read_text())
    assert "'nowhere' is not there" in said("nowhere", *HEAD, "zero", *out)
    assert "has no checkpoint yet" in said(str(empty), *HEAD, "zero", *out)
    assert "does not say how many heads" in said(str(tmp_path / "ckpt.pt"), *HEAD, "zero", *out)
    assert "--source-heads is 0" in said(str(tmp_path / "ckpt.pt"), *HEAD, "zero", "--source-heads=0", *out)
    torch.save({"model": nanogpt(), "model_args": {"n_head": "three"}}, tmp_path / "odd.pt")
    assert "says n_head is 'three'" in said(str(tmp_path / "odd.pt"), *HEAD, "zero", *out)
    inside = str(tmp_path / "ckpt.pt" / "Y")
    assert "is a file; give another" in said(source, *HEAD, "zero", "--out", inside)
    heads = "--source-heads=3"
    assert "says nothing of data" in said(str(tmp_path / "ckpt.pt"), *HEAD, "zero", heads, *out)
    assert "holds a run" in said(source, *HEAD, "zero", "--out", source)
    assert "--out is missing" in said(source, *HEAD, "zero")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "surgery runs in one process" in said(source, *HEAD, "zero", *out)
    assert not (tmp_path / "Y").exists()


@pytest.mark.parametrize("command", [[], ["--help"], ["runs/X", "--help"]])
def test_help_needs_no_run(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert main(["surgery", *command]) == 0
    assert "--add-head PLACE" in capsys.readouterr().out


def test_one_step_of_a_run_is_a_source_too(source: str, tmp_path: Path) -> None:
    at = Path(source) / "checkpoints" / "step_00000006"
    assert main(["surgery", str(at), *HEAD, "ko_zero", "--out", str(tmp_path / "Y")]) == 0
    ours, theirs = saved(tmp_path / "Y").model, saved(Path(source), 6).model
    assert torch.equal(ours["blocks.0.mlp.up.weight"], theirs["blocks.0.mlp.up.weight"])
    assert torch.equal(ours["blocks.0.attention.out.weight"][:, 8:], theirs["blocks.0.attention.out.weight"])
