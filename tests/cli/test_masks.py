"""`headwise masks` from a run folder to its page."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from headwise.cli.main import main
from headwise.config.run import from_dict
from headwise.questions.masks.measure import look
from headwise.questions.masks.page import statements
from headwise.training.run import train

TINY = {
    "model.d_model": 16, "model.n_layers": 2, "model.n_heads": 2, "model.attention.kind": "selective",
    "data.seq_len": 16, "data.batch_size": 4, "training.max_steps": 1, "measure.heads": False,
    "measure.maps": 0, "device": "cpu",
}  # fmt: skip
SELECTIVE = "model.attention.selective"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and the runs `plain` and `protected`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("to be or not to be\n" * 200)
    text = {"data.name": "text", "data.path": str(folder / "text.txt")}
    train(from_dict(TINY | text | {"out": str(folder / "plain"), "model.init_std": 0.3}))
    switches = {
        f"{SELECTIVE}.source": "dedicated", f"{SELECTIVE}.n_masks": 2,
        f"{SELECTIVE}.protection.kind": "head_two",
    }  # fmt: skip
    train(from_dict(TINY | text | switches | {"out": str(folder / "protected"), "model.init_std": 0.3}))
    return folder


def test_the_page_has_every_number_and_the_arrays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "page"
    assert main(["masks", str(folder / "plain"), "--prompt", "if a:\n\té", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Every layer has one mask." in said
    assert "The run has no protection" in said
    assert {path.name for path in out.iterdir()} == {
        "masks.html", "masks.json", "masks.npz", "tokens.png", "maps.png", "answers.png",
    }  # fmt: skip
    data = json.loads((out / "masks.json").read_text())
    assert data["tokens"] == ["i", "f", "␣", "a", ":", "⏎", "⇥", "é", "…"]
    assert [layer["layer"] for layer in data["layers"]] == [0, 1]
    assert data["all"]["tokens"] == 7
    assert not data["protected"]
    page = (out / "masks.html").read_text()
    assert 'http-equiv="Content-Security-Policy"' in page
    assert not re.search(r"<(script|link|img)\b[^>]*\b(src|href)=", page)
    stored = re.search(r'id="report-masks" type="application/json">(.*?)</script>', page)
    assert stored
    arrays = np.load(out / "masks.npz", allow_pickle=False)
    packed = json.loads(stored[1])["1"][0]
    i, j = np.tril_indices(9)
    for name in ("attack", "taken"):
        half = np.frombuffer(base64.b64decode(packed[name]), "<f2")
        np.testing.assert_allclose(half, arrays[f"{name}_1"][0, i, j], rtol=1e-3, atol=1e-6)


def test_masks_and_protection_are_compared(folder: Path) -> None:
    found = look(folder / "protected", "to be or not", layers=[1], device="cpu")
    (layer,) = found.data["layers"]
    assert layer["layer"] == 1
    assert layer["heads"] == [[0], [1]]
    assert len(layer["differences"]) == 1
    every = found.data["all"]
    assert 0 < every["absorbed"] < 1
    assert every["kept_context"] > every["unprotected"]["kept_context"]
    said = dict(statements(found.data))
    (pair,) = layer["differences"]
    differ = said["How much do the masks of a layer differ?"][0]
    assert f"differ in min(F, 1) by {pair['difference']:.2f} on average" in differ
    assert f"takes up {every['absorbed']:.1%} of the attack" in said["What does protection change?"][0]


def test_layers_that_disagree_are_named(folder: Path) -> None:
    data = look(folder / "plain", "to be or not", device="cpu").data
    first, second = (layer["all"] for layer in data["layers"])
    first["effect"]["median"], second["effect"]["median"] = 2, 30
    assert dict(statements(data))["Is masking mostly local?"][0] == "Yes in layer 0, no in layer 1."
    second["effect"]["median"] = 8
    assert dict(statements(data))["Is masking mostly local?"][0] == "Yes, in every layer."
    many = [data["layers"][0] | {"layer": n, "all": first | {"effect": {"median": 2 + 9 * (n == 5)}}}
            for n in range(9)]  # fmt: skip
    told = dict(statements(data | {"layers": many}))["Is masking mostly local?"]
    assert told[0] == "Yes in layers 0 to 4, 6 to 8, no in layer 5."
    assert "(2 in layer 0 to 11 in layer 5)" in told[1]
    data["all"]["effect"] = None
    assert "no token loses anything" in dict(statements(data))["Is masking mostly local?"][0]


def test_a_long_file_is_cut_and_that_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(folder / "text.txt")
    for limit, reason in ((256, "the length that the run was trained with"), (12, "--max-tokens")):
        out = str(folder / f"cut{limit}")
        arguments = ["--file", text, "--max-tokens", str(limit), "--out", out]
        assert main(["masks", str(folder / "plain"), *arguments]) == 0
        said = capsys.readouterr().out.splitlines()[0]
        assert f"was cut to its first {min(limit, 16)}: {reason}." in said
        assert len(json.loads((Path(out) / "masks.json").read_text())["tokens"]) == min(limit, 16)


def test_bytes_that_are_no_character_have_numbers() -> None:
    from headwise.questions.masks.measure import _characters

    assert _characters("a ⟂".encode()[:-1] + b"b") == ["a", "␣", "\\xe2", "\\x9f", "b"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "ab"], "it takes 3"),
        (["--prompt", "abc", "--layers", "2"], "--layers has 2; the run has layers 0 to 1"),
        (["--prompt", "abc", "--max-tokens", "2"], "--max-tokens is 2"),
        (["--file", "no/such.py"], "--file no/such.py cannot be read"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    folder: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["masks", str(folder / "plain"), *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert reason in said[0]


@pytest.mark.parametrize(
    ("switch", "reason"),
    [
        ({"model.attention.kind": "flash"}, "kind 'flash'"),
        ({f"{SELECTIVE}.enabled": False}, "enabled is false"),
    ],
)
def test_a_run_that_masks_nothing_is_refused(
    tmp_path: Path, switch: dict, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"data.name": "copy", "data.vocab_size": 16, "data.eval_sequences": 4}
    train(from_dict(TINY | data | switch | {"out": str(tmp_path / "run")}))
    capsys.readouterr()
    assert main(["masks", str(tmp_path / "run"), "--prompt", "1 2 3"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert reason in said[0]


def test_data_without_text_takes_token_ids(tmp_path: Path) -> None:
    data = {"data.name": "copy", "data.vocab_size": 16, "data.eval_sequences": 4}
    switch = {f"{SELECTIVE}.source": "latent", f"{SELECTIVE}.n_masks": 2, f"{SELECTIVE}.mask_layernorm": True}
    train(from_dict(TINY | data | switch | {"out": str(tmp_path / "run")}))
    found = look(tmp_path / "run", "5 3 9 5", device="cpu").data
    assert found["tokens"] == ["5", "3", "9", "5"]
    assert found["all"]["effect"] is None  # F is no sum of attacks
    assert any("mask_layernorm" in note for note in found["notes"])
    assert main(["masks", str(tmp_path / "run"), "--prompt", "five"]) == 2
