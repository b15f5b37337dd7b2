"""The body of a worker process: one run, trained here, whichever executor started the process."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from headwise.attention.kinds import load_plugins
from headwise.errors import HeadwiseError
from headwise.runs.folder import Outdated

if TYPE_CHECKING:
    from headwise.study.plan import PlannedRun


def work(run: PlannedRun, processes: int = 1) -> None:
    """Train a run, or continue it; what goes wrong is in its folder's status, and nothing is raised.

    A worker whose place another one took (`Outdated`) ends without writing anything.

    Args:
        processes: as torchrun starts them, each with a GPU where there are any; 1 for this one alone.
    """
    from headwise.study.fit import train_to_fit
    from headwise.study.ranks import train_ranks
    from headwise.study.revision import train_at

    folder = run.folder
    try:
        folder.refuse_outdated()
        if run.code is not None:
            train_at(run, processes)
            return
        load_plugins(run.config.plugins)
        train_to_fit(run) if processes == 1 else train_ranks(run, processes)
    except Outdated:
        return
    except HeadwiseError as error:
        _fail(run, str(error))
    except Exception as error:
        _fail(run, f"{type(error).__name__}: {error}", traceback.format_exc())


def _fail(run: PlannedRun, reason: str, details: str = "") -> None:
    try:
        run.folder.write_status("failed", reason=reason)
        if details:
            run.folder.say(details)
    except Outdated:
        return
