"""What the tests on a GPU share; they need torch, Triton, numpy, pytest and the checkout alone.

`make test-gpu` runs them without the fixtures of the other tests (`--confcutdir`).
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from tests.gpu.families import FAMILIES, Outcome, outcome

RESULT = Path(__file__).parents[2] / "benchmarks" / "test-gpu.json"
JOBS = max(1, min(14, os.cpu_count() or 1))
LONG = ("long texts", "large offsets", "large grids")


def seed() -> int:
    return int(os.environ.get("HEADWISE_TEST_SEED", "0"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; or HEADWISE_TEST_DEVICE=cpu, to try the tests themselves at tiny sizes."""
    name = os.environ.get("HEADWISE_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device(name)


@pytest.fixture(scope="session")
def outcomes(device: torch.device) -> dict[str, list[Outcome]]:
    """How every case of every family came out; on a GPU written to `benchmarks/test-gpu.json`.

    Cases run in processes side by side, since compiling takes longer than computing.
    """
    began = time.perf_counter()
    print(f"\nseed {seed()} (HEADWISE_TEST_SEED changes it)")
    tiny = device.type == "cpu"
    few = os.environ.get("HEADWISE_TEST_FAMILIES")  # names, with commas, to look at some
    cases = [
        (name, n)
        for name, (_, count) in FAMILIES.items()
        for n in range(4 if tiny else count)
        if few is None or name in few.split(",")
    ]
    names, indices = zip(*cases, strict=True)
    seeds, devices = [seed()] * len(cases), [str(device)] * len(cases)
    if tiny:
        done = list(map(outcome, names, indices, seeds, devices))
    else:
        os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")  # an illegal access is told of where it is
        with ProcessPoolExecutor(JOBS, mp_context=get_context("spawn")) as pool:
            done = list(pool.map(outcome, names, indices, seeds, devices))
        broken = [n for n, found in enumerate(done) if found.error == float("inf")]
        print(f"{len(done)} cases after {time.perf_counter() - began:.0f} s, {len(broken)} in exceptions")
        if broken:
            for n in broken:
                print(f"exception: {done[n].family}, {done[n].case}", flush=True)
            again = _alone([cases[n] for n in broken], device)
            for n, found in zip(broken, again, strict=True):
                done[n] = found
        for found in done:
            if not found.passed:
                print(f"failed: {found.family}, {found.case}: {found.error} of {found.limit}", flush=True)
        if few is None:
            _write(_by_family(done), device, time.perf_counter() - began)
            from tests.gpu.long import run

            for found in run(device):
                done.append(found)
                _write(_by_family(done), device, time.perf_counter() - began)
        else:
            _write({name: found for name, found in _by_family(done).items() if found}, device,
                   time.perf_counter() - began, beside=True)  # fmt: skip
    return _by_family(done)


def _by_family(done: list[Outcome]) -> dict[str, list[Outcome]]:
    families: dict[str, list[Outcome]] = {name: [] for name in (*FAMILIES, *LONG)}
    for found in done:
        families[found.family].append(found)
    return families


def _alone(cases: list[tuple[str, int]], device: torch.device) -> list[Outcome]:
    """Cases that ended in an exception, each again in a process of its own.

    An illegal access breaks all that follows in its process, so that the first pass blames others too.
    """
    with ProcessPoolExecutor(JOBS, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        names, indices = zip(*cases, strict=True)
        return list(pool.map(outcome, names, indices, [seed()] * len(cases), [str(device)] * len(cases)))


def _write(
    families: dict[str, list[Outcome]], device: torch.device, seconds: float, beside: bool = False
) -> None:
    """Write the result; where some families alone ran, `beside` those of the others that are there.

    Every family has the commit that it was tested at.
    """
    import importlib.metadata

    from headwise.files import write_json
    from headwise.runs.environment import environment

    versions = environment(str(device)) | {"triton": importlib.metadata.version("triton")}
    commit = os.environ.get("HEADWISE_TEST_COMMIT") or versions["git_commit"]  # of a bare copy
    versions["git_commit"] = commit
    rows: dict[str, dict[str, object]] = {}
    for family, found in families.items():
        failed = [row for row in found if not row.passed]
        finite = [row.error for row in found if row.error < float("inf")]
        rows[family] = {
            "git_commit": commit,
            "cases": len(found),
            "passed": len(found) - len(failed),
            "failed": [{"case": row.case, "error": str(row.error), "limit": row.limit} for row in failed],
            "largest_relative_error": max(finite, default=None),
            "largest_error_of_its_limit": max(
                (row.error / row.limit for row in found if row.limit and row.error < float("inf")),
                default=None,
            ),
        }
    result = {"seed": seed(), "seconds": round(seconds, 1), "environment": versions, "families": rows}
    if beside and RESULT.is_file():
        before = json.loads(RESULT.read_text(encoding="utf-8"))
        old = before["environment"]["git_commit"]
        kept = {name: {"git_commit": old} | row for name, row in before["families"].items()}
        result = before | {"families": kept | rows}
    write_json(RESULT, result)
    print(f"written: {RESULT}")
