"""A server process seen from its owner: how it says that it is ready, and how it is ended."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from shmelim.channel.address import normalize
from shmelim.channel.codec import MSGPACK
from shmelim.channel.failures import pack_failure, unpack_failure
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE
from shmelim.errors import CallTimeoutError, ChannelError, NotServingError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess

    from shmelim.channel.address import Address, Location
    from shmelim.channel.codec import Codec
    from shmelim.system.processes import ProcessIdentity

_LOOK_AGAIN = 0.1  # seconds; a dead process' pipes may be held open by a child that was forked meanwhile
_REPORT_LIMIT = 64 * 1024

_logger = logging.getLogger("shmelim.service")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server process must know besides address and key.

    Attributes
    ----------
    service_name : str
        Name for title, messages and threads.
    owner : ProcessIdentity | None
        The process with which it ends; None: it outlives all others.
    codec : Codec | None
        Codec of requests and replies; None: msgpack.
    max_message : int
        Longest message in bytes.
    drain : float
        Seconds that running calls have when it ends.

    """

    service_name: str
    owner: ProcessIdentity | None = None
    codec: Codec | None = None
    max_message: int = DEFAULT_MAX_MESSAGE
    drain: float = 1.0

    @property
    def codec_in_use(self) -> Codec:
        """The codec itself."""
        return MSGPACK if self.codec is None else self.codec


class ServerReady:
    """What a server process gets from its owner, to say by it that it is ready, or why it will not be.

    Used like a :class:`multiprocessing.Event`, which it stands for: the process calls :meth:`set`. Unlike one, it
    can also report a failure, fits processes of every start method, and leaves no lock behind when one dies.
    Can be pickled while a process is being started, and only then.

    Parameters
    ----------
    options
        What the server process must know.
    refusal
        Says why its owner does not want it any more, None while it does; asked while it is waited for.

    """

    def __init__(self, options: ServerOptions, refusal: Callable[[], str | None] = lambda: None) -> None:
        self.options = options
        self._refusal: Callable[[], str | None] | None = refusal
        # One report goes through this pipe. The owner reads it in one thread.
        self._reading: Connection | None
        self._writing: Connection | None
        self._reading, self._writing = multiprocessing.Pipe(duplex=False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.options.service_name}>"

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        return {"options": self.options, "_refusal": None, "_reading": None, "_writing": self._writing}

    def set(self, address: Address | None = None) -> None:
        """Say that clients can connect; in the server process.

        Parameters
        ----------
        address
            Where, if the system chose the port.

        """
        self._report([True, address])

    def fail(self, error: BaseException) -> None:
        """Say that there will be no server, and why; in the server process."""
        self._report([False, pack_failure(error, MSGPACK)])

    def _report(self, report: list[Any]) -> None:
        if self._writing is not None:
            with contextlib.suppress(OSError):  # the owner has given up, or is gone
                self._writing.send_bytes(MSGPACK.dumps(report))

    def is_set(self) -> bool:
        """Whether a report has come, and was not yet taken; in the owner."""
        return self._reading is not None and self._reading.poll()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a report; return whether there is one; in the owner."""
        return self._reading is not None and self._reading.poll(timeout)

    def outcome(self, process: BaseProcess, timeout: float) -> Location | None:
        """Wait until `process` is ready; return its address if it said one.

        Raises
        ------
        CallTimeoutError
            It was not within `timeout` seconds.
        NotServingError
            It ended before.
        ChannelError
            It is not wanted any more.
        Exception
            Whatever it says has kept it from serving.

        """
        assert self._reading is not None
        name = self.options.service_name
        if self._writing is not None:  # ours; once it is closed, the end of the process is the end of the pipe
            self._writing.close()
            self._writing = None
        deadline = time.monotonic() + timeout
        while True:
            alive = process.is_alive()  # before the look at the pipe: what a process reports, it reports alive
            left = deadline - time.monotonic()
            if wait([self._reading], min(_LOOK_AGAIN, max(left, 0.0)) if alive else 0.0):
                with contextlib.suppress(EOFError, OSError):
                    report = self._reading.recv_bytes(_REPORT_LIMIT)
                    break
                process.join(_LOOK_AGAIN)  # it closed the pipe, and so is about to end
                alive = process.is_alive()
            if not alive:
                raise NotServingError(
                    f"the server process of {name} ended with exit code {process.exitcode} before it was ready",
                    hint="its own output says why",
                )
            refusal = None if self._refusal is None else self._refusal()
            if refusal is not None:
                raise ChannelError(refusal)
            if left <= 0:
                raise CallTimeoutError(
                    f"the server process of {name} (pid {process.pid}) was not ready within {timeout:g} s"
                )
        return self._read(report)

    def _read(self, report: bytes) -> Location | None:
        """Return what a report says, or raise it."""
        match MSGPACK.loads(report):
            case [True, None]:
                return None
            case [True, str(path)]:
                return path
            case [True, [str(host), int(port)]]:
                return normalize((host, port))
            case [False, failure]:
                raise unpack_failure(failure)
        raise ProtocolError(f"the server process of {self.options.service_name} sent an unknown report")

    def close(self) -> None:
        """Give the pipe back; idempotent."""
        for end in (self._reading, self._writing):
            if end is not None:
                end.close()
        self._reading = self._writing = None


class ServerProcess:
    """A started server process.

    Belongs to the process that started it; in a forked child nothing but :meth:`disown` may be called.

    Parameters
    ----------
    process
        What a subclass' ``_start_server_process`` returned.
    service_name
        For messages.

    Raises
    ------
    TypeError
        `process` is no started process.

    """

    def __init__(self, process: BaseProcess, service_name: str) -> None:
        if getattr(process, "pid", None) is None:
            raise TypeError(f"_start_server_process must return a started Process, not {process!r}")
        self.process = process
        self._service_name = service_name

    def stop(self, timeout: float) -> None:
        """End it: SIGTERM, and after `timeout` seconds SIGKILL. Idempotent."""
        process = self.process
        if process.is_alive():
            process.terminate()
            process.join(timeout)
            if process.is_alive():
                _logger.warning(
                    "%s: server process %d did not end within %g s of SIGTERM, killing it",
                    self._service_name,
                    process.pid,
                    timeout,
                )
                process.kill()
        process.join()

    def disown(self) -> None:
        """Let this forked child's exit leave its parent's process alone.

        At its exit :mod:`multiprocessing` ends the daemonic processes in its books, and after a plain
        ``os.fork`` those are the parent's.
        """
        books: set[BaseProcess] = getattr(multiprocessing.process, "_children", set())
        books.discard(self.process)
