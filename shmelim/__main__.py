"""``python -m shmelim``: the command line."""

from shmelim.cli.main import main

if __name__ == "__main__":
    main()
