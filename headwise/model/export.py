"""A trained model as a Hugging Face folder, where an architecture of transformers computes the same.

- Llama: RMSNorm, SwiGLU, RoPE, any number of key/value heads, any head width, with or without biases;
  written as Mistral, its twin, where the heads do not divide the width, which Llama's configuration refuses.
- With modifiers of attention: what `headwise.model.export_modifiers` lists.
- GPT-2: LayerNorm, GELU, learned positions, heads that make up the width; absent biases are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.attention import KINDS, Attention, AttentionConfig
from headwise.attention.projection import projections
from headwise.errors import HeadwiseError
from headwise.files import local, must_be_folder, replacing
from headwise.model.config import ModelConfig
from headwise.model.convert import NANOGPT
from headwise.model.decoder import Decoder
from headwise.model.export_modifiers import architecture_of, make_config, modifiers_of, renamed
from headwise.pretrained import load_config, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "Llama": {"norm": ("rmsnorm",), "mlp": ("swiglu",), "position": ("rope",)},
    "GPT-2": {"norm": ("layernorm",), "mlp": ("gelu", "gelu_tanh"), "position": ("learned",)},
}
LLAMA: dict[str, tuple[str, ...]] = {
    "tokens": ("model.embed_tokens",), "norm": ("model.norm",), "head": ("lm_head",),
    "attention_norm": ("input_layernorm",), "mlp_norm": ("post_attention_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",),
}  # fmt: skip
"""Llama's names of each part; a fused projection is taken apart."""

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that float32 rounding explains."""


def export(
    model: Decoder, folder: str | Path, name: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> float:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads, whole or not at all.

    Args:
        model: in eval mode, with weights on the CPU.
        folder: a new one, or an empty one.
        name: what to call the model in an error.
        tokenizer: goes along; its special tokens become the model's.

    Returns:
        The largest difference between the logits of `model` and of what was written, both float32.

    Raises:
        HeadwiseError: the setting that no architecture expresses, a folder that is taken, or a full disk.
    """
    folder = local(folder).resolve()
    _refuse_taken(folder)
    must_be_folder(folder)
    from transformers import GenerationConfig

    family = family_of(model, name)
    ends = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = _config(model, family, ends, name)
    with replacing(folder) as draft:
        draft.mkdir()
        (draft / "model.safetensors").write_bytes(_serialised(model, family, name))
        config.save_pretrained(draft)
        GenerationConfig.from_model_config(config).save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        difference = _difference(model, draft, name)
        _refuse_taken(folder)  # another process may have written there meanwhile
    return difference


def _refuse_taken(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HeadwiseError(f"{folder} exists and is not an empty folder; give another --out")


def _is_softmax(kind: type[Attention]) -> bool:
    """Whether a kind is softmax attention and nothing else."""
    options = kind.options() if kind.options else None
    return kind.computes(options) == "softmax" and not kind.heads_interact(options)


def family_of(model: Decoder, name: str) -> str:
    """The architecture that computes what `model` does: `Llama`, `GPT-2`, or one with its modifiers.

    Raises:
        HeadwiseError: there is none; names the settings in the way and what to train instead.
    """
    exported = [name for name, kind in KINDS.items() if _is_softmax(kind)]
    kinds = sorted({attention.kind for attention in model.attentions()} - set(exported))
    if kinds:
        raise HeadwiseError(
            f"{name} cannot be exported: no Hugging Face architecture computes model.attention.kind="
            f"{kinds[0]}; train with --model.attention.kind={exported[0]} (or {' or '.join(exported[1:])})"
        )
    obstacles = {family: _obstacles(model.config, family) for family in NEEDS}
    family = min(obstacles, key=lambda family: len(obstacles[family]))
    if obstacles[family]:
        found = " and ".join(f"model.{key} is {value}" for key, value, _ in obstacles[family])
        instead = " ".join(f"--model.{key}={wanted}" for key, _, wanted in obstacles[family])
        raise HeadwiseError(
            f"{name} cannot be exported: {found}, which no {family}-shaped model can express; "
            f"train with {instead}"
        )
    if family == "Llama" and modifiers_of(model.config):
        return architecture_of(model.config, name).name
    return family


def _obstacles(config: ModelConfig, family: str) -> list[tuple[str, Any, Any]]:
    """Each setting in the way, its value, and one that is not."""
    found: list[tuple[str, Any, Any]] = []
    for key, values in NEEDS[family].items():
        if (value := getattr(config, key)) not in values:
            found.append((key, value, values[0]))
    if config.heads_by_layer is not None:
        found.append(("heads_by_layer", config.heads_by_layer, "null"))
    heads, width = config.n_heads, config.width_of_head()
    if family == "GPT-2":
        off = AttentionConfig()
        for key in modifiers_of(config):
            found.append((f"attention.{key}", getattr(config.attention, key), getattr(off, key) or "null"))
    if family == "GPT-2" and config.kv_heads() != heads:
        found.append(("n_kv_heads", config.kv_heads(), heads))
    if family == "GPT-2" and width * heads != config.d_model:
        found.append(("d_model", config.d_model, width * heads))
    if family == "Llama" and config.bias and config.d_model % heads and not modifiers_of(config):
        found.append(("bias", "true (and model.d_model no multiple of model.n_heads)", "false"))
    return found


def _config(model: Decoder, family: str, ends: dict[str, int | None], name: str) -> PreTrainedConfig:
    from transformers import GPT2Config, LlamaConfig, MistralConfig

    ours = model.config
    common: dict[str, Any] = {
        "vocab_size": ours.vocab_size,
        "tie_word_embeddings": ours.tie_embeddings,
        "initializer_range": ours.init_std,
        "dtype": "float32",
        **ends,  # None where there is none: an architecture's own defaults would be bytes like any other
    }
    if family == "GPT-2":
        return GPT2Config(
            **common, architectures=["GPT2LMHeadModel"], n_positions=model.max_seq_len, n_embd=ours.d_model,
            n_layer=ours.n_layers, n_head=ours.n_heads, n_inner=ours.width_of_mlp(),
            activation_function="gelu" if ours.mlp == "gelu" else "gelu_new",
            layer_norm_epsilon=_epsilon(model), attn_pdrop=ours.attention.dropout,
            resid_pdrop=ours.dropout, embd_pdrop=ours.dropout,
        )  # fmt: skip
    common |= {
        "hidden_size": ours.d_model, "intermediate_size": ours.width_of_mlp(),
        "num_hidden_layers": ours.n_layers, "num_attention_heads": ours.n_heads,
        "num_key_value_heads": ours.kv_heads(), "head_dim": ours.width_of_head(),
        "max_position_embeddings": model.max_seq_len, "rms_norm_eps": _epsilon(model),
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_theta},
        "attention_dropout": ours.attention.dropout,
    }  # fmt: skip
    if family != "Llama":
        return make_config(architecture_of(ours, name), model, common)
    if ours.d_model % ours.n_heads:
        return MistralConfig(**common, architectures=["MistralForCausalLM"], sliding_window=None)
    common |= {"attention_bias": ours.bias, "mlp_bias": ours.bias}
    return LlamaConfig(**common, architectures=["LlamaForCausalLM"])


def _epsilon(model: Decoder) -> float:
    epsilon = model.norm.eps
    assert isinstance(epsilon, float)
    return epsilon


@torch.no_grad()
def _serialised(model: Decoder, family: str, name: str) -> bytes:
    from safetensors.torch import save

    named = _gpt2_weights(model) if family == "GPT-2" else _llama_weights(model)
    if family not in NEEDS:
        named = iter(renamed(architecture_of(model.config, name), model, named).items())
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in named}
    return save(tensors, metadata={"format": "pt"})


def _llama_weights(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    shape, hidden = model.attentions()[0].shape, model.config.width_of_mlp()
    heads, kv_heads = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    fused = {"attention.qkv": [heads, kv_heads, kv_heads], "mlp.up": [hidden, hidden]}
    for layer, part, leaf, value in _parameters(model):
        if part.startswith("attention.modifiers."):
            continue
        at = f"model.layers.{layer}." if layer else ""
        pieces = value.split(fused.get(part, [len(value)]))
        for theirs, piece in zip(LLAMA[part], pieces, strict=True):
            yield f"{at}{theirs}.{leaf}", piece


def _gpt2_weights(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    names = {ours.removesuffix(".weight"): theirs.removesuffix(".weight") for theirs, ours in NANOGPT.items()}
    names |= {"head": "lm_head"}
    for layer, part, leaf, value in _parameters(model):
        at = f"transformer.h.{layer}." if layer else ""
        # GPT-2 keeps the matrices of a block as (inputs, outputs).
        yield f"{at}{names[part]}.{leaf}", value.T if layer and value.dim() == 2 else value
        if not model.config.bias and part not in ("tokens", "positions", "head"):
            yield f"{at}{names[part]}.bias", value.new_zeros(len(value))


def _parameters(model: Decoder) -> Iterator[tuple[str, str, str, Tensor]]:
    """Layer ("" outside of the blocks), part, weight or bias, and value; a tied output layer is left out.

    What stands in the place of a matrix is given as the matrix.
    """
    own = dict(projections(model))
    whole = {
        f"{stem}.{leaf}": value
        for stem, part in own.items()
        for leaf, value in (("weight", part.dense()), ("bias", part.bias)) if value is not None
    }  # fmt: skip
    given = {
        name: value for name, value in model.named_parameters()
        if not any(name.startswith(f"{stem}.") for stem in own)
    }  # fmt: skip
    for name, value in (given | whole).items():
        stem, _, leaf = name.rpartition(".")
        layer, part = stem.split(".", 2)[1:] if stem.startswith("blocks.") else ("", stem)
        yield layer, part, leaf, value


@torch.no_grad()
def _difference(model: Decoder, folder: Path, name: str) -> float:
    """Read the folder back and compare the logits on random tokens: what leaves here has been seen to work.

    Raises:
        HeadwiseError: they differ by more than rounding.
    """
    theirs = load_model("AutoModelForCausalLM", folder, load_config(folder), dtype=torch.float32).eval()
    length = min(model.max_seq_len, 128)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.tokens.num_embeddings, (1, length), generator=draw)
    expected, found = model(tokens).float(), theirs(input_ids=tokens).logits
    largest = expected.abs().nan_to_num(0).max().item()
    if not torch.allclose(found, expected, rtol=0, atol=TOLERANCE * max(1.0, largest), equal_nan=True):
        raise HeadwiseError(
            f"{name} was not exported: read back, its logits differ by {(found - expected).abs().max():.2g}; "
            "this version of transformers computes something else"
        )
    return (found - expected).abs().nan_to_num(0).max().item()


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """256 tokens, one for each byte, and the id is the byte's value: what a run without a tokenizer reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's letters for bytes: a printable byte is its own letter, the others follow in order from 256.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(set(range(256)) - {ord(letter) for letter in letters}))
    vocabulary = {letter: ord(letter) if ord(letter) < 256 else next(others) for letter in letters}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def local_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of that path or name as far as it is on this machine; else None."""
    from transformers import PreTrainedTokenizerFast

    path = local(name)
    if path.is_file() and path.name != "tokenizer.json":
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    folder = path.parent if path.is_file() else path
    if (folder / "tokenizer.json").is_file():  # as it stands: an architecture's own class may rewrite it
        return PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        return load_tokenizer(name, local_files_only=True)
    except Exception:  # transformers raises errors of many libraries for what is not there
        return None
