"""Health checks by themselves, at an interval, in a thread or a process of their own.

A restart is made where the service was made, wherever the checks run: a server is a child of its owner, which
alone can wait for it, and alone has what it was made with. From another process the check asks the owner (see
:mod:`shmelim.service.restarts`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from shmelim.service import log_streams
from shmelim.service.monitor import tell
from shmelim.service.titles import checker_title
from shmelim.system import forks
from shmelim.system.processes import ProcessIdentity, set_title

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from types import TracebackType

    from shmelim.service.monitor import Notifier

_PATIENCE = 0.8  # seconds that a check under way has to end by itself
_LOOK_AGAIN = 0.5  # seconds
_FLUSH = 2.0  # seconds for alerts that are still to be sent when a checking process ends

_logger = logging.getLogger("shmelim.service")


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

    May be handed to a process of one's own as well: ``Process(target=daemon.run, daemon=True).start()``.

    Parameters
    ----------
    service
        The service, with health checks enabled. Its own interval holds, too: the longer one decides.
    interval_s
        Seconds between two checks; None: the service's own interval.
    slack_notifier
        Who is told when the checking itself fails. The service tells its own notifier what the checks find.
    start_method
        Start method for a process of its own; None: the default of :mod:`multiprocessing`.

    Raises
    ------
    TypeError
        `interval_s` is no number.
    ValueError
        It is not positive; or the service's health checks are not enabled, so that they would find nothing.

    """

    def __init__(
        self,
        service: Checked,
        interval_s: float | None = None,
        slack_notifier: Notifier | None = None,
        *,
        start_method: str | None = None,
    ) -> None:
        if interval_s is None:
            interval_s = getattr(service, "health_check_interval_s", 60.0)
        if not isinstance(interval_s, (int, float)):
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
        # Closing or writing to the second end wakes the first; written by start() and stop() of one process.
        self._waking, self._stopping = multiprocessing.Pipe(duplex=False)
        self._stopped = False
        self._runner: threading.Thread | BaseProcess | None = None
        forks.register(self)

    def start(self, kind: Literal["thread", "process"] = "thread") -> Self:
        """Begin to check.

        Parameters
        ----------
        kind
            ``"thread"``: in a thread of this process, which is all that most need, since a restart is made here
            anyway, and told from here. ``"process"``: in a process titled ``vali_<service>_HealthChecker``, which
            goes on checking when this process is too busy to run a thread.

        Returns
        -------
        HealthCheckDaemon
            This object.

        Raises
        ------
        RuntimeError
            It was started before.

        """
        if self._runner is not None or self._stopped:
            raise RuntimeError("a HealthCheckDaemon can be started once; make a new one")
        name = f"{self.service.service_name}-health"
        if kind == "thread":
            self._runner = threading.Thread(target=self._run, name=name, daemon=True)
        elif kind == "process":
            context = multiprocessing.get_context(self._start_method)
            process: BaseProcess = context.Process(target=self.run, name=name, daemon=True)  # type: ignore[attr-defined]
            self._runner = process
        else:
            raise ValueError(f"kind is 'thread' or 'process', not {kind!r}")
        with log_streams.at_rest() if kind == "process" else contextlib.nullcontext():
            self._runner.start()
        return self

    def run(self) -> None:
        """Check until stopped; what a checking process runs.

        Returns also when the service was shut down, and when the process that made this ends.
        """
        elsewhere = self._maker.pid != os.getpid()
        if elsewhere:
            set_title(checker_title(self.service.service_name))
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
        began_ms, began = time.time_ns() // 1_000_000, time.monotonic()
        due = began
        poller = select.poll()
        poller.register(self._waking, select.POLLIN)
        maker = None if self._maker.pid == os.getpid() else self._maker
        watched = None if maker is None else maker.open()
        try:
            if watched is not None:
                poller.register(watched, select.POLLIN)
            while self._pause(due, poller, None if watched is not None else maker):
                now = time.monotonic()
                # Whole milliseconds, rounded up: two checks are never less than the interval apart by these.
                self._check(began_ms + math.ceil((now - began) * 1000))
                if getattr(self.service, "has_ended", False) is True:  # a mock has all attributes
                    return
                due = now + self.interval_s
        finally:
            if watched is not None:
                os.close(watched)

    @staticmethod
    def _pause(due: float, poller: select.poll, maker: ProcessIdentity | None) -> bool:
        """Wait until a check is due; return False instead when it is time to end."""
        while True:
            left = due - time.monotonic()
            # Where the kernel does not report the maker's end, it is looked for now and then.
            if poller.poll(max(0.0, min(left, _LOOK_AGAIN) if maker is not None else left) * 1000):
                return False
            if maker is not None and not maker.is_running():
                return False
            if time.monotonic() >= due:
                return True

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
