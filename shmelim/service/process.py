"""A server process: how it is started, says that it is ready, serves, and is ended."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import multiprocessing.util
import os
import pickle
import pickletools
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from types import FrameType, SimpleNamespace
from typing import Any, Final, Self, TypeAlias, TypeVar

from shmelim.channel.address import Address, Location, check_free, normalize
from shmelim.channel.codec import MSGPACK, Codec
from shmelim.channel.failures import pack_failure, unpack_failure
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE
from shmelim.channel.server import ChannelServer
from shmelim.errors import CallTimeoutError, ChannelError, NotServingError, ProtocolError, ShmelimError
from shmelim.service.settings import server_title
from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.durable import hint_of
from shmelim.system.logs import log_without_waiting
from shmelim.system.problems import Problems
from shmelim.system.processes import ProcessIdentity, set_title
from shmelim.system.text import get_logger

_LOOK_AGAIN: Final = 0.5  # seconds; a dead process' pipe may be held open by a child that was forked meanwhile
_REPORT_LIMIT: Final = 64 * 1024
_PROGRESS: Final = 0.1  # seconds between two reports of progress
_REAPED: Final = 1.0  # seconds for the parent of an ended process to say how it ended
_SCRIPTS: Final = ("__main__", "__mp_main__")  # the second in a child of multiprocessing
_SCRIPT_RUNS_AGAIN: Final = (
    "multiprocessing runs the caller's script again in that process: put the server's factory into a module "
    'and leave start_method out, or what the script does under `if __name__ == "__main__":`'
)

# What makes the object: factory, its arguments, and who is called when it listens.
Recipe: TypeAlias = tuple[
    Callable[..., object], tuple[Any, ...], Mapping[str, Any], Callable[[Any, Location], object] | None
]
_Process = TypeVar("_Process", bound=BaseProcess)

_logger = get_logger("shmelim.service")


# ---------------------------------------------------------------------- starting


class _InCallersScriptError(Exception):
    """Something that a fresh interpreter needs lives in the caller's script, which it does not run."""


class FreshProcess(BaseProcess):
    """A process of :mod:`multiprocessing` that runs a new interpreter, and not the caller's script in it.

    Daemonic processes may have one as well: it watches its owner by itself.
    """

    _start_method = None  # for the processes that it starts itself
    recipe: Recipe

    def start(self) -> None:
        """Start it; raises ``_InCallersScriptError``, and whatever pickling does."""
        # As BaseProcess does, but for the question whether this process is daemonic, and without keeping books.
        state, popen = vars(self), _FreshPopen(self)
        state |= {"_popen": popen, "_sentinel": popen.sentinel}
        self.recipe = self._args[0]  # type: ignore[attr-defined]
        for name in ("_target", "_args", "_kwargs"):  # which need not live on
            del state[name]


class _FreshPopen(popen_spawn_posix.Popen):
    """Starts the interpreter; everything that it needs, the key included, goes through a pipe."""

    _fds: list[int]

    def _launch(self, process: BaseProcess) -> None:
        pickled = pickle.dumps(_preparation(process.name)) + _pickled(process, self)
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
                pipe.write(pickled)  # one that has died already is found dead
        finally:
            for end in ends[1:3]:
                os.close(end)
            self.finalizer = multiprocessing.util.Finalize(
                self,
                multiprocessing.util.close_fds,  # type: ignore[attr-defined]
                [*ends[:1], *ends[3:]],
            )


def _preparation(name: str) -> dict[str, Any]:
    """Return what :mod:`multiprocessing` tells a new interpreter, less the caller's script."""
    here = multiprocessing.process.ORIGINAL_DIR  # type: ignore[attr-defined]
    sys_path = sys.path.copy()
    with contextlib.suppress(ValueError):
        sys_path[sys_path.index("")] = here or ""
    data = {
        "name": name,
        "authkey": bytes(multiprocessing.current_process().authkey),
        "sys_path": sys_path,
        "sys_argv": sys.argv,
        "orig_dir": here,
    }
    with contextlib.suppress(FileNotFoundError):  # the directory is gone
        data["dir"] = os.getcwd()  # noqa: PTH109
    method = multiprocessing.get_start_method(allow_none=True)
    return data if method is None else data | {"start_method": method}


def _pickled(value: object, popen: object) -> bytes:
    """Return a value for a process; ``_InCallersScriptError`` if something in it lives in the caller's script."""
    multiprocessing.context.set_spawning_popen(popen)  # type: ignore[arg-type]
    try:
        pickled = bytes(reduction.ForkingPickler.dumps(value, pickle.HIGHEST_PROTOCOL))
    finally:
        multiprocessing.context.set_spawning_popen(None)
    # Modules stand in it as texts of their own.
    if (b"__main__" in pickled or b"__mp_main__" in pickled) and any(
        text in _SCRIPTS for _, text, _ in pickletools.genops(pickled)
    ):
        raise _InCallersScriptError
    return pickled


def start_server(
    name: str, method: str | None, recipe: Recipe, address: Location, authkey: bytes, server_ready: ServerReady
) -> BaseProcess:
    """Start a process that serves what the recipe makes, as ``RPCServiceBase._spawn_server`` says."""
    options: Any = {
        "target": run_server,
        "args": (recipe, address, authkey, server_ready),
        "name": name,
        "daemon": True,
    }
    try:
        if method is None:
            with contextlib.suppress(_InCallersScriptError):
                fresh = FreshProcess(**options)
                fresh.start()
                return fresh
        context: Any = multiprocessing.get_context(method)
        if context.get_start_method() != "fork":
            server_ready.hint = _SCRIPT_RUNS_AGAIN
        process: BaseProcess = context.Process(**options)
        with forks.logs_at_rest():
            process.start()
    except AssertionError as error:
        hint = "make that process with daemon=False, or put the factory into a module and leave start_method out"
        raise ChannelError(f"{name} cannot be served: {error}", hint=hint) from error
    except (EOFError, RuntimeError, OSError) as error:
        why = hint_of(error) if isinstance(error, OSError) else None
        raise ChannelError(f"{name} cannot be served: {error!r}", hint=why or server_ready.hint) from error
    return process


def disown(process: _Process) -> _Process:
    """Have the exit of this process, and of each forked child, leave a process alone that it started.

    :mod:`multiprocessing` ends the daemonic processes in its books then, and in a child of a plain ``os.fork``
    those are the parent's.
    """
    books: set[BaseProcess] = getattr(multiprocessing.process, "_children", set())
    books.discard(process)
    return process


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
        """Say that clients can connect, and where if the system chose the port; in the server process."""
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
        return self.wait(0.0)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds for a report; return whether there is one; in the owner."""
        return self._reading is not None and self._reading.poll(timeout)

    def outcome(self, server: ServerProcess, timeout: float) -> Location | None:
        """Wait until `server` is ready; return its address if it said one.

        Raises ``CallTimeoutError`` if that takes more than `timeout` seconds (from the last progress),
        ``NotServingError`` if it ends before, and whatever it says has kept it from serving.
        """
        name = self.options.service_name
        match self._next(server, timeout):
            case ["ready", None | str() as said]:
                return said
            case ["ready", [str(host), int(port)]]:
                return normalize((host, port))
            case ["failed", failure]:
                raise unpack_failure(failure)
            case None:
                raise CallTimeoutError(
                    f"the server process of {name} (pid {server.pid}) was not ready within {timeout:g} s",
                    hint="ready_timeout= gives it longer, and report_progress() as long as it gets on",
                )
        raise ProtocolError(f"the server process of {name} sent an unknown report")

    def _next(self, server: ServerProcess, timeout: float) -> Any:
        """Return a report other than progress, or None in time; ``NotServingError`` if the process ends before."""
        assert self._reading is not None
        if self._writing is not None:  # ours; once it is closed, the end of the process is the end of the pipe
            self._writing.close()
            self._writing = None
        deadline = monotonic() + timeout
        while True:
            pause = max(0.0, min(_LOOK_AGAIN, deadline - monotonic()))
            # The process is looked at before its pipe: what it reports, it reports alive.
            has_ended = not self._reading.poll(pause) and not server.identity.is_running()
            try:
                if self._reading.poll():
                    report = MSGPACK.loads(self._reading.recv_bytes(_REPORT_LIMIT))
                    if report != ["progress"]:
                        return report
                    deadline = monotonic() + timeout
                    continue
            except (EOFError, OSError):  # it closed the pipe, and so is about to end
                has_ended = server.identity.wait(pause)
            if has_ended:
                name, how = self.options.service_name, server.how_it_ended()
                raise NotServingError(f"the server process of {name} {how} before it was ready", hint=self.hint)
            if not pause:
                return None

    def close(self) -> None:
        """Give the pipe back; idempotent."""
        for end in (self._reading, self._writing):
            if end is not None:
                end.close()
        self._reading = self._writing = None


# ---------------------------------------------------------------------- the process, seen from its owner


def own(pid: int) -> socket.socket:
    """Mark a server process as one whose owner lives, until the returned socket is closed or this process ends.

    The mark is a name in the kernel, an abstract Unix socket that is never listened on: it goes with its process,
    however that dies. Every local user who guesses the id can bind it, so it can only keep a server from being
    ended. Where there are no such names (they are Linux'), every server counts as left behind.
    """
    with forks.creating_descriptors:
        mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if sys.platform == "linux":
        try:
            mark.bind(f"\0shmelim.owner.{os.getuid()}.{pid}")
        except OSError as error:
            _logger.warning("server process %d cannot be marked as having an owner: %s", pid, error)
    return mark


def has_living_owner(pid: int) -> bool:
    """Tell whether a server process of this user has an owner that lives: this process, or another."""
    with forks.creating_descriptors, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(f"\0shmelim.owner.{os.getuid()}.{pid}")
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


class ServerProcess:
    """A started server process, whoever is its parent, marked as one whose owner lives.

    Whether it lives is asked of the kernel: ``Process.is_alive()`` and ``Process.sentinel`` of a process that a
    forkserver started say that it has ended when only the forkserver has.
    """

    def __init__(self, process: BaseProcess, service_name: str) -> None:
        pid = getattr(process, "pid", None)
        if pid is None or not hasattr(process, "exitcode"):
            raise TypeError(f"_start_server_process must return a started Process, not {process!r}")
        self.process = disown(process)
        self.pid: int = pid
        self.identity = ProcessIdentity.of(pid)
        self.mark = own(pid)
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

        def say(number: int) -> None:
            if number == signal.SIGKILL:
                text = "%s: server process %d did not end by SIGTERM, killing it"
                _logger.warning(text, self._service_name, self.pid)

        self.identity.end(timeout, say)
        self.process.join(_REAPED)  # so that it is not a zombie
        self.mark.close()

    def check_replaceable(self) -> None:
        """Raise what giving the same things to another process would raise."""
        if isinstance(self.process, FreshProcess):
            _pickled(self.process.recipe, SimpleNamespace(duplicate_for_child=int))


# ---------------------------------------------------------------------- the process, seen from inside


def serve_rpc(server: object, address: Address, authkey: bytes, server_ready: ServerReady | Event) -> None:
    """Serve an object in this process until SIGTERM or the end of the process' owner.

    Sets the process title, handles signals, serves, says that it is ready, waits for the end, and lets running
    calls finish. To be called from the process' main thread, with what ``_start_server_process`` got; a plain
    ``multiprocessing.Event`` will do as `server_ready`, and the service is then named after the object's type.
    If the object has :class:`~shmelim.system.problems.Problems` as its ``problems``, those of the channel join
    them. ``ChannelError`` if the address is taken or cannot be used, which the owner is told.
    """
    if isinstance(server_ready, ServerReady):
        options = server_ready.options
    else:
        parent = multiprocessing.parent_process()
        owner = None if parent is None or parent.pid is None else ProcessIdentity.of(parent.pid)
        options = ServerOptions(type(server).__name__, owner)
    _serve(lambda: server, address, authkey, server_ready, options)


def run_server(recipe: Recipe, address: Address, authkey: bytes, server_ready: ServerReady) -> None:
    """Make an object and serve it; what a process runs that ``_spawn_server`` starts.

    If the object has a method ``close``, that is called in the end. Where there is no server, the owner is told
    why, and ``SystemExit`` is raised.
    """
    factory, args, kwargs, on_listening = recipe
    options = server_ready.options
    try:
        _serve(
            lambda: factory(*args, **kwargs), address, authkey, server_ready, options, on_listening, closes=True
        )
    except Exception as error:
        # An error of ours explains itself, and the owner raises it.
        trace = None if isinstance(error, ShmelimError) else error
        with log_without_waiting():
            _logger.error("%s: the server process failed: %s", options.service_name, error, exc_info=trace)  # noqa: TRY400
        raise SystemExit(1) from None


def _serve(
    make: Callable[[], object],
    address: Address,
    authkey: bytes,
    server_ready: ServerReady | Event,
    options: ServerOptions,
    on_listening: Callable[[Any, Location], object] | None = None,
    *,
    closes: bool = False,
) -> None:
    """Serve what `make` returns, known as a server of the service; the owner is told what keeps it from that."""
    global _starting  # noqa: PLW0603
    ready = server_ready if isinstance(server_ready, ServerReady) else None
    # First of all, so that no signal reaches a handler that was inherited from the owner.
    with Ending(options.owner) as ending, log_without_waiting(), contextlib.ExitStack() as stack:
        try:
            title = server_title(options.service_name)
            if not set_title(title):
                _logger.warning("%s: the process title %r could not be set", options.service_name, title)
            check_free(address)  # before anything is made, or published
            _starting = ready
            server = make()
            _starting = None
            if closes and callable(close := getattr(server, "close", None)):
                stack.callback(close)
            stack.enter_context(log_without_waiting())  # by handlers that were added since, too
            problems = getattr(server, "problems", None)  # what its health check lists
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
            stack.callback(channel.close, options.drain)
            if on_listening is not None:
                on_listening(server, channel.address)
            ending.defer()
            if ready is None:
                server_ready.set()
            else:
                ready.set(channel.address)
            _logger.info("%s: ending because of %s", options.service_name, ending.wait())
        except Exception as error:
            if ready is not None:
                ready.fail(error)
            raise


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


class Ending:
    """Waits for the end of this process' work, for the length of a ``with`` block.

    Up to :meth:`defer` a SIGTERM, or the owner's end, raises ``SystemExit``, so that a start can be broken off;
    from then on it only ends :meth:`wait`, so that neither serving nor closing is interrupted halfway. SIGINT
    does as SIGTERM in a foreground process; others ignore it: a terminal sends it to each of a group, and the
    owner decides what it means. The owner's death is seen by a descriptor of its process: a pipe would also be
    held open by its other children. Outside of the main thread, which alone may handle signals, only the owner's
    end counts, once it is waited for. Children that this process forks end by a SIGTERM of theirs, and alone.
    """

    def __init__(self, owner: ProcessIdentity | None, *, in_foreground: bool = False) -> None:
        self._owner = owner
        self._signals = {signal.SIGTERM, signal.SIGINT} if in_foreground else {signal.SIGTERM}
        self._deferred = False  # set by the main thread; a SIGTERM of the watcher that comes later ends wait()
        self._sending = threading.Lock()  # held by the watcher while it sends one
        self._reading = self._writing = self._old_wakeup = -1
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        self._reading, self._writing = os.pipe()
        if threading.current_thread() is threading.main_thread():
            os.set_blocking(self._writing, False)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = self._take(number)
            self._old_wakeup = self._be_woken()
            forks.register(self)
            # A fresh process starts with SIGINT blocked, and inherits what the thread blocked that started it.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
            if self._owner is not None:
                with contextlib.suppress(RuntimeError):  # no room for a thread: it is missed after the start
                    threading.Thread(target=self._watch, args=(self._owner,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._deferred = True
        with self._sending:  # from here on the watcher sends nothing, which would end this process
            for number, handler in self._before.items():
                signal.signal(number, handler)
            if self._before:
                signal.set_wakeup_fd(self._old_wakeup)
            self._before.clear()
        os.close(self._reading)
        os.close(self._writing)

    def _take(self, number: signal.Signals) -> signal._HANDLER:
        return signal.signal(number, self._handle if number in self._signals else signal.SIG_IGN)

    def _be_woken(self) -> int:
        """Have the interpreter write each signal to the pipe; return the descriptor that it wrote to.

        That needs no lock which the main thread could hold. What stood there before is the parent's, who must not
        be told of our signals.
        """
        return signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)

    def after_fork_in_child(self) -> None:
        """Leave signals to do there what they do by themselves. Called by :mod:`shmelim.system.forks`."""
        if self._before:
            signal.set_wakeup_fd(-1)
        for number in self._before:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._deferred:
            self.defer()  # whatever comes while that is undone: a supervisor may end the owner at the same time
            raise SystemExit(128 + number)

    def _watch(self, owner: ProcessIdentity) -> None:
        """Break off a start that nobody waits for any more, whatever holds it up."""
        if owner.wait(None):
            with self._sending:
                if not self._deferred:
                    os.kill(os.getpid(), signal.SIGTERM)

    def defer(self) -> None:
        """Stop raising."""
        self._deferred = True
        if self._before:  # an asyncio loop that handled a signal, and has ended, took the pipe and handlers away
            self._be_woken()
            for number in self._before:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._take(number)

    def wait(self) -> str:
        """Wait for the end; return what it was."""
        owner = self._owner
        while owner is None or not owner.wait(None, self._reading):
            # Signals that others handle are written there too.
            if self._signals.intersection(os.read(self._reading, 256)):
                return "a signal"
        return f"the end of its owner, process {owner.pid}"
