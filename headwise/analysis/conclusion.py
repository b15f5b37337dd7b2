"""What a comparison shows: better, worse, equivalent or undecided. Lower is better.

    interval of the difference                            conclusion
    whole interval within ± the smallest difference       equivalent (it may exclude 0: too small to matter)
    otherwise, all of it below 0                          better
    otherwise, all of it above 0                          worse
    it holds 0 and a difference that matters              undecided

The interval is the simultaneous one of `headwise.analysis.statistics`. One that covers 0 does not
show that two variants are equal; only one that leaves no room for a difference that matters does,
and then the word is `equivalent`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headwise.analysis import further
from headwise.analysis.further import Seeds
from headwise.analysis.statistics import Paired, Summary, half_width, max_t, simultaneous
from headwise.errors import HeadwiseError

DEFAULT_SMALLEST = "0.5%"


@dataclass(frozen=True)
class Conclusion:
    """One variant against the baseline.

    Attributes:
        conclusion: better, worse, equivalent or undecided.
        why: the reason, as a clause with its numbers.
        difference: n, mean and std of variant - baseline, with the simultaneous 95% interval.
        alone: the same with the interval of this variant alone.
        p: of the paired t test; `p_adjusted`: the one that belongs to the simultaneous interval.
        comparisons: how many variants the interval holds for at once.
        smallest: the smallest difference that matters.
        doubt: why the values cannot be compared at all; None where they can.
        further_seeds: from and to how many seeds beyond these would decide an undecided comparison if the
            mean stayed as it is; None where it is decided or nothing can be told.
    """

    conclusion: str
    why: str
    difference: Summary
    alone: Summary
    p: float | None
    p_adjusted: float | None
    comparisons: int
    smallest: float
    further_seeds: Seeds | None = None
    doubt: str | None = None


def conclude(
    pairs: Paired, smallest: float, comparisons: int = 1, *, unit: str = "nats", doubt: str | None = None
) -> Conclusion:
    """Conclude from the paired differences of one variant.

    Args:
        pairs: variant - baseline, seed by seed.
        smallest: the smallest difference that matters, at least 0, in `unit`.
        comparisons: variants that are compared with this baseline, on this metric, with two seeds or more.
        doubt: why the values cannot be compared at all (nothing was learned, say).
    """
    alone = pairs.difference
    found = simultaneous(alone, comparisons)
    word, why = _word_and_reason(found, smallest, unit, doubt)
    seeds = None
    if word == "undecided" and doubt is None and found.n >= 2:
        seeds = further_seeds(found, smallest, comparisons)
        if seeds is not None:
            why += f"; if the mean stays, {further.in_words(seeds)} would decide it"
    p = pairs.p_t
    return Conclusion(word, why, found, alone, p, max_t(p, comparisons), comparisons, smallest, seeds, doubt)


def further_seeds(difference: Summary, smallest: float, comparisons: int = 1) -> Seeds | None:
    """From and to how many seeds beyond the n seen would decide the same mean (`analysis.further`)."""
    mean = difference.mean
    if mean is None:
        return None

    def decided(std: float, total: int) -> bool:
        half = half_width(std, total, 0.95 ** (1 / comparisons))
        return _word(mean - half, mean + half, smallest) != "undecided"

    return further.further_seeds(difference, decided)


def smallest_difference(value: float | str, baseline: float | None) -> float:
    """The smallest difference that matters, in the unit of `baseline`.

    Args:
        value: a number in that unit, or a share of the baseline's value such as `0.5%`.
        baseline: the baseline's mean; without it a share is 0.

    Raises:
        HeadwiseError: neither a number above 0 nor a percentage above 0.
    """
    text = str(value).strip()
    share = text.endswith("%")
    try:
        number = math.nan if isinstance(value, bool) else float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise HeadwiseError(
            f"smallest_difference is {value!r}; give a number above 0 in nats, such as 0.01, or a share of "
            "the baseline's loss, such as 0.5%"
        )
    return number / 100 * abs(baseline or 0.0) if share else number


def signed(value: float) -> str:
    """A difference with its sign and four decimals, or in powers of ten where those would show 0."""
    return f"{value:+.4f}" if value == 0 or abs(value) >= 5e-5 else f"{value:+.1e}"


def _word(low: float, high: float, smallest: float) -> str:
    if -smallest <= low and high <= smallest:
        return "equivalent"
    if high < 0:
        return "better"
    return "worse" if low > 0 else "undecided"


def _word_and_reason(found: Summary, smallest: float, unit: str, doubt: str | None) -> tuple[str, str]:
    if doubt is not None:
        return "undecided", doubt
    if found.n == 0:
        return "undecided", "no seed in common with the baseline on the same data"
    if found.low is None or found.high is None:
        return "undecided", "one seed in common, so there is no interval; a further seed would give one"
    word = _word(found.low, found.high, smallest)
    limit = f"±{signed(smallest)[1:]} {unit}"
    if word == "equivalent":
        why = f"the whole interval lies within {limit}, the smallest difference that matters"
        if found.low > 0 or found.high < 0:
            why += "; there is a difference, too small to matter"
    elif word == "undecided":
        why = f"the interval holds both 0 and a difference that matters ({limit})"
    else:
        why = f"the whole interval lies {'below' if word == 'better' else 'above'} 0"
        nearest = min(abs(found.low), abs(found.high))
        if nearest < smallest:
            why += f"; whether it matters ({limit}) is open"
    return word, why
