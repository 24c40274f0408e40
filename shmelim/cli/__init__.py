"""The command line: ``shmelim`` and ``python -m shmelim``."""
