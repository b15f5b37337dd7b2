"""Errors of libraries that are written in Rust: their panics are no `Exception`."""

from __future__ import annotations

PANIC = "PanicException"


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked, which `except Exception` does not catch."""
    return type(error).__name__ == PANIC


def first_line(error: BaseException) -> str:
    """The first line that an error has to say, or its name."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300]
