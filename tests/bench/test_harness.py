"""What every benchmark has: limits, a JSON that is whole after every case, and names of what is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headwise.bench import harness
from headwise.bench.command import BENCHMARKS, main
from headwise.bench.harness import Table, beside
from headwise.bench.page import page


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs tables as a benchmark; returns its exit code and its JSON."""

    def run(tables: list[Table], *argv: str) -> tuple[int, dict[str, Any]]:
        arguments = harness.parser("some", None).parse_args(["--out", str(tmp_path), *argv])
        code = harness.run("some", arguments, tables, device="cpu")
        path = tmp_path / "some-cpu.json"
        return code, json.loads(path.read_text()) if path.is_file() else {}

    return run


def endless() -> harness.Row:
    """A case whose library takes every exception for its own."""
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue


def test_the_time_cuts_off_the_case_that_runs_and_names_the_rest(measured: Any) -> None:
    began = time.monotonic()
    cases = {"first": lambda: {"ms": 1.0}, "long": endless, "last": lambda: {"ms": 2.0}}
    code, result = measured([Table(cases)], "--budget-s", "2")
    assert (code, result["rows"]) == (0, [{"ms": 1.0}])
    assert [one["case"] for one in result["missing"]] == ["long", "last"]
    assert "2 s of --budget-s" in result["missing"][0]["reason"]
    assert time.monotonic() - began < 60


def test_the_json_is_whole_after_every_case(measured: Any, tmp_path: Path) -> None:
    seen: list[tuple[list[float], list[str]]] = []

    def look(number: float) -> harness.Row:
        if (path := tmp_path / "some-cpu.json").is_file():
            now = json.loads(path.read_text())
            seen.append(([row["x"] for row in now["rows"]], [one["case"] for one in now["missing"]]))
        return {"x": number}

    cases = {name: lambda n=n: look(n) for n, name in enumerate("abc")}
    assert measured([Table(cases)])[0] == 0
    assert seen == [([0], ["b", "c"]), ([0, 1], ["c"])]


def test_a_case_that_fails_is_missing_and_the_others_are_measured(
    measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> harness.Row:
        raise RuntimeError("no such kernel\nand more")

    code, result = measured([Table({"a": fails, "b": lambda: {"ms": 1.0}})])
    assert (code, result["rows"]) == (1, [{"ms": 1.0}])
    assert result["missing"] == [{"case": "a", "reason": "RuntimeError: no such kernel"}]
    assert "missing: a (RuntimeError" in capsys.readouterr().out


@pytest.mark.parametrize("check", [lambda: {"passed": False}, lambda: 1 / 0])
def test_no_time_is_written_beside_a_check_that_fails(check: Any, measured: Any) -> None:
    tables = [Table({"before": lambda: {"ms": 1.0}}), Table({"check": check}, checks=True)]
    assert measured([*tables, Table({"after": endless})]) == (1, {})


def test_ratios_are_to_the_row_of_the_same_shape() -> None:
    rows = [{"of": of, "n": n, "ms": ms} for of, n, ms in (("a", 1, 2.0), ("b", 1, 3.0), ("b", 2, 5.0))]
    assert [row["x"] for row in beside(rows, "ms", "x", base={"of": "a"}, by=("n",))] == [1.0, 1.5, None]


def test_the_page_names_what_is_missing(tmp_path: Path, measured: Any) -> None:
    def fails() -> harness.Row:
        raise RuntimeError("no such kernel")

    measured([Table({"a": lambda: {"ms": 1.0}, "b": fails})])
    assert "Not measured: b (RuntimeError: no such kernel)." in page(tmp_path)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "page"])
def test_every_benchmark_can_be_limited(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "--budget-s" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["differential", "modifiers", "tt", "linear", "holo"])
def test_axes_can_be_limited(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--lengths", "--widths", "--no-compile", "--budget-s"))


def test_a_width_that_no_heads_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="give multiples"):
        main(["tt", "--widths", "100", "--out", str(tmp_path), "--device", "cpu"])
