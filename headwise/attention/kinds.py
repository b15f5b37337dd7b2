"""Every kind of attention by its name: those of this package, of installed packages, and of `--plugins`.

A package adds kinds through entry points of the group `headwise.kinds`; each names a module, or a class in
it, whose import registers the kind:

    [project.entry-points."headwise.kinds"]
    nothing = "my_package.nothing"

A module that is not installed is named by `--plugins my_module` or by `plugins:` in a configuration. Modules
are imported only where the user names them: what a run folder records is imported where it is installed,
because a folder may come from somebody else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from headwise.attention.base import FEATURES, Attention
from headwise.attention.modifiers import MODIFIERS
from headwise.errors import HeadwiseError, one_of
from headwise.measures.spec import register_measure

GROUP = "headwise.kinds"
RESERVED = ("kind", "dropout", *MODIFIERS)
"""Keys of `model.attention` that are no section of a kind."""

KINDS: dict[str, type[Attention]] = {}
LOADED: list[str] = []
"""Plug-ins that were imported by name, in order."""
BROKEN: dict[str, str] = {}
"""Entry points whose import failed, with the reason."""

Listener = Callable[[type[Attention]], None]
_listeners: list[Listener] = []


def register(kind: str) -> Callable[[type[Attention]], type[Attention]]:
    """Make a subclass of `Attention` known as `model.attention.kind = kind`.

    Raises:
        ValueError: a name that is taken or is not an identifier, or features that do not exist.
        HeadwiseError: a measure that cannot be registered.
    """

    def add(cls: type[Attention]) -> type[Attention]:
        unknown = cls.supports - set(FEATURES)
        if unknown:
            raise ValueError(f"attention kind {kind!r} declares unknown features {sorted(unknown)}")
        if not kind.isidentifier() or kind in RESERVED:
            raise ValueError(f"attention kind {kind!r}: a kind's name is an identifier other than {RESERVED}")
        known = KINDS.get(kind)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"attention kind {kind!r} of {cls.__module__} has the name of one in {known.__module__}"
            )
        for measure in cls.measures:
            register_measure(measure)
        cls.kind = kind
        KINDS[kind] = cls
        for listener in _listeners:
            listener(cls)
        return cls

    return add


def on_registration(listener: Listener) -> Listener:
    """Call `listener` with every kind: with those known now, and with each as it is registered."""
    for cls in list(KINDS.values()):
        listener(cls)
    _listeners.append(listener)
    return listener


def attention_kind(kind: str) -> type[Attention]:
    """The class registered as `kind`.

    Raises:
        HeadwiseError: there is none; names the nearest.
    """
    if kind in BROKEN and kind not in KINDS:
        raise HeadwiseError(
            f"attention kind {kind!r} is installed, but it cannot be imported: {BROKEN[kind]}"
        )
    return KINDS[one_of("model.attention.kind", kind, KINDS)]


def resolve(place: str) -> Any:
    """The object at `package.module:NAME`, of which a kind declares several; imported when it is needed."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def load_installed() -> None:
    """Import the kinds of installed packages. One that fails stops nothing until it is chosen."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # another package's mistake, whatever it is
            BROKEN[entry.name] = f"{entry.value}: {type(error).__name__}: {error}"


def load_plugins(names: Iterable[str], *, recorded_in: str | None = None) -> None:
    """Import modules whose import registers kinds.

    Args:
        names: dotted names of modules.
        recorded_in: the file of a run that records them. They are imported then only if they are installed.

    Raises:
        HeadwiseError: a module that is not found, fails, or registers no kind.
    """
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise HeadwiseError(f"plug-in {name!r} is not a module's name, such as my_package.my_module")
        if name in LOADED or name in sys.modules:
            continue
        if recorded_in is not None and not _installed(name):
            raise HeadwiseError(
                f"{recorded_in} needs the plug-in {name!r}, which is not installed; "
                f"pass --plugins {name} to import it from here"
            )
        _import(name)
        LOADED.append(name)


def _import(name: str) -> None:
    known = set(KINDS)
    here = os.getcwd()
    beside = here not in sys.path
    if beside:
        sys.path.append(here)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = "it" if error.name and name.startswith(error.name) else f"{error.name}, which it imports,"
        raise HeadwiseError(
            f"plug-in {name!r} cannot be imported: {missing} is neither installed nor below {here}"
        ) from error
    except (Exception, SystemExit) as error:  # a script may end the program
        raise HeadwiseError(
            f"plug-in {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if set(KINDS) == known and not any(cls.__module__.startswith(name) for cls in KINDS.values()):
        raise HeadwiseError(
            f"plug-in {name!r} registers no attention kind; decorate its class with @register"
        )


def _installed(name: str) -> bool:
    """Whether a module comes from an installed package, and not from the working folder."""
    top = name.partition(".")[0]
    return top in importlib.metadata.packages_distributions()
