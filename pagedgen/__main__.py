"""``python -m pagedgen``: the command line."""

from pagedgen.cli import main

if __name__ == "__main__":
    main()
