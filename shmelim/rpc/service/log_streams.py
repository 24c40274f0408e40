"""Keeps a fork from catching another thread in the middle of writing a log line.

A stream's own lock is not re-made in a forked child. If another thread holds it at the fork, the child's first log
line waits for ever for a thread that does not exist there. So whoever forks waits until no log handler is at work.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["at_rest"]

_PATIENCE = 0.1  # seconds for one handler; one that hangs must not hold up the fork


@contextlib.contextmanager
def at_rest() -> Iterator[None]:
    """Hold the locks of all log handlers, as far as they can be had soon.

    Another thread may hold one of them and wait for another, hence the limit.
    """
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers}
    with contextlib.ExitStack() as stack:
        for handler in handlers:
            lock = handler.lock
            if lock is not None and lock.acquire(timeout=_PATIENCE):
                stack.callback(lock.release)
        yield
