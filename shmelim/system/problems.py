"""Named problems: what is wrong now, since when, how bad it is, what to do about it, and who is told.

A part of the program *raises* a problem when something stops working and *clears* it when it works again. Between
the two it stands: the health lists it, log and Slack were told once. So who notices a fault keeps no books.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from typing import Final, Literal, NamedTuple, TypeAlias

from shmelim.system import forks
from shmelim.system.clock import now_ms
from shmelim.system.text import get_logger, printable

# Worth knowing; something does not work; the purpose is not served.
Severity: TypeAlias = Literal["notice", "degraded", "failing"]
Change: TypeAlias = Literal["raised", "worse", "cleared"]

SEVERITIES: Final[tuple[Severity, ...]] = ("notice", "degraded", "failing")
_MOST: Final = 10_000  # problems that stand at a time; beyond it the oldest is forgotten

_logger = get_logger("shmelim.problems")


def worst(severities: Iterable[Severity]) -> Literal["ok", "degraded", "failing"]:
    """Return how the whole is in which problems of these severities stand."""
    found = set(severities)
    return "failing" if "failing" in found else "degraded" if "degraded" in found else "ok"


class Problem(NamedTuple):
    """Something that is wrong."""

    name: str  # what kind of problem it is, such as "server_down"; a constant of this package
    subject: str  # whom or what it concerns, such as a hotkey; empty where there is only one
    text: str  # what is wrong, in one sentence for people; escaped, as the remedy
    severity: Severity
    remedy: str | None  # what to do about it, in one sentence; None where it mends itself
    since_ms: int  # when it began: ms since 1970, UTC

    def __str__(self) -> str:
        return self.text if self.remedy is None else f"{self.text}; {self.remedy}"


def subject_of(whom: object) -> str:
    """Return whom or what a problem concerns as text that can be sent, whatever it is."""
    text = whom if isinstance(whom, str) else repr(whom)
    return text.encode("utf-8", "backslashreplace").decode()


def over(problem: Problem) -> str:
    """Return the line that says that a problem has ended just now."""
    return f"over after {max(0, now_ms() - problem.since_ms) / 1000:.1f} s: {problem.text}"


Subscriber: TypeAlias = Callable[[Change, Problem], object]


class Problems:
    """The problems that stand, and who is told of each change.

    A subscriber is called by whoever raises or clears, without the lock; what it raises is logged. Thread-safe and
    signal-safe. A forked child has the problems that stood at the fork, of which its parent told.

    Examples
    --------
    >>> told = []
    >>> problems = Problems()
    >>> problems.subscribe(lambda change, problem: told.append((change, problem.name)))
    >>> problems.report("disk_full", "the last commit failed", severity="failing", remedy="make room")
    True
    >>> problems.status()
    'failing'
    >>> problems.clear("disk_full").text, told
    ('the last commit failed', [('raised', 'disk_full'), ('cleared', 'disk_full')])

    """

    def __init__(self) -> None:
        self._subscribers: tuple[Subscriber, ...] = ()  # replaced whole
        self._standing: dict[tuple[str, str], Problem] = {}  # in the order in which they began
        self.after_fork_in_child()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Re-make the lock, whose holder may not exist in the child."""
        # Guards changes of `_standing`. Re-entrant: a signal handler may raise a problem while its thread does.
        self._lock = threading.RLock()

    def subscribe(self, subscriber: Subscriber) -> None:
        """Have ``subscriber(change, problem)`` called for each problem raised, worse or cleared."""
        self._subscribers = (*self._subscribers, subscriber)

    def report(
        self,
        name: str,
        text: str,
        *,
        subject: str = "",
        severity: Severity = "degraded",
        remedy: str | None = None,
        since_ms: int | None = None,
    ) -> bool:
        """Raise a problem; return whether it did not stand before.

        One that stands keeps its beginning and takes the new text; subscribers hear of it again if it is worse.
        """
        subject = subject_of(subject)
        text, remedy = printable(text), None if remedy is None else printable(remedy)
        problem = Problem(name, subject, text, severity, remedy, now_ms() if since_ms is None else since_ms)
        key = name, subject
        with self._lock:
            before = self._standing.get(key)
            if before is not None:
                problem = problem._replace(since_ms=before.since_ms)
            elif len(self._standing) >= _MOST:
                del self._standing[next(iter(self._standing))]
            self._standing[key] = problem
        if before is None:
            self._notify("raised", problem)
        elif SEVERITIES.index(problem.severity) > SEVERITIES.index(before.severity):
            self._notify("worse", problem)
        return before is None

    def clear(self, name: str, subject: str = "") -> Problem | None:
        """Clear a problem; return it, or None if it did not stand."""
        if not self._standing:  # as mostly
            return None
        with self._lock:
            problem = self._standing.pop((name, subject_of(subject)), None)
        if problem is not None:
            self._notify("cleared", problem)
        return problem

    def clear_others(self, name: str, subjects: Collection[str]) -> None:
        """Clear the problems of that name, but for those of these subjects."""
        kept = set(map(subject_of, subjects))
        for problem in self.standing():
            if problem.name == name and problem.subject not in kept:
                self.clear(name, problem.subject)

    def stands(self, name: str, subject: str = "") -> bool:
        """Whether a problem was raised and not cleared."""
        return (name, subject_of(subject)) in self._standing

    def standing(self) -> list[Problem]:
        """Return the problems that stand, the oldest first."""
        with self._lock:
            return list(self._standing.values())

    def status(self) -> Literal["ok", "degraded", "failing"]:
        """Return how the whole is: as its worst problem; a notice does not count."""
        return worst(problem.severity for problem in self.standing())

    def _notify(self, change: Change, problem: Problem) -> None:
        for subscriber in self._subscribers:
            try:
                subscriber(change, problem)
            except Exception:
                _logger.exception("a subscriber failed; it should have heard: %s", problem.text)
