"""`headwise profile` and `headwise show-config`, from command line to files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from headwise.cli import profile, show_config
from headwise.errors import HeadwiseError


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model and a shard of 5 sequences of 24 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes, **ends, initializer_range=0.4)).save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(0, 64, (5, 24)).astype(np.int32)
    np.savez(folder / "shard.npz", input_ids=ids)
    return folder


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", str(place / "shard.npz"), "--out", str(out), "--cache", str(place / "cache")]
    sizes = ["--n-samples", "9", "--context-length", "12", "--samples-per-part", "2", "--batch-size", "2"]
    return [str(place / "model"), *given, *sizes, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert profile.main(arguments(place, out, "--export", "csv")) == 0
    return out


def test_the_csv_has_the_query_scaling_studys_columns_and_the_tables_numbers(finished):
    files = list(finished.glob("attention_metrics_*.csv"))
    assert len(files) == 1
    got = pyarrow.csv.read_csv(files[0])
    assert ",".join(got.column_names) == "sample_id,layer,head,token_pos,query_norm,entropy,max_attn,k_eff"
    table = pq.read_table(finished / "heads")
    assert got.num_rows == table.num_rows == 9 * 2 * 4 * 12
    for name, column in (("max_attn", "max_weight"), ("k_eff", "k_eff"), ("sample_id", "sample")):
        np.testing.assert_array_equal(
            got[name].to_numpy().astype(np.float32), table[column].to_numpy().astype(np.float32)
        )
    absent = np.isnan(got["entropy"].to_numpy())
    np.testing.assert_array_equal(absent, got["token_pos"].to_numpy() < 2)


def test_the_end_is_said(place, finished, capsys):
    profile.main(arguments(place, finished))
    said = capsys.readouterr().out
    assert "8 heads over 108 tokens" in said
    assert str(finished / "per_head.csv") in said


def test_the_atlas_warns_of_scores_before_a_rotation_where_there_is_one(place, finished, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path / "rotating")
    assert profile.main([str(tmp_path / "rotating"), *arguments(place, tmp_path / "out")[1:]]) == 0
    assert "previous-token heads do not show" in (tmp_path / "out" / "atlas.html").read_text()
    assert "previous-token heads do not show" not in (finished / "atlas.html").read_text()


def test_processes_of_torchrun_make_the_same_table(place, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = tmp_path / "run.py"
    program.write_text("import sys\nfrom headwise.cli.profile import main\nsys.exit(main(sys.argv[1:]))\n")
    done = subprocess.run(
        [*command, str(program), *arguments(place, tmp_path / "out")],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in [*finished.glob("heads/*"), finished / "per_head.csv"]:
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(finished)).read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--measures", "entropy", "--export", "csv"], "--export csv has a row per token with query_norm"),
        (["--scores", "before"], "--scores 'before' is not known"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--raw-layers", "2"], "--raw-layers 2 is not there: layers go from 0 to 1"),
        (["--context-length", "33"], "--context-length 33 exceeds the 32 learned positions"),
        (["--n-samples", "11"], "has 10 contexts of 12 tokens; pass --n-samples 10 or less"),
        (["--dtype", "int4"], "dtype 'int4' is not known"),
    ],
)
def test_what_cannot_be_is_one_clear_line(more, message, place, tmp_path):
    with pytest.raises(HeadwiseError, match=message) as raised:
        profile.main(arguments(place, tmp_path / "out", *more))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out" / "heads").exists()


@pytest.mark.parametrize("part", ["heads/part_000001.parquet", "moments/part_000002.safetensors"])
def test_a_damaged_part_is_named(part, place, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / part).write_bytes(b"PAR1 no more")
    with pytest.raises(HeadwiseError, match=f"{part} .*is damaged"):
        profile.main(arguments(place, out))


def test_show_config_prints_decisions_and_formulas(place, tmp_path, capsys):
    assert show_config.main(arguments(place, tmp_path / "out", "--raw-layers", "1")) == 0
    shown = capsys.readouterr().out
    for line in (
        "9 x 12 = 108 tokens", "-Σ p ln p", "softmax_j(s[i,j] + bias)", "before the rotation", "864 rows",
        "entropy is NaN for the first 2 tokens", "in order from the first", "mass 0.9",
        "q, k (pre_rope) and v",
    ):  # fmt: skip
        assert line in shown
    assert not (tmp_path / "out").exists()
    with pytest.raises(HeadwiseError, match="--scores 'x' is not known"):
        show_config.main(arguments(place, tmp_path / "out", "--scores", "x"))
