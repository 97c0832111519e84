"""`python -m hfedmoe` is the command `hfedmoe`."""

from hfedmoe.cli import main

if __name__ == "__main__":
    main()
