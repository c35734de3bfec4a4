"""`python -m nano`: the same as the `nanokit` command."""

from nano.entry import main

main()
