"""`report.md`: the sections of the per-head metrics study, after what a reader must know first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from headwise.report import tables
from headwise.report.conclusions import line
from headwise.report.section import Section
from headwise.report.tables import Table

BUDGETS = {
    "flops": ("Target FLOPs/run (est)", ".3e"),
    "steps": ("Steps/run", ",.0f"),
    "tokens": ("Tokens/run", ",.0f"),
}
SYMBOL = {"error": "❌", "warning": "⚠️", "note": "ℹ️"}


def render(data: dict[str, Any], figures: dict[str, str], sections: Sequence[Section] = ()) -> str:
    """The report as Markdown.

    Args:
        data: what `collect` gathered.
        figures: title -> path relative to the report.
        sections: those that `data` was gathered with.
    """
    blocks = [f"# {data['title']}", _conclusions(data), "## Study", _head(data)]
    blocks += [*_flags(data), *_question(data), *_verdicts(data)]
    blocks += _figures(figures)
    for section in sections:
        if found := data[section.name]:
            tables_of = [titled.table for titled in section.tables(found) if titled.table.rows]
            blocks += [f"## {section.title}", *(_table(table) for table in tables_of)]
    blocks.append("## Variants")
    for variant in data["variants"]:
        blocks += _variant(data, variant)
    blocks += _section("Costs", tables.costs(data))
    blocks += _section("Parameters and FLOPs", tables.parts(data))
    blocks += _section("Other splits", tables.other_splits(data))
    blocks += _appendix(data["appendix"])
    blocks += ["## Environment", *_environment(data)]
    if data["command"]:
        blocks += ["## Command", f"```bash\n{data['command']}\n```"]
    return "\n\n".join(blocks) + "\n"


def budget(data: dict[str, Any]) -> tuple[str, str] | None:
    """The budget of a run: its name and its size, as text."""
    found = data["budget"]
    if not found or found.get("kind") not in BUDGETS:
        return None
    name, style = BUDGETS[found["kind"]]
    return name, format(float(found["value"]), style)


def sentence(text: str) -> str:
    """The text with a capital letter first and a full stop last."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _head(data: dict[str, Any]) -> str:
    lines = [f"- Run ID: `{data['run_id']}`", f"- Device: `{data['device']}`"]
    lines.append(f"- Seeds: `{', '.join(map(str, data['seeds']))}`")
    if found := budget(data):
        lines.append(f"- {found[0]}: `{found[1]}`")
    return "\n".join(lines)


def _flags(data: dict[str, Any]) -> list[str]:
    flags = [f"- {SYMBOL[f['severity']]} **{f['severity']}**: {f['text']}" for f in data["flags"]]
    return ["## Honesty flags", "\n".join(flags) if flags else "None: every check passed."]


def _question(data: dict[str, Any]) -> list[str]:
    lines = [f"**{name.capitalize()}.** {data[name]}" for name in ("question", "hypothesis") if data[name]]
    return ["## Question", *lines] if lines else []


def _conclusions(data: dict[str, Any]) -> str:
    lines = []
    for row in data["conclusions"]:
        name, _, rest = line(row).partition(": ")
        lines.append(f"- **{name}**: {rest}")
    return "\n".join(lines) or str(data["conclusion_note"])


def _verdicts(data: dict[str, Any]) -> list[str]:
    blocks = ["## Verdict"]
    if data["verdicts"]:
        blocks.append("\n".join(
            f"- **{v['variant']}: {v['verdict']}** against {v['against']} (decided by: {v['decided_by']}). "
            f"{sentence(v['text'])}" for v in data["verdicts"]
        ))  # fmt: skip
    else:
        blocks.append(str(data["conclusion_note"]))
    if any(row["of"] > 1 for row in data["kinds"]):
        blocks += ["### Of each kind", _table(tables.kinds(data))]
    blocks += [f"- **{row['variant']}** {sentence(row['text'])[0].lower()}{sentence(row['text'])[1:]}"
               for row in data["chosen"]]  # fmt: skip
    blocks += [_best(row) for row in data["best"]]
    blocks += [_table(tables.results(data))]
    if data["comparisons"]:
        blocks += [_table(tables.comparisons(data)), _table(tables.unadjusted(data))]
    return blocks


def _variant(data: dict[str, Any], variant: dict[str, Any]) -> list[str]:
    lines = [
        f"- label: `{variant['label']}`",
        f"- attention_type: `{variant['kind']}`",
        f"- expected_use_flex_attention: `{variant['expected_engine'] == 'flex'}`",
        f"- engine: expected `{variant['expected_engine'] or 'any'}`, ran `{variant['engine'] or 'none'}`",
        _final_loss(variant),
    ]
    blocks = [f"### {variant['name']}", "\n".join(lines)]
    for title, table in tables.per_head_tables(variant):
        blocks += [f"#### {title}", _table(table)]
    if variant["per_layer_head"]:
        blocks += ["#### Every measure (per layer and head)", _table(tables.per_layer_head(variant))]
    else:
        blocks.append("No averaged run of this variant has measured heads.")
    blocks += ["#### Runs", _table(_runs(data, variant["name"]))]
    return blocks


def _final_loss(variant: dict[str, Any]) -> str:
    found = variant["results"].get("final_loss") or {"mean": None, "std": None, "ci95": None, "n": 0}
    mean, std, ci95 = ("n/a" if found[k] is None else repr(found[k]) for k in ("mean", "std", "ci95"))
    return f"- final_loss: mean=`{mean}` std=`{std}` ci95=`{ci95}` n=`{found['n']}`"


def _runs(data: dict[str, Any], name: str) -> Table:
    mine = [run for run in data["runs"] if run["variant"] == name]
    rows = []
    for run in mine:
        status = f"{run['state']} ({run['reason']})" if run["reason"] else run["state"]
        seed = "" if run["seed"] is None else str(run["seed"])
        rows.append([seed, status, tables.fixed(run["final_loss"]), run["summary"]])
    return Table(["seed", "status", "final_loss", "summary"], rows)


def _figures(figures: dict[str, str]) -> list[str]:
    return ["## Figures", *(f"![{title}]({path})" for title, path in figures.items())] if figures else []


def _section(title: str, table: Table) -> list[str]:
    return [f"## {title}", _table(table)] if table.rows else []


def _best(row: dict[str, Any]) -> str:
    """The best run, with a link to its checkpoint, or to its folder where it kept none."""
    of_data = f" on data {row['data'][:12]}" if row["data"] else ""
    what = "checkpoint" if row["checkpoint"] else "folder"
    link = row.get("link") or row["checkpoint"] or row["path"]
    return (
        f"**Best run{of_data}: {row['variant']}, seed {row['seed']}**, with the lowest final loss of "
        f"{row['of']} runs, {row['final_loss']:.4f} ([{what}](<{link}>))."
    )


def _appendix(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    blocks = ["## Appendix: configurations", "All variants:", _yaml(found["shared"])]
    for name, own in found["variants"].items():
        blocks += [f"{name}:", _yaml(own)] if own else []
    return blocks


def _yaml(values: dict[str, Any]) -> str:
    text = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
    return f"```yaml\n{text}\n```"


def _environment(data: dict[str, Any]) -> list[str]:
    rows = [[row["name"], ", ".join(row["values"])] for row in data["environment"]]
    return [_table(Table(["what", "value"], rows))] if rows else ["Not recorded."]


def _table(table: Table) -> str:
    lines = [table.headers, ["---"] * len(table.headers), *table.rows]
    text = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
    return f"{text}\n\n{table.note}" if table.note else text


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
