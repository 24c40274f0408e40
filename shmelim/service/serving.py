"""A server process seen from inside: serves one object until it is told to end."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.synchronize import Event
from types import FrameType, TracebackType
from typing import Any, Final, Self

from shmelim.channel.address import Address, Location
from shmelim.channel.codec import MSGPACK
from shmelim.channel.server import ChannelServer
from shmelim.errors import ShmelimError
from shmelim.service.lease import server_mark
from shmelim.service.process import ServerOptions, ServerReady
from shmelim.service.settings import server_title
from shmelim.system.clock import monotonic
from shmelim.system.logs import log_without_waiting
from shmelim.system.problems import Problems
from shmelim.system.processes import ProcessIdentity, set_title

_PROGRESS: Final = 0.1  # seconds between two reports of progress

_logger = logging.getLogger("shmelim.service")


def serve_rpc(server: object, address: Address, authkey: bytes, server_ready: ServerReady | Event) -> None:
    """Serve an object in this process until SIGTERM or the end of the process' owner.

    Sets the process title, handles signals, serves, says that it is ready, waits for the end, and lets running
    calls finish. To be called from the process' main thread.

    Parameters
    ----------
    server
        The object; its methods whose name ends in ``_rpc`` can be called, and those that the service lists.
        If it has :class:`~shmelim.system.problems.Problems` as its ``problems``, those of the channel join them.
    address, authkey, server_ready
        What ``_start_server_process`` got. A plain ``multiprocessing.Event`` will do as `server_ready`; the
        service is then named after the object's type.

    Raises
    ------
    ChannelError
        The address is taken or cannot be used. The owner is told.

    """
    if isinstance(server_ready, ServerReady):
        options = server_ready.options
    else:
        parent = multiprocessing.parent_process()
        owner = None if parent is None or parent.pid is None else ProcessIdentity.of(parent.pid)
        options = ServerOptions(type(server).__name__, owner)
    with _named(options), Ending(options.owner) as ending:
        try:
            _serve(server, address, authkey, server_ready, options, ending)
        except Exception as error:
            if isinstance(server_ready, ServerReady):
                server_ready.fail(error)
            raise


def run_server(
    factory: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    address: Address,
    authkey: bytes,
    server_ready: ServerReady,
    on_listening: Callable[[Any, Location], object] | None = None,
) -> None:
    """Make an object and serve it; what a process runs that ``_spawn_server`` starts.

    If the object has a method ``close``, that is called in the end. `on_listening` is called with it and its
    address before the owner is told that the server is ready. Where there is no server, the owner is told why, and
    ``SystemExit`` is raised.
    """
    global _starting  # noqa: PLW0603
    options = server_ready.options
    # First of all, so that no signal reaches a handler that was inherited from the owner.
    with Ending(options.owner) as ending, log_without_waiting(), contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_named(options))
            _starting = server_ready
            server = factory(*args, **kwargs)
            _starting = None
            close = getattr(server, "close", None)
            if callable(close):
                stack.callback(close)
            _serve(server, address, authkey, server_ready, options, ending, on_listening)
        except Exception as error:
            # An error of ours explains itself, and the owner raises it.
            trace = None if isinstance(error, ShmelimError) else error
            _logger.error("%s: the server process failed: %s", options.service_name, error, exc_info=trace)  # noqa: TRY400
            server_ready.fail(error)
            raise SystemExit(1) from None


# Where a factory that runs in this server process can report progress; main thread only.
_starting: ServerReady | None = None
_reported = float("-inf")


def report_progress(*_details: object) -> None:
    """Say, in a server process that is being started, that the start takes long and gets on.

    To be called by a factory, or by what that calls, as often as one likes: each report gives it another
    ``ready_timeout``. Does nothing in any other process. Costs about a microsecond; 10 a second are sent.
    """
    global _reported  # noqa: PLW0603
    ready, now = _starting, monotonic()
    if ready is not None and now - _reported >= _PROGRESS:
        _reported = now
        ready.progress()


@contextlib.contextmanager
def _named(options: ServerOptions) -> Iterator[None]:
    """Have this process known as a server of the service: by its title, and by a mark where that cannot be set."""
    title = server_title(options.service_name)
    with contextlib.closing(server_mark(options.service_name)):
        if not set_title(title):
            _logger.warning("%s: the process title %r could not be set", options.service_name, title)
        yield


@log_without_waiting()
def _serve(
    server: object,
    address: Address,
    authkey: bytes,
    server_ready: ServerReady | Event,
    options: ServerOptions,
    ending: Ending,
    on_listening: Callable[[Any, Location], object] | None = None,
) -> None:
    problems = getattr(
        server, "problems", None
    )  # what its health check lists: there people look for the channel's
    channel = ChannelServer(
        server,
        address,
        authkey,
        service_name=options.service_name,
        max_message=options.max_message,
        codec=options.codec or MSGPACK,
        methods=options.methods,
        problems=problems if isinstance(problems, Problems) else None,
    ).start()
    try:
        if on_listening is not None:
            on_listening(server, channel.address)
        ending.defer()
        if isinstance(server_ready, ServerReady):
            server_ready.set(channel.address)
        else:
            server_ready.set()
        _logger.info("%s: ending because of %s", options.service_name, ending.wait())
    finally:
        channel.close(options.drain)


class Ending:
    """Waits for the end of this process' work, for the length of a ``with`` block.

    Up to :meth:`defer` a SIGTERM raises ``SystemExit``, so that a start can be broken off. From then on it only
    ends :meth:`wait`, so that neither serving nor closing is interrupted halfway. SIGINT does the same in
    a foreground process; in others it is ignored: a terminal sends it to every process of the group, and the owner
    decides what it means. The owner's death is watched by a descriptor of the process itself: a pipe would also be
    held open by each of its other children. Outside of the main thread, which alone may handle signals, only the
    owner's end counts.
    """

    def __init__(self, owner: ProcessIdentity | None, *, in_foreground: bool = False) -> None:
        self._owner = owner
        self._signals = {signal.SIGTERM, signal.SIGINT} if in_foreground else {signal.SIGTERM}
        self._deferred = False  # main thread only
        self._reading = self._writing = self._old_wakeup = -1
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        self._reading, self._writing = os.pipe()
        if threading.current_thread() is threading.main_thread():
            os.set_blocking(self._writing, False)
            # The interpreter writes each signal to the pipe, which needs no lock that the main thread could hold.
            # Whatever descriptor stood there before is the parent's, who must not be told of our signals.
            self._old_wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                handler = self._handle if number in self._signals else signal.SIG_IGN
                self._before[number] = signal.signal(number, handler)
            signal.pthread_sigmask(
                signal.SIG_UNBLOCK, {signal.SIGINT}
            )  # a fresh process was started with it blocked
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._reading)
        os.close(self._writing)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._deferred:
            raise SystemExit(128 + number)

    def defer(self) -> None:
        """Stop raising."""
        self._deferred = True

    def wait(self) -> str:
        """Wait for the end; return what it was."""
        owner = self._owner
        while owner is None or not owner.wait(None, self._reading):
            # Signals that others handle are written there too.
            if self._signals.intersection(os.read(self._reading, 256)):
                return "a signal"
        return f"the end of its owner, process {owner.pid}"
