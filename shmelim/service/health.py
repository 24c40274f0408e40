"""The health of a service: what its processes share, how checks are counted and told, a daemon that checks."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import mmap
import multiprocessing
import multiprocessing.context
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol, Self

from shmelim.channel.address import Location, describe
from shmelim.channel.wire import file_of
from shmelim.errors import CallerFaultError, KeyFileError, ShmelimError, UnknownMethodError
from shmelim.notify.problems import Notifier, ProblemMessages, checked_notifier, take_over
from shmelim.service.process import disown
from shmelim.service.settings import ServiceSettings, server_title
from shmelim.shm.mapping import map_writable
from shmelim.system import forks
from shmelim.system.arguments import seconds
from shmelim.system.clock import monotonic
from shmelim.system.logs import log_problems
from shmelim.system.problems import SEVERITIES, Problems, Severity
from shmelim.system.processes import ProcessIdentity, set_title, terminal_left_to_owner
from shmelim.system.text import get_logger

_DOWN: Final = "server_down"
_DYING: Final = 0.1  # seconds in which a process that closed its connections is dead
_STOPPED: Final = 0.2  # seconds; a process that was stopped with the lock in its hands must not stop the others
_PATIENCE: Final = 0.8  # seconds that a check under way has to end by itself
_FLUSH: Final = 2.0  # seconds for alerts that are still to be sent when a checking process ends

_logger = get_logger("shmelim.service")


# ---------------------------------------------------------------------- what all processes of a service know


class _State(ctypes.Structure):
    """Words of eight bytes, each written whole: by the owner, by who ends the server, and under the lock."""

    _fields_: ClassVar = [
        ("ended", ctypes.c_int64),  # the owner has shut the service down
        ("owner_tells", ctypes.c_int64),  # it has a notifier
        ("pid", ctypes.c_int64),
        ("started", ctypes.c_double),
        ("restarting", ctypes.c_int64),  # the owner restarts it because somebody wants that
        ("ended_by", ctypes.c_int64),  # the process whose health check ends the server; 0: none does
        ("level", ctypes.c_int64),  # how bad an outage was told to be that is not over; 0: there is none
        ("number", ctypes.c_int64),  # of the outage that is on, or was the last
        ("restarts", ctypes.c_int64),  # in it
        ("since", ctypes.c_double),
    ]


# Number of the last outage of each service of this process, over all objects of a name: a notifier that holds
# repetitions back must be able to tell those of one object from those of the next. Each step is one.
_numbers: dict[str, int] = {}


class SharedPage:
    """The state of one service: whether it has ended, who its server is, and what was told of its outage.

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
        memory: Any = mmap.mmap(-1, mmap.PAGESIZE)
        if shared:
            memory = map_writable(self._descriptor, mmap.PAGESIZE)
            weakref.finalize(self, _close, self._descriptor, file_of(self._descriptor)).atexit = False
        self.state = _State.from_buffer(memory)
        self._file = file_of(self._descriptor)
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
            # One that was closed, and may be somebody else's, keeps other processes from nothing.
            is_shared = self._descriptor >= 0 and file_of(self._descriptor) == self._file
            deadline = monotonic() + _STOPPED
            while is_shared and monotonic() < deadline:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.001)
            try:
                yield
            finally:
                if is_shared:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


def _close(descriptor: int, file: tuple[int, ...] | None) -> None:
    if file_of(descriptor) == file:  # else it is somebody else's by now
        os.close(descriptor)


def _again(name: str, descriptor: Any) -> SharedPage:
    return SharedPage(name, descriptor=descriptor.detach())


# ---------------------------------------------------------------------- checks


class Finding(NamedTuple):
    """What a check found wrong with a server."""

    text: str
    error: Exception | None = None  # that the call raised


class Health(ABC):
    """A service's health as one process sees it: checks, at most so often, failures in a row, and who is told.

    An outage is told once for all processes of the service; its messages carry its number, so that no two look
    like a repetition. Thread-safe. A check that comes while another one is under way returns what is known, and
    does not wait.
    """

    refusal: str | None = None  # why the service serves no more; never goes back

    def __init__(
        self,
        name: str,
        location: Location | None,
        settings: ServiceSettings,
        page: SharedPage | None,
        maker: ProcessIdentity | None,
    ) -> None:
        self.name = name
        self.location = location  # None in direct mode; with port 0 until a server is ready
        self.settings = settings
        self.page = page or SharedPage(name, shared=location is not None)
        self.is_makers = maker is None  # whether this process made the service
        self.maker = maker or ProcessIdentity.this_process()
        self.facade: Callable[[], Any] = lambda: None  # by a weak reference: dropping that object ends the service
        # Whoever holds the turn, which nobody waits for, reads and writes these; the others only read `_healthy`.
        self._healthy = True
        self._last_ms: float | None = None
        self._asked = self._failing = ProcessIdentity(0, 0.0)  # the server asked last, and that which failed last
        self._failures = 0  # of that, in a row
        self._last_reported: object = None
        self.begin_here()

    def begin_here(self) -> None:
        """Make what each process has of its own."""
        self._turn = threading.Lock()
        self.page.begin_here()
        self.problems = Problems()
        log_problems(self.problems, _logger)
        self._reported = Problems()  # what the server says is wrong with it
        self._messages = ProblemMessages(self._reported, self.notifier)

    @abstractmethod
    def ask(self) -> object:
        """Return what the server says of itself; ``UnknownMethodError`` if it says nothing."""

    @abstractmethod
    def replace(self, asked: ProcessIdentity) -> bool | str:
        """Have a server that failed too often replaced; return whether that was done, or why it may not be."""

    def notifier(self) -> Notifier | None:
        """Return who is told, in this process."""
        found: Notifier | None = getattr(self.facade(), "slack_notifier", None)
        return found

    def check(self, now_ms: float, interval_ms: float) -> bool:
        """Check if it is time to (also when time has gone back); return whether the server was found healthy."""
        # Not by acquire(): what a signal handler raises right after it would leave the turn taken for ever.
        if self._turn.locked():
            return self._healthy
        with self._turn:
            if self._last_ms is None or not 0 <= now_ms - self._last_ms < interval_ms:
                self._last_ms = now_ms
                self._messages.send_again()
                self._messages.report_undelivered(self.problems)
                self._asked = self.page.server
                # The owner knows of a dead server; for a copy, another owner's may be at the address.
                if self.is_makers and self.location is not None and not self._asked.is_running():
                    what = f"nobody serves at {describe(self.location)}: process {self._asked.pid} has ended"
                    finding: Finding | None = Finding(f"RPC error: {what}")
                else:
                    finding = self.find()
                self._healthy = finding is None
                if finding is None:
                    self._failures = 0
                    self._be_well(settled=False)
                elif self.refusal is None and not self.page.state.ended:
                    self._count(finding)
            return self._healthy

    def look(self) -> None:
        """Find out, in the owner, whether a restart has ended the outage: where nobody checks, it has."""
        if not getattr(self.facade(), "enable_health_check", False) or self.find() is None:
            self._be_well(settled=True)

    def find(self) -> Finding | None:
        """Ask the server now; return what is wrong."""
        try:
            answer = self.ask()
        except UnknownMethodError as error:
            text = f"health cannot be checked, and counts as good: {error}"
            self._notice("unchecked", text)
            return None
        except Exception as error:
            return Finding(f"RPC error: {type(error).__name__}: {error}", error)
        if not isinstance(answer, Mapping):
            return Finding(f"status error: the answer is {_short(answer)}, not a dict with a status")
        reported = answer.get("problems")
        if self.is_makers and reported != self._last_reported:  # copies would tell of the same once more
            self._last_reported = reported
            take_over(self._reported, reported)
        status = answer.get("status")
        return None if status in ("ok", "degraded") else Finding(f"status error: the status is {_short(status)}")

    def _count(self, finding: Finding) -> None:
        """Count and tell what a check found, and at the threshold have the server replaced."""
        text, error = finding
        is_ours = isinstance(error, KeyFileError | CallerFaultError | MemoryError)
        if is_ours and not hasattr(error, "is_servers"):
            text = f"this process ({os.getpid()}) cannot check the server, which may be well: {text}"
            self._notice("cannot_check", text)
            return
        if self._asked != self._failing:  # what its predecessor did counts no more
            self._failing, self._failures = self._asked, 0
        if self._asked != self.page.server or (self.page.state.restarting and self.is_owned()):
            return  # there is another one by now, or soon
        self._failures += 1
        limit = getattr(self.facade(), "max_consecutive_failures", self._failures)
        # The traceback of the first only: the next are mostly the same. And an error of ours says it all.
        trace = None if self._failures > 1 or isinstance(error, ShmelimError) else error
        line = "%s: health check failed (%d in a row, the limit is %d): %s"
        _logger.warning(line, self.name, self._failures, limit, text, exc_info=trace)
        if not self._owner_tells():
            self.report_down(f"health check failed: {text}")
        if self._failures >= limit:
            self._act(text)

    def _act(self, text: str) -> None:
        """Have a server replaced that failed so often, or say why it is not."""
        checks = "1 failed health check" if self._failures == 1 else f"{self._failures} failed health checks"
        try:
            done = self.replace(self._asked)
            if done is True:
                self._failures = 0
                if self.is_makers:
                    self.say_restarted(f"server restarted after {checks}")
            if not isinstance(done, str):
                return
            why_not = done
        except Exception as error:
            if self.refusal is not None:
                return
            trace = None if isinstance(error, ShmelimError) else error
            _logger.error("%s: restart failed: %s", self.name, error, exc_info=trace)  # noqa: TRY400
            why_not = f"restart failed, will be tried again: {type(error).__name__}: {error}"
        self.report_down(f"{checks} in a row, {why_not}: {text}", "failing")

    def _owner_tells(self) -> bool:
        """Whether the owner tells of this failure: it does of a server that has died."""
        return (
            self.location is not None
            and self.settings.restart_on_exit
            and bool(self.page.state.owner_tells)
            and self.is_owned()
            and self._asked.wait(_DYING)
        )

    def is_owned(self) -> bool:
        """Whether the process that made the service runs."""
        return self.is_makers or self.maker.is_running()

    # ------------------------------------------------------------------ what people are told

    def report_down(self, text: str, severity: Severity = "degraded") -> None:
        """Raise the problem that the server is down; people are told of an outage by whoever is first."""
        is_heard = self.notifier() is not None
        if is_heard and not self.page.state.level:
            self.problems.clear(_DOWN, self.name)  # an earlier one, whose end another process has told
        self.problems.report(_DOWN, text, subject=self.name, severity=severity)
        if is_heard and (number := self.page.rise(SEVERITIES.index(severity))):
            self._messages.send(f"{self.name}: outage {number}: {text}", "error")

    def say_restarted(self, text: str) -> None:
        """Say that a health check has had the server restarted, and find out whether all is well."""
        self._messages.send(f"{self.name}: outage {self.page.state.number}: {text}", "warning")
        self.page.state.ended_by = 0  # from here on, also copies may tell that all is well
        self.look()

    def _be_well(self, *, settled: bool) -> None:
        """End whatever a good check ends; also an outage of which another process told that has ended since.

        Unless all is `settled`, the owner may be about to tell of another server, which answers and is not yet in
        the books.
        """
        state = self.page.state
        if not (state.level or self.problems.standing()):
            return
        self.problems.clear("cannot_check", self.name)
        settled = settled or self.location is None or (not state.ended_by and self.page.server.is_running())
        if not settled and self.is_owned():
            return
        self.problems.clear(_DOWN, self.name)
        if state.level and self.notifier() is not None and (over := self.page.fall()) is not None:
            number, seconds, restarts = over
            count = "1 restart" if restarts == 1 else f"{restarts} restarts"
            text = f"{self.name}: outage {number}: recovered after {seconds:.1f} s and {count}"
            self._messages.send(text, "success")

    def _notice(self, name: str, text: str) -> None:
        """Raise a problem of this process', and tell people of it once."""
        if self.problems.report(name, text, subject=self.name, severity="notice"):
            self._messages.send(f"{self.name}: {text}", "warning")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"  # noqa: PLR2004


# ---------------------------------------------------------------------- the daemon


class Checked(Protocol):
    """What can be checked: an :class:`~shmelim.service.base.RPCServiceBase`."""

    service_name: str

    def health_check(self, current_time_ms: float | None = None) -> bool:
        """Check it."""


class HealthCheckDaemon:
    """Checks a service's health until it is stopped, the service is shut down, or the daemon's maker ends.

    Survives every exception of a check: it is logged, told to the notifier, and the next check comes in time.
    A server that hangs is found by it; one that died is restarted by the service itself.

    May be handed to a process of one's own as well: ``Process(target=daemon.run, daemon=True).start()``.
    Thread-safe. In a forked child the copy does not check and cannot be started, and :meth:`stop` does nothing.

    Parameters
    ----------
    service
        The service, with health checks enabled. Its own interval holds, too: the longer one decides.
    interval_s
        Seconds between two checks; None: the service's own interval. The notifier may stand in its place:
        ``HealthCheckDaemon(service, slack_notifier)``.
    slack_notifier
        Who is told when the checking itself fails. The service tells its own notifier what the checks find.
    start_method
        Start method for a process of its own; None: the default of :mod:`multiprocessing`.

    Raises
    ------
    TypeError, ValueError
        `interval_s` is not a number, or not positive; the service's health checks are not enabled.

    Examples
    --------
    >>> class Service:
    ...     service_name = "PriceServer"
    ...     def health_check(self, current_time_ms=None):
    ...         return True
    >>> with HealthCheckDaemon(Service(), interval_s=60).start() as daemon:
    ...     daemon
    <HealthCheckDaemon of PriceServer, every 60 s>

    """

    def __init__(
        self,
        service: Checked,
        interval_s: float | Notifier | None = None,
        slack_notifier: Notifier | None = None,
        *,
        start_method: str | None = None,
    ) -> None:
        if slack_notifier is None and hasattr(interval_s, "send_message"):
            interval_s, slack_notifier = None, interval_s
        if interval_s is None:
            interval_s = float(getattr(service, "health_check_interval_s", 60.0))
        every: float = seconds("interval_s", interval_s, most=threading.TIMEOUT_MAX)
        if every == 0:
            raise ValueError("interval_s must be more than 0")
        if not callable(getattr(service, "health_check", None)):
            raise TypeError(f"service must have a health_check(), as a service has, not be {service!r:.100}")
        if not getattr(service, "enable_health_check", True):
            raise ValueError(f"{service.service_name} was made without enable_health_check=True")
        self.service = service
        self.interval_s = float(every)
        self.slack_notifier = checked_notifier(slack_notifier)
        self._start_method = start_method
        self._maker = ProcessIdentity.this_process()
        # Writing to the second end wakes the first; written by stop() of the process that made it.
        with forks.creating_descriptors:
            self._waking, self._stopping = multiprocessing.Pipe(duplex=False)
        self._stopped = False
        self._runner: threading.Thread | BaseProcess | None = None
        self._attendant: threading.Thread | None = None  # of a checking process

    def start(self, kind: Literal["thread", "process"] = "thread") -> Self:
        """Begin to check, once; return this object.

        By `kind` in a ``"thread"`` of this process, which is all that most need; or in a ``"process"`` titled
        ``vali_<service>_HealthChecker``, which goes on checking when this process is too busy to run a thread, and
        costs the start of a process; one that dies is told of, and another one started. ``RuntimeError`` if it was
        started before, or made by another process.
        """
        if self._maker.pid != os.getpid():
            # The copy would be stopped by nobody, and give this process the title of one that does nothing else.
            raise RuntimeError("the process that made a HealthCheckDaemon starts it; make one in this process")
        if self._runner is not None or self._stopped:
            raise RuntimeError("a HealthCheckDaemon can be started once; make a new one")
        name = f"{self.service.service_name}-health"
        if kind == "thread":
            self._runner = threading.Thread(target=self.run, name=name, daemon=True)
            self._runner.start()
        elif kind == "process":
            attended = weakref.ref(self), self._launched(name)  # a service that nobody needs ends
            self._attendant = threading.Thread(target=_attend, args=attended, name=name, daemon=True)
            self._attendant.start()
        else:
            raise ValueError(f"kind is 'thread' or 'process', not {kind!r}")
        return self

    def _launched(self, name: str) -> BaseProcess:
        context: Any = multiprocessing.get_context(self._start_method)
        process: BaseProcess = context.Process(target=self.run, name=name, daemon=True)
        with forks.logs_at_rest():
            process.start()
        self._runner = disown(process)  # it ends with this process by itself
        return process

    def _launched_again(self, dead: BaseProcess) -> BaseProcess:
        """Say that the checking process died, and start another one an interval later."""
        what = f"checking process {dead.pid} ended with exit code {dead.exitcode}, another is started"
        while True:
            _logger.error("%s: %s", self.service.service_name, what)
            self._tell(f"health check daemon: {what}")
            if self._waking.poll(self.interval_s) or self._is_over():
                return dead
            try:
                return self._launched(dead.name)
            except Exception as error:
                what = f"checking process could not be started: {type(error).__name__}: {error}"

    def _is_over(self) -> bool:
        # A mock has all attributes.
        return self._stopped or getattr(self.service, "has_ended", False) is True

    def run(self) -> None:
        """Check until stopped; what a checking process runs.

        Returns also when the service was shut down, and when the process that made this ends. A terminal's Ctrl-C
        is left to that process, unless the checking one has a handler for it.
        """
        if self._maker.pid == os.getpid():
            return self._run(elsewhere=False)
        set_title(f"{server_title(self.service.service_name)}_HealthChecker")
        with terminal_left_to_owner():
            return self._run(elsewhere=True)

    def _run(self, *, elsewhere: bool) -> None:
        # A wall clock that is set would lengthen or shorten an interval; this one does neither.
        began_ms, began = time.time_ns() // 1_000_000, monotonic()
        due = began
        try:
            while not self._maker.wait(max(0.0, due - monotonic()), self._waking.fileno()):
                if self._waking.poll() or self._is_over():
                    return
                now = monotonic()
                if now >= due:
                    due = now + self.interval_s
                    # Whole milliseconds, rounded up: two checks are never less than the interval apart by these.
                    self._check(began_ms + math.ceil((now - began) * 1000))
        finally:
            # Alerts have a moment to leave a process that ends without the interpreter's exit functions.
            for notifier in (self.slack_notifier, getattr(self.service, "slack_notifier", None)):
                if elsewhere and callable(flush := getattr(notifier, "flush", None)):
                    with contextlib.suppress(Exception):
                        flush(_FLUSH)

    def _check(self, now_ms: float) -> None:
        name = self.service.service_name
        try:
            if not self.service.health_check(now_ms):
                _logger.debug("%s: not healthy", name)  # the service has said it, if it is news
        except Exception as error:
            _logger.exception("%s: the health check daemon failed, and goes on", name)
            self._tell(f"health check daemon error: {type(error).__name__}: {error}")

    def _tell(self, what: str) -> None:
        if self.slack_notifier is not None:
            text = f"{self.service.service_name}: {what}"
            ProblemMessages(Problems(), lambda: self.slack_notifier).send(text, "error")

    def stop(self) -> None:
        """End the checking within a second; idempotent. A check that is under way in a thread ends by itself."""
        if self._stopped or self._maker.pid != os.getpid():
            return
        self._stopped = True
        with contextlib.suppress(OSError):
            self._stopping.send_bytes(b"stop")
        runner = self._runner
        if runner is not None and runner is not threading.current_thread():
            runner.join(_PATIENCE)
            if isinstance(runner, BaseProcess) and runner.is_alive():
                runner.kill()  # it owns nothing that would need an orderly end
                runner.join()
            if self._attendant is not None:
                self._attendant.join(_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.service.service_name}, every {self.interval_s:g} s>"

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        return self.__dict__ | {"_runner": None, "_attendant": None}


def _attend(daemon: weakref.ref[HealthCheckDaemon], process: BaseProcess) -> None:
    """Reap a checking process that ends; where nobody wanted that, have another one started."""
    while True:
        process.join()
        attended = daemon()
        if attended is None or process.exitcode == 0 or attended._is_over():  # noqa: SLF001
            return
        process = attended._launched_again(process)  # noqa: SLF001
        del attended
