"""How a copy of a service in another process gets its server restarted: by asking the process that owns it.

Only the owner can restart a server: the server is its child, which it alone can wait for, and it alone can give
the server what it was made with. So the owner has a thread that reads requests from a pipe, of which every copy
holds the other end. A request is the time at which the failed check began; the owner ignores those of before
its last restart, so that ten copies that notice the same death cause one restart. There is no answer: the copy
sees by itself whether the server works again.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.context
import os
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from shmelim.errors import CallTimeoutError, ChannelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

__all__ = ["RestartDesk"]

_REQUEST = struct.Struct("!d")
_LOOK_AGAIN = 0.05  # seconds

_logger = logging.getLogger("shmelim.service")


class RestartDesk:
    """The pipe, and in the owner the thread that reads it.

    In a forked child, and when pickled to a process that is being started, only :meth:`ask` remains.
    """

    def __init__(self) -> None:
        self._reading: Connection | None
        self._reading, self._writing = multiprocessing.Pipe(duplex=False)
        # Small messages are written as one, whole or not at all; a full pipe must not hold up whoever asks.
        os.set_blocking(self._writing.fileno(), False)
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        return {"_reading": None, "_writing": self._writing, "_thread": None}

    def open(self, service_name: str, restart: Callable[[float], object]) -> None:
        """Begin to serve requests; in the owner, once.

        Parameters
        ----------
        service_name
            For the thread's name.
        restart
            Called with the time of each request, in the desk's thread. Must not hold a reference that should
            not live as long as the desk is open.

        """
        assert self._reading is not None
        self._thread = threading.Thread(
            target=_serve, args=(self._reading, restart), name=f"{service_name}-restarts", daemon=True
        )
        self._thread.start()

    def ask(self, failed_at: float) -> None:
        """Ask the owner for a restart; from any process.

        Raises
        ------
        ChannelError
            The owner is gone, or does not read its requests.

        """
        try:
            self._writing.send_bytes(_REQUEST.pack(failed_at))
        except OSError as error:
            raise ChannelError(f"the server's owner cannot be asked to restart it: {error.strerror}") from error

    def ask_and_wait(self, failed_at: float, is_well: Callable[[], bool], timeout: float) -> None:
        """Ask the owner for a restart, and wait until the server works again.

        Parameters
        ----------
        failed_at
            The ``time.monotonic()`` at which it was found not to.
        is_well
            Whether it works.
        timeout
            Seconds.

        Raises
        ------
        ChannelError
            As :meth:`ask`.
        CallTimeoutError
            It does not work within that time.

        """
        self.ask(failed_at)
        deadline = time.monotonic() + timeout
        while not is_well():
            if time.monotonic() > deadline:
                raise CallTimeoutError(f"the server's owner was asked to restart it, and did not in {timeout:g} s")
            time.sleep(_LOOK_AGAIN)

    def close(self) -> None:
        """End the thread; in the owner. Idempotent. A restart that is under way is not waited for."""
        if self._thread is not None:
            with contextlib.suppress(OSError):
                self._writing.send_bytes(b"")
            if self._thread is not threading.current_thread():
                self._thread.join(1.0)
            self._thread = None

    def after_fork_in_child(self) -> None:
        """Close the owner's end, so that the owner's death shows."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None
        self._thread = None


def _serve(reading: Connection, restart: Callable[[float], object]) -> None:
    while True:
        try:
            request = reading.recv_bytes(_REQUEST.size)
        except (EOFError, OSError):
            return
        if len(request) != _REQUEST.size:
            return
        try:
            restart(_REQUEST.unpack(request)[0])
        except Exception:
            _logger.exception("a restart that another process asked for failed")
