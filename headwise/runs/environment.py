"""What a run or a benchmark ran on: versions, device, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def environment(device: str | None = None) -> dict[str, Any]:
    """Versions, machine, device and git commit, for `env.json`."""
    import torch

    from headwise import __version__

    cuda = device is not None and device.startswith("cuda")
    return {
        "headwise": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        **git_state(),
    }


def git_state() -> dict[str, Any]:
    """The commit of the source tree that runs and whether it differs from it; None outside a checkout."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if (root / ".git").exists() else None
    dirty = bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None
    return {"git_commit": commit, "git_dirty": dirty}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or sys.platform
