"""The command `hfedmoe`, also available as `python -m hfedmoe`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends it with one line, even during the import."""
    try:
        from hfedmoe import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
