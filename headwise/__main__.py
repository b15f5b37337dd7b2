"""`python -m headwise …`, as torchrun needs it."""

import sys

from headwise.cli.main import main

sys.exit(main())
