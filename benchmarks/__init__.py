"""One program per claim. Each prints a table; `--json FILE` also writes it, with a description of the machine."""
