"""The options of a layer's modifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwise.errors import HeadwiseError, one_of

MODIFIERS = ("qk_norm", "sink", "output_gate", "value_residual", "windows")
"""Keys of `model.attention`, and what a kind's `supports` names."""

SINKS = ("none", "zero", "learned")
GATES = ("none", "head", "element")
FULL = "full"
"""In a pattern of windows: a layer that sees every key."""
LONGEST_WINDOW = 2**24


@dataclass(frozen=True)
class Modifiers:
    """The modifiers of one layer.

    Attributes:
        qk_norm: whether queries and keys are normalised.
        sink: none, zero or learned.
        output_gate: none, head or element.
        value_residual: whether values are mixed with the first layer's.
        window: query i sees the keys with |i - j| < window; None sees all.
    """

    qk_norm: bool = False
    sink: str = "none"
    output_gate: str = "none"
    value_residual: bool = False
    window: int | None = None

    def present(self) -> list[str]:
        """The names of those that are on, as `MODIFIERS` has them."""
        on = (
            self.qk_norm, self.sink != "none", self.output_gate != "none", self.value_residual,
            self.window is not None,
        )  # fmt: skip
        return [name for name, is_on in zip(MODIFIERS, on, strict=True) if is_on]


def window_of(windows: Sequence[int | str] | None, layer: int) -> int | None:
    """The window of a layer: the pattern is repeated over layers."""
    if not windows:
        return None
    window = windows[layer % len(windows)]
    return None if isinstance(window, str) else window


def check(sink: str, output_gate: str, windows: Any) -> None:
    """Refuse invalid values.

    Raises:
        HeadwiseError: names the key, the value and the range.
    """
    one_of("model.attention.sink", sink, SINKS)
    one_of("model.attention.output_gate", output_gate, GATES)
    if windows is None:
        return
    if not windows:
        raise HeadwiseError(
            "model.attention.windows is an empty list; give a window for each layer of the pattern, such as "
            "[256, full], or leave it out"
        )
    for window in windows:
        number = isinstance(window, int) and not isinstance(window, bool)
        if window != FULL and not (number and 1 <= window <= LONGEST_WINDOW):
            raise HeadwiseError(
                f"model.attention.windows has {window!r}; a window is {FULL!r} or a number of keys, "
                f"1 to {LONGEST_WINDOW}"
            )
