"""The command `hfedmoe`, which `python -m hfedmoe` is, too."""

import sys


def main() -> None:
    """Run the command line; an interruption ends it in one line also while it is being imported."""
    try:
        from hfedmoe import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
