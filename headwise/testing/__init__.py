"""The tests that every kind of attention passes, for kinds of other packages as well.

python -m headwise.testing my_kind                      # installed, with an entry point
python -m headwise.testing my_kind --plugins my_module  # a file that is not installed
"""

kinds: list[str] | None = None
"""The kinds that `headwise.testing.contract` tests; all that are registered where None."""
