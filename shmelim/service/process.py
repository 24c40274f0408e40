"""A server process seen from its owner: how it is started, how it says that it is ready, and how it is ended."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import multiprocessing.util
import os
import pickle
import pickletools
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final

from shmelim.channel.address import Address, Location, normalize
from shmelim.channel.codec import MSGPACK, Codec
from shmelim.channel.failures import pack_failure, unpack_failure
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE
from shmelim.errors import CallTimeoutError, ChannelError, NotServingError, ProtocolError
from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.processes import ProcessIdentity

_LOOK_AGAIN: Final = 0.1  # seconds; a dead process' pipes may be held open by a child that was forked meanwhile
_REPORT_LIMIT: Final = 64 * 1024
_SCRIPTS: Final = {"__main__", "__mp_main__"}  # the second in a child of multiprocessing
_REAPED: Final = 1.0  # seconds for the parent of an ended process to say how it ended

_logger = logging.getLogger("shmelim.service")


# ---------------------------------------------------------------------- a fresh interpreter


class InCallersScriptError(Exception):
    """Something that a fresh interpreter needs lives in the caller's script, which it does not run."""


class FreshProcess(BaseProcess):
    """A process of :mod:`multiprocessing` that runs a new interpreter, and not the caller's script in it.

    Daemonic processes may have one as well: it watches its owner by itself.
    """

    _start_method = None  # for the processes that it starts itself

    def start(self) -> None:
        """Start it; raises ``InCallersScriptError``, and whatever pickling does."""
        # As BaseProcess does, but for the question whether this process is daemonic.
        state, popen = vars(self), _FreshPopen(self)
        state |= {"_popen": popen, "_sentinel": popen.sentinel}
        for name in ("_target", "_args", "_kwargs"):  # which need not live on
            del state[name]
        _children().add(self)


class _FreshPopen(popen_spawn_posix.Popen):
    """Starts the interpreter; everything that it needs, the key included, goes through a pipe."""

    _fds: list[int]

    def _launch(self, process: BaseProcess) -> None:
        pickled = io.BytesIO(_pickled(_preparation(process.name), self) + _pickled(process, self))
        ends: list[int] = []
        try:
            with forks.creating_descriptors:
                ends += os.pipe()  # whose writing end only the process has: closed, it has ended
                ends += os.pipe()  # by which it reads what it is to do, and sees that its parent has ended
            sentinel, alive, reading, writing = ends
            tracker = getattr(resource_tracker._resource_tracker, "_fd", None)  # noqa: SLF001
            # A terminal's Ctrl-C is for the owner. The process unblocks it when it has said so.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.pid = multiprocessing.util.spawnv_passfds(
                    os.fsencode(spawn.get_executable()),
                    spawn.get_command_line(pipe_handle=reading, tracker_fd=tracker),
                    [*self._fds, alive, reading, *(() if tracker is None else (tracker,))],
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.sentinel = sentinel
            with contextlib.suppress(BrokenPipeError), open(writing, "wb", closefd=False) as pipe:
                pipe.write(pickled.getbuffer())  # one that has died already is found dead
        finally:
            for end in ends[1:3]:
                os.close(end)
            self.finalizer = multiprocessing.util.Finalize(self, _close, [*ends[:1], *ends[3:]])


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _preparation(name: str) -> dict[str, Any]:
    """Return what :mod:`multiprocessing` tells a new interpreter, less the caller's script."""
    here = multiprocessing.process.ORIGINAL_DIR  # type: ignore[attr-defined]
    data = {
        "name": name,
        "authkey": multiprocessing.current_process().authkey,
        "log_to_stderr": multiprocessing.util._log_to_stderr,  # type: ignore[attr-defined]  # noqa: SLF001
        "sys_path": [path or here or "" for path in sys.path],
        "sys_argv": sys.argv,
        "orig_dir": here,
    }
    with contextlib.suppress(FileNotFoundError):  # the directory is gone
        data["dir"] = os.getcwd()  # noqa: PTH109
    method = multiprocessing.get_start_method(allow_none=True)
    return data if method is None else data | {"start_method": method}


class _NoProcess:
    """Stands for a process that is being started, where it is only asked whether things can be given to one."""

    def duplicate_for_child(self, descriptor: int) -> int:
        return descriptor


def check_portable(*things: object) -> None:
    """Raise what giving things to a fresh process would raise."""
    _pickled(things, _NoProcess())


def _pickled(value: object, popen: object) -> bytes:
    """Return a value for a process; ``InCallersScriptError`` if something in it lives in the caller's script."""
    multiprocessing.context.set_spawning_popen(popen)  # type: ignore[arg-type]
    try:
        pickled = bytes(reduction.ForkingPickler.dumps(value, pickle.HIGHEST_PROTOCOL))
    finally:
        multiprocessing.context.set_spawning_popen(None)
    # Modules stand in it as texts of their own.
    if any(name.encode() in pickled for name in _SCRIPTS) and any(
        text in _SCRIPTS for _, text, _ in pickletools.genops(pickled)
    ):
        raise InCallersScriptError
    return pickled


# ---------------------------------------------------------------------- readiness


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What a server process must know besides address and key."""

    service_name: str
    owner: ProcessIdentity | None = None  # with which it ends; None: it outlives all others
    codec: Codec | None = None  # None: msgpack
    max_message: int = DEFAULT_MAX_MESSAGE
    drain: float = 1.0  # seconds that running calls have when it ends
    methods: frozenset[str] = frozenset()  # that are served although their names do not end in _rpc


class ServerReady:
    """What a server process gets from its owner, to say by it that it is ready, or why it will not be.

    Used like a :class:`multiprocessing.Event`, which it stands for: the process calls :meth:`set`. Unlike one, it
    can also report a failure or progress, fits processes of every start method, and leaves no lock behind when one
    dies. Can be pickled while a process is being started, and only then. Made by the service; a subclass's
    ``_start_server_process`` hands it on.

    Examples
    --------
    >>> ready = ServerReady(ServerOptions("PriceServer"))
    >>> ready.is_set()
    False
    >>> ready.set(("127.0.0.1", 50001))  # in the server process
    >>> ready.is_set()
    True
    >>> ready.close()

    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.hint = "its own output says why"  # what to do about a process that ends before it is ready
        # Reports go through this pipe. The owner reads it in one thread.
        self._reading: Connection | None
        self._writing: Connection | None
        with forks.creating_descriptors:
            self._reading, self._writing = multiprocessing.Pipe(duplex=False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.options.service_name}>"

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        return self.__dict__ | {"_reading": None}

    def set(self, address: Address | None = None) -> None:
        """Say that clients can connect; in the server process.

        Parameters
        ----------
        address
            Where, if the system chose the port.

        """
        self._report(["ready", address])

    def fail(self, error: BaseException) -> None:
        """Say that there will be no server, and why; in the server process. The owner raises `error`."""
        self._report(["failed", pack_failure(error, MSGPACK)])

    def progress(self) -> None:
        """Say that the start takes long and gets on: ``ready_timeout`` begins anew; in the server process."""
        self._report(["progress"])

    def _report(self, report: list[Any]) -> None:
        if self._writing is not None:
            with contextlib.suppress(OSError):  # the owner has given up, or is gone
                self._writing.send_bytes(MSGPACK.dumps(report))

    def is_set(self) -> bool:
        """Whether a report has come, and was not yet taken; in the owner."""
        return self._reading is not None and self._reading.poll()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds for a report; return whether there is one; in the owner."""
        return self._reading is not None and self._reading.poll(timeout)

    def outcome(self, server: ServerProcess, timeout: float, refusal: Callable[[], str | None]) -> Location | None:
        """Wait until `server` is ready; return its address if it said one.

        Raises ``CallTimeoutError`` if that takes more than `timeout` seconds (from the last progress),
        ``NotServingError`` if it ends before, ``ChannelError`` if `refusal` says why it is not wanted any more,
        and whatever it says has kept it from serving.
        """
        assert self._reading is not None
        name = self.options.service_name
        if self._writing is not None:  # ours; once it is closed, the end of the process is the end of the pipe
            self._writing.close()
            self._writing = None
        deadline = monotonic() + timeout
        while True:
            alive = server.identity.is_running()  # before the look at the pipe: what it reports, it reports alive
            left = deadline - monotonic()
            if wait([self._reading], min(_LOOK_AGAIN, max(left, 0.0)) if alive else 0.0):
                try:
                    report = MSGPACK.loads(self._reading.recv_bytes(_REPORT_LIMIT))
                except (EOFError, OSError):  # it closed the pipe, and so is about to end
                    alive = not server.identity.wait(_LOOK_AGAIN)
                else:
                    if report != ["progress"]:
                        return _address_in(report, name)
                    deadline = monotonic() + timeout
                    continue
            if not alive:
                raise NotServingError(
                    f"the server process of {name} {server.how_it_ended()} before it was ready",
                    hint=self.hint,
                )
            why_not = refusal()
            if why_not is not None:
                raise ChannelError(why_not)
            if left <= 0:
                raise CallTimeoutError(
                    f"the server process of {name} (pid {server.pid}) was not ready within {timeout:g} s",
                    hint="ready_timeout= gives it longer, and report_progress() as long as it gets on",
                )

    def close(self) -> None:
        """Give the pipe back; idempotent."""
        for end in (self._reading, self._writing):
            if end is not None:
                end.close()
        self._reading = self._writing = None


def _address_in(report: Any, name: str) -> Location | None:
    """Return the address in a final report, or raise what it says."""
    match report:
        case ["ready", None]:
            return None
        case ["ready", str(path)]:
            return path
        case ["ready", [str(host), int(port)]]:
            return normalize((host, port))
        case ["failed", failure]:
            raise unpack_failure(failure)
    raise ProtocolError(f"the server process of {name} sent an unknown report")


# ---------------------------------------------------------------------- the process


class ServerProcess:
    """A started server process, whoever is its parent.

    Whether it lives is asked of the kernel: ``Process.is_alive()`` and ``Process.sentinel`` of a process that a
    forkserver started say that it has ended when only the forkserver has.
    """

    def __init__(self, process: BaseProcess, service_name: str) -> None:
        pid = getattr(process, "pid", None)
        if pid is None:
            raise TypeError(f"_start_server_process must return a started Process, not {process!r}")
        self.process = process
        self.pid: int = pid
        self.identity = ProcessIdentity.of(pid)
        self.ready_at = float("inf")  # monotonic()
        self._service_name = service_name

    def how_it_ended(self) -> str:
        """Say so, as far as its parent knows."""
        self.process.join(_REAPED)
        code = self.process.exitcode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
        return "ended" if code is None else f"ended with exit code {code}"

    def stop(self, timeout: float) -> None:
        """End it: SIGTERM, and after `timeout` seconds SIGKILL. Idempotent."""
        self.identity.end(timeout, self._say)
        self.process.join(_REAPED)  # so that it is not a zombie

    def _say(self, number: int) -> None:
        if number == signal.SIGKILL:
            text = "%s: server process %d did not end by SIGTERM, killing it"
            _logger.warning(text, self._service_name, self.pid)

    def disown(self) -> None:
        """Let this forked child's exit leave its parent's process alone.

        At its exit :mod:`multiprocessing` ends the daemonic processes in its books, and after a plain
        ``os.fork`` those are the parent's.
        """
        _children().discard(self.process)


def _children() -> set[BaseProcess]:
    """Return the books in which multiprocessing keeps the children of this process."""
    books: set[BaseProcess] = getattr(multiprocessing.process, "_children", set())
    return books
