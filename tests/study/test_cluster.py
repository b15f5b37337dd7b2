"""The same study on this machine, on a Ray cluster that loses a node, and as jobs: the same numbers."""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.runs.folder import RunFolder
from headwise.study.executor import Executor, Resources, executor_named, run_all, state
from headwise.study.plan import PlannedRun, plan
from headwise.study.study import Study, Variant
from headwise.study.work import work

ray = pytest.importorskip("ray")
pytest.importorskip("submitit")

STEPS = 300
ONE = Resources(threads=1)


def planned(root: Path) -> list[PlannedRun]:
    base = {
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
        "data": {"name": "copy", "seq_len": 8, "batch_size": 2, "vocab_size": 8, "eval_sequences": 2},
        "training": {"max_steps": STEPS, "warmup_steps": 1, "eval_every": 0, "checkpoint_every": 0},
        "measure": {"heads": False, "maps": 0},
    }
    study = Study("demo", base=base, variants={"flash": Variant()}, seeds=[0, 1], device="cpu")
    study.validate()
    return plan(study, root)


def losses(folder: RunFolder) -> list[tuple[str, str, str]]:
    return [(row["step"], row["split"], row["loss"]) for row in folder.read_metrics()]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[str, str, str]]]:
    """What each seed logs on this machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = planned(tmp_path_factory.mktemp("here"))
    for run in runs:
        work(run)
    torch.set_num_threads(threads)
    return [losses(run.folder) for run in runs]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes with a processor each."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    before = signal.getsignal(signal.SIGTERM)  # a node in this process takes it
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        signal.signal(signal.SIGTERM, before)


def test_a_run_whose_node_is_lost_goes_on_elsewhere_with_the_same_numbers(
    cluster: Any, here: list[list[tuple[str, str, str]]], tmp_path: Path
) -> None:
    second = cluster.add_node(num_cpus=1)
    with pytest.raises(HeadwiseError, match="a run needs 5 CPUs"):
        executor_named("ray", Resources(threads=5), tmp_path, address=cluster.address)
    runs, lost = planned(tmp_path), []

    def lose_a_node(_: Sequence[PlannedRun]) -> None:
        if not lost and all(run.folder.metrics.exists() for run in runs):
            cluster.remove_node(second, allow_graceful=False)
            lost.append(second)

    assert run_all(runs, executor_named("ray", ONE, tmp_path, address=cluster.address), show=lose_a_node)
    assert lost
    assert [state(run) for run in runs] == ["finished", "finished"]
    assert sorted(run.folder.read_status()["attempt"] for run in runs) == [1, 2]
    assert [losses(run.folder) for run in runs] == here
    resumed = [len(re.findall("resumed at step", run.folder.log.read_text())) for run in runs]
    assert sorted(resumed) == [0, 1]


def test_a_job_of_submitit_has_the_same_numbers(
    here: list[list[tuple[str, str, str]]], tmp_path: Path
) -> None:
    run, _ = planned(tmp_path)
    executor: Executor = executor_named("slurm", ONE, tmp_path, slurm=["cluster=local"])
    assert run_all([run], executor, show=lambda _: None)
    assert losses(run.folder) == here[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["partition"], "not KEY=VALUE"),
        (["a=b\n#SBATCH --x"], "not KEY=VALUE"),
        (["gpus=1"], "use --gpus-per-run"),
        (["mem=1G", "mem=2G"], "given twice"),
        (["cluster=moon"], "use slurm or local"),
    ],
)
def test_a_wrong_option_of_sbatch_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match=message):
        executor_named("slurm", ONE, tmp_path, slurm=options)
    assert dataclasses.replace(ONE, gpus=2).processes == 2
