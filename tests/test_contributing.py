"""CONTRIBUTING.md shows the files of examples/outside_kind as they are."""

from __future__ import annotations

from tests.included import ROOT, with_files


def test_the_page_shows_the_kind_of_the_example_as_it_is() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "<!-- begin examples/outside_kind/outside_kind/layer.py -->" in page
    assert with_files(page) == page, "run python -m tests.included"
