"""The state of a service's health: when to look, how to count, when to restart, and what to tell whom."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HealthMonitor", "HealthPolicy", "Notifier", "tell"]

_logger = logging.getLogger("shmelim.service")


class Notifier(Protocol):
    """Who is told of what people should know, such as a :class:`~shmelim.rpc.alerts.slack.SlackNotifier`."""

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


class _Message(NamedTuple):
    text: str
    level: str


class _Problem(NamedTuple):
    text: str
    error: Exception | None = None  # that the call raised


@dataclass
class _Streak:
    """Failures without a success between them."""

    since: float  # time.monotonic()
    failures: int = 0  # since the last restart
    checks: int = 0
    restarts: int = 0
    told_of_restart_failure: bool = False
    told_of_no_restart: bool = False


class HealthMonitor:
    """Checks a server at most so often, restarts it when it failed too often in a row, and tells of changes.

    Each streak of failures is told once: when it begins, when it leads to a restart (or cannot), when it ends.

    Thread-safe. A call that comes while another one checks returns what is known, and does not wait.

    Parameters
    ----------
    service_name
        For messages.
    probe
        Asks the server how it is.
    restart
        Restarts it, given the ``time.monotonic()`` at which the failed check began.
    notify
        Passes a text and its level on. Called without a lock, after any restart, so that it may be slow.

    """

    def __init__(
        self,
        service_name: str,
        probe: Callable[[], object],
        restart: Callable[[float], None],
        notify: Callable[[str, str], None],
    ) -> None:
        self._name = service_name
        self._probe = probe
        self._restart = restart
        self._notify = notify
        # Whoever holds the turn, which nobody waits for, reads and writes everything below; the others only read
        # `_healthy`, which is one reference.
        self._turn = threading.Lock()
        self._healthy = True
        self._last_ms: float | None = None
        self._streak: _Streak | None = None

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
        messages: list[_Message] = []
        try:
            if self._last_ms is not None and 0 <= now_ms - self._last_ms < policy.interval_ms:
                return self._healthy
            self._last_ms = now_ms
            return self._look(policy, messages)
        finally:
            self._turn.release()
            for message in messages:
                self._notify(*message)

    def _look(self, policy: HealthPolicy, messages: list[_Message]) -> bool:
        began = time.monotonic()
        problem = self._ask()
        if problem is None:
            self._end_streak(messages)
            return True
        self._healthy = False
        if self._streak is None:
            self._streak = _Streak(began)
            messages.append(_Message(f"{self._name}: health check failed: {problem.text}", "error"))
        streak = self._streak
        streak.failures += 1
        streak.checks += 1
        _logger.warning(
            "%s: health check failed (%d in a row, the limit is %d): %s",
            self._name,
            streak.failures,
            policy.max_failures,
            problem.text,
            exc_info=problem.error if streak.checks == 1 else None,  # those that follow are mostly the same
        )
        if streak.failures >= policy.max_failures:
            self._act(policy, streak, began, problem.text, messages)
        return False

    def is_well(self) -> bool:
        """Ask the server now, without consequences."""
        return self._ask() is None

    def _ask(self) -> _Problem | None:
        """Ask the server; return what is wrong."""
        try:
            answer = self._probe()
        except Exception as error:
            return _Problem(f"RPC error: {type(error).__name__}: {error}", error)
        if not isinstance(answer, Mapping):
            return _Problem(f"status error: the answer is {_short(answer)}, not a dict with a status")
        status = answer.get("status")
        return None if status == "ok" else _Problem(f"status error: the status is {_short(status)}, not 'ok'")

    def _act(
        self, policy: HealthPolicy, streak: _Streak, began: float, problem: str, messages: list[_Message]
    ) -> None:
        """Restart the server, if that is allowed."""
        if not policy.restarts:
            if not streak.told_of_no_restart:
                streak.told_of_no_restart = True
                text = f"{_checks(streak.failures)} in a row, no automatic restart: {problem}"
                messages.append(_Message(f"{self._name}: {text}", "error"))
            return
        try:
            self._restart(began)
        except Exception as error:
            _logger.exception("%s: restart failed, the next check tries again", self._name)
            if not streak.told_of_restart_failure:
                streak.told_of_restart_failure = True
                text = f"restart failed, will be tried again: {type(error).__name__}: {error}"
                messages.append(_Message(f"{self._name}: {text}", "error"))
            return
        failures, streak.failures = streak.failures, 0
        streak.restarts += 1
        messages.append(_Message(f"{self._name}: server restarted after {_checks(failures)}", "warning"))
        if self.is_well():
            self._end_streak(messages)

    def _end_streak(self, messages: list[_Message]) -> None:
        self._healthy = True
        streak, self._streak = self._streak, None
        if streak is None:
            return
        seconds = time.monotonic() - streak.since
        restarts = "1 restart" if streak.restarts == 1 else f"{streak.restarts} restarts"
        text = f"recovered after {seconds:.1f} s, {_checks(streak.checks)} and {restarts}"
        _logger.info("%s: %s", self._name, text)
        messages.append(_Message(f"{self._name}: {text}", "success"))


def tell(notifier: Notifier | None, text: str, level: str) -> None:
    """Pass a message to a notifier, if there is one; whatever that raises is logged."""
    if notifier is None:
        return
    try:
        notifier.send_message(text, level=level)
    except Exception:
        _logger.exception("the notifier failed; it should have said: %s", text)


def _checks(number: int) -> str:
    return "1 failed health check" if number == 1 else f"{number} failed health checks"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"  # noqa: PLR2004
