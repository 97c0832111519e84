"""One runnable program per claim. Each prints a table and, with `--json FILE`, writes it with the machine beside it."""
