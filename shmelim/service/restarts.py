"""How the copies of a service in other processes talk to the process that owns its server.

Only the owner can restart a server: the server is its child, which it alone can wait for, and it alone can give
the server what it was made with. So the owner has a thread that reads a pipe, of which every copy holds the other
end. Two things come through it. A request for a restart is the time at which the failed check began; the owner
ignores those of before its last restart, so that ten copies that notice the same death cause one restart. There
is no answer: the copy sees by itself whether the server works again. A finding of a health check is told by the
owner, who knows which others have come, so that one outage causes one round of alerts.

A second pipe, which nothing is ever read from, says how the owner is: something is in it when the service was shut
down, and its other end is closed when the owner is gone.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.context
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any

from shmelim.channel.codec import MSGPACK
from shmelim.errors import CallTimeoutError, ChannelError, ShmelimError
from shmelim.service.outages import KINDS, Finding

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

_LONGEST = 2048  # bytes of a message; more than the kernel writes as one would mix with those of other processes
_DETAIL = 400  # characters, four bytes each at the most
_LOOK_AGAIN = 0.05  # seconds

_logger = logging.getLogger("shmelim.service")


class RestartDesk:
    """The two pipes, and in the owner the thread that reads one of them.

    In a forked child, and when pickled to a process that is being started, only :meth:`ask`,
    :meth:`ask_and_wait`, :meth:`report` and :meth:`has_ended` remain.
    """

    def __init__(self) -> None:
        self._reading: Connection | None
        self._ending: Connection | None
        self._reading, self._writing = multiprocessing.Pipe(duplex=False)
        self._state, self._ending = multiprocessing.Pipe(duplex=False)
        # Small messages are written as one, whole or not at all; a full pipe must not hold up whoever asks.
        os.set_blocking(self._writing.fileno(), False)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        return self.__dict__ | dict.fromkeys(("_reading", "_ending", "_closing", "_thread"))

    # ------------------------------------------------------------------ in the owner

    def open(
        self, service_name: str, restart: Callable[[float], object], report: Callable[[Finding], object]
    ) -> None:
        """Begin to serve requests; in the owner, once.

        Parameters
        ----------
        service_name
            For the thread's name.
        restart
            Called with the time of each request, in the desk's thread.
        report
            Called with each finding, in the desk's thread. Neither may hold a reference that should not live as
            long as the desk is open.

        """
        assert self._reading is not None
        thread = threading.Thread(
            target=_serve,
            args=(self._reading, self._closing, restart, report),
            name=f"{service_name}-restarts",
            daemon=True,
        )
        thread.start()
        self._thread = thread

    def close(self) -> None:
        """Say to all copies that the service has ended, and let the thread end; in the owner. Idempotent.

        A restart that is under way is not waited for.
        """
        ending, self._ending = self._ending, None
        if ending is not None:
            with contextlib.suppress(OSError):
                ending.send_bytes(b"ended")
            ending.close()
        self._closing.set()
        with contextlib.suppress(OSError):  # full: then it wakes by itself, and looks
            self._writing.send_bytes(b"")

    def join(self, timeout: float) -> None:
        """Wait for the thread, at most so many seconds; in the owner, once it was closed."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    # ------------------------------------------------------------------ in copies

    def has_ended(self) -> bool:
        """Whether the owner has shut the service down."""
        return bool(self._events() & select.POLLIN)

    def _events(self) -> int:
        """Return what shows on the owner's state: input if it has ended, a hang-up if it is gone."""
        poller = select.poll()
        poller.register(self._state, select.POLLIN)
        return sum(events for _, events in poller.poll(0))

    def ask(self, failed_at: float) -> None:
        """Ask the owner for a restart; from any process.

        Raises
        ------
        ChannelError
            The owner is gone, or does not read its requests.

        """
        self._send([failed_at])

    def report(self, finding: Finding) -> None:
        """Have the owner tell of a finding; from any process. Raises as :meth:`ask`."""
        kind, since, until, failures, detail = finding
        detail = detail[:_DETAIL].encode(errors="replace").decode()  # whatever an error may say
        self._send([KINDS.index(kind), since, until, failures, detail])

    def _send(self, message: list[Any]) -> None:
        try:
            self._writing.send_bytes(MSGPACK.dumps(message))
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
            As :meth:`ask`; or the owner ended meanwhile, in one way or the other.
        CallTimeoutError
            It does not work within that time.

        """
        self.ask(failed_at)
        deadline = time.monotonic() + timeout
        while not is_well():
            if self._events():
                raise ChannelError("the server's owner has ended, and cannot restart it")
            if time.monotonic() > deadline:
                raise CallTimeoutError(f"the server's owner was asked to restart it, and did not in {timeout:g} s")
            time.sleep(_LOOK_AGAIN)

    def after_fork_in_child(self) -> None:
        """Close the owner's ends, so that the owner's death shows."""
        for end in (self._reading, self._ending):
            if end is not None:
                end.close()
        self._reading = self._ending = self._thread = None


def _serve(
    reading: Connection,
    closing: threading.Event,
    restart: Callable[[float], object],
    report: Callable[[Finding], object],
) -> None:
    with reading:  # once it is closed, whoever asks learns at once that nobody hears
        while not closing.is_set():
            try:
                message = reading.recv_bytes(_LONGEST)
            except (EOFError, OSError):
                return
            if not message or closing.is_set():
                return
            try:
                match MSGPACK.loads(message):
                    case [failed_at]:
                        restart(failed_at)
                    case [kind, since, until, failures, detail]:
                        report(Finding(KINDS[kind], since, until, failures, detail))
            except Exception as error:
                trace = None if isinstance(error, ShmelimError) else error
                _logger.error("a request of another process failed: %s", error, exc_info=trace)  # noqa: TRY400
