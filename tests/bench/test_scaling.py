"""Slopes, crossing points, and the benchmarks that use them, with small sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from headwise.bench.scaling import crossing, slope, summary
from headwise.cli.main import main

LENGTHS = [1024, 2048, 4096, 8192]


def test_the_slope_of_a_power_is_its_exponent() -> None:
    assert slope(LENGTHS, [3 * t**1.5 for t in LENGTHS]) == pytest.approx(1.5)
    assert slope(LENGTHS, [3 * t**2 for t in LENGTHS[:3]] + [math.nan]) == pytest.approx(2)
    assert slope(LENGTHS[:1], [1.0]) is None


@pytest.mark.parametrize("at", [1500, 3000, 8000])
def test_a_linear_and_a_quadratic_time_cross_where_they_are_equal(at: int) -> None:
    assert crossing(LENGTHS, [at * t for t in LENGTHS], [t**2 for t in LENGTHS]) == pytest.approx(at)


def test_what_never_crosses_or_is_always_faster() -> None:
    assert crossing(LENGTHS, [2, 2, 2, 2], [1, 1, 1, 1]) is None
    assert crossing(LENGTHS, [1, 1, 1, math.nan], [2, 2, 2, 2]) is None
    assert crossing(LENGTHS, [1, 1, 1, 1], [2, 2, 2, 2]) == 1024
    assert crossing(LENGTHS, [1, 3, 1, 1], [2, 2, 2, 2]) == pytest.approx(2896, rel=0.3)


def test_the_summary_compares_with_the_baseline() -> None:
    rows = [{"way": "flash", "tokens": t, "width": 64, "ms": t**2 / 3000} for t in LENGTHS]
    rows += [{"way": "ours", "tokens": t, "width": 64, "ms": float(t)} for t in LENGTHS]
    base, ours = summary(rows)
    assert (base["faster_from_T"], base["speedup_at_longest"]) == (None, 1)
    assert ours["slope"] == pytest.approx(1)
    assert ours["faster_from_T"] == pytest.approx(3000)


@pytest.mark.parametrize("name", ["holo", "linear"])
def test_a_benchmark_checks_and_times(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--device", "cpu", "--out", str(tmp_path), "--lengths", "16", "32"]
    assert main(["bench", name, *how]) == 0
    assert "faster_from_T" in capsys.readouterr().out
    rows = json.loads((tmp_path / f"{name}-cpu.json").read_text())["rows"]
    assert all(row["passed"] for row in rows if "passed" in row)
    assert {row["tokens"] for row in rows if "ms" in row} == {16, 32}
