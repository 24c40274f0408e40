"""What people are told of a service's outages: one round of alerts for each, however many processes notice it."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

Kind: TypeAlias = Literal["failed", "not restarted", "restart failed", "restarted", "recovered", "unchecked"]

KINDS: Final[tuple[Kind, ...]] = (
    "failed",
    "not restarted",
    "restart failed",
    "restarted",
    "recovered",
    "unchecked",
)


class Finding(NamedTuple):
    """What one process found out about a service.

    Attributes
    ----------
    kind : str
        One of :data:`KINDS`.
    since : float
        The ``time.monotonic()``, which all processes share, at which its check began.
    until : float
        That at which this was found.
    failures : int
        Failed checks in a row.
    detail : str
        What is wrong.

    """

    kind: Kind
    since: float
    until: float
    failures: int = 0
    detail: str = ""


@dataclass
class _Outage:
    number: int
    since: float
    told: set[Kind]
    failures: int = 0
    restarts: int = 0


# Counts the outages of each service that this process tells of, over all objects of a name: a notifier that holds
# repetitions back must be able to tell those of one object from those of the next. There is no lock, which a fork
# could leave locked: each step is one.
_numbers: dict[str, itertools.count[int]] = {}


class Outages:
    """Makes of the findings of many processes what one would have told.

    An outage begins with the first failed check, and ends with the first good one after it. In between it is told
    once each that it began, that a restart failed, and that none will be made; each restart is told once.
    Messages of an outage carry its number, so that no two outages look like a repetition.

    Thread-safe, and usable from a signal handler.

    Parameters
    ----------
    service_name
        For messages.
    notify
        Passes a text and its level on. Called without a lock.

    """

    def __init__(self, service_name: str, notify: Callable[[str, str], None]) -> None:
        self._name = service_name
        self._notify = notify
        self._lock = threading.RLock()  # guards everything below
        self._outage: _Outage | None = None
        self._ended_at = float("-inf")
        self._restart_told = float("-inf")  # when the restart was made that was told last
        self._told_unchecked = False

    def report(self, finding: Finding, restarted_at: float | None = None) -> None:
        """Tell of a finding, if it is news.

        Parameters
        ----------
        finding
            What was found.
        restarted_at
            The ``time.monotonic()`` of the last restart, if that is known. By it a restart is known again of which
            another process was faster to tell; and one of which nobody has told yet is told before the recovery.

        """
        with self._lock:
            messages = self._messages(finding, restarted_at)
        for text, level in messages:
            self._notify(f"{self._name}: {text}", level)

    def _messages(self, finding: Finding, restarted_at: float | None) -> list[tuple[str, str]]:
        match finding.kind:
            case "failed":
                message = self._failed(finding)
            case "restarted":
                message = self._restarted(finding.failures, restarted_at)
            case "recovered":
                return self._recovered(finding, restarted_at)
            case "unchecked":
                message = self._unchecked(finding)
            case "not restarted" | "restart failed":
                message = self._not_restarted(finding)
        return [] if message is None else [message]

    def _unchecked(self, finding: Finding) -> tuple[str, str] | None:
        if self._told_unchecked:
            return None
        self._told_unchecked = True
        return f"health cannot be checked: {finding.detail}", "warning"

    def _not_restarted(self, finding: Finding) -> tuple[str, str] | None:
        outage = self._outage
        if outage is None or finding.kind in outage.told:
            return None
        outage.told.add(finding.kind)
        if finding.kind == "not restarted":
            text = f"{_checks(finding.failures)} in a row, no automatic restart: {finding.detail}"
        else:
            text = f"restart failed, will be tried again: {finding.detail}"
        return f"outage {outage.number}: {text}", "error"

    def _failed(self, finding: Finding) -> tuple[str, str] | None:
        outage = self._outage
        if outage is not None:
            outage.failures += 1
            return None
        if finding.since <= self._ended_at:  # by a process that learns of it late
            return None
        number = next(_numbers.setdefault(self._name, itertools.count(1)))
        self._outage = _Outage(number, finding.since, set(), failures=1)
        return f"outage {number}: health check failed: {finding.detail}", "error"

    def _restarted(self, failures: int, restarted_at: float | None) -> tuple[str, str] | None:
        if restarted_at is not None:
            if restarted_at == self._restart_told:
                return None
            self._restart_told = restarted_at
        where = ""
        if self._outage is not None:
            self._outage.restarts += 1
            where = f"outage {self._outage.number}: "
        return f"{where}server restarted after {_checks(failures)}", "warning"

    def _recovered(self, finding: Finding, restarted_at: float | None) -> list[tuple[str, str]]:
        outage = self._outage
        if outage is None or finding.until <= outage.since:  # the latter: of the outage before
            return []
        messages = []
        if restarted_at is not None and restarted_at > outage.since:
            message = self._restarted(outage.failures, restarted_at)
            if message is not None:
                messages.append(message)
        self._outage = None
        self._ended_at = finding.until
        restarts = "1 restart" if outage.restarts == 1 else f"{outage.restarts} restarts"
        seconds = max(0.0, finding.until - outage.since)
        text = f"recovered after {seconds:.1f} s, {_checks(outage.failures)} and {restarts}"
        return [*messages, (f"outage {outage.number}: {text}", "success")]


def _checks(number: int) -> str:
    return "1 failed health check" if number == 1 else f"{number} failed health checks"
