"""`python -m nano`: the same as the `nanokit` command."""

from nano.cli import main

main()
