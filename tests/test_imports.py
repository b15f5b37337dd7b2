"""Imports point one way: a module imports from its own package and from those that it stands on, no others.

Imports inside functions and under TYPE_CHECKING count. The one exception is the package's lazy face.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "headwise"

STANDS_ON = {
    "errors": [],
    "files": ["errors"],
    "reading": ["files"],
    "names": ["files"],
    "pretrained": ["reading"],
    "functional": ["reading"],
    "spec": ["errors"],
    "attention": ["functional", "spec"],
    "model": ["attention", "pretrained"],
    "data": ["attention", "pretrained", "names"],
    "config": ["model", "data"],
    "measures": ["config"],
    "runs": ["measures", "names"],
    "watch": ["runs", "analysis"],
    "training": ["watch"],
    "study": ["training"],
    "analysis": ["errors"],
    "report": ["analysis", "runs"],
    "questions": ["report", "study"],
    "bench": ["questions"],
    "notebook": ["questions"],
    "cli": ["bench", "notebook"],
    "testing": ["cli"],
    "__main__": ["cli"],
}
"""What each package or module of headwise stands on; it also stands on all that these stand on."""

UPSTAIRS = {
    "section.py": "questions", "inspect.py": "questions", "sums.py": "questions",
    "bench.py": "bench", "bench_step.py": "bench",
}  # fmt: skip
"""Files in the folder of a kind of attention that are reached by name alone, and where they stand."""

FACE = "__init__.py"
"""`headwise.watch` is imported when it is used: the one import against the order."""


def below(floor: str) -> set[str]:
    """All that `floor` stands on."""
    return {found for under in STANDS_ON[floor] for found in {under} | below(under)}


def floor_of(path: Path) -> str:
    """Of a file, by its path below headwise/."""
    parts = path.relative_to(ROOT).parts
    if parts == ("measures", "spec.py"):  # what a measure is, which kinds of attention declare
        return "spec"
    if parts[0] == "attention" and len(parts) == 3 and parts[-1] in UPSTAIRS:
        return UPSTAIRS[parts[-1]]
    return parts[0].removesuffix(".py")


def target(name: str) -> str | None:
    """The floor that a dotted name stands for, None where it is not a part of headwise."""
    top, *parts = name.split(".")
    if (
        top != "headwise"
        or not parts
        or not ((ROOT / parts[0]).is_dir() or (ROOT / f"{parts[0]}.py").is_file())
    ):
        return None
    path = ROOT.joinpath(*parts)
    return floor_of(path if path.is_dir() else path.with_name(f"{path.name}.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports, wherever in the file it does."""
    package = ("headwise", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            for name in node.names:
                inside = f"{module}.{name.name}"
                is_module = ROOT.parent.joinpath(*inside.split(".")).with_suffix(".py").is_file()
                yield node.lineno, inside if is_module or module == "headwise" else module


def against_the_order() -> list[str]:
    """Every import that goes up or sideways, as `file:line imports module`."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        floor = floor_of(path)
        if path == ROOT / FACE:
            continue
        allowed = {floor} | below(floor)
        for line, name in imports(path):
            to = target(name)
            if to is not None and to not in allowed:
                found.append(f"{path.relative_to(ROOT.parent)}:{line} ({floor}) imports {name} ({to})")
    return found


def test_every_module_has_a_floor() -> None:
    floors = {floor_of(path) for path in ROOT.rglob("*.py") if path != ROOT / FACE}
    assert floors <= set(STANDS_ON)


def test_imports_point_one_way() -> None:
    found = against_the_order()
    assert not found, "\n".join(["imports against the order:", *found])


def test_the_face_is_the_only_way_up_and_is_lazy() -> None:
    face = ast.parse((ROOT / FACE).read_text(encoding="utf-8"))
    assert {target(name) for _, name in imports(ROOT / FACE)} - {None} == {"watch"}
    at_import = [node for node in face.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all(not ast.unparse(node).removeprefix("from ").startswith("headwise") for node in at_import)
