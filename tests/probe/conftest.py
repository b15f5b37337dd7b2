"""Tiny random Hugging Face models with sharp enough attention to measure."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import nn

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {**SIZES, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
GROUPED = {**COMMON, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0], "factor": 4.0,
}  # fmt: skip
WINDOW = 7

SPECS = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama-yarn": ("LlamaForCausalLM", {**GROUPED, "rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**GROUPED, "head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", COMMON),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "phi3-longrope": ("Phi3ForCausalLM", {**GROUPED, "rope_parameters": LONGROPE}),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "bert": ("BertModel", COMMON),
    "albert": ("AlbertModel", {**COMMON, "embedding_size": 16, "num_hidden_layers": 3}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "cohere": ("CohereForCausalLM", GROUPED),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **COMMON, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 8, "first_k_dense_replace": 2, "num_key_value_heads": 4,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "modernbert": (
        "ModernBertModel",
        {**COMMON, "local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    ),
    "smollm3": ("SmolLM3ForCausalLM", {**GROUPED, "no_rope_layer_interval": 2}),
    "t5": (
        "T5Model",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}  # fmt: skip


@functools.cache
def build(name: str) -> nn.Module:
    """A model of SPECS in float32, in eval mode, with its default attention implementation."""
    torch.manual_seed(0)
    class_name, sizes = SPECS[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.35)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def hf_model():
    """`hf_model(name)` builds a model once for the session; tests leave it as they found it."""
    return build


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """`(2, 24)`, no padding."""
    return torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(1))
