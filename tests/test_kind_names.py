"""No file outside of a kind's own names the kind."""

from __future__ import annotations

import re
from pathlib import Path

import headwise
from headwise.attention import KINDS

PACKAGE = Path(headwise.__file__).parent
DEFAULT = "flash"
"""The kind that configurations and reports start from, which others may name."""

SOURCE = "selective attention log"
"""The title of a source (docs/sources.md), which is not the kind. Words of style sheets are not either."""

WORDS = {"linear"}
"""Kinds with an everyday word as a name: a string of it alone or an import names them, a sentence not."""

EXCEPTIONS = {
    "attention/__init__.py": "the list of this package's kinds",
    "functional/__init__.py": "exports the operation of the same name",
    "functional/selective": "the operation of the same name",
    "functional/tropical": "the operation of the same name",
    "cli/per_head_metrics.py": "a suite that is defined by the kinds it compares",
    "report/markdown.py": "a line of the report that the suite prescribes, which names an engine",
    "config/run.py": "names an engine",
    "notebook/log": "reads the log of a program that was made for this kind",
}


def files() -> list[Path]:
    """Sources of the package, a kind's own left out."""
    own = {PACKAGE / "attention" / kind for kind in KINDS}
    found = []
    for path in sorted(PACKAGE.rglob("*")):
        kinds_own = path.with_suffix("") in own or own & set(path.parents)
        if path.suffix in {".py", ".js", ".j2"} and not kinds_own:
            found.append(path)
    return found


def test_only_the_listed_files_name_a_kind() -> None:
    ours = {kind: cls for kind, cls in KINDS.items() if cls.__module__.startswith("headwise.")}
    kinds = [kind for kind in ours if kind != DEFAULT and kind not in WORDS]
    classes = [KINDS[kind].__name__ for kind in kinds]
    words = "|".join(WORDS)
    alone = rf"(?<=[\"'])(?:{words})(?=[\"'])|(?<=attention\.)(?:{words})"
    pattern = re.compile(rf"(?<![\w-])({'|'.join([*kinds, *classes])})(?![\w-])|{alone}")
    naming: dict[str, list[str]] = {}
    for path in files():
        at = path.relative_to(PACKAGE).as_posix()
        text = re.sub(rf"display: flex|flex-\w+|{SOURCE}", "", path.read_text(encoding="utf-8"))
        if found := [match.group() for match in pattern.finditer(text)]:
            naming[at] = found
    allowed = {at for at in naming if any(at == place or at.startswith(f"{place}/") for place in EXCEPTIONS)}
    assert {at: found for at, found in naming.items() if at not in allowed} == {}
    used = {place for place in EXCEPTIONS for at in naming if at == place or at.startswith(f"{place}/")}
    assert used == set(EXCEPTIONS), "an exception that nothing needs any more"
