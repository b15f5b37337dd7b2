"""The report of a study: `report.md`, `report.html`, `report.json` and `figures/*.png`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from headwise.errors import HeadwiseError, one_of
from headwise.files import must_be_folder, replacing, write_text
from headwise.report import exports, figures, html, maps, markdown
from headwise.report.collect import collect
from headwise.report.conclusions import line
from headwise.report.section import Section
from headwise.runs.read import Run, Study


def build(
    folder: str | Path | Sequence[str | Path],
    *,
    baseline: str | None = None,
    out: str | Path | None = None,
    sections: Sequence[Section] = (),
    force: bool = False,
) -> dict[str, Path]:
    """Write the report of a study, of a single run, of any folder with runs below it, or of several of these.

    Each file appears whole or not at all; an earlier report is replaced.

    Args:
        folder: one, or several, whose report needs an `out`.
        baseline: the variant that the others are compared with; otherwise the plan's.
        out: the report's folder; otherwise `folder` itself.
        sections: what is added to the report; `headwise.questions.sections` gives those there are.
        force: report on variants whose data is not their baseline's; a flag marks them, and no difference
            to the baseline is drawn.

    Returns:
        the paths written: `markdown`, `html`, `json`, `figures`, a folder, the tables `sweep` and `all`, and
        by their names the files that sections export.

    Raises:
        HeadwiseError: there is no such folder, no run or no such variant in it, `out` is a file, several
            folders have none, the disk is full, or the data differs and `force` is not given.
    """
    folders = [folder] if isinstance(folder, str | Path) else list(folder)
    if out is None and len(folders) > 1:
        raise HeadwiseError("a report of several folders needs a folder of its own: give --out DIR")
    root = Path(folders[0] if out is None else out)
    if out is not None:
        must_be_folder(root)
    study = Study.read_all(folders)
    if baseline is not None:
        one_of("variant", baseline, tuple(study.variants))
        variants = {name: (one or {}) | {"against": None} for name, one in study.variants.items()}
        plan = study.plan | {"baseline": baseline, "variants": variants}
        study = dataclasses.replace(study, plan=plan)
    data = collect(study, sections)
    if data["different_data"] and not force:
        raise HeadwiseError(
            f"{', '.join(data['different_data'])} read other data than the baseline, so that their losses "
            "cannot be compared; --force reports on them all the same, marked as such"
        )
    for one in data["best"]:
        one["link"] = Path(os.path.relpath(one["checkpoint"] or one["path"], root.absolute())).as_posix()
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
    paths["sweep"] = exports.write_sweep(study.runs + study.trials, study.path, root)
    paths["all"] = exports.write_all(study.runs + study.trials, study.path, root)
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
