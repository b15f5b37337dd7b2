"""The first code in the process of a run at another revision: it makes that revision's modules the only ones.

A file that is run by its path, with the standard library alone: the `headwise` that it imports is the
revision's. Its argument is a JSON object:

    argv        of the command line of headwise
    path        sys.path, the working tree of the revision first
    repository  whose own files are not to be imported: a module that the revision lacks is missing
    allowed     folders inside of it that are no files of the revision: the working tree, the environment
    exempt      modules that may come from anywhere
    alive       descriptor that reads its end when the process that started this one is gone
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import signal
import sys
import threading
from typing import Any


class OnlyRevision:
    """Finds a module as the finders after it do, unless it lies in the user's own working tree."""

    def __init__(self, repository: str, allowed: list[str], exempt: list[str]) -> None:
        self.repository, self.allowed, self.exempt = repository, allowed, exempt

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The specification of a module, as import asks for it."""
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                break
        else:
            return None
        if path is None and name not in self.exempt and any(map(self.outside, _places(spec))):
            raise ModuleNotFoundError(f"No module named {name!r} at this revision", name=name)
        return spec

    def outside(self, place: str) -> bool:
        """Whether a file is one of the user's working tree."""
        place = os.path.realpath(place)
        return _below(place, self.repository) and not any(_below(place, one) for one in self.allowed)


def _places(spec: importlib.machinery.ModuleSpec) -> list[str]:
    places = list(spec.submodule_search_locations or ())
    return [*places, spec.origin] if spec.origin and spec.has_location else places


def _below(place: str, folder: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)


def _end_with(descriptor: int) -> None:
    """A process that started this one and is gone was killed: so is this one."""
    while os.read(descriptor, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def main(order: dict[str, Any]) -> int:
    """Run the revision's command line; returns its exit code."""
    threading.Thread(target=_end_with, args=(order["alive"],), daemon=True).start()
    sys.path[:] = order["path"]
    os.environ["PYTHONPATH"] = os.pathsep.join(order["path"])  # of processes that the run starts
    sys.meta_path.insert(0, OnlyRevision(order["repository"], order["allowed"], order["exempt"]))
    try:
        headwise = importlib.import_module("headwise.cli.main").main
    except Exception as error:
        print(f"headwise: this revision cannot be started: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    code: int = headwise(order["argv"])
    return code


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
