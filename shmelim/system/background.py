"""Output that nobody waits for, as it may block for ever: log handlers and streams with threads of their own."""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from shmelim.system import forks

T = TypeVar("T")

_CAPACITY: Final = 1000


class Background(Generic[T]):
    """Calls ``work(item)`` for each item in a thread of its own; whoever puts an item never waits.

    What finds the queue full is dropped and counted, and ``work(lost(count))`` says so once half of it is free.
    What ``work`` raises is ignored. A forked child begins with an empty queue: what waits is the parent's.
    """

    def __init__(self, work: Callable[[T], object], lost: Callable[[int], T], capacity: int = _CAPACITY) -> None:
        self._work = work
        self._lost = lost
        self._capacity = capacity
        self.after_fork_in_child()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Begin anew."""
        # Guards everything below; re-entrant, since a signal handler may put something while its thread does.
        self._changed = threading.Condition(threading.RLock())
        self._queue: collections.deque[T] = collections.deque()  # the first one is being worked on
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, item: T) -> bool:
        """Have an item worked on; False: it is dropped."""
        with self._changed:
            if len(self._queue) >= self._capacity:
                self._dropped += 1
                return False
            self._queue.append(item)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="shmelim-background", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the interpreter ends, or has no thread left
                    self._queue.clear()
                    self._dropped += 1
                    return False
                self._thread = thread
            return True

    def drain(self, timeout: float) -> bool:
        """Wait until nothing waits any more, at most so many seconds; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue, timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._thread = None
                    self._changed.notify_all()
                    return
                item = self._queue[0]
            with contextlib.suppress(BaseException):
                self._work(item)
            with self._changed:
                self._queue.popleft()
                if self._dropped and len(self._queue) <= self._capacity // 2:
                    self._queue.append(self._lost(self._dropped))
                    self._dropped = 0


class Descriptor:
    """A text stream without a buffer and without a lock, over a file descriptor that it does not own.

    A thread that hangs inside ``sys.stderr`` holds a lock that the interpreter takes at its end; in here, nothing.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        """Write all of a text, or lose it where nobody can read it any more: there is nowhere to say so."""
        data = text.encode("utf-8", "backslashreplace")
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # somebody who shares it made it non-blocking
                select.select([], [self._descriptor], [])
            except OSError:
                break
        return len(text)

    def flush(self) -> None:
        """Do nothing: there is no buffer."""


class BackgroundHandler(logging.Handler):
    """Stands in for a log handler, and has it work in the background; in a forked child it works as ever."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__(handler.level)
        self.replaced: logging.Handler = handler.replaced if isinstance(handler, BackgroundHandler) else handler
        self.filters = handler.filters
        self.pid = os.getpid()  # where its thread may live
        # Without the handler's lock, which logging takes when the process ends.
        self._background = Background(_off_the_stream(self.replaced).emit, _lines_dropped)
        self.drain = self._background.drain

    def emit(self, record: logging.LogRecord) -> None:
        """Have a line written; its arguments are those of this moment."""
        if self.pid != os.getpid():
            self.replaced.emit(record)
            return
        merged = copy.copy(record)
        with contextlib.suppress(Exception):  # the handler itself says what is wrong with the arguments
            merged.msg, merged.args = record.getMessage(), None
        self._background.put(merged)


def _off_the_stream(handler: logging.Handler) -> logging.Handler:
    """Return the handler; where it writes to ``sys.stderr`` or ``sys.stdout``, one that takes no lock of these."""
    if not isinstance(handler, logging.StreamHandler) or handler.stream not in (sys.stderr, sys.stdout):
        return handler
    try:
        descriptor = Descriptor(handler.stream.fileno())
    except (AttributeError, OSError, ValueError):  # none, closed, or only in memory
        return handler
    writer = copy.copy(handler)
    try:
        writer.stream = descriptor
    except AttributeError:  # that of logging's last resort is always sys.stderr
        writer = logging.StreamHandler(descriptor)
        writer.setFormatter(handler.formatter)
    return writer


def _lines_dropped(count: int) -> logging.LogRecord:
    text = f"{count} lines were not logged: whoever reads the log was too slow"
    return logging.LogRecord("shmelim.log", logging.WARNING, __file__, 0, text, None, None)


class BackgroundStream(Descriptor):
    """A text stream on which nobody waits; what nobody reads in time is dropped and counted. Over None: all."""

    encoding = "utf-8"

    def __init__(self, descriptor: int | None) -> None:
        super().__init__(-1 if descriptor is None else descriptor)
        self._background = Background(
            super().write, lambda count: f"({count} pieces of output were dropped here)\n"
        )
        self.drain = self._background.drain

    def write(self, text: str) -> int:
        """Have a text written; what is written at once stays together."""
        self._background.put(text)
        return len(text)

    def isatty(self) -> bool:
        """Whether a person looks at it."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor
