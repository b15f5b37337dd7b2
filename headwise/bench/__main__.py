"""`python -m headwise.bench NAME …`: the same as `headwise bench`, with torch and numpy alone."""

import sys

from headwise.bench.command import main

sys.exit(main(sys.argv[1:]))
