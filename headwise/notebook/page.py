"""The page of a notebook: one HTML file with its pictures, the noise floor first; it runs no script of a
user."""

from __future__ import annotations

import base64
import datetime
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import write_text
from headwise.names import place_inside
from headwise.notebook.decide import facts, floors
from headwise.notebook.document import Document
from headwise.notebook.identity import short_code
from headwise.notebook.results import label, links, measures_of, picture_of, table, troubles, url
from headwise.notebook.status import BlockStatus, NotebookStatus
from headwise.notebook.verbs import result_of, state_of_verb, tail
from headwise.report.html import templates

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

PICTURES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".gif": "gif", ".webp": "webp"}
LARGEST = 8 << 20
"""The most bytes of a picture that is embedded."""

SAFE = re.compile(r"https?://[^\s]+|#.*|(?![a-z][a-z0-9+.-]*:|//)[^\s\\]*", re.IGNORECASE | re.DOTALL)
"""Links that a page may have: to the web, within the page, and to relative paths."""


def write_page(status: NotebookStatus, out: Path) -> Path:
    """Write the page.

    Raises:
        HeadwiseError: `out` cannot be written.
    """
    write_text(out, render(status))
    return out


def render(status: NotebookStatus) -> str:
    """The page as text."""
    document, memory = status.document, status.memory
    names = [block.name for block in status.blocks]
    found = floors(document, memory, {block.name: block.fence for block in status.blocks})
    floor = {(name, measure): one for name, measure, one in found}
    md = prose_of(status.path.parent)
    environment: dict[str, Any] = {}
    md.parse("".join(document.lines), environment)  # reference definitions may stand anywhere
    parts = []
    for lines, block in _parts(document, status.blocks):
        if text := lines.strip():
            parts.append({"prose": md.render(text, environment)})
        if block is not None:
            parts.append(_block(block, status, md, environment))
    script = templates().get_template("theme.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    done, total = (sum(getattr(block, key) for block in status.blocks) for key in ("done", "total"))
    codes = dict.fromkeys(short_code(memory.blocks[name]["code"]) for name in names if name in memory.blocks)
    return templates().get_template("notebook.html.j2").render(
        title=document.title or status.path.stem,
        name=status.path.name,
        notes=status.notes,
        floors=[(name, label(measure), one) for name, measure, one in found],
        decisions=[
            (one, facts(one, floor.get((one.compare.b, one.compare.measure)), one.looks))
            for one in status.decided
        ],
        parts=parts,
        facts=[
            ("Blocks", len(names)), ("Runs done", f"{done} of {total}"), ("Code", ", ".join(codes)),
            ("Written", datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes")),
        ],
        script=script,
        digest=digest,
    )  # fmt: skip


def _parts(document: Document, blocks: list[BlockStatus]) -> list[tuple[str, BlockStatus | None]]:
    """Pieces of prose, each with the block that follows it; hypotheses and results are removed."""
    gone: set[int] = set()
    last = max((block.fence.first for block in blocks), default=-1)
    for begin, end in [*document.hidden, *((mark.first, mark.last) for mark in document.marks)]:
        gone.update(range(begin, end + 1))
    for begin, end in document.hypotheses:
        if begin < last:
            gone.update(range(begin, end + 1))
    found: list[tuple[str, BlockStatus | None]] = []
    at = 0
    for block in blocks:
        found.append((_lines(document, at, block.fence.first, gone), block))
        at = block.fence.last + 1
    return [*found, (_lines(document, at, len(document.lines), gone), None)]


def _lines(document: Document, first: int, last: int, gone: set[int]) -> str:
    title = re.compile(r" {0,3}#[ \t]")
    lines = [document.lines[n] for n in range(first, last) if n not in gone]
    if first == 0 and lines and title.match(lines[0].removeprefix("\ufeff")):
        lines = lines[1:]  # the page has its own
    return "".join(lines)


def _block(
    block: BlockStatus, status: NotebookStatus, md: MarkdownIt, environment: dict[str, Any]
) -> dict[str, Any]:
    memory, folder = status.memory, status.path.parent
    past = memory.blocks.get(block.name) if block.groups or block.done else None
    document = status.document
    mark = document.mark_of(block.name)
    verbs = []
    for verb in past["verbs"] if past else ():
        ended = result_of(folder / verb)
        verbs.append((state_of_verb(folder / verb), ended, tail(folder / verb)))
    picture = picture_of(block.name, past, memory) if past else None
    shown = table(block.groups, measures_of(document.compares, block.groups)) if block.groups else None
    return {
        "block": block,
        "hypothesis": md.render(document.hypothesis_of(block.fence), environment),
        "commands": "".join(document.lines[block.fence.first + 1 : block.fence.last]).rstrip(),
        "table": shown,
        "troubles": troubles(block.groups),
        "verbs": verbs,
        "picture": _embedded(picture) if picture else None,
        "links": [(name, url(path)) for name, path in links(past, folder)] if past else [],
        "written": md.render(mark.text, environment) if mark and past is None else "",
    }


def prose_of(folder: Path) -> MarkdownIt:
    """A renderer of a user's Markdown: no HTML, only the links in `SAFE`, only pictures inside `folder`."""
    from markdown_it import MarkdownIt

    class Prose(MarkdownIt):
        def validateLink(self, url: str) -> bool:
            return SAFE.fullmatch(unquote(url)) is not None

    def image(self: Any, tokens: Any, index: int, options: Any, environment: Any) -> str:
        token = tokens[index]
        text = _escape(token.content)
        source = _picture(folder, str(token.attrs.get("src", "")))
        return f'<img src="{source}" alt="{text}">' if source else f"<em>[picture: {text}]</em>"

    def link_open(self: Any, tokens: Any, index: int, options: Any, environment: Any) -> str:
        tokens[index].attrSet("rel", "noopener noreferrer")
        return str(self.renderToken(tokens, index, options, environment))

    md = Prose("commonmark", {"html": False}).enable("table")
    md.add_render_rule("image", image)
    md.add_render_rule("link_open", link_open)
    return md


def _escape(text: str) -> str:
    from markupsafe import escape

    return str(escape(text))


def _picture(folder: Path, source: str) -> str | None:
    try:
        return _embedded(place_inside(folder, unquote(source), "the notebook"))
    except HeadwiseError:
        return None


def _embedded(path: Path) -> str | None:
    """A picture as a `data:` URL; None if it is no picture, too large or missing."""
    kind = PICTURES.get(path.suffix.lower())
    if kind is None:
        return None
    try:
        content = reading.read_bytes(path, limit=LARGEST)
    except reading.Unreadable:
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
