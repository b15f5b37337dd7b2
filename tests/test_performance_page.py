"""docs/performance.md is what the committed measurements say: no number in it is typed."""

from __future__ import annotations

from pathlib import Path

from headwise.bench.page import page

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_committed_results() -> None:
    made = page(ROOT / "benchmarks" / "results")
    assert made.replace(str(ROOT) + "/", "") == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
