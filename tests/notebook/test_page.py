"""No HTML of a user's runs in the page, and nothing leads out of the notebook's folder."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headwise.notebook.page import prose_of, render
from headwise.notebook.status import look

HOSTILE = """# <script>alert(1)</script>

<script>alert(2)</script> <img src=x onerror=alert(3)>

[a](javascript:alert(4)) [b](JaVaScRiPt:alert(5)) [c](java&#10;script:alert(6))
[d](data:text/html,x) [e](//evil/x)
[f](vbscript:x) [g](file:///etc/passwd) [h](https://example.org/) [i](runs/x.html) [j](javascript%3Aalert(1))
![k](../secret.png) ![l](in.png) ![m](https://example.org/x.png)

Hypothesis: <svg onload=alert(7)>

```headwise a
headwise train --out "</pre><script>alert(8)</script>"
```
<!-- headwise:result a 0123456789abcdef -->
<script>alert(9)</script>
<!-- /headwise:result -->
"""


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_in_a_notebook_becomes_a_script_or_a_link_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (home / "in.png").write_bytes(b"picture")
    (home / "nb.md").write_text(HOSTILE)
    page = render(look(home / "nb.md"))
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    links = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert links <= {"#floor", "#decisions", "#notebook", "https://example.org/", "runs/x.html"}
    pictures = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert pictures == ["data:image/png;base64,cGljdHVyZQ=="]
    policy = next(
        attributes["content"] for tag, attributes in tags if tag == "meta" and "http-equiv" in attributes
    )
    assert policy is not None
    assert re.search(r"default-src 'none'; script-src 'sha256-[\w+/]+='", policy)


@pytest.mark.parametrize(
    "text", ["a | b\n--- | ---\n1 | 2\n", "**bold** `code`\n", "[x]\n\n[x]: https://a.b\n"]
)
def test_markdown_is_rendered(tmp_path: Path, text: str) -> None:
    assert re.search(r"<(table|strong|a href)", prose_of(tmp_path).render(text))
