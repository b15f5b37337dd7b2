"""Export: transformers, loading the folder on its own, computes the same logits; or one line says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.attention import AttentionConfig
from headwise.config.run import Config, to_yaml
from headwise.data.tokenizer import load_tokenizer
from headwise.errors import HeadwiseError
from headwise.files import write_json
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.model.export import byte_tokenizer, export
from headwise.model.generate import generate, make_cache
from headwise.runs import checkpoint
from headwise.watch import watch
from headwise.watch.load import load
from headwise.watch.samples import Source, open_samples

BYTES = byte_tokenizer()
LENGTH = 24
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope"}
GPT2: dict[str, Any] = {"norm": "layernorm", "mlp": "gelu", "position": "learned"}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", LLAMA),
    "untied": ("llama", LLAMA | {"tie_embeddings": False}),
    "shared-keys": ("llama", LLAMA | {"n_kv_heads": 2, "attention": AttentionConfig(kind="mha")}),
    "wide-heads": ("llama", LLAMA | {"head_dim": 20, "n_kv_heads": 1, "d_ff": 40}),
    "biases": ("llama", LLAMA | {"bias": True, "n_kv_heads": 2}),
    "theta": ("llama", LLAMA | {"rope_theta": 500.0, "attention": AttentionConfig(kind="flex")}),
    "odd-heads": ("mistral", LLAMA | {"n_heads": 3, "head_dim": 8}),
    "gpt2": ("gpt2", GPT2 | {"bias": True}),
    "gpt2-tanh": ("gpt2", GPT2 | {"mlp": "gelu_tanh", "tie_embeddings": False}),
    "gpt2-long": ("gpt2", GPT2 | {"max_seq_len": 40, "bias": True, "d_ff": 48}),
}


def decoder(settings: dict[str, Any]) -> Decoder:
    """A small model whose every parameter matters: none is left at 0 or 1."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 256}
    model = Decoder(ModelConfig(**(sizes | settings)), LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(("architecture", "settings"), SHAPES.values(), ids=SHAPES)
def test_logits_and_layout(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """In float32, logits of order 10 agree to 1e-4: the products are summed in another order."""
    from transformers import AutoModelForCausalLM

    model = decoder(settings)
    difference = export(model, tmp_path / "out", "run")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.model_type == architecture
    tokens = torch.randint(256, (3, LENGTH))
    with torch.no_grad():
        expected, found = model(tokens), theirs.eval()(input_ids=tokens).logits
    assert found.dtype == torch.float32
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert 0 <= difference < 1e-4
    count = sum(p.numel() for p in model.parameters())
    zeros = sum(v.numel() for n, v in theirs.named_parameters() if n.endswith("bias") and not v.any())
    assert sum(p.numel() for p in theirs.parameters()) == count + zeros


WITH_MODIFIERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "norm": ("qwen3", {"qk_norm": True}, {"n_kv_heads": 2}),
    "norm and windows": ("qwen3", {"qk_norm": True, "windows": [5, "full"]}, {}),
    "one window": ("mistral", {"windows": [5]}, {"n_kv_heads": 2}),
    "windows": ("ministral", {"windows": ["full", 5]}, {"tie_embeddings": False}),
    "learned sinks": ("gpt_oss", {"sink": "learned"}, {"n_kv_heads": 2, "bias": True}),
    "zero sinks and windows": ("gpt_oss", {"sink": "zero", "windows": [5, "full"]}, {"d_ff": 40}),
    "gate by element": ("qwen3_next", {"qk_norm": True, "output_gate": "element"}, {}),
    "gate by head": (
        "qwen3_next",
        {"qk_norm": True, "output_gate": "head"},
        {"head_dim": 20, "n_kv_heads": 1},
    ),
}


@pytest.mark.parametrize(("architecture", "modifiers", "sizes"), WITH_MODIFIERS.values(), ids=WITH_MODIFIERS)
def test_modifiers_have_an_architecture_that_generates_the_same(
    architecture: str, modifiers: dict[str, Any], sizes: dict[str, Any], tmp_path: Path
) -> None:
    """Logits to rounding, and greedy tokens with a cache in both programs."""
    from transformers import AutoModelForCausalLM

    model = decoder(LLAMA | sizes | {"attention": AttentionConfig(**modifiers)})
    assert export(model, tmp_path / "out", "run") < 1e-4
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.model_type == architecture
    tokens = torch.randint(256, (2, 4))
    expected = generate(model, make_cache(model, 2, LENGTH), tokens, LENGTH - 4)
    found = theirs.generate(tokens, max_new_tokens=LENGTH - 4, do_sample=False)
    assert torch.equal(found[:, 4:], expected)


def test_a_model_with_sinks_is_measured_in_both_programs_alike(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = decoder(LLAMA | {"attention": AttentionConfig(sink="learned", windows=[7, "full"])})
    export(model, tmp_path / "out", "run")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens, found = torch.randint(256, (2, LENGTH)), []
    for watched in (model, theirs):
        with torch.no_grad(), watch(watched) as seen:
            watched(tokens)
        found.append(seen.columns())
    for name in ("null_weight", "entropy", "k_eff", "query_norm", "mean_distance"):
        torch.testing.assert_close(*(torch.from_numpy(each[name]) for each in found), atol=1e-4, rtol=1e-3)


def test_an_exported_model_generates_what_the_run_would(tmp_path: Path) -> None:
    """No token of a byte vocabulary is an end of text, as Llama's own configuration would have it."""
    from transformers import AutoModelForCausalLM

    model = decoder(LLAMA)
    export(model, tmp_path / "out", "run")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.generation_config.eos_token_id is None
    tokens = torch.randint(256, (1, 4))
    found = theirs.generate(tokens, max_new_tokens=16, do_sample=False)
    expected = tokens
    with torch.no_grad():
        for _ in range(16):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (LLAMA | {"mlp": "gelu"}, "model.mlp is gelu, .*--model.mlp=swiglu"),
        (LLAMA | {"position": "none"}, "model.position is none, .*--model.position=rope"),
        (GPT2 | {"norm": "rmsnorm"}, "model.norm is rmsnorm, .*--model.norm=layernorm"),
        (GPT2 | {"n_kv_heads": 2}, "model.n_kv_heads is 2, .*--model.n_kv_heads=4"),
        (GPT2 | {"head_dim": 10}, "model.d_model is 32, .*--model.d_model=40"),
        (LLAMA | {"n_heads": 3, "head_dim": 8, "bias": True}, "model.bias is true .*--model.bias=false"),
        ({"mlp": "gelu", "position": "sinusoidal"}, "mlp is gelu and model.position is sinusoidal.*=rope$"),
        (
            LLAMA | {"attention": AttentionConfig(value_residual=True)},
            "value_residual=True; Mistral has windows",
        ),
        (
            LLAMA | {"attention": AttentionConfig(qk_norm=True, sink="learned")},
            "qk_norm=True and model.attention.sink=learned together",
        ),
        (LLAMA | {"attention": AttentionConfig(windows=[4, 5])}, r"windows is \[4, 5\], .* several lengths"),
        (LLAMA | {"attention": AttentionConfig(windows=[1])}, "a window of one key"),
        (
            LLAMA | {"bias": True, "attention": AttentionConfig(qk_norm=True)},
            "model.bias is true, and Qwen3, .*--model.bias=false",
        ),
        (
            GPT2 | {"attention": AttentionConfig(sink="zero")},
            "model.attention.sink is zero, .*--model.attention.sink=none",
        ),
    ],
)
def test_what_no_architecture_expresses_is_refused_in_one_line(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(HeadwiseError, match=said) as error:
        export(decoder(settings), tmp_path / "out", "runs/mine")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("runs/mine cannot be exported: ")
    assert not list(tmp_path.iterdir())


def test_a_kind_that_is_no_softmax_attention_is_refused(tmp_path: Path) -> None:
    from headwise.attention import KINDS
    from headwise.attention.mha import VanillaAttention

    model = decoder(LLAMA)
    other = type("Other", (VanillaAttention,), {"kind": "other"})
    assert "other" not in KINDS
    model.blocks[1].attention.__class__ = other
    with pytest.raises(
        HeadwiseError, match=r"model\.attention\.kind=other; .*--model\.attention\.kind=flash"
    ):
        export(model, tmp_path / "out", "run")


def test_a_taken_folder_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(HeadwiseError, match="not an empty folder; give another --out"):
        export(decoder(LLAMA), tmp_path / "out", "run")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    (tmp_path / "empty").mkdir()
    export(decoder(LLAMA), tmp_path / "empty", "run")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


@given(st.text())
def test_the_byte_tokenizer_is_utf8(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def run_folder(path: Path, data: dict[str, Any]) -> Path:
    """A run with one checkpoint."""
    values = Config()
    for key, value in (LLAMA | {"d_model": 32, "vocab_size": 256}).items():
        setattr(values.model, key, value)
    for key, value in (data | {"seq_len": LENGTH}).items():
        setattr(values.data, key, value)
    values.training.max_steps = 1
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(values))
    weights = dict(decoder(LLAMA).named_parameters())
    checkpoint.save(path / "checkpoints", checkpoint.Checkpoint(weights, {}, {"step": 1}))
    return path


def test_a_byte_run_exported_reads_text_as_the_run_does(tmp_path: Path, capsys) -> None:
    from headwise.cli.main import main

    run = run_folder(tmp_path / "run", {"name": "pystdlib"})
    (tmp_path / "text.txt").write_text("a naïve text of a few words, " * 20, encoding="utf-8")
    assert main(["export", str(run), "--format", "huggingface", "--out", str(tmp_path / "out")]) == 0
    assert "Llama-shaped" in capsys.readouterr().out
    ids = []
    for model in (run, tmp_path / "out"):
        source = Source(str(tmp_path / "text.txt"), cache=str(tmp_path / "cache"))
        samples = open_samples(source, load(str(model)), n_samples=9, context_length=16)
        ids.append(samples.batch(0, 9))
    assert torch.equal(*ids)


def test_a_tokenizer_on_this_machine_goes_along(tmp_path: Path, capsys) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from headwise.cli.main import main

    words = Tokenizer(models.WordLevel({"<end>": 0, "?": 1, "one": 2, "two": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "words")
    given = str(tmp_path / "words")
    run = run_folder(tmp_path / "run", {"name": "text", "path": "gone.txt", "tokenizer": given})
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert load_tokenizer(str(tmp_path / "out")).checksum == load_tokenizer(given).checksum
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("one two <end>")["input_ids"] == [2, 3, 0]
    assert load(str(tmp_path / "out")).model.config.eos_token_id == 0

    shards = tmp_path / "shards"
    write_json(shards / "manifest.json", {"settings": {"tokenizer": {"name": given}}})
    run = run_folder(tmp_path / "sharded", {"name": "shards", "path": str(shards)})
    assert main(["export", str(run), "--out", str(tmp_path / "out2")]) == 0
    assert load_tokenizer(str(tmp_path / "out2")).checksum == load_tokenizer(given).checksum

    run = run_folder(tmp_path / "far", {"name": "text", "path": "gone.txt", "tokenizer": "./nowhere"})
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(tmp_path / "out3")]) == 0
    assert "tokenizer: none, for ./nowhere is not on this machine" in capsys.readouterr().out
    assert not (tmp_path / "out3" / "tokenizer.json").exists()


def test_what_is_no_run_is_one_line_and_exit_code_2(tmp_path: Path, capsys) -> None:
    from headwise.cli.main import main

    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
