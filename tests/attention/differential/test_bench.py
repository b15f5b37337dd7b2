"""The benchmark checks before it times, and says what it compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwise.attention.differential import bench


def test_it_checks_first_and_compares_both_versions_with_flash(tmp_path: Path) -> None:
    assert bench.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "differential-cpu.json").read_text())["rows"]
    checks = [row for row in rows if "passed" in row]
    assert len(checks) >= 10
    assert all(row["passed"] for row in checks)
    timed = {row["case"]: row["flash_x"] for row in rows if "passed" not in row}
    assert timed["flash"] == 1.0
    assert {"version 1", "version 2"} < set(timed)


def test_nothing_is_timed_where_a_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TOLERANCE", dict.fromkeys(bench.TOLERANCE, 0.0))
    assert bench.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []
