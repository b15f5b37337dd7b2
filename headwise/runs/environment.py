"""What a run or a benchmark ran on: versions, device, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
"""The checkout that this file may lie in."""


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
    commit = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None
    return {"git_commit": commit, "git_dirty": dirty}


def git_changes() -> str:
    """Eight hexadecimal digits of what differs from the commit; `unknown` where git does not tell."""
    found = _git("diff", "--binary", "HEAD")
    return "unknown" if found is None else hashlib.sha256(found.encode("utf-8", "replace")).hexdigest()[:8]


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or sys.platform
