"""Models of transformers: smaller where that is safe, zeroed elsewhere, and read back the same."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.questions.prune.after import check, unit_sizes, without_heads
from headwise.questions.prune.measure import Options, prune
from headwise.questions.prune.write import write
from headwise.watch.effect import Speaker, speaker_of
from headwise.watch.hooks import Layer, attention_layers
from headwise.watch.samples import Source


def opened(hf_model, name: str, tokens: Tensor) -> tuple[Speaker, list[Layer]]:
    speaker = speaker_of(copy.deepcopy(hf_model(name)), name)
    return speaker, attention_layers(speaker.loaded.model, speaker, tokens)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_group_of_every_layer_is_taken_out(hf_model, tokens: Tensor, name: str) -> None:
    speaker, layers = opened(hf_model, name, tokens)
    assert unit_sizes(speaker, layers, zeroed=False) == {0: 2, 1: 2}
    chosen = {0: [0, 1], 1: [2, 3]}
    after = without_heads(speaker, layers, chosen, zeroed=False)
    assert after.loaded.model.config.num_attention_heads == 2
    assert after.loaded.model.config.num_key_value_heads == 1
    assert check(speaker, after, layers, chosen, tokens) < 1e-4
    with pytest.raises(HeadwiseError, match="does not compute the same as with their outputs at 0"):
        check(speaker, after, layers, {0: [2, 3], 1: [2, 3]}, tokens)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "phi3", "olmo2"])
def test_heads_are_zeroed_in_the_matrix_that_reads_them(hf_model, tokens: Tensor, name: str) -> None:
    speaker, layers = opened(hf_model, name, tokens)
    assert unit_sizes(speaker, layers, zeroed=True) == {0: 1, 1: 1}
    before = {n: p.clone() for n, p in speaker.loaded.model.named_parameters()}
    after = without_heads(speaker, layers, {1: [0, 3]}, zeroed=True)
    assert check(speaker, after, layers, {1: [0, 3]}, tokens) < 1e-4
    assert all(torch.equal(p, before[n]) for n, p in speaker.loaded.model.named_parameters())


@pytest.mark.parametrize(
    ("name", "chosen", "zeroed", "said"),
    [
        ("llama", {0: [0, 1]}, False, "one number of heads for all layers; pass --per-layer"),
        ("bert", {0: [0]}, True, "outside of its attention module"),
    ],
)
def test_what_is_not_safe_is_refused(hf_model, tokens, name, chosen, zeroed, said) -> None:
    speaker, layers = opened(hf_model, name, tokens)
    with pytest.raises(HeadwiseError, match=said):
        without_heads(speaker, layers, chosen, zeroed=zeroed)


def test_projections_that_are_not_apart_are_refused(hf_model, tokens: Tensor) -> None:
    speaker, layers = opened(hf_model, "gpt2", tokens)
    with pytest.raises(HeadwiseError, match=r"GPT2LMHeadModel does not have separate q_proj.*pass --zero"):
        unit_sizes(speaker, layers, zeroed=False)


def test_the_folder_is_a_model_of_transformers(hf_model, tmp_path: Path) -> None:
    model = hf_model("llama")
    model.save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(0).integers(1, 64, (12, 16)).astype(np.int32)
    np.savez(tmp_path / "ids.npz", ids)
    source = Source(str(tmp_path / "ids.npz"))
    options = Options(
        "low", 0.5, "entanglement", per_layer=True, sequences=6, context_length=16, draws=2, source=source
    )
    found = prune(str(tmp_path / "model"), options)
    write(found, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.from_numpy(ids[:2].astype(np.int64))
    torch.testing.assert_close(again(input_ids=tokens).logits, found.after(tokens), atol=1e-5, rtol=1e-4)
    record = found.record
    assert (record["n_heads"], len(record["removed"]), record["unit"]) == (8, 4, 2)
    assert (record["n_sequences"], record["context_length"]) == (6, 15)
    assert record["evaluations"] is None
    values = {(h["layer"], h["head"]): h["value"] for h in record["heads"]}
    kept = set(values) - {tuple(at) for at in record["removed"]}
    for layer in (0, 1):
        means = [
            np.mean([values[at] for at in some if at[0] == layer]) for some in (set(values) - kept, kept)
        ]
        assert means[0] < means[1]
