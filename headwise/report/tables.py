"""The report's tables as headers and cells of text, the same for Markdown and HTML."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from headwise.measures.spec import head_label, in_order, measure_of
from headwise.report.conclusions import words


@dataclass(frozen=True)
class Metric:
    """How one result is named and written."""

    label: str
    unit: str = ""
    style: str = ".4f"
    lower_is_better: bool | None = None


METRICS = {
    "val_loss": Metric("validation loss", "nats", lower_is_better=True),
    "train_loss": Metric("training loss, smoothed", "nats", lower_is_better=True),
    "val_bits_per_byte": Metric("bits per byte", "", lower_is_better=True),
    "val_perplexity": Metric("perplexity", "", ".3f", True),
    "val_accuracy": Metric("accuracy", "", ".2%", False),
    "tokens_per_sec": Metric("tokens per second", "", ",.0f", False),
    "step_time_ms": Metric("step time", "ms", ",.1f", True),
    "peak_vram_mb": Metric("peak device memory", "MB", ",.0f", True),
    "peak_rss_mb": Metric("peak process memory", "MB", ",.0f", True),
    "data_wait": Metric("waiting for data", "", ".2%", True),
    "wall_s": Metric("wall time", "s", ",.1f", True),
    "step": Metric("steps", "", ",.0f"),
    "tokens": Metric("tokens", "", ",.0f"),
    "flops": Metric("FLOPs", "", ".3e"),
}


@dataclass(frozen=True)
class Table:
    """Cells of text; `numeric` columns are set flush right."""

    headers: list[str]
    rows: list[list[str]]
    note: str = ""
    numeric: list[bool] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        columns = zip(*self.rows, strict=True) if self.rows else ([] for _ in self.headers)
        self.numeric.extend(_is_numeric(column) for column in columns)


def results(data: dict[str, Any]) -> Table:
    """One row a variant: what it reached, as mean ± half-width of the 95% interval."""
    names = _present(data, ("val_loss", "train_loss", "val_bits_per_byte", "val_perplexity", "val_accuracy"))
    rows = [
        [v["name"], v["kind"] or "", str(v["n"]), *(plus_minus(v["results"].get(m), m) for m in names),
         _count(v["params_total"])]
        for v in data["variants"]
    ]  # fmt: skip
    headers = ["variant", "kind", "n", *(heading(m) for m in names), "parameters"]
    note = "Mean ± half-width of the 95% interval (Student's t over seeds); n counts the runs averaged."
    return Table(headers, rows, note)


def costs(data: dict[str, Any]) -> Table:
    """One row a variant: speed and memory."""
    wanted = ("tokens_per_sec", "step_time_ms", "peak_vram_mb", "peak_rss_mb", "data_wait", "wall_s")
    names = _present(data, wanted)
    flops = ["FLOPs"] if any("flops" in v["results"] for v in data["variants"]) else []
    rows = [
        [v["name"], str(v["n"]), *(plus_minus(v["results"].get(m), m) for m in names),
         *(plain(v["results"].get("flops", {}).get("mean"), ".3e") for _ in flops)]
        for v in data["variants"] if v["results"]
    ]  # fmt: skip
    return Table(["variant", "n", *(heading(m) for m in names), *flops], rows)


def labels(data: dict[str, Any]) -> dict[str, str]:
    """What each variant is called in prose, by its name."""
    return {v["name"]: v["label"] for v in data["variants"]}


def conclusions(data: dict[str, Any]) -> Table:
    """One row a variant: what the comparison with the baseline shows, its costs, what to distrust."""
    rows = []
    for row in data["conclusions"]:
        parts = words(row)
        word, why = parts["conclusion"], parts["why"]
        rows.append(
            [row["variant"], f"{word}: {why}", parts["difference"], parts["costs"], parts["distrust"]]
        )
    against = labels(data).get(data["against"], data["against"])
    headers = ["variant", f"against {against}", "difference [95% interval]", "costs", "distrust"]
    note = (
        "Paired differences on the same seeds; the intervals hold for all variants at once (max-t). An "
        "interval that covers 0 does not show that two variants are equal. Costs are ratios to the baseline."
    )
    return Table(headers, rows, note)


def kinds(data: dict[str, Any]) -> Table:
    """One row a kind of attention: its verdict, and the numbers that decide it."""
    rows = [
        [row["kind"], row["verdict"], f"{row['variant']} against {row['against']}", row["decided_by"],
         row["text"]]
        for row in data["kinds"]
    ]  # fmt: skip
    note = "The verdict of a kind is the best that one of its variants has."
    return Table(["kind", "verdict", "decided on", "by", "numbers"], rows, note)


def configurations(data: dict[str, Any]) -> list[tuple[str, Table]]:
    """What all configurations have in common, then what each variant's has of its own."""
    found = data["appendix"]
    if not found:
        return []
    parts_ = {"All variants": found["shared"]} | {name: own for name, own in found["variants"].items() if own}
    return [
        (name, Table(["key", "value"], [[key, json.dumps(value)] for key, value in values.items()]))
        for name, values in parts_.items()
    ]


def comparisons(data: dict[str, Any]) -> Table:
    """One row a variant and metric: the paired difference to the baseline, over all variants at once."""
    rows = []
    for c in data["comparisons"]:
        style = METRICS[c["metric"]].style
        rows.append([
            METRICS[c["metric"]].label, c["variant"], _signed(c["mean"], style),
            _interval(c, style),
            "" if c["relative"] is None else f"{c['relative']['mean']:+.2%}",
            p_value(c["p_adjusted"]), str(c["n"]),
        ])  # fmt: skip
    headers = ["metric", "variant", f"difference to {data['against']}", "95% interval, simultaneous",
               "relative", "p (max-t)", "n"]  # fmt: skip
    note = (
        "Pairs share the seed and the data. Intervals and p-values hold for all variants of a metric at "
        "once: an interval excludes 0 exactly where p is below 0.05."
    )
    return Table(headers, rows, note)


def unadjusted(data: dict[str, Any]) -> Table:
    """The same differences with intervals and tests of each variant alone."""
    rows = []
    for c in data["comparisons"]:
        style = METRICS[c["metric"]].style
        rows.append([
            METRICS[c["metric"]].label, c["variant"], _signed(c["mean"], style), _interval(c["alone"], style),
            p_value(c["p_t"]), p_value(c["p_wilcoxon"]), str(c["n"]),
        ])  # fmt: skip
    headers = ["metric", "variant", f"difference to {data['against']}", "95% interval, alone",
               "p (paired t)", "p (Wilcoxon)", "n"]  # fmt: skip
    note = (
        "Not corrected: of several variants, one in twenty seems to differ by chance. Wilcoxon needs 6 pairs."
    )
    return Table(headers, rows, note)


def parts(data: dict[str, Any]) -> Table:
    """One row a part, one column a variant: parameters, then FLOPs per token."""
    variants = [v for v in data["variants"] if v["params"] or v["flops_per_token"]]
    headers = ["part", *(v["name"] for v in variants)]
    rows = [
        [f"{part} parameters", *(_count(v["params"].get(part)) for v in variants)]
        for part in dict.fromkeys(p for v in variants for p in v["params"])
    ]
    rows.append(["all parameters", *(_count(v["params_total"]) for v in variants)])
    rows += [
        [f"{part.replace('_', ' ')} FLOPs per token (forward)",
         *(_count(v["flops_parts"].get(part)) for v in variants)]
        for part in dict.fromkeys(p for v in variants for p in v["flops_parts"])
    ]  # fmt: skip
    rows.append(["training FLOPs per token", *(_count(v["flops_per_token"]) for v in variants)])
    return Table(headers, [row for row in rows if any(row[1:])])


def runs(data: dict[str, Any]) -> Table:
    """Every run with its state, and why where it did not finish."""
    rows = [
        [r["variant"] or "", _text(r["seed"]), r["state"], plain(r["final_loss"], ".4f"), _text(r["step"]),
         plain(r["wall_s"], ".1f"), r["engine"] or "", "yes" if r["used"] else "no", r["reason"], r["place"]]
        for r in data["runs"]
    ]  # fmt: skip
    headers = [
        "variant",
        "seed",
        "state",
        "final loss",
        "steps",
        "wall s",
        "engine",
        "averaged",
        "reason",
        "folder",
    ]
    return Table(headers, rows)


def other_splits(data: dict[str, Any]) -> Table:
    """Loss and accuracy on the test text and at other lengths."""
    rows = []
    for v in data["variants"]:
        for split, found in v["other_splits"].items():
            rows.append([v["name"], split, plus_minus(found.get("loss"), "val_loss"),
                         plus_minus(found.get("accuracy"), "val_accuracy")])  # fmt: skip
    return Table(["variant", "split", "loss", "accuracy"], rows)


def per_head(variant: dict[str, Any], measure: str) -> Table:
    """The per-head metrics study's table: head, mean over layers, std and half-width over seeds."""
    _, title = measure_of(measure).table or ("", measure)
    rows = [[_head(r), fixed(r["mean"]), fixed(r["std"]), fixed(r["ci95"])]
            for r in variant["per_head"].get(measure, [])]  # fmt: skip
    return Table(["head", f"{title}_mean", "std", "ci95"], rows)


def per_head_tables(variant: dict[str, Any]) -> list[tuple[str, Table]]:
    """Title and table of each measure that has a table of its own (the per-head metrics study's)."""
    with_table = [(m, measure_of(m).table) for m in in_order(variant["per_head"])]
    return [(table[0], per_head(variant, m)) for m, table in with_table if table]


def per_layer_head(variant: dict[str, Any]) -> Table:
    """Every measure of every layer and head, mean ± half-width over seeds."""
    found = variant["per_layer_head"]
    cells = {((r["layer"], r["head"], r.get("part", "")), m): r for m, rows in found.items() for r in rows}
    places = sorted({place for place, _ in cells})
    rows = [
        [str(layer), head_label(head, part), *(_short(cells.get(((layer, head, part), m))) for m in found)]
        for layer, head, part in places
    ]
    return Table(["layer", "head", *found], rows)


def _head(row: dict[str, Any]) -> str:
    return head_label(row["head"], row.get("part"))


def heading(metric: str) -> str:
    """A metric's name with its unit."""
    m = METRICS[metric]
    return f"{m.label} ({m.unit})" if m.unit else m.label


def plus_minus(summary: dict[str, Any] | None, metric: str) -> str:
    """`mean ± ci95`, the mean alone where n = 1, nothing where there is no run."""
    if not summary or summary["mean"] is None:
        return ""
    style = METRICS[metric].style
    mean = format(summary["mean"], style)
    return mean if summary["ci95"] is None else f"{mean} ± {format(summary['ci95'], style)}"


def fixed(value: float | None, digits: int = 6) -> str:
    """A number with fixed digits; `n/a` where there is none."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def plain(value: float | None, style: str) -> str:
    """A number in `style`; nothing where there is none."""
    return "" if value is None else format(value, style)


def p_value(p: float | None) -> str:
    """A p-value to two significant digits, never rounded to 0."""
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _present(data: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    return [m for m in names if any(v["results"].get(m) for v in data["variants"])]


def _short(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['mean']:.4f}" if row["ci95"] is None else f"{row['mean']:.4f} ± {row['ci95']:.4f}"


def _interval(row: dict[str, Any], style: str) -> str:
    if row["low"] is None:
        return "none (n = 1)"
    return f"{_signed(row['low'], style)} to {_signed(row['high'], style)}"


def _signed(value: float, style: str) -> str:
    return format(value, "+" + style)


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _is_numeric(cells: Any) -> bool:
    filled = [cell for cell in cells if cell and cell != "n/a"]
    return bool(filled) and all(cell.lstrip("+-<≥ ")[:1].isdigit() for cell in filled)
