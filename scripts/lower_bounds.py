"""The lowest versions that pyproject.toml claims, as pins: `python scripts/lower_bounds.py [EXTRA ...]`

With `--keep NAME`, that package has the version of constraints.txt, for one whose lowest build cannot be had.
scripts/lower_bounds.sh installs them into a fresh virtual environment and runs the tests.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lowest(requirement: str) -> str:
    """`name[extra]>=1.2; marker` as `name[extra]==1.2; marker`; what has no lower bound as it is."""
    return re.sub(r">=\s*([\w.]+)", r"==\1", requirement)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="optional dependencies to pin too")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="NAME", help="with constraints.txt's version"
    )
    given = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    if unknown := set(given.extras) - set(optional):
        parser.error(f"no extra {', '.join(sorted(unknown))}; there are {', '.join(sorted(optional))}")
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for requirement in [
        *project["dependencies"],
        *(one for extra in given.extras for one in optional[extra]),
    ]:
        name = re.split(r"[^\w.-]", requirement)[0]
        print(f"{name}=={tested[name]}" if name in given.keep else lowest(requirement))


if __name__ == "__main__":
    main()
