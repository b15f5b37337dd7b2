"""The conclusions, tables and figures of a pruning: for the terminal, `prune.md` and a study's report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from headwise.measures.spec import measure_of
from headwise.questions.prune.heads import IMPORTANCE
from headwise.report.drawing import COLOURS, INK, finish_axis, new_figure
from headwise.report.markdown import _table
from headwise.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALPHA = 0.05
CHOSEN = {"low": "lowest", "high": "highest", "mixed": "lowest and highest"}


def statements(record: dict[str, Any]) -> list[str]:
    """Whether the measure predicts importance, whether removing by it beats random, and the savings."""
    return [_law(record), *_against(record), _saves(record)]


def _law(record: dict[str, Any]) -> str:
    law = next((law for law in record["law"] if law["measure"] == record["by"]), None)
    name = (
        measure_of(record["by"]).label.lower()
        if record["by"] != IMPORTANCE
        else "importance on other sequences"
    )
    if law is None:
        return "Heads were drawn at random, and no measure is recorded that could predict importance."
    if law["rho"] is None:
        return f"Whether {name} predicts importance is not defined: {law['n']} heads, or values do not vary."
    numbers = (
        f"Spearman's ρ {law['rho']:+.2f} (95% {law['low']:+.2f} to {law['high']:+.2f}, permutation p "
        f"{law['p']:.3g}, {law['n']} heads)"
    )
    holds = law["p"] < ALPHA and not law["low"] <= 0 <= law["high"]
    if not holds:
        return f"There is no evidence that {name} predicts which heads matter: {numbers}."
    which = "high" if law["rho"] > 0 else "low"
    return f"{_upper(name)} predicts which heads matter: {numbers}; those with a {which} value cost more."


def _against(record: dict[str, Any]) -> list[str]:
    share, against = _share(record), record["against_random"]
    what = f"the {share} of heads" + ("" if record["mode"] == "random" else f" with the {_which(record)}")
    cost = f"Removing {what} changes the loss by {_signed(record['loss']['delta'])} nats per token"
    if against is None:
        return [f"{cost}; there is no random removal for comparison."]
    control = f"{against['delta']['n']} random removals by {_signed(against['delta'])}"
    if against["verdict"] == "control":
        return [f"{cost}; these heads are drawn at random, like the control ({control})."]
    verdict = {
        "better": "it costs less than random removal",
        "worse": "it costs more than random removal",
        "undecided": "the data does not distinguish it from random removal",
    }[against["verdict"]]
    difference = (
        f"{_signed(against['over_draws'])} over draws, {_signed(against['over_sequences'])} over sequences"
    )
    draws = f"it costs less than {against['costs_less_than']} of the {against['delta']['n']} draws"
    return [f"{cost}, and {control}: {verdict} (difference {difference}; {draws})."]


def _saves(record: dict[str, Any]) -> str:
    loss, speed, (before, after) = record["loss"], record["speed"], record["params"]
    ends = speed["interval"]
    interval = f" (95% {ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    how = "zeroed, and still computed" if record["zeroed"] else f"parameters {before:,} → {after:,}"
    return (
        f"{len(record['removed'])} of {record['n_heads']} heads {'are' if record['zeroed'] else 'are gone:'} "
        f"{how}; perplexity {loss['perplexity_before']:.3f} → {loss['perplexity_after']:.3f}; "
        f"{speed['tokens_per_sec_before']:,.0f} → {speed['tokens_per_sec_after']:,.0f} tokens/s, "
        f"{speed['speedup']:.2f} times as fast{interval}."
    )


def notes(record: dict[str, Any]) -> list[str]:
    """The method, and its limits."""
    found = [
        f"Loss over {record['n_sequences']} sequences of {record['context_length']} tokens in "
        "the precision of the weights; ± is half of a 95% interval, paired over sequences.",
    ]
    if record["unit"] > 1:
        found.append(
            f"Each key/value head serves {record['unit']} query heads, which are removed together; such a "
            "group is ranked by the mean of its heads."
        )
    if record["evaluations"] is not None and record["mode"] != "random":
        found.append(
            f"Heads are ranked by their mean over the last {record['evaluations']} recorded evaluations."
        )
    elif record["mode"] != "random":
        found.append("Heads are ranked by a measurement on other sequences of the same text.")
    if record["zeroed"]:
        found.append("A zeroed head is still computed, so it still affects other heads that read it.")
    if record["mode"] != "random" and record["draws"]:
        found.append(
            "A random removal removes the same number of heads and leaves at least one in every layer."
        )
    return found


def before_and_after(record: dict[str, Any]) -> Table:
    """The removal and every random one."""
    rows = [_row(_name(record), record["loss"], record["removed"])]
    rows += [_row(f"random {n}", draw, draw["removed"]) for n, draw in enumerate(record["draws"])]
    headers = ["removal", "heads", "loss before", "loss after", "difference", "perplexity before", "after"]
    return Table(headers, rows, "Nats per token.")


def _row(name: str, change: dict[str, Any], removed: list[Any]) -> list[str]:
    losses = [f"{change['before']:.4f}", f"{change['after']:.4f}", _signed(change["delta"])]
    perplexities = [f"{change[f'perplexity_{when}']:.3f}" for when in ("before", "after")]
    return [name, str(len(removed)), *losses, *perplexities]


def laws(record: dict[str, Any]) -> Table:
    """The correlation of every recorded measure with the importance of heads."""
    rows = [
        [law["measure"], str(law["n"]), "not defined", "", "", ""] if law["rho"] is None else
        [law["measure"], str(law["n"]), f"{law['rho']:+.2f}", f"{law['low']:+.2f} to {law['high']:+.2f}",
         f"{law['p']:.3g}", f"{law['p_holm']:.3g}"]
        for law in record["law"]
    ]  # fmt: skip
    note = (
        "Spearman's rank correlation with the increase of the loss without each single head; interval by "
        "bootstrap over heads, p by permutation, and Holm's p over all rows. Heads of one model depend on "
        "each other."
    )
    return Table(["measure", "heads", "ρ", "95%", "p", "p, Holm"], rows, note)


def markdown(record: dict[str, Any]) -> str:
    """`prune.md`."""
    by_layer = ", ".join(f"{before} → {after}" for before, after in record["heads_by_layer"])
    removed = " ".join(f"{layer}.{head}" for layer, head in record["removed"])
    blocks = [
        f"# {record['model']} without {_share(record)} of its heads",
        "\n".join(f"- {line}" for line in statements(record)),
        "![Impact of pruning](prune.png)", "## Loss", _table(before_and_after(record)),
        "## Does a measure predict importance?",
        _table(laws(record)) if record["law"] else "No measure is recorded.",
        "## Heads", f"Removed (layer.head): {removed}", f"Heads by layer: {by_layer}",
        "## Notes", "\n".join(f"- {note}" for note in notes(record)),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def figure(records: list[dict[str, Any]]) -> Figure:
    """The cost of removals by the share removed, random ones in grey, and the measure against importance."""
    drawn, axes = new_figure(1, 2, 9.6, 3.6)
    impact(axes[0][0], records)
    record = next((r for r in records if any(h["value"] is not None for h in r["heads"])), None)
    if record is None:
        axes[0][1].remove()
        return drawn
    gone = {tuple(at) for at in record["removed"]}
    for taken, colour, label in ((False, COLOURS[0], "kept"), (True, COLOURS[1], "removed")):
        some = [
            h
            for h in record["heads"]
            if ((h["layer"], h["head"]) in gone) is taken and h["value"] is not None
        ]
        axes[0][1].plot([h["value"] for h in some], [h["importance"] for h in some], "o", color=colour,
                        markersize=4, label=label)  # fmt: skip
    axes[0][1].axhline(0, color=INK, linewidth=0.8)
    axes[0][1].legend(frameon=False, fontsize=8)
    label = measure_of(record["by"]).label_with_unit
    finish_axis(axes[0][1], "increase of the loss without each single head (nats)", label)
    return drawn


def impact(axis: Axes, records: list[dict[str, Any]]) -> None:
    """Difference of the loss against the share of heads removed."""
    names = list(dict.fromkeys(map(_name, records)))
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        mine = sorted((r for r in records if _name(r) == name), key=_removed_share)
        x = [_removed_share(r) for r in mine]
        y = [r["loss"]["delta"]["mean"] for r in mine]
        spread = [r["loss"]["delta"]["ci95"] or 0.0 for r in mine]
        axis.errorbar(
            x, y, yerr=spread, fmt="o-", color=colour, markersize=4, capsize=3, label=name, zorder=3
        )
    points = [(_removed_share(r), draw["delta"]["mean"]) for r in records for draw in r["draws"]]
    if points:
        axis.plot(*zip(*points, strict=True), "o", color="#999999", markersize=3, label="random draws")
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.legend(frameon=False, fontsize=7)
    finish_axis(axis, "difference of the loss (nats per token)", "heads removed")


def _name(record: dict[str, Any]) -> str:
    return "random" if record["mode"] == "random" else f"{record['mode']} {record['by']}"


def _which(record: dict[str, Any]) -> str:
    by = "importance" if record["by"] == IMPORTANCE else measure_of(record["by"]).label.lower()
    return f"{CHOSEN[record['mode']]} {by}" + (" of each layer" if record["per_layer"] else "")


def _removed_share(record: dict[str, Any]) -> float:
    share: float = len(record["removed"]) / record["n_heads"]
    return share


def _share(record: dict[str, Any]) -> str:
    return f"{_removed_share(record):.0%}"


def _signed(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "nothing"
    digits = max(4, min(8, 2 - math.floor(math.log10(abs(found["mean"]) or 1))))
    text = f"{found['mean']:+.{digits}f}"
    return text if found["ci95"] is None else f"{text} ± {found['ci95']:.{digits}f}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
