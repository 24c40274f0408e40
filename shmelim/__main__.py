"""The command line, as ``shmelim`` and as ``python -m shmelim``."""

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run it; Ctrl-C ends it without a trace from its first moment on."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while there is nothing yet to end in order
    os.umask(0o077)  # what is made can be used by this user, and by nobody else
    from shmelim.cli import main as commands  # noqa: PLC0415  # it takes a while

    commands.main(handler)


if __name__ == "__main__":
    main()
