"""What a forked child does with the channel's descriptors: closes its copies, and uses none of them.

A descriptor that a child inherits keeps the other end of a connection from seeing that the parent died, and
keeps a dead server's port taken. So every object that owns descriptors registers here, and creates each
descriptor together with its entry in its own books inside :func:`creating_descriptors`, which a fork waits for.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import Protocol

_logger = logging.getLogger("shmelim.forks")


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


def _in_child() -> None:
    try:
        for owner in list(_owners):
            try:
                owner.after_fork_in_child()
            except Exception:  # the others have descriptors, too
                _logger.exception("a %s failed after a fork", type(owner).__qualname__)
    finally:
        creating_descriptors.release()


os.register_at_fork(
    before=creating_descriptors.acquire,
    after_in_parent=creating_descriptors.release,
    after_in_child=_in_child,
)
