"""The longest trainable sequence of every variant of a study, each searched in a process of its own."""

from __future__ import annotations

import dataclasses
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from headwise import reading
from headwise.attention.kinds import load_plugins
from headwise.config.run import Config
from headwise.errors import HeadwiseError
from headwise.files import write_json
from headwise.runs.schemas import Lengths
from headwise.study.configure import configure
from headwise.study.expand import Place, places
from headwise.study.longest import search_length
from headwise.study.memory_size import parse_size
from headwise.study.study import Study

FILE = "max_lengths.json"
LENGTH = "data.seq_len"


def search_lengths(study: Study, root: Path) -> Path:
    """Search at `study.max_length_at` and write the results after each variant; earlier results are kept.

    Stages are left out: the variants from which they take overrides are searched.

    Returns:
        The file `max_lengths.json` in the study's folder.
    """
    assert study.max_length_at is not None
    limit = parse_size("max_length_at", study.max_length_at)
    path = root / study.name / FILE
    found: dict[str, Any] = {}
    try:
        known = reading.read_json(path, Lengths)
        found = {
            row["variant"]: row
            for row in known["rows"]
            if (row["limit_mb"], row["until"]) == (limit / 1e6, study.max_length_until)
        }
    except reading.Missing:
        pass
    except reading.Unreadable as error:
        raise error.so("delete it and search again") from error
    context = multiprocessing.get_context("forkserver")
    for name, place in _without_length(study).items():
        if name in found:
            continue
        config = configure(study, place)
        inside, outside = context.Pipe(duplex=False)
        arguments = (config, limit, study.max_length_until, outside)
        process = context.Process(target=_search, args=arguments)
        process.start()
        outside.close()
        try:
            result = inside.recv()
        except EOFError:
            result = {"problem": "the process of the search was killed: the machine ran out of memory"}
        process.join()
        about = {"variant": name, "kind": config.model.attention.kind, "until": study.max_length_until}
        found[name] = about | {"limit_mb": limit / 1e6} | result
        write_json(path, {"rows": list(found.values())})
    return path


def _without_length(study: Study) -> dict[str, Place]:
    """Every variant at every combination of the axes but the length."""
    axes = {key: values for key, values in study.axes.items() if key != LENGTH}
    without = dataclasses.replace(study, axes=axes)
    stages = [name for name, variant in study.variants.items() if variant.best_of]
    return {place.name: place for place in places(without) if place.origin not in stages}


def _search(config: Config, limit: int, until: int, pipe: Connection) -> None:
    """The body of the process."""
    load_plugins(config.plugins)
    try:
        pipe.send(search_length(config, limit, until))
    except HeadwiseError as error:
        pipe.send({"problem": str(error)})
    except Exception as error:
        pipe.send({"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
