"""The health of a service: how checks are counted, what people are told, and a daemon that checks by itself."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import os
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Protocol, Self

from shmelim.errors import CallerFaultError, KeyFileError
from shmelim.service.settings import server_title
from shmelim.service.shared import SharedPage
from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.problems import SEVERITIES, Change, Problem
from shmelim.system.processes import ProcessIdentity, set_title

DOWN: Final = "server_down"

_PATIENCE: Final = 0.8  # seconds that a check under way has to end by itself
_FLUSH: Final = 2.0  # seconds for alerts that are still to be sent when a checking process ends

_logger = logging.getLogger("shmelim.service")


# ---------------------------------------------------------------------- who is told


class Notifier(Protocol):
    """Who is told of what people should know, such as a :class:`~shmelim.notify.slack.SlackNotifier`."""

    def send_message(self, text: str, level: str = "info") -> object:
        """Pass a message on; `level` is info, success, warning or error."""


def tell(notifier: Notifier | None, text: str, level: str) -> None:
    """Pass a message to a notifier, if there is one; whatever that raises is logged."""
    if notifier is None:
        return
    try:
        notifier.send_message(text, level=level)
    except Exception:
        _logger.exception("the notifier failed; it should have said: %s", text)


class Alerts:
    """A subscriber of problems that passes them on to a notifier; an outage once for all processes of the service.

    An outage's messages carry its number, so that no two look like a repetition.
    """

    def __init__(self, service_name: str, page: SharedPage, notifier: Callable[[], Notifier | None]) -> None:
        self._name = service_name
        self._page = page
        self._notifier = notifier

    def __call__(self, change: Change, problem: Problem) -> None:
        """Hear of a change."""
        if problem.name != DOWN:
            if change == "raised":
                self.say(problem.text, "warning")
        elif change == "cleared":
            self.recovered()
        elif self._notifier() is not None:
            number = self._page.rise(SEVERITIES.index(problem.severity))
            if number:
                self.say(f"outage {number}: {problem.text}", "error")

    def recovered(self) -> None:
        """Say that the outage is over, if one was told of that is not over yet, by whatever process."""
        over = self._page.fall() if self._page.state.level and self._notifier() is not None else None
        if over is not None:
            number, seconds, restarts = over
            count = "1 restart" if restarts == 1 else f"{restarts} restarts"
            self.say(f"outage {number}: recovered after {seconds:.1f} s and {count}", "success")

    def restarted(self, text: str) -> None:
        """Say that a health check has had the server restarted."""
        self.say(f"outage {self._page.state.number}: {text}", "warning")

    def say(self, text: str, level: str) -> None:
        """Pass a message on."""
        tell(self._notifier(), f"{self._name}: {text}", level)


# ---------------------------------------------------------------------- what a check finds


class Finding(NamedTuple):
    """What a check found wrong with a server."""

    text: str
    error: Exception | None = None  # that the call raised
    own: bool = False  # whether that is this process' own fault


class HealthChecks:
    """Checks a server at most so often, and counts how often it failed in a row.

    Thread-safe. A call that comes while another one checks returns what is known, and does not wait. `ask` returns
    what the server says of itself. `found` gets what a check finds and the number of failures in a row, and
    returns whether the count begins anew.
    """

    def __init__(self, ask: Callable[[], object], found: Callable[[Finding | None, int], bool]) -> None:
        self._ask = ask
        self._found = found
        # Whoever holds the turn, which nobody waits for, reads and writes everything below; the others only read
        # `_healthy`, which is one reference.
        self._turn = threading.Lock()
        self._healthy = True
        self._last_ms: float | None = None
        self.failures = 0

    def check(self, now_ms: float, interval_ms: float) -> bool:
        """Check if it is time to (also when time has gone back); return whether the server was found healthy."""
        if not self._turn.acquire(blocking=False):
            return self._healthy
        try:
            if self._last_ms is None or not 0 <= now_ms - self._last_ms < interval_ms:
                self._last_ms = now_ms
                finding = self.find()
                self._healthy = finding is None
                self.failures = 0 if finding is None else self.failures + (not finding.own)
                if self._found(finding, self.failures):
                    self.failures = 0
            return self._healthy
        finally:
            self._turn.release()

    def find(self) -> Finding | None:
        """Ask the server now; return what is wrong."""
        try:
            answer = self._ask()
        except Exception as error:
            own = isinstance(error, KeyFileError | CallerFaultError | MemoryError)
            return Finding(f"RPC error: {type(error).__name__}: {error}", error, own)
        if not isinstance(answer, Mapping):
            return Finding(f"status error: the answer is {_short(answer)}, not a dict with a status")
        status = answer.get("status")
        return None if status in ("ok", "degraded") else Finding(f"status error: the status is {_short(status)}")


def checks(number: int) -> str:
    """Return so many failed checks in words."""
    return "1 failed health check" if number == 1 else f"{number} failed health checks"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"  # noqa: PLR2004


# ---------------------------------------------------------------------- the daemon


class Checked(Protocol):
    """What can be checked: an :class:`~shmelim.service.base.RPCServiceBase`."""

    @property
    def service_name(self) -> str:
        """Its name."""

    def health_check(self, current_time_ms: float | None = None) -> bool:
        """Check it."""


class HealthCheckDaemon:
    """Checks a service's health until it is stopped, the service is shut down, or the daemon's maker ends.

    Survives every exception of a check: it is logged, told to the notifier, and the next check comes in time.
    A server that hangs is found by it; one that died is restarted by the service itself.

    May be handed to a process of one's own as well: ``Process(target=daemon.run, daemon=True).start()``.
    Thread-safe. In a forked child the copy does not check, and :meth:`stop` does nothing.

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
    TypeError
        `interval_s` is not a number.
    ValueError
        It is not positive; or the service's health checks are not enabled, so that they would find nothing.

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
        if not isinstance(interval_s, int | float):
            raise TypeError(f"interval_s is a number of seconds, not {interval_s!r}")
        if not 0 < interval_s < math.inf:
            raise ValueError(f"interval_s must be more than 0 seconds, not {interval_s}")
        if not getattr(service, "enable_health_check", True):
            raise ValueError(f"{service.service_name} was made without enable_health_check=True")
        self.service = service
        self.interval_s = float(interval_s)
        self.slack_notifier = slack_notifier
        self._start_method = start_method
        self._maker = ProcessIdentity.this_process()
        # Writing to the second end wakes the first; written by stop() of the process that made it.
        with forks.creating_descriptors:
            self._waking, self._stopping = multiprocessing.Pipe(duplex=False)
        self._stopped = False
        self._runner: threading.Thread | BaseProcess | None = None
        forks.register(self)

    def start(self, kind: Literal["thread", "process"] = "thread") -> Self:
        """Begin to check.

        Parameters
        ----------
        kind
            ``"thread"``: in a thread of this process, which is all that most need. ``"process"``: in a process
            titled ``vali_<service>_HealthChecker``, which goes on checking when this process is too busy to run a
            thread; it costs the start of a process.

        Returns
        -------
        HealthCheckDaemon
            This object.

        Raises
        ------
        RuntimeError
            It was started before.
        ValueError
            There is no such kind.

        """
        if self._runner is not None or self._stopped:
            raise RuntimeError("a HealthCheckDaemon can be started once; make a new one")
        name = f"{self.service.service_name}-health"
        if kind == "thread":
            self._runner = threading.Thread(target=self._run, name=name, daemon=True)
            self._runner.start()
        elif kind == "process":
            context: Any = multiprocessing.get_context(self._start_method)
            process = self._runner = context.Process(target=self.run, name=name, daemon=True)
            with forks.logs_at_rest():
                process.start()
        else:
            raise ValueError(f"kind is 'thread' or 'process', not {kind!r}")
        return self

    def run(self) -> None:
        """Check until stopped; what a checking process runs.

        Returns also when the service was shut down, and when the process that made this ends.
        """
        elsewhere = self._maker.pid != os.getpid()
        if elsewhere:
            set_title(f"{server_title(self.service.service_name)}_HealthChecker")
        try:
            self._run()
        finally:
            if elsewhere:
                self._flush()

    def stop(self) -> None:
        """End the checking within a second; idempotent. A check that is under way in a thread ends by itself."""
        if self._stopped or self._maker.pid != os.getpid():
            return
        self._stopped = True
        with contextlib.suppress(OSError):
            self._stopping.send_bytes(b"stop")
        runner = self._runner
        if runner is None or runner is threading.current_thread():
            return
        runner.join(_PATIENCE)
        if not isinstance(runner, threading.Thread) and runner.is_alive():
            runner.kill()  # it owns nothing that would need an orderly end
            runner.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.service.service_name}, every {self.interval_s:g} s>"

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        return self.__dict__ | {"_runner": None}

    def after_fork_in_child(self) -> None:
        """Let this forked child's exit leave the checking process alone. Called by :mod:`shmelim.system.forks`."""
        books: set[Any] = getattr(multiprocessing.process, "_children", set())
        books.discard(self._runner)
        self._runner = None

    def _run(self) -> None:
        # A wall clock that is set would lengthen or shorten an interval; this one does neither.
        began_ms, began = time.time_ns() // 1_000_000, monotonic()
        due = began
        while not self._maker.wait(max(0.0, due - monotonic()), self._waking.fileno()):
            if (
                self._waking.poll() or getattr(self.service, "has_ended", False) is True
            ):  # a mock has all attributes
                return
            now = monotonic()
            if now >= due:
                # Whole milliseconds, rounded up: two checks are never less than the interval apart by these.
                self._check(began_ms + math.ceil((now - began) * 1000))
                due = now + self.interval_s

    def _check(self, now_ms: float) -> None:
        name = self.service.service_name
        try:
            if not self.service.health_check(now_ms):
                _logger.debug("%s: not healthy", name)  # the service has said it, if it is news
        except Exception as error:
            _logger.exception("%s: the health check daemon failed, and goes on", name)
            text = f"{name}: health check daemon error: {type(error).__name__}: {error}"
            tell(self.slack_notifier, text, "error")

    def _flush(self) -> None:
        """Give alerts a moment to leave a process that ends without the interpreter's exit functions."""
        for notifier in (self.slack_notifier, getattr(self.service, "slack_notifier", None)):
            flush = getattr(notifier, "flush", None)
            if callable(flush):
                with contextlib.suppress(Exception):
                    flush(_FLUSH)
