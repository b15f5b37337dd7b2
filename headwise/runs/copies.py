"""`copies.json`: the URLs of a run's verified copies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import write_json
from headwise.runs.folder import known_format
from headwise.runs.manifest import COPIES, Manifest
from headwise.runs.remote import LONGEST_URL, Store
from headwise.runs.schemas import Count

FORMAT = 1


class Known(TypedDict):
    """A copy, with the time at which it was verified."""

    url: Annotated[str, Meta(min_length=1, max_length=LONGEST_URL)]
    verified: float
    step: Count


class Copies(TypedDict):
    """`copies.json`."""

    format: Count
    copies: Annotated[list[Known], Meta(max_length=1000)]


def known(folder: Path) -> list[Known]:
    """The recorded copies of a run; empty if there is no copies.json.

    Raises:
        HeadwiseError: copies.json is damaged, or was written by a newer headwise.
    """
    path = folder / COPIES
    try:
        found: Copies = reading.read_json(path, Copies, accept=known_format(path, known=FORMAT))
    except reading.Missing:
        return []
    except reading.Unreadable as error:
        raise error.so("delete the file, and push again") from error
    return found["copies"]


def record(folder: Path, store: Store, manifest: Manifest) -> None:
    """Record that `store` holds a verified copy, unless the store is lost when this process ends."""
    if not store.lasting:
        return
    new: Known = {"url": store.url, "verified": time.time(), "step": manifest["step"]}
    others = [copy for copy in known(folder) if copy["url"] != store.url]
    values: Copies = {"format": FORMAT, "copies": [*others, new]}
    try:
        write_json(folder / COPIES, values)
    except HeadwiseError as error:
        if os.access(folder, os.W_OK):
            raise
        raise HeadwiseError(
            f"the copy at {store.url} is verified, but cannot be recorded in {folder}: {error}"
        ) from error
