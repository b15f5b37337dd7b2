from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from headwise.attention import KINDS, AttentionConfig
from headwise.config.run import Config, to_yaml
from headwise.errors import HeadwiseError
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.questions.geometry.projections import read_weights
from headwise.runs import checkpoint
from headwise.watch.huggingface import Call, listening

D_MODEL, HEADS, KV_HEADS = 24, 4, 2
LLAMA = {
    "hidden_size": D_MODEL,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
LLAMA |= {"vocab_size": 20, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": KV_HEADS}
GPT = {"n_embd": D_MODEL, "n_layer": 2, "n_head": HEADS, "vocab_size": 20, "n_positions": 16}

MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, **GROUPED, head_dim=8)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA, **GROUPED)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA, **GROUPED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**LLAMA, **GROUPED, head_dim=8)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**LLAMA)),
    "gpt_bigcode": lambda: transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**GPT)),
    "gpt_bigcode_mha": lambda: transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(**GPT, multi_query=False)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**LLAMA)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=D_MODEL, ffn_dim=16, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=20,
            word_embed_proj_dim=D_MODEL,
        )
    ),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **LLAMA, eos_token_id=1, bos_token_id=2, cls_token_id=3, sep_token_id=4
        )
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return random_model(request.param)


def random_model(name: str) -> nn.Module:
    """The named model with every parameter random, biases and norms too."""
    torch.manual_seed(0)
    built = MODELS[name]().eval()
    built.config.use_cache = False
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    return built


class Seen:
    """What reaches the attention interface: layers in order, with q, k, v of the last call."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.qkv: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, layer: nn.Module, call: Call) -> None:
        self.layers.append(layer)
        scaled_before = call.options["scaling"] == 1.0  # OPT scales its queries itself
        self.qkv[layer] = (call.q * call.q.shape[-1] ** 0.5 if scaled_before else call.q, call.k, call.v)


def inputs_of_attention(model: nn.Module) -> dict[nn.Module, tuple[tuple, dict[str, Any]]]:
    """Arguments with which the model calls the module around each interface call, one token at position 0."""
    calls: dict[nn.Module, tuple[tuple, dict[str, Any]]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, k: calls.__setitem__(m, (a, k)), with_kwargs=True)
        for m in model.modules()
    ]
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def test_projections_do_what_the_modules_do(model: nn.Module) -> None:
    """One token at position 0: rotations are the identity, attention's weight on itself is 1.

    So the layer's q, k, v are affine in its input, with the projections as matrices.
    """
    weights = read_weights(model)
    assert weights.layers == [0, 1]
    seen = Seen()
    with listening(model, seen):
        calls = inputs_of_attention(model)
        for (_, found), module in zip(weights, list(seen.layers), strict=True):
            args, options = calls[module]
            unit = torch.eye(D_MODEL)[:, None]
            run(module, args, options, torch.zeros_like(unit))
            base = seen.qkv[module]
            run(module, args, options, unit)
            for name, after, before in zip("qkv", seen.qkv[module], base, strict=True):
                got = (after - before)[:, :, 0].permute(1, 2, 0)
                torch.testing.assert_close(got, torch.tensor(getattr(found, name)), rtol=1e-4, atol=1e-5)
            assert found.o.shape == (HEADS, D_MODEL, found.q.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "opt", "modernbert", "gpt_bigcode"])
def test_value_output_circuits_add_up_to_the_layer(name: str) -> None:
    """Σ_h W_O^h W_V^h is what a layer does to a single token."""
    model = random_model(name)
    seen = Seen()
    with listening(model, seen):
        calls = inputs_of_attention(model)
        for (_, found), module in zip(read_weights(model), list(seen.layers), strict=True):
            group = HEADS // found.v.shape[0]
            total = sum(found.o[h] @ found.v[h // group] for h in range(HEADS))
            args, options = calls[module]
            unit = torch.eye(D_MODEL)[:, None]
            after = run(module, args, options, unit) - run(module, args, options, torch.zeros_like(unit))
            np.testing.assert_allclose(after[:, 0].T.numpy(), total, rtol=1e-3, atol=1e-5)


def run(module: nn.Module, args: tuple, options: dict[str, Any], x: Tensor) -> Tensor:
    """Call an attention module on other hidden states `(N, 1, d_model)`, all of them at position 0."""
    options = {
        k: v for k, v in options.items() if k not in ("hidden_states", "past_key_values", "attention_mask")
    }
    if "cu_seqlens" in options or "cu_seq_lens_q" in options:
        raise AssertionError("packed sequences are not expected here")
    if "attention_mask" in module.forward.__code__.co_varnames:
        options["attention_mask"] = None
    output = module(x, *(None for _ in args[1:]), **options)
    return output[0] if isinstance(output, tuple) else output


FOLDS = {"llama": 0, "phi3": 0, "gemma2": 1, "gpt2": 0, "gpt_neox": 0, "opt": 0}


@torch.no_grad()
@pytest.mark.parametrize("name", FOLDS)
def test_fold_norm_multiplies_by_the_norms_gain(name: str) -> None:
    """Folded weights on normalised input equal plain weights on the norm's output, biases aside."""
    model = random_model(name)
    norms = [
        m for n, m in model.named_modules() if n.endswith(("input_layernorm", "ln_1", "self_attn_layer_norm"))
    ]
    x = torch.randn(5, D_MODEL)
    for (_, plain), (_, folded), norm in zip(
        read_weights(model), read_weights(model, fold_norm=True), norms, strict=True
    ):
        zero = torch.zeros_like(x)  # its output is the norm's bias
        scaled = norm(x) - norm(zero)
        unit = plain_norm(norm, x)
        for role in "qkv":
            expected = scaled.numpy() @ getattr(plain, role).reshape(-1, D_MODEL).T
            got = unit.numpy() @ getattr(folded, role).reshape(-1, D_MODEL).T
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(plain.o, folded.o)


def plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm without its gain and bias."""
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(x, (D_MODEL,), eps=norm.eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(norm, "variance_epsilon", 1e-6))


def test_fold_norm_is_refused_where_the_norm_comes_after() -> None:
    with pytest.raises(HeadwiseError, match="no norm directly before its attention"):
        read_weights(random_model("bert"), fold_norm=True)


@pytest.mark.parametrize(("name", "can"), [("llama", True), ("bert", False)])
def test_fold_norm_is_offered_where_it_can_be_done(name: str, can: bool) -> None:
    """BERT's norms come after attention: the option would be refused."""
    notes = read_weights(random_model(name)).notes
    assert any("--fold-norm does" in note for note in notes) == can
    assert any("norm before attention" in note for note in notes) == can


@torch.no_grad()
def test_bloom_and_both_falcons_interleave_their_fused_projection() -> None:
    shape = {"hidden_size": D_MODEL, "vocab_size": 20}
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**shape, n_layer=1, n_head=HEADS))
    attention = bloom.transformer.h[0].self_attention
    check_split(bloom, attention.query_key_value, attention._reshape)
    for options in (
        {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": False, "multi_query": False},
    ):
        config = transformers.FalconConfig(**shape, num_hidden_layers=1, num_attention_heads=HEADS, **options)
        falcon = transformers.FalconForCausalLM(config)
        attention = falcon.transformer.h[0].self_attention
        check_split(
            falcon,
            attention.query_key_value,
            lambda x, a=attention: [t.transpose(1, 2) for t in a._split_heads(x)],
        )


def check_split(model: nn.Module, fused: nn.Linear, split: Any) -> None:
    ((_, found),) = read_weights(model)
    bias = 0 if fused.bias is None else fused.bias
    for name, got in zip("qkv", split((fused(torch.eye(D_MODEL)) - bias)[:, None]), strict=True):
        expected = torch.tensor(getattr(found, name))
        got = got[:, :, 0].permute(1, 2, 0)
        if got.shape[0] > expected.shape[0]:  # Falcon repeats the keys of a group
            expected = expected.repeat_interleave(got.shape[0] // expected.shape[0], 0)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_gate_beside_the_query_is_left_out(tmp_path: Path) -> None:
    """Qwen3-Next keeps a gate after each head's query in one projection; other layers have no heads."""
    config = transformers.Qwen3NextConfig(
        **LLAMA | {"num_hidden_layers": 4}, **GROUPED, head_dim=8, num_experts=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )  # fmt: skip
    model = transformers.Qwen3NextModel(config)
    ((number, found),) = read_weights(model)
    assert number == 3
    x = torch.randn(D_MODEL)
    both = model.layers[3].self_attn.q_proj(x).view(HEADS, 16)
    torch.testing.assert_close(torch.tensor(found.q) @ x, both.chunk(2, dim=-1)[0], rtol=1e-4, atol=1e-6)


def test_a_stack_must_be_chosen_where_there_are_several() -> None:
    config = transformers.T5Config(
        d_model=D_MODEL, d_ff=16, num_layers=2, num_heads=HEADS, d_kv=6, vocab_size=20
    )
    model = transformers.T5Model(config)
    with pytest.raises(HeadwiseError, match=r"several stacks of layers \(encoder.block, decoder.block\)"):
        read_weights(model)
    with pytest.raises(HeadwiseError, match=r"'encoder.blok' is not known.*did you mean 'encoder.block'"):
        read_weights(model, stack="encoder.blok")
    found = dict(read_weights(model, stack="decoder.block"))
    expected = model.decoder.block[1].layer[0].SelfAttention.q.weight
    np.testing.assert_array_equal(found[1].q.reshape(-1, D_MODEL), expected.detach().numpy())
    assert len(read_weights(model, stack="encoder.block", fold_norm=True)) == 2


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in ("mha", "flash") if k in KINDS])
def test_a_headwise_model_is_read_by_what_it_does(kind: str) -> None:
    config = ModelConfig(
        d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=20, bias=True
    )
    config.attention = AttentionConfig(kind=kind)
    model = Decoder(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    attention = model.attentions()[1]
    found, folded = dict(read_weights(model))[1], dict(read_weights(model, fold_norm=True))[1]
    x = torch.randn(1, 1, 24)
    q, _, v = attention.heads(x)
    q0, _, v0 = attention.heads(torch.zeros_like(x))
    torch.testing.assert_close((q - q0)[0, :, 0], torch.tensor(found.q) @ x[0, 0], rtol=1e-4, atol=1e-4)
    moved = sum(found.o[h] @ found.v[h // 2] @ x[0, 0].numpy() for h in range(4))
    expected = attention.out((v - v0)[0, :, 0].repeat_interleave(2, 0).flatten()) - attention.out.bias
    np.testing.assert_allclose(moved, expected.numpy(), rtol=1e-3, atol=1e-3)
    gain = model.blocks[1].attention_norm.weight.numpy()
    np.testing.assert_allclose(folded.q, found.q * gain, rtol=1e-6)


def test_a_run_goes_by_the_name_it_was_asked_for(tmp_path: Path) -> None:
    config = Config()
    config.model.d_model, config.model.n_heads, config.model.vocab_size = 16, 2, 256
    config.training.max_steps = 1
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    weights = dict(Decoder(config.model, config.data.seq_len).named_parameters())
    checkpoint.save(tmp_path / "checkpoints", checkpoint.Checkpoint(weights, {}, {"step": 1}))
    assert read_weights(tmp_path).name == str(tmp_path)
    assert read_weights(Decoder(config.model, config.data.seq_len)).name == "Decoder"


def test_a_folder_reads_as_the_model_and_says_what_is_left_out(tmp_path: Path) -> None:
    model = random_model("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    in_memory, on_disk = read_weights(model), read_weights(tmp_path)
    for (_, a), (_, b) in zip(in_memory, on_disk, strict=True):
        for role in "qkvo":
            np.testing.assert_array_equal(getattr(a, role), getattr(b, role))
    assert on_disk.notes == in_memory.notes
    assert any("biases" in note for note in on_disk.notes)
    assert any("RoPE" in note for note in on_disk.notes)
    plain = read_weights(random_model("gpt2")).notes
    assert not any("RoPE" in note for note in plain)


def test_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="holds no weights"):
        read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(HeadwiseError, match=r"pytorch_model\.bin, which would have to be unpickled"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(HeadwiseError, match=r"model\.safetensors is damaged"):
        read_weights(tmp_path)
    with pytest.raises(HeadwiseError, match="is a file"):
        read_weights(tmp_path / "model.safetensors")


def saved(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def layer(q: tuple[int, int] = (8, 8), **other: tuple[int, int]) -> dict[str, Tensor]:
    shapes = {"q_proj": q, "k_proj": (8, 8), "v_proj": (8, 8), "o_proj": (8, 8)} | other
    return {f"layers.0.self_attn.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


TWO = {"num_attention_heads": 2}
CHECKPOINTS = {
    "no config": (layer(), None, "has no config.json"),
    "no head count": (layer(), {"model_type": "llama"}, "does not say how many heads"),
    "unknown layout": (
        {f"h.0.attn.{n}.weight": torch.ones(s) for n, s in (("query_key_value", (24, 8)), ("dense", (8, 8)))},
        {"n_head": 2, "model_type": "chatglm"}, "'chatglm' lays out its fused query_key_value is not known",
    ),
    "wrong head count": (layer(), {"num_attention_heads": 3}, "8 rows do not divide into 3 heads"),
    "kv shapes": (
        layer(v_proj=(4, 8)), {"num_attention_heads": 4}, r"q \(8, 8\), k \(8, 8\), v \(4, 8\) do not divide",
    ),
    "no attention": ({"layers.0.mlp.up.weight": torch.ones(2)}, TWO, "none of its 1 tensors"),
    "quantised": (
        {name: tensor.to(torch.int8) for name, tensor in layer().items()}, TWO, "quantised",
    ),
    "latent": (
        {"layers.0.self_attn.kv_b_proj.weight": torch.ones(2)}, TWO, "latent attention",
    ),
    "codegen": (
        {f"h.0.attn.{n}.weight": torch.ones(s) for n, s in (("qkv_proj", (24, 8)), ("out_proj", (8, 8)))},
        {"n_head": 2, "model_type": "codegen"}, "'codegen' lays out its fused qkv_proj is not known",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_that_do_not_fit_say_why(tmp_path: Path, case: str) -> None:
    tensors, config, message = CHECKPOINTS[case]
    with pytest.raises(HeadwiseError, match=message):
        list(read_weights(saved(tmp_path, tensors, config)))
