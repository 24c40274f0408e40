"""What a forked child must do: close its copies of descriptors, re-make locks; and how a fork is kept safe.

A descriptor that a child inherits keeps the other end of a connection from seeing that the parent died, and
keeps a dead server's port taken. So every object that owns descriptors registers here, and creates each
descriptor together with its entry in its own books inside :func:`creating_descriptors`, which a fork waits for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Final, Protocol

from shmelim.system.text import get_logger

_PATIENCE: Final = 0.1  # seconds for one lock of a log handler; one that hangs must not hold up the fork

_logger = get_logger("shmelim.forks")


class ForkAware(Protocol):
    """An owner of descriptors that must be told about a fork."""

    def after_fork_in_child(self) -> None:
        """Close the inherited descriptors and re-make every lock; other threads do not exist here."""


# Held by whoever creates a descriptor until the descriptor is in its owner's books, and by fork itself, so that a
# child finds every inherited descriptor in the books. Re-entrant, since a signal handler may fork inside it.
# Nothing may block or log while it is held.
creating_descriptors = threading.RLock()

# Written under creating_descriptors; read only by a child, which is alone.
_owners: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def register(owner: ForkAware) -> None:
    """Have `owner.after_fork_in_child()` called in every child forked from now on, while `owner` lives."""
    with creating_descriptors:
        _owners.add(owner)


# Whether this thread's forks wait for log lines of others, and what each fork under way has taken of the logs.
_thread = threading.local()
_taken: list[contextlib.ExitStack] = []


def _before() -> None:
    creating_descriptors.acquire()
    _taken.append(stack := contextlib.ExitStack())
    # The holder of the logging module's lock may wait for that of a handler.
    if getattr(_thread, "waits_for_logs", False) and _held(getattr(logging, "_lock", None), stack):
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in {h for one in loggers if isinstance(one, logging.Logger) for h in one.handlers}:
            _held(handler.lock, stack)


def _in_parent() -> None:
    try:
        if _taken:  # a signal handler that raises may have broken off what is done before
            _taken.pop().close()
    finally:
        creating_descriptors.release()


def _in_child() -> None:
    _taken.clear()  # logging has re-made them
    try:
        for owner in list(_owners):
            try:
                owner.after_fork_in_child()
            except Exception:  # the others have descriptors, too
                _logger.exception("a %s failed after a fork", type(owner).__qualname__)
    finally:
        creating_descriptors.release()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)


@contextlib.contextmanager
def logs_at_rest() -> Iterator[None]:
    """Keep forks of this thread from catching another thread in the middle of writing a log line.

    A stream's own lock is not re-made in a forked child. If another thread holds it at the fork, the child's first
    log line waits for ever for a thread that does not exist there. So such a fork takes the locks of all log
    handlers, as far as they can be had soon. It does so itself, after it took those of other modules: two threads
    that fork at the same time would otherwise wait for each other.
    """
    _thread.waits_for_logs = True
    try:
        yield
    finally:
        _thread.waits_for_logs = False


def _held(lock: Any, stack: contextlib.ExitStack) -> bool:
    """Take a lock until the stack ends, if there is one; return whether nobody else has it."""
    if lock is None:
        return True
    if not lock.acquire(timeout=_PATIENCE):
        return False
    stack.callback(lock.release)
    return True
