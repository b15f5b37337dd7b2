"""The report of a study: `report.md`, `report.html`, `report.json` and `figures/*.png`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from headwise.errors import one_of
from headwise.files import must_be_folder, replacing, write_text
from headwise.report import figures, html, maps, markdown
from headwise.report.collect import collect
from headwise.report.conclusions import line
from headwise.report.section import Section
from headwise.runs.read import Run, Study


def build(
    folder: str | Path,
    *,
    baseline: str | None = None,
    out: str | Path | None = None,
    sections: Sequence[Section] = (),
) -> dict[str, Path]:
    """Write the report of a study, of a single run, or of any folder with runs below it.

    Each file appears whole or not at all; an earlier report is replaced.

    Args:
        baseline: the variant that the others are compared with; otherwise the plan's.
        out: the report's folder; otherwise `folder` itself.
        sections: what is added to the report; `headwise.questions.sections` gives those there are.

    Returns:
        the paths written: `markdown`, `html`, `json`, `figures`, a folder, and by their names the files that
        sections export.

    Raises:
        HeadwiseError: there is no such folder, no run or no such variant in it, `out` is a file, or the
            disk is full.
    """
    root = Path(folder if out is None else out)
    if out is not None:
        must_be_folder(root)
    study = Study.read(folder)
    if baseline is not None:
        plan = study.plan | {"baseline": one_of("variant", baseline, tuple(study.variants))}
        study = dataclasses.replace(study, plan=plan)
    data = collect(study, sections)
    prompts = _prompts(study, [variant["name"] for variant in data["variants"]])
    paths = {
        "markdown": root / "report.md", "html": root / "report.html", "json": root / "report.json",
        "figures": root / "figures",
    }  # fmt: skip
    with replacing(paths["figures"]) as draft:
        drawn = figures.draw(data, prompts, draft, sections)
    write_text(paths["json"], json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
    for section in sections:
        for name, text in section.exports(study.runs).items():
            paths[name] = root / name
            write_text(paths[name], text)
    pictures = {title: f"figures/{name}" for title, name in drawn.items()}
    write_text(paths["markdown"], markdown.render(data, pictures, sections))
    write_text(paths["html"], html.render(data, maps.pack(prompts), sections))
    return paths


def conclusions(report: Path) -> list[str]:
    """The conclusions of a written `report.json`, a line each; a line that says why, where there are none."""
    data = json.loads(report.read_text(encoding="utf-8"))
    return [line(row) for row in data["conclusions"]] or [data["conclusion_note"]]


def _prompts(study: Study, variants: list[str]) -> dict[str, tuple[Run, list]]:
    """Attention maps of the first run of each variant that wrote some, a finished one if there is one."""
    found = {}
    for name in variants:
        mine = [run for run in study.runs if run.variant == name and run.maps()]
        for run in sorted(mine, key=lambda run: run.state != "finished"):
            if prompts := maps.read(run):
                found[name] = (run, prompts)
                break
    return found
