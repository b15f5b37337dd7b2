"""Which engine computes selective attention: for every switch, as a table, and for a run that is not on the
fastest, why and what that costs."""

from __future__ import annotations

from typing import Any

from headwise.attention.selective.config import (
    ACCUMULATIONS,
    COMBINATIONS,
    LATENTS,
    MASK_HEADS,
    PROTECTIONS,
    SOURCES,
    PenaltyConfig,
    ProtectionConfig,
    SelectiveConfig,
)
from headwise.functional.dispatch import HAS_KERNELS, WIDEST_HEAD

HEADS, HEAD_DIM = 12, 64
FUSED = "selective-fused"

COMBINED = {"source": "linear_combo"}
LATENT = {"source": "latent", "n_masks": 4}
TWO = {"source": "dedicated", "n_masks": 2}


def _protection(**values: Any) -> dict[str, Any]:
    return {"protection": ProtectionConfig(**({"kind": "head_two"} | values))}


def _penalty(**values: Any) -> dict[str, Any]:
    return {"memory_penalty": PenaltyConfig(**({"epsilon": 0.02} | values))}


def _each(values: tuple[str, ...], key: str, **beside: Any) -> dict[str, dict[str, Any]]:
    return {value: beside | {key: value} for value in values}


SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "enabled": {"false": {"enabled": False}},
    "layers": {"those named": {"layers": [0]}},
    "source": _each(SOURCES, "source"),
    "n_masks": {
        "1": {},
        "2": TWO,
        f"{HEADS}, one a head": TWO | {"n_masks": HEADS, "mask_heads": "one_each"},
    },
    "mask_heads": _each(MASK_HEADS, "mask_heads", **TWO),
    "combination_init": _each(COMBINATIONS, "combination_init", **COMBINED),
    "combination_lr": {"any": COMBINED | {"combination_lr": 0.1}},
    "latent_init": _each(LATENTS, "latent_init", **LATENT),
    "latent_scale": {"any": LATENT | {"latent_scale": 0.5}},
    "latent_bias": {"true": LATENT | {"latent_bias": True}},
    "protect_bos": {"true": {}, "false": {"protect_bos": False}},
    "protect_self": {"true": {}, "false": {"protect_self": False}},
    "relu_leak": {"any": {"relu_leak": 0.25}},
    "relu_after_cumsum": {"true": {"relu_leak": 1.0, "relu_after_cumsum": True}},
    "residual_logits": {"true": {"residual_logits": True}},
    "mask_layernorm": {"true": TWO | {"mask_layernorm": True}},
    "accumulate": _each(ACCUMULATIONS, "accumulate"),
    "memory_penalty.epsilon": {"any": _penalty(), "any, a mask a head": LATENT | _penalty()},
    "memory_penalty.tau": {"any": _penalty(tau=2.0)},
    "memory_penalty.reduce": {"max": _penalty(), "mean": _penalty(reduce="mean")},
    "memory_penalty.normalize_layers": {"true": _penalty(), "false": _penalty(normalize_layers=False)},
    "protection.kind": {kind: _protection(kind=kind) for kind in PROTECTIONS}
    | {
        "any other, a mask a head": LATENT | _protection(),
        "leaky_relu with latent_bias": LATENT | {"latent_bias": True} | _protection(kind="leaky_relu"),
        "leaky_relu with combination_init=head_zero_and_bias": (
            COMBINED | {"combination_init": "head_zero_and_bias"} | _protection(kind="leaky_relu")
        ),
    },
    "protection.scale": {"any": _protection(scale=0.2)},
    "protection.bias": {"any": _protection(bias=-0.1)},
    "protection.alpha": {"any": _protection(kind="leaky_relu", alpha=0.2)},
    "protection.offset": {"any": _protection(kind="leaky_relu", offset=-0.05)},
}
"""Every switch, the values that are tried, and what else a value needs."""


def engine_table() -> str:
    """A Markdown table: for every switch what computes on a GPU, and how much of F is kept."""
    lines = [
        "| `model.attention.selective.` | value | mask | attention | kept of F |",
        "|---|---|---|---|---|",
    ]
    for switch, values in SWITCHES.items():
        by_engine: dict[tuple[str, str, str], list[str]] = {}
        for value, switches in values.items():
            config = SelectiveConfig(**switches)
            config.validate(n_heads=HEADS, head_dim=HEAD_DIM)
            by_engine.setdefault(engines(config), []).append(value)
        for engine, same in by_engine.items():
            lines.append(f"| `{switch}` | {', '.join(same)} | {' | '.join(engine)} |")
    return "\n".join(lines) + "\n"


def engines(config: SelectiveConfig, n_heads: int = HEADS) -> tuple[str, str, str]:
    """What makes the mask on a GPU, what attends under it, and how much of F that keeps."""
    if not config.enabled:
        return "none", "that of `flash`", "nothing"
    if config.plain_because() is not None:
        return "plain", "fused", "several T x T a mask"
    if config.streams(n_heads, config.width(n_heads, HEAD_DIM)):
        return "fused", "fused", "nothing"
    if config.masks(n_heads) == n_heads:
        return "fused", "fused", "T x T a mask, some heads at a time"
    return "fused", "fused", "T x T a mask"


def fallback(
    config: SelectiveConfig, engine: str | None, *, cuda: bool, n_heads: int, head_dim: int,
    batch: int, tokens: int,
) -> str | None:  # fmt: skip
    """Why `engine` computed rather than the fused one, and what that costs, in a line; None where it did not.

    Args:
        cuda: whether on a GPU.
        batch, tokens: B and T of a forward pass.
    """
    if engine is None or not engine.startswith("selective") or engine == FUSED:
        return None
    masks, plain = config.masks(n_heads), engine == "selective-plain"
    each = 4e-6 * batch * (n_heads if plain else masks) * tokens**2
    return (
        f"attention runs on {engine}, not {FUSED}: {_reason(config, cuda, head_dim, plain)}. The "
        f"{'mask and the attention' if plain else 'mask'} of a layer then keep"
        f"{'' if plain else 's'} several T x T tensors a {'head' if plain else 'mask'} for the backward pass "
        f"({each:,.1f} MB each in float32) and take several times as long as fused"
    )


def _reason(config: SelectiveConfig, cuda: bool, head_dim: int, plain: bool) -> str:
    because = config.plain_because()
    if not cuda:
        also = "" if because is None else f" (and {because} is plain everywhere)"
        return f"no CUDA device{also}"
    if not plain:
        return f"{because} has no kernel"
    if not HAS_KERNELS:
        return "kernels are off: no Triton, or HEADWISE_KERNELS=0"
    if head_dim > WIDEST_HEAD:
        return f"heads of width {head_dim} exceed the kernels' {WIDEST_HEAD}"
    return "the kernels do not know this dtype"
