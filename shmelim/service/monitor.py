"""The state of a service's health: when to look, how to count, when to restart, and what to report."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from shmelim.errors import ShmelimError, UnknownMethodError
from shmelim.service.outages import Finding

if TYPE_CHECKING:
    from collections.abc import Callable

_logger = logging.getLogger("shmelim.service")


class Notifier(Protocol):
    """Who is told of what people should know, such as a :class:`~shmelim.notify.slack.SlackNotifier`."""

    def send_message(self, text: str, level: str = "info") -> object:
        """Pass a message on; `level` is info, success, warning or error."""


class HealthPolicy(NamedTuple):
    """When to check and when to restart; may differ from check to check.

    Attributes
    ----------
    interval_ms : float
        Milliseconds between two checks.
    max_failures : int
        Failures in a row that lead to a restart.
    restarts : bool
        Whether they do.

    """

    interval_ms: float
    max_failures: int
    restarts: bool


class _Problem(NamedTuple):
    text: str
    error: Exception | None = None  # that the call raised


@dataclass
class _Streak:
    """Failures without a success between them."""

    failures: int = 0  # since the last restart
    checks: int = 0


class HealthMonitor:
    """Checks a server at most so often, restarts it when it failed too often in a row, and reports what it finds.

    A server that has no ``health_check_rpc`` cannot be checked, and so is never found to fail.

    Thread-safe. A call that comes while another one checks returns what is known, and does not wait.

    Parameters
    ----------
    service_name
        For messages.
    probe
        Asks the server how it is.
    restart
        Restarts it, given the ``time.monotonic()`` at which the failed check began.
    report
        Gets each finding. Called without a lock, after any restart, so that it may be slow.
    has_ended
        Whether the service was ended on purpose: what fails then is no failure.

    """

    def __init__(
        self,
        service_name: str,
        probe: Callable[[], object],
        restart: Callable[[float], None],
        report: Callable[[Finding], object],
        has_ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self._name = service_name
        self._probe = probe
        self._restart = restart
        self._report = report
        self._has_ended = has_ended
        # Whoever holds the turn, which nobody waits for, reads and writes everything below; the others only read
        # `_healthy`, which is one reference.
        self._turn = threading.Lock()
        self._healthy = True
        self._last_ms: float | None = None
        self._streak: _Streak | None = None
        self._unchecked = False

    @property
    def consecutive_failures(self) -> int:
        """Failed checks since the last good one or the last restart."""
        streak = self._streak
        return 0 if streak is None else streak.failures

    def check(self, now_ms: float, policy: HealthPolicy) -> bool:
        """Check if it is time to.

        Parameters
        ----------
        now_ms
            The time in milliseconds. When it has gone backwards, it is time.
        policy
            What holds for this check.

        Returns
        -------
        bool
            Whether the check found the server healthy. False also if it was restarted since. What is known
            already, if it is not time yet or another thread is at it.

        """
        if not self._turn.acquire(blocking=False):
            return self._healthy
        findings: list[Finding] = []
        try:
            if self._last_ms is not None and 0 <= now_ms - self._last_ms < policy.interval_ms:
                return self._healthy
            self._last_ms = now_ms
            return self._look(policy, findings)
        finally:
            self._turn.release()
            for finding in findings:
                self._report(finding)

    def _look(self, policy: HealthPolicy, findings: list[Finding]) -> bool:
        began = time.monotonic()
        try:
            problem = self._ask()
        except UnknownMethodError as error:
            self._cannot_be_checked(began, error, findings)
            return True
        if problem is None:
            self._end_streak(began, findings)
            return True
        if self._has_ended():
            self._healthy = False
            return False
        self._healthy = False
        if self._streak is None:
            self._streak = _Streak()
        streak = self._streak
        streak.failures += 1
        streak.checks += 1
        findings.append(Finding("failed", began, time.monotonic(), streak.failures, problem.text))
        # The first of a streak only: those that follow are mostly the same. And an error of ours says it all.
        traced = streak.checks == 1 and not isinstance(problem.error, ShmelimError)
        _logger.warning(
            "%s: health check failed (%d in a row, the limit is %d): %s",
            self._name,
            streak.failures,
            policy.max_failures,
            problem.text,
            exc_info=problem.error if traced else None,
        )
        if streak.failures >= policy.max_failures:
            self._act(policy, streak, began, problem.text, findings)
        return False

    def _cannot_be_checked(self, began: float, error: UnknownMethodError, findings: list[Finding]) -> None:
        """Say so, once."""
        self._end_streak(began, findings)
        if not self._unchecked:
            self._unchecked = True
            _logger.warning("%s: health cannot be checked, and counts as good: %s", self._name, error)
            findings.append(Finding("unchecked", began, time.monotonic(), 0, str(error)))

    def is_well(self) -> bool:
        """Ask the server now, without consequences."""
        try:
            return self._ask() is None
        except UnknownMethodError:  # it answers
            return True

    def _ask(self) -> _Problem | None:
        """Ask the server; return what is wrong."""
        try:
            answer = self._probe()
        except UnknownMethodError:
            raise
        except Exception as error:
            return _Problem(f"RPC error: {type(error).__name__}: {error}", error)
        if not isinstance(answer, Mapping):
            return _Problem(f"status error: the answer is {_short(answer)}, not a dict with a status")
        status = answer.get("status")
        if status in ("ok", "degraded"):  # the latter is named in the answer, and no restart would mend it
            return None
        return _Problem(f"status error: the status is {_short(status)}, not 'ok'")

    def _act(
        self, policy: HealthPolicy, streak: _Streak, began: float, problem: str, findings: list[Finding]
    ) -> None:
        """Restart the server, if that is allowed."""
        if not policy.restarts:
            findings.append(Finding("not restarted", began, time.monotonic(), streak.failures, problem))
            return
        try:
            self._restart(began)
        except Exception as error:
            if self._has_ended():
                return
            trace = None if isinstance(error, ShmelimError) else error
            _logger.error(  # noqa: TRY400
                "%s: restart failed, the next check tries again: %s", self._name, error, exc_info=trace
            )
            text = f"{type(error).__name__}: {error}"
            findings.append(Finding("restart failed", began, time.monotonic(), streak.failures, text))
            return
        failures, streak.failures = streak.failures, 0
        findings.append(Finding("restarted", began, time.monotonic(), failures))
        if self.is_well():
            self._end_streak(began, findings)

    def _end_streak(self, began: float, findings: list[Finding]) -> None:
        self._healthy = True
        streak, self._streak = self._streak, None
        if streak is not None:
            _logger.info("%s: healthy again after %d failed checks", self._name, streak.checks)
            findings.append(Finding("recovered", began, time.monotonic(), streak.checks))


def tell(notifier: Notifier | None, text: str, level: str) -> None:
    """Pass a message to a notifier, if there is one; whatever that raises is logged."""
    if notifier is None:
        return
    try:
        notifier.send_message(text, level=level)
    except Exception:
        _logger.exception("the notifier failed; it should have said: %s", text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"  # noqa: PLR2004
