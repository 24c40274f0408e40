"""What a service's owner and its copies in other processes share: one page of memory, and no messages."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import multiprocessing.context
import os
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing.reduction import DupFd
from typing import Any, ClassVar, Final

from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.processes import ProcessIdentity


class _State(ctypes.Structure):
    """Words of eight bytes, each written whole: by the owner, by who ends the server, and under the lock."""

    _fields_: ClassVar = [
        ("ended", ctypes.c_int64),
        ("owner_tells", ctypes.c_int64),
        ("pid", ctypes.c_int64),
        ("started", ctypes.c_double),
        ("restarts", ctypes.c_int64),
        ("ended_by", ctypes.c_int64),
        ("level", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("since", ctypes.c_double),
    ]


_PATIENCE: Final = 0.2  # seconds; a process that was stopped with the lock in its hands must not stop the others

# Number of the last outage of each service of this process, over all objects of a name: a notifier that holds
# repetitions back must be able to tell those of one object from those of the next. Each step is one.
_numbers: dict[str, int] = {}


class SharedPage:
    """The state of one service: whether it has ended, who its server is, and what was told of its outage.

    Its `state` has the words `ended` (the owner has shut the service down), `owner_tells` (it has a notifier),
    `ended_by` (the process whose health check ends the server; 0: none does), `level` (how bad an outage was told
    to be that is not over; 0: there is none), `number` and `restarts` (of the outage that is on, or was the last).

    Inherited over a fork, and pickled to a process that is being started only. In direct mode it is this process'
    own. Thread-safe, and usable from a signal handler.
    """

    def __init__(self, service_name: str, *, shared: bool = True, descriptor: int = -1) -> None:
        self._name = service_name
        self._descriptor = descriptor
        if shared and descriptor < 0:
            with forks.creating_descriptors:
                self._descriptor = os.memfd_create("shmelim-service")
            os.ftruncate(self._descriptor, mmap.PAGESIZE)
        if shared:
            weakref.finalize(self, os.close, self._descriptor).atexit = False
        self.state = _State.from_buffer(mmap.mmap(self._descriptor, mmap.PAGESIZE))
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
        return ProcessIdentity(self.state.pid, self.state.started)

    @server.setter
    def server(self, process: ProcessIdentity) -> None:
        # Whoever reads in between sees a process that never was, which does not run.
        self.state.pid, self.state.started = process.pid, process.started

    def rise(self, level: int) -> int:
        """Enter that an outage is as bad as `level`; return its number if nobody has entered that yet, else 0."""
        with self._alone():
            state = self.state
            if level <= state.level:
                return 0
            if not state.level:
                state.number = _numbers[self._name] = max(state.number, _numbers.get(self._name, 0)) + 1
                state.since, state.restarts = monotonic(), 0
            state.level = level
            return int(state.number)

    def fall(self) -> tuple[int, float, int] | None:
        """Enter that the outage is over; return its number, seconds and restarts, or None if none is on."""
        with self._alone():
            state = self.state
            if not state.level:
                return None
            state.level = 0
            return state.number, monotonic() - state.since, state.restarts

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
