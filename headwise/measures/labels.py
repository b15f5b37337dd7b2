"""What a head does, by plain rules on its mean measures.

A rule compares one mean over tokens with a threshold, so that every label can be checked by hand.
`local` and `broad` are relative to what uniform attention over the same keys would give: over T
tokens, causal attention sees (T + 1)/2 keys on average, at a mean distance of (T - 1)/4. The first
rule that holds names the head; all that hold are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headwise.functional.head_stats import MASS


@dataclass(frozen=True)
class Rule:
    """`label` holds where `measure`, divided by what uniform attention gives, passes `threshold`.

    Attributes:
        above: whether it must be at least the threshold, or at most.
        relative: divide by uniform attention's value of the measure first.
        text: the rule in words and numbers.
    """

    label: str
    measure: str
    threshold: float
    above: bool
    relative: bool
    text: str


RULES = (
    Rule("sink", "sink_weight", 0.5, True, False, "mean weight on key 0 is at least 0.5"),
    Rule("previous-token", "previous_weight", 0.5, True, False, "mean weight on key i-1 is at least 0.5"),
    Rule("local", "mean_distance", 0.1, False, True, "mean distance is at most 0.1 of uniform attention's"),
    Rule("sharp", "max_weight", 0.5, True, False, "mean largest weight is at least 0.5"),
    Rule("broad", "k_eff", 0.5, True, True, "mean k_eff is at least 0.5 of uniform attention's"),
)
OTHER = "mixed"


def classify(per_head: Mapping[str, np.ndarray]) -> list[list[str]]:
    """For each of R heads the labels of all rules that hold, the first of which names it.

    Args:
        per_head: means by measure `(R,)`, and of uniform attention `uniform_keys`, the mean number
            of keys that a query sees, and `uniform_distance`, their mean distance. A measure that
            is absent or NaN holds no rule.

    Returns:
        Lists of labels; `["mixed"]` where no rule holds, none where no rule's measure is known.
    """
    uniform = {"k_eff": MASS * per_head["uniform_keys"], "mean_distance": per_head["uniform_distance"]}
    n_heads = len(per_head["uniform_keys"])
    found: list[list[str]] = [[] for _ in range(n_heads)]
    known = np.zeros(n_heads, dtype=bool)
    for rule in RULES:
        if rule.measure not in per_head:
            continue
        value = per_head[rule.measure] / (uniform[rule.measure] if rule.relative else 1.0)
        known |= np.isfinite(value)
        with np.errstate(invalid="ignore"):
            holds = value >= rule.threshold if rule.above else value <= rule.threshold
        for head in np.flatnonzero(holds):
            found[head].append(rule.label)
    return [labels or ([OTHER] if some else []) for labels, some in zip(found, known, strict=True)]
