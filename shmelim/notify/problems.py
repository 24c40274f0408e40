"""Telling Slack, or any other notifier, of problems: once each, and again what it did not take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol, runtime_checkable

from shmelim.system.logs import LimitedLog
from shmelim.system.problems import Change, Problem, Problems, over

_MOST: Final = 10_000  # messages that wait to be sent again; beyond it the oldest is forgotten

_limited = LimitedLog(logging.getLogger("shmelim.notify"))


@runtime_checkable
class Notifier(Protocol):
    """Who is told of what people should know, such as a :class:`~shmelim.notify.slack.SlackNotifier`."""

    def send_message(self, text: str, level: str = "info") -> object:
        """Pass a message on; `level` is info, success, warning or error. False: it was not taken."""


class _Unsent(NamedTuple):
    text: str
    level: str
    is_known: bool  # an earlier message of the problem was taken


class ProblemMessages:
    """Sends a message when a problem is raised or gets worse, and unless `ends` is false another when it ends.

    What the notifier (asked for each time) refuses, by False or an error, is kept for :meth:`send_again` as long
    as it holds; of a problem that ends before anybody heard of it, nothing is sent.

    Thread-safe and fork-safe without a lock: each step is one operation of a dict.
    """

    def __init__(self, problems: Problems, notifier: Callable[[], Notifier | None], *, ends: bool = True) -> None:
        self._problems = problems
        self._notifier = notifier
        self._ends = ends
        self._unsent: dict[tuple[str, str], _Unsent] = {}
        problems.subscribe(self._on_change)

    def send(self, text: str, level: str) -> bool:
        """Send a message; False: it was not taken. What the notifier raises is logged."""
        try:
            notifier = self._notifier()
            return notifier is None or notifier.send_message(text, level=level) is not False
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a notifier that runs coroutines can raise CancelledError
            _limited(logging.ERROR, "notifier", "a message could not be sent: %s", text, exc_info=error)
            return False

    def send_again(self) -> None:
        """Send what was not taken, up to the first message that is refused again."""
        for key in list(self._unsent):
            unsent = self._unsent.pop(key, None)
            if unsent is None or (unsent.level != "success" and not self._problems.stands(*key)):
                continue
            if not self.send(unsent.text, unsent.level):
                self._unsent[key] = unsent
                return  # the others would wait as long, and for nothing

    def _on_change(self, change: Change, problem: Problem) -> None:
        key = problem.name, problem.subject
        earlier = self._unsent.pop(key, None)
        is_known = change != "raised" if earlier is None else earlier.is_known
        if change != "cleared":
            text, level = str(problem), "warning" if problem.severity == "notice" else "error"
        elif is_known and self._ends:
            text, level = over(problem), "success"
        else:
            return
        if not self.send(text, level):
            self._unsent[key] = _Unsent(text, level, is_known)
            if len(self._unsent) > _MOST:
                self._unsent.pop(next(iter(list(self._unsent))), None)


def take_over(problems: Problems, reported: object) -> None:
    """Let those problems stand that a server's health check lists, so that subscribers hear of changes.

    `problems` should be that server's alone: what is not listed is over. What is not a problem is passed over.
    """
    rows = [row for row in reported if isinstance(row, Mapping)] if isinstance(reported, list) else []
    listed = {(row["name"], row["subject"]): row for row in rows if row.keys() == set(Problem._fields)}
    for old in problems.standing():
        if (old.name, old.subject) not in listed:
            problems.clear(old.name, old.subject)
    for each in listed.values():
        problems.report(**each)
