"""Silence for verbs that load checkpoints."""

from __future__ import annotations

import os


def quiet_transformers() -> None:
    """Without transformers' own bars and reports while it loads; HEADWISE_VERBOSE keeps them."""
    if not os.environ.get("HEADWISE_VERBOSE"):
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
