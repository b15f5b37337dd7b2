"""Attention maps of fixed prompts, read from `maps/step_*.npz` and packed for the page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from headwise import reading
from headwise.runs.read import Run

MAX_BYTES = 3_000_000  # of packed maps in one page
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def read(run: Run) -> list[tuple[list[str], np.ndarray]]:
    """Prompts of a run's latest maps: tokens (T) and weights `(L, H, T, T)`; empty where none.

    A damaged file reads as none: the maps are an illustration, no number depends on them.
    """
    path = run.maps()
    if path is None:
        return []
    try:
        with reading.Arrays.open(path) as stored:
            names = sorted(name for name in stored.headers if name.startswith("weights_"))
            found = [(stored.read(name, "f"), _tokens(stored, name)) for name in names]
    except reading.Unreadable:
        return []
    return [(tokens(raw, w.shape[-1]), w.astype(np.float32)) for w, raw in found if w.ndim == 4 and w.size]


def _tokens(stored: reading.Arrays, weights: str) -> np.ndarray | None:
    name = weights.replace("weights", "tokens")
    return stored.read(name) if name in stored.headers else None


def pack(variants: dict[str, tuple[Run, list]]) -> dict[str, Any]:
    """Maps of one run a variant, as bytes: `round(255·√weight)`, so that small weights survive.

    Prompts beyond the page's budget are left out, the last first.
    """
    packed: dict[str, Any] = {}
    room = MAX_BYTES
    for prompt in range(max((len(prompts) for _, prompts in variants.values()), default=0)):
        for name, (run, prompts) in variants.items():
            if prompt >= len(prompts) or prompts[prompt][1].size > room:
                continue
            words, weights = prompts[prompt]
            room -= weights.size
            entry = packed.setdefault(name, {"seed": run.seed, "step": step_of(run), "prompts": []})
            entry["prompts"].append({
                "tokens": words, "shape": list(weights.shape),
                "data": base64.b64encode(quantized(weights).tobytes()).decode(),
            })  # fmt: skip
    return packed


def quantized(weights: np.ndarray) -> np.ndarray:
    """`round(255·√weight)` as bytes."""
    return np.round(255 * np.sqrt(np.clip(np.nan_to_num(weights), 0, 1))).astype(np.uint8)


def step_of(run: Run) -> int | None:
    """The step of the latest maps."""
    path = run.maps()
    digits = Path(path).stem.removeprefix("step_") if path else ""
    return int(digits) if digits.isdecimal() else None


def tokens(raw: np.ndarray | None, length: int) -> list[str]:
    """Tokens as people read them: bytes, one string, or strings of their own; numbers otherwise."""
    if raw is None:
        return [str(i) for i in range(length)]
    if raw.dtype == np.uint8:
        words = list(raw.tobytes().decode("latin-1"))
    elif raw.dtype.kind == "S":
        words = [w.decode("utf-8", "replace") for w in raw.ravel().tolist()]
    else:
        words = [str(w) for w in raw.ravel().tolist()]
    if len(words) == 1 and length > 1:
        words = list(words[0])
    words = [*words, *("" for _ in range(length - len(words)))][:length]
    return ["".join(VISIBLE.get(c, c if c.isprintable() else "·") for c in word) for word in words]
