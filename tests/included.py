"""Files that a page shows: `python -m tests.included` writes them anew between the page's markers.

<!-- begin examples/outside_kind/outside_kind/layer.py -->
```python
...
```
<!-- end -->
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md",)
_SHOWN = re.compile(r"<!-- begin (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def with_files(page: str) -> str:
    """The page's text with what its files hold now."""

    def shown(found: re.Match[str]) -> str:
        path = ROOT / found[1]
        language = {".py": "python", ".toml": "toml"}.get(path.suffix, "")
        content = path.read_text(encoding="utf-8").rstrip()
        return f"<!-- begin {found[1]} -->\n```{language}\n{content}\n```\n<!-- end -->"

    return _SHOWN.sub(shown, page)


if __name__ == "__main__":
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        (ROOT / name).write_text(with_files(text), encoding="utf-8")
