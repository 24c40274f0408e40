"""A lease: a file whose ``flock`` one process has at a time, and which names it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

from shmelim.errors import DamagedFileError
from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.durable import reading

_PID_SIZE: Final = 20  # bytes
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
# Seconds for somebody who has the directory's lock for a moment, as one has who makes a database in it.
_PATIENCE: Final = 1.0
_PAUSE: Final = 0.01


class Lease:
    """A lock that the kernel releases however its holder dies.

    A file can be removed by somebody who takes it for a stale one. So the directory is locked as well once
    :meth:`secure` was called, where its file system can do that, and :meth:`keep` puts the file back. The file
    `guarded`, for which all of this is, is locked too: links and mounts can have it stand in two directories.

    A forked child closes its copies, so that it does not keep a dead parent's lock. Two leases of one file exclude
    each other within a process, too.
    """

    def __init__(self, path: Path, guarded: Path | None = None) -> None:
        self.path = path
        self._guarded = guarded
        self._descriptor: int | None = None
        self._directory: int | None = None
        self._files: list[int] = []

    def acquire(self) -> None:
        """Take it; ``BlockingIOError`` if somebody has it, another ``OSError`` if the file cannot be used.

        The former names the guarded file where it is that which somebody has.
        """
        self._take_file()
        deadline = monotonic() + _PATIENCE
        try:
            while (descriptor := _lock(self.path.parent)) is None and monotonic() < deadline:
                time.sleep(_PAUSE)
            if descriptor is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))  # noqa: TRY301
            os.close(descriptor)
            self._guard()
        except BaseException:
            self.release()
            raise

    def secure(self) -> None:
        """Lock the directory too: from now on nobody else in it does so; ``BlockingIOError`` if somebody has.

        Not in :meth:`acquire`, because whoever makes the database in there has that lock meanwhile.
        """
        with forks.creating_descriptors:
            self._directory = _lock(self.path.parent)
        if self._directory is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._guard()

    def keep(self) -> bool:
        """Put the file back if it was removed; False where another process has the one that stands there.

        Where that cannot be seen, as the directory is gone or may not be entered, nobody is known to have it.
        """
        before = self._descriptor
        try:
            if before is None or self._is_named(before):
                return True
            self._take_file()
        except OSError as error:
            return not isinstance(error, BlockingIOError)
        os.close(before)
        return True

    def holder(self) -> int | None:
        """Return the id of the process that took the lock last; None if the file does not say."""
        try:
            with reading(self.path) as file:
                return int(file.read(_PID_SIZE))
        except (OSError, ValueError, DamagedFileError):
            return None

    def release(self) -> None:
        """Give the lock back; idempotent."""
        descriptors = self._descriptor, self._directory, *self._files
        self._descriptor = self._directory = None
        self._files = []
        _held.discard(self)
        for descriptor in descriptors:
            if descriptor is not None:
                os.close(descriptor)

    after_fork_in_child = release

    def _take_file(self) -> None:
        with forks.creating_descriptors:
            while True:
                descriptor = os.open(self.path, _FLAGS, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # The lock of a file that was removed between the two calls keeps nobody out.
                    if self._is_named(descriptor):
                        break
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
            self._descriptor = descriptor
            forks.register(self)
            _held.add(self)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, and names nobody
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)

    def _is_named(self, descriptor: int) -> bool:
        """Whether the lock's name leads to this very file."""
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _guard(self) -> None:
        """Lock the guarded file, if there is one that was not locked yet."""
        try:
            if self._guarded is None or not self._guarded.is_file():
                return
            status = self._guarded.stat()
            # Not opened where this process has it already: to close it again would drop SQLite's locks on it.
            known = ((lease, file) for lease in list(_held) for file in lease._files)  # noqa: SLF001  # of this class
            holder = next((lease for lease, file in known if os.path.samestat(status, os.fstat(file))), None)
            if holder is self:
                return
            if holder is None:
                with forks.creating_descriptors:
                    if (descriptor := _lock(self._guarded)) is not None:
                        self._files.append(descriptor)
                        return
        except OSError:  # whoever opens it says so
            return
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(self._guarded))


def _lock(path: Path) -> int | None:
    """Return a descriptor of what is there, with its lock where that is possible; None if somebody has that."""
    with forks.creating_descriptors:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            pass  # a file system that locks only what is open for writing, such as NFS
        return descriptor


# Strong references: a lease that its holder forgot is held all the same.
_held: set[Lease] = set()
