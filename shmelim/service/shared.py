"""What a service's owner and its copies in other processes share: one page of memory, and no messages."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import multiprocessing.context
import os
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing.reduction import DupFd
from typing import Any, Final

from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.processes import ProcessIdentity

# Words of eight bytes, each written whole: the first four by the owner, the fifth by who ends the server, the
# others under the lock.
_ENDED, _PID, _STARTED, _TELLS, _ENDED_BY, _LEVEL, _NUMBER, _SINCE, _RESTARTS = range(9)
_PATIENCE: Final = 0.2  # seconds; a process that was stopped with the lock in its hands must not stop the others

# Number of the last outage of each service of this process, over all objects of a name: a notifier that holds
# repetitions back must be able to tell those of one object from those of the next. Each step is one.
_numbers: dict[str, int] = {}


def _word(place: int, doc: str) -> property:
    """Return a property of a page that is one of its words."""

    def get(page: Any) -> Any:
        return page._words[place]  # noqa: SLF001

    def put(page: Any, value: int) -> None:
        page._words[place] = value  # noqa: SLF001

    return property(get, put, doc=doc)


class SharedPage:
    """The state of one service: whether it has ended, who its server is, and what was told of its outage.

    Inherited over a fork, and pickled to a process that is being started only. In direct mode it is this process'
    own. Thread-safe, and usable from a signal handler.
    """

    ended = _word(_ENDED, "Whether the owner has shut the service down.")
    owner_tells = _word(_TELLS, "Whether the owner has a notifier.")
    ended_by = _word(_ENDED_BY, "The process whose health check ends the server; 0: none does.")
    level = _word(_LEVEL, "How bad an outage was told to be that is not over; 0: there is none.")

    number = _word(_NUMBER, "The number of the outage that is on, or was the last.")

    def __init__(self, service_name: str, *, shared: bool = True, descriptor: int = -1) -> None:
        self._name = service_name
        self._descriptor = descriptor
        if shared and descriptor < 0:
            with forks.creating_descriptors:
                self._descriptor = os.memfd_create("shmelim-service")
            os.ftruncate(self._descriptor, mmap.PAGESIZE)
        if shared:
            weakref.finalize(self, os.close, self._descriptor).atexit = False
        page = mmap.mmap(self._descriptor, mmap.PAGESIZE)
        self._words = memoryview(page).cast("q")
        self._reals = memoryview(page).cast("d")
        self.begin_here()

    def begin_here(self) -> None:
        """Make what each process has of its own."""
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        multiprocessing.context.assert_spawning(self)
        return _again, (self._name, DupFd(self._descriptor))

    @property
    def server(self) -> ProcessIdentity:
        """The server process that serves, or was the last to."""
        return ProcessIdentity(self._words[_PID], self._reals[_STARTED])

    @server.setter
    def server(self, process: ProcessIdentity) -> None:
        # Whoever reads in between sees a process that never was, which does not run.
        self._words[_PID], self._reals[_STARTED] = process.pid, process.started

    def rise(self, level: int) -> int:
        """Enter that an outage is as bad as `level`; return its number if nobody has entered that yet, else 0."""
        with self._alone():
            words = self._words
            if level <= words[_LEVEL]:
                return 0
            if not words[_LEVEL]:
                words[_NUMBER] = _numbers[self._name] = max(words[_NUMBER], _numbers.get(self._name, 0)) + 1
                words[_SINCE], words[_RESTARTS] = time.monotonic_ns(), 0
            words[_LEVEL] = level
            return words[_NUMBER]

    def count_restart(self) -> None:
        """Count a restart in this outage."""
        self._words[_RESTARTS] += 1  # the owner's alone

    def fall(self) -> tuple[int, float, int] | None:
        """Enter that the outage is over; return its number, seconds and restarts, or None if none is on."""
        with self._alone():
            words = self._words
            if not words[_LEVEL]:
                return None
            words[_LEVEL] = 0
            return words[_NUMBER], (time.monotonic_ns() - words[_SINCE]) / 1e9, words[_RESTARTS]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep others from rising and falling, unless one that does has been stopped."""
        with self._lock:
            deadline = monotonic() + _PATIENCE
            while self._descriptor >= 0 and monotonic() < deadline:
                try:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    time.sleep(0.001)
            try:
                yield
            finally:
                if self._descriptor >= 0:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


def _again(name: str, descriptor: Any) -> SharedPage:
    return SharedPage(name, descriptor=descriptor.detach())
