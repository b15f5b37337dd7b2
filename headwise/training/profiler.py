"""A profile of some training steps: a trace for a viewer, and the table of the hottest operators."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from headwise.files import replacing, write_text
from headwise.training.distributed import World

WARMUP = 2


class StepProfiler:
    """Profiles `steps` steps after two of warm-up into `folder/profile/`; nothing where `steps` is 0."""

    def __init__(self, steps: int, folder: Path, world: World) -> None:
        self.folder, self.world = folder / "profile", world
        self._profile: torch.profiler.profile | None = None
        if steps and world.leads:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if world.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(wait=0, warmup=WARMUP, active=steps, repeat=1),
                on_trace_ready=self._write,
                profile_memory=True,
            )

    def __enter__(self) -> StepProfiler:
        if self._profile:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile:
            self._profile.__exit__(kind, error, trace)

    def step(self) -> None:
        """One training step is done."""
        if self._profile:
            self._profile.step()

    def _write(self, profile: torch.profiler.profile) -> None:
        key = "self_cuda_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        write_text(self.folder / "operators.txt", profile.key_averages().table(sort_by=key, row_limit=30))
        with replacing(self.folder / "trace.json") as draft:
            profile.export_chrome_trace(str(draft))
