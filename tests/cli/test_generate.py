"""`headwise generate` from a run folder to text."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.cli.main import main
from headwise.config.run import from_dict
from headwise.data.tokenizer import text_of_bytes
from headwise.questions.generate.measure import continue_text
from headwise.training.run import train

TINY = {
    "model.d_model": 16, "model.n_layers": 2, "model.n_heads": 2, "model.attention.kind": "selective",
    "data.seq_len": 16, "data.batch_size": 4, "training.max_steps": 1, "measure.heads": False,
    "measure.maps": 0, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("to be or not to be\n" * 200)
    data = {"data.name": "text", "data.path": str(folder / "text.txt"), "out": str(folder / "run")}
    train(from_dict(TINY | data))
    return folder / "run"


def test_text_speed_and_bytes_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "to be", "--tokens", "15", "--budget", "0.25", "--device", "cpu"]
    assert main(["generate", str(run), *arguments]) == 0
    said = capsys.readouterr().out
    assert said.startswith("to be")
    assert "15 tokens, " in said
    assert "cache of 5 keys a layer" in said
    assert "25.0% of the full cache's" in said
    assert "for 20 tokens" in said


def test_a_seed_repeats_a_text_and_a_temperature_varies_it(run: Path) -> None:
    one, same, other = (
        continue_text(run, "to", 20, temperature=1.0, seed=seed, device="cpu").text for seed in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--budget", "1.5"], "--budget is 1.5; it is a share"),
        (["--budget", "0"], "--budget is 0; it is a share"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "\udcff"], "the argument '\\udcff' is not UTF-8"),
        (["--seed", "99999999999999999999"], "--seed is 99999999999999999999; it must be at least 0"),
        (["--tokens", "100000000000"], "no memory for a cache of 100000000002 keys"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    run: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(run), "--prompt", "to", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert reason in said[0]


def test_a_tiny_temperature_takes_the_likeliest_token(run: Path) -> None:
    cold, greedy = (continue_text(run, "to", 20, temperature=t, device="cpu").text for t in (1e-320, 0.0))
    assert cold == greedy


def test_ids_beyond_bytes_are_written_as_unknown() -> None:
    assert text_of_bytes([104, 105, 300]) == "hi\N{REPLACEMENT CHARACTER}"


def test_data_without_text_takes_token_ids(tmp_path: Path) -> None:
    numbers = {
        "data.name": "copy",
        "data.vocab_size": 16,
        "data.eval_sequences": 4,
        "out": str(tmp_path / "run"),
    }
    train(from_dict(TINY | numbers))
    assert all(
        word.isdigit() for word in continue_text(tmp_path / "run", "5 3 9", 4, device="cpu").text.split()
    )
    assert main(["generate", str(tmp_path / "run"), "--prompt", "five", "--device", "cpu"]) == 2
    assert main(["generate", str(tmp_path / "run"), "--prompt", "99", "--device", "cpu"]) == 2


def test_a_tokenizer_reads_the_prompt_and_writes_the_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"to": 0, "be": 1, "or": 2, "not": 3, "[UNK]": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    text = {
        "data.name": "text", "data.path": str(tmp_path / "text.txt"), "data.cache": str(tmp_path / "cache"),
        "data.tokenizer": str(tmp_path / "tokenizer.json"), "out": str(tmp_path / "run"),
    }  # fmt: skip
    train(from_dict(TINY | text))
    written = continue_text(tmp_path / "run", "to be", 6, temperature=1.0, device="cpu")
    assert (written.length, written.keys) == (8, 8)
    assert set(written.text.split()) <= set(words)
