"""`python -m headwise.testing KIND [KIND ...] [--plugins MODULE] [-- PYTEST OPTIONS]`: the contract suite."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from headwise import testing
from headwise.cli.main import with_plugins
from headwise.errors import HeadwiseError


def main(argv: list[str]) -> int:
    """Run the suite; returns pytest's exit code, or 2 for a mistake of the user's."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    own, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    if importlib.util.find_spec("pytest") is None:
        raise HeadwiseError("the contract suite needs pytest: pip install 'headwise[test]'")
    import pytest

    names = with_plugins(own)
    from headwise.attention import attention_kind

    testing.kinds = [attention_kind(name).kind for name in names]
    suite = [str(Path(__file__).with_name(name)) for name in ("contract.py", "modifiers.py")]
    return int(pytest.main([*suite, "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *options]))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except HeadwiseError as error:
        print(f"headwise: {error}", file=sys.stderr)
        sys.exit(2)
