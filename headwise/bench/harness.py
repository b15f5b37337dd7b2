"""What all benchmarks share: timing on the device, the table, and JSON with the environment.

Needs torch and numpy alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from headwise.files import write_json
from headwise.runs.environment import environment


def measure(
    function: Callable[[], Any], device: torch.device, *, seconds: float = 0.5, least: int = 5
) -> float:
    """Median milliseconds of a call, after a warm-up, over about `seconds` of calls."""
    for _ in range(2):
        function()
    once = _timed(function, device)
    times = [_timed(function, device) for _ in range(max(least, int(seconds * 1e3 / max(once, 1e-3))))]
    return statistics.median(times)


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`function` as a CUDA graph, so that only the device's time is measured; itself on a CPU.

    What launching from Python costs is hidden in training, where the device lags behind the host.
    """
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def extra_memory_mb(function: Callable[[], Any], device: torch.device) -> float | None:
    """Peak device memory that a call needs beyond what is allocated before it, in MB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    del result
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows under the names of the first one's columns."""
    if not rows:
        return
    names = list(rows[0])
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def save(name: str, rows: Sequence[dict[str, Any]], out: Path, *, device: str) -> Path:
    """Write `out/<name>-<device>.json`: the rows, the environment and when they were measured."""
    kind = torch.device(device).type
    path = out / f"{name}-{kind}.json"
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    result = {"benchmark": name, "measured": stamp, "environment": environment(device), "rows": list(rows)}
    write_json(path, json.loads(json.dumps(result)))
    print(f"written: {path}")
    return path


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    return str(value)
