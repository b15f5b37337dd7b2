"""The same study on this machine, on a Ray cluster that loses a node, and as jobs: the same numbers."""

from __future__ import annotations

import dataclasses
import os
import re
import select
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
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

ONE = Resources(threads=1)

GATE = """
import os
from torch.optim.optimizer import register_optimizer_step_pre_hook
from headwise.attention.flash import FlashAttention
from headwise.attention.kinds import register

steps = 0

@register("gated")
class Gated(FlashAttention):
    pass

def stand_still(*_):
    global steps
    steps += 1
    if steps == 3 and os.path.exists(os.environ["GATE"]):
        open(os.environ["GATE"]).close()

register_optimizer_step_pre_hook(stand_still)
"""
"""What the cluster's workers load: in their third step they wait at the gate of their node."""


def planned(root: Path) -> list[PlannedRun]:
    base = {
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
        "data": {"name": "copy", "seq_len": 8, "batch_size": 2, "vocab_size": 8, "eval_sequences": 2},
        "training": {"max_steps": 6, "warmup_steps": 1, "eval_every": 0, "checkpoint_every": 2},
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


@dataclasses.dataclass
class Nodes:
    """A cluster of two nodes with a processor and a gate each."""

    cluster: Any
    second: Any
    gates: tuple[Path, Path]

    def open_gate(self, number: int) -> None:
        """Let go who waits at the gate of a node, and who comes later."""
        with suppress(FileNotFoundError):
            gate = os.open(self.gates[number], os.O_RDWR)
            self.gates[number].unlink()
            os.close(gate)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Nodes]:
    """As small as Ray makes them."""
    from ray.cluster_utils import Cluster

    (tmp_path / "gate.py").write_text(GATE)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}")
    gates = tmp_path / "first", tmp_path / "second"
    before = signal.getsignal(signal.SIGTERM)  # a node in this process takes it
    cluster = Cluster()
    added: list[Any] = []
    try:
        for gate in gates:
            os.mkfifo(gate)
            monkeypatch.setenv("GATE", str(gate))  # a node's processes have its environment
            added.append(
                cluster.add_node(
                    num_cpus=1,
                    include_dashboard=False,
                    include_log_monitor=False,
                    object_store_memory=80 << 20,
                )
            )
        made = Nodes(cluster, added[1], gates)
        yield made
        made.open_gate(0)
        made.open_gate(1)
    finally:
        ray.shutdown()
        cluster.shutdown()
        signal.signal(signal.SIGTERM, before)


def test_a_run_whose_node_is_lost_goes_on_elsewhere_with_the_same_numbers(
    nodes: Nodes, here: list[list[tuple[str, str, str]]], tmp_path: Path
) -> None:
    address = nodes.cluster.address
    with pytest.raises(HeadwiseError, match="a run needs 5 CPUs"):
        executor_named("ray", Resources(threads=5), tmp_path, address=address)
    runs = [
        dataclasses.replace(run, config=dataclasses.replace(run.config, plugins=["gate"]))
        for run in planned(tmp_path)
    ]
    workers: list[int] = []

    def lose_a_node(_: Sequence[PlannedRun]) -> None:
        if not workers and all(list(run.folder.checkpoints.glob("step_*")) for run in runs):
            workers.extend(run.folder.read_status()["pid"] for run in runs)
            nodes.cluster.remove_node(nodes.second, allow_graceful=False)
            nodes.open_gate(0)

    assert run_all(runs, executor_named("ray", ONE, tmp_path, address=address), show=lose_a_node)
    assert [state(run) for run in runs] == ["finished", "finished"]
    assert sorted(run.folder.read_status()["attempt"] for run in runs) == [1, 2]
    assert [losses(run.folder) for run in runs] == here
    resumed = [re.findall(r"resumed at step \d+", run.folder.log.read_text()) for run in runs]
    assert sorted(resumed) == [[], ["resumed at step 2"]]
    nodes.open_gate(1)  # whoever lived on there goes on, and writes nothing
    for worker in workers:
        with suppress(ProcessLookupError):
            select.select([os.pidfd_open(worker)], [], [], 60)
    assert [losses(run.folder) for run in runs] == here
    assert [state(run) for run in runs] == ["finished", "finished"]


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
