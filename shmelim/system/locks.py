"""A lease: a file whose ``flock`` one process has at a time, and which names it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from shmelim.system import forks

_PID_SIZE = 20  # bytes


class Lease:
    """A lock that the kernel releases however its holder dies.

    A forked child closes its copy, so that it does not keep a dead parent's lock. Two leases of one file exclude
    each other within a process, too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take it; ``BlockingIOError`` if somebody has it, another ``OSError`` if the file cannot be used."""
        with forks.creating_descriptors:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self._path, flags, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptor = descriptor
            forks.register(self)
            _held.add(self)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, and names nobody
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)

    def holder(self) -> int | None:
        """Return the id of the process that took the lock last; None if the file does not say."""
        try:
            with self._path.open("rb") as file:
                return int(file.read(_PID_SIZE))
        except (OSError, ValueError):
            return None

    def release(self) -> None:
        """Give the lock back; idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        _held.discard(self)
        if descriptor is not None:
            os.close(descriptor)

    after_fork_in_child = release


# Strong references: a lease that its holder forgot is held all the same.
_held: set[Lease] = set()
