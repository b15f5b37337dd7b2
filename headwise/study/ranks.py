"""One run on several GPUs of a machine: processes that torchrun starts, each of which is this module."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from headwise.config.run import load, to_yaml
from headwise.errors import HeadwiseError
from headwise.study.plan import PlannedRun


def train_ranks(run: PlannedRun, processes: int) -> None:
    """Train a run in `processes` processes; SIGTERM lets them finish their step and save.

    They end as well when this process is killed: their standard input closes.

    Raises:
        HeadwiseError: they ended with an error that the run's folder does not tell.
    """
    if run.fit.shrink or run.fit.limit is not None:
        raise HeadwiseError(
            "a run on several GPUs does not fit its batch into memory: leave out fit_batch and memory_limit, "
            "or use one GPU a run"
        )
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(to_yaml(run.config))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            "-m", "headwise.study.ranks", str(config), str(run.attempt or 0),
            str(torch.get_num_threads()),
        ]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as group:
            signal.signal(signal.SIGTERM, lambda *_: group.send_signal(signal.SIGTERM))
            assert group.stderr is not None
            said = [line.strip() for line in group.stderr if line.strip()][-200:]
    if group.returncode and run.folder.read_status()["state"] not in ("interrupted", "failed", "timed_out"):
        own = [line.removeprefix(MARK) for line in said if line.startswith(MARK)]
        raise HeadwiseError(own[0] if own else f"torchrun ended with {group.returncode}: {said[-1:]}")


MARK = "headwise: "


def main(arguments: list[str]) -> int:
    """The body of one of the processes."""
    from headwise.attention.kinds import load_plugins
    from headwise.runs.folder import Outdated, RunFolder
    from headwise.training.run import train

    path, attempt, threads = arguments
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(int(threads))
    try:
        config = load(Path(path))
        load_plugins(config.plugins)
        folder = RunFolder(Path(str(config.out)))
        train(config, resume=folder.holds_run(), attempt=int(attempt) or None)
    except Outdated:
        return 1
    except HeadwiseError as error:
        print(f"{MARK}{error}", file=sys.stderr)
        return 2
    return 0


def _stop_with_parent(*_: Any) -> None:
    while os.read(0, 1 << 10):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
