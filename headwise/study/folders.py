"""The folders of a study: which names its variants may have, and whose plan lies there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.names import folder_name
from headwise.runs.read import Unreadable, read_plan

OWN = (
    "study.yaml", "report.md", "report.html", "report.json", "figures", "config.yaml", "env.json",
    "status.json", "summary.json", "metrics.csv", "log.txt", "heads", "maps", "checkpoints", "eval.json",
    "max_lengths.json", "sweep_results.csv", "all_results.parquet",
)  # fmt: skip
"""Names that mean something in the folder of a study or of a run: no variant is called so."""


def variant_folder(name: str) -> str:
    """`name`, of a variant with its axes' values, if it can name a folder of the study.

    Raises:
        HeadwiseError: it cannot.
    """
    return folder_name(name, "variant", reserved=OWN)


def variant_name(name: str) -> None:
    """Refuse a variant's own name that cannot name a folder, or that a reader would take for something else.

    Raises:
        HeadwiseError: that is so.
    """
    variant_folder(name)
    if "@" in name or name.lower().startswith("seed_"):
        reason = "@ comes before an axis's value" if "@" in name else "runs are in folders seed_<n>"
        raise HeadwiseError(f"variant {name!r} cannot name a folder: {reason}; choose another name")


def refuse_newer_plan(folder: Path) -> None:
    """Refuse a study's folder whose plan a newer headwise wrote.

    Raises:
        HeadwiseError: that is so; the folder is left as it is.
    """
    with suppress(Unreadable):  # an earlier plan that is damaged is replaced
        read_plan(folder)
