"""The law of FLOPs: what is counted is what PyTorch's counter sees, for every kind, option and modifier.

Lengths are odd, below and above the blocks that some kinds compute in. A window's keys alone are counted, but
engines of a CPU compute all keys and mask: that count is compared without the window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headwise.attention import KINDS, AttentionConfig, attention_kind
from headwise.attention.modifiers import MODIFIERS
from headwise.model.config import ModelConfig
from headwise.model.count import forward_flops_by_part, training_flops_per_token
from headwise.model.decoder import Decoder

LENGTHS = (5, 129)
NOT_SEEN = {
    "flex": "PyTorch's counter does not see FlexAttention on a CPU",
    "fla": "layers of another package",
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "differential": [{"version": 1}, {"version": 2}],
    "holo": [{"boundary_residual": False}, {"poincare": True}, {"form": "hrr"},
             {"form": "hrr", "read": "reweight"}],
    "performer": [{"features": 5}, {"features": 24}],
    "selective": [{}, {"source": "latent", "n_masks": 4}],
    "tropical": [{"centre": False}, {"centre": True}],
    "tt": [{"rank": 4}, {"rank": 3, "n_factors": 3}, {"rank": 4, "share_cores": "qkv", "engine": "mha"}],
}  # fmt: skip
"""Of kinds whose options change what is computed; of the others the usual ones."""
TOLERANCE = {"hrr": 0.15}
"""Of the core, by form: spectra are counted by formula, and sums and norms over channels are not."""
MODIFIED: dict[str, Any] = {
    "qk_norm": True, "sink": "learned", "output_gate": "element", "value_residual": True,
    "windows": [3, "full"],
}  # fmt: skip


def cases() -> Iterator[Any]:
    """Every kind with each of its options, and with each modifier that it takes."""
    for kind, cls in KINDS.items():
        if cls.__module__.startswith("headwise.") and kind not in NOT_SEEN:
            for options in OPTIONS.get(kind, [{}]):
                yield pytest.param(kind, options, {}, id=f"{kind} {options}")
            for name in MODIFIERS:
                if name in cls.supports:
                    yield pytest.param(
                        kind, OPTIONS.get(kind, [{}])[-1], {name: MODIFIED[name]}, id=f"{kind} {name}"
                    )


def model_of(kind: str, options: dict[str, Any], modifiers: dict[str, Any], length: int) -> Decoder:
    attention = AttentionConfig(kind=kind, **modifiers)
    for key, value in options.items():
        setattr(attention.options(), key, value)
    config = ModelConfig(
        d_model=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        d_ff=16,
        vocab_size=11,
        attention=attention,
    )
    return Decoder(config, seq_len=length)


def transform(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """2.5·D·log2 D, with D real numbers on one side."""
    width = max(x.shape[-1], out_val.shape[-1])
    return round(2.5 * width * math.log2(width) * x[..., 0].numel())


def product(x: Any, y: Any, *_: Any, out_val: Tensor, **__: Any) -> int:
    """6 for each product of two complex numbers."""
    both = all(isinstance(one, Tensor) and one.is_complex() for one in (x, y))
    return 6 * out_val.numel() if both else 0


def formulas(model: Decoder) -> dict[Any, Any]:
    """For operators that PyTorch's counter does not know."""
    for function in (transform, product):
        function._get_raw = True  # type: ignore[attr-defined]
    aten = torch.ops.aten
    return {
        aten._fft_r2c: transform, aten._fft_c2r: transform, aten.mul: product,
        **model.attentions()[0].flop_formulas,
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "modifiers"), cases())
def test_what_is_counted_is_what_runs(kind: str, options: Any, modifiers: Any) -> None:
    for length in LENGTHS:
        model, tokens = model_of(kind, options, modifiers, length), torch.randint(11, (1, length))
        known = formulas(model)
        with sdpa_kernel(SDPBackend.MATH):  # the counter sees its products
            with FlopCounterMode(display=False, custom_mapping=known) as forward:
                logits = model(tokens)
            with FlopCounterMode(display=False, custom_mapping=known) as backward:
                logits.sum().backward()
        for layer in model.attentions():
            layer.shape = dataclasses.replace(
                layer.shape, modifiers=dataclasses.replace(layer.shape.modifiers, window=None)
            )
        ran = [forward.get_total_flops() / length, backward.get_total_flops() / length]
        told = sum(forward_flops_by_part(model, length).values())
        counted = [told, training_flops_per_token(model, length) - told]
        allowed = TOLERANCE.get(options.get("form", ""), 0.001)
        assert counted == pytest.approx(ran, rel=allowed)


def test_a_sink_on_fused_kernels_is_seen() -> None:
    """So that the law is not kept by counting nothing."""
    model = model_of("flash", {}, {"sink": "learned"}, 5)
    with FlopCounterMode(display=False, custom_mapping=formulas(model)) as counter:
        model(torch.randint(11, (1, 5)))
    assert any("attention_with_lse" in str(key) for key in counter.get_flop_counts()["Global"])


def test_every_kind_is_under_the_law() -> None:
    ours = {kind for kind in KINDS if KINDS[kind].__module__.startswith("headwise.")}
    tried = {param.values[0] for param in cases()}
    assert tried == ours - NOT_SEEN.keys()
    assert {name for kind in tried for name in attention_kind(kind).supports if name in MODIFIERS} == set(
        MODIFIERS
    )
