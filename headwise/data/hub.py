"""Hugging Face: its data sets, and one line for whatever its libraries raise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headwise.errors import HeadwiseError
from headwise.names import hub_name


def load_dataset(path: str, otherwise: str, **options: Any) -> Any:
    """`datasets.load_dataset` with errors that say what to do: `otherwise`, or install the extra.

    It runs no code of a data set: `datasets` refuses loading scripts from version 4 on, the oldest that is
    installed with headwise.

    Raises:
        HeadwiseError: `datasets` is not installed, or cannot load the data set.
    """
    if not os.path.exists(path):
        hub_name(path, "the dataset")
    try:
        import datasets
    except ImportError as error:
        raise HeadwiseError(
            f"{path!r} is read through Hugging Face datasets, which is not installed: "
            f'pip install "headwise[datasets]", or {otherwise}'
        ) from error
    try:
        with _quiet():
            return datasets.load_dataset(path, **options)
    except Exception as error:  # datasets raises errors of many libraries
        raise HeadwiseError(
            f"the dataset {path!r} cannot be loaded ({reason(error)}); {otherwise}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a line for each attempt to reach the hub: the error at the end says it."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def ask_for(name: str, *files: str) -> None:
    """Ask the hub once whether it has `name`, where its libraries would try again for a minute.

    Args:
        files: nothing is asked where one of them is in the hub's cache on this machine.

    Raises:
        Exception: of several libraries; it says why not.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        HfApi().model_info(name, timeout=20)


def revision_of(dataset: str) -> str | None:
    """The commit of a data set on the hub; None where the hub does not answer."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, timeout=20).sha
    except Exception:  # of several libraries
        return None


def reason(error: Exception) -> str:
    """The first line of an error, or its name where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
