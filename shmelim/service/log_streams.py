"""Keeps a fork from catching another thread in the middle of writing a log line.

A stream's own lock is not re-made in a forked child. If another thread holds it at the fork, the child's first log
line waits for ever for a thread that does not exist there. So whoever forks waits until no log handler is at work.

A fork itself waits for the lock of the logging module, whose holder may wait for that of a handler. So that one is
taken first, and if it cannot be had soon, none is.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE = 0.1  # seconds for one lock; a handler that hangs must not hold up the fork


@contextlib.contextmanager
def at_rest() -> Iterator[None]:
    """Hold the locks of the logging module and of all log handlers, as far as they can be had soon.

    Another thread may hold one of them and wait for another, hence the limit.
    """
    with contextlib.ExitStack() as stack:
        if _held(getattr(logging, "_lock", None), stack):
            loggers = [logging.root, *logging.root.manager.loggerDict.values()]
            for handler in {
                h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers
            }:
                _held(handler.lock, stack)
        yield


def _held(lock: Any, stack: contextlib.ExitStack) -> bool:
    """Take a lock until the stack ends, if there is one; return whether nobody else has it."""
    if lock is None:
        return True
    if not lock.acquire(timeout=_PATIENCE):
        return False
    stack.callback(lock.release)
    return True
