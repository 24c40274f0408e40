"""Telling Slack, or any other notifier, of problems: once each, and again what it did not take."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol, runtime_checkable

import msgspec

from shmelim.system.clock import now_ms
from shmelim.system.coroutines import carried_out
from shmelim.system.logs import LimitedLog
from shmelim.system.problems import Change, Problem, Problems, over
from shmelim.system.text import get_logger, printable

_MOST: Final = 10_000  # messages that wait to be sent again; beyond it the oldest is forgotten

UNDELIVERED: Final = "alerts_undelivered"
"""Name of the problem that people cannot be told of what is wrong."""

_limited = LimitedLog(get_logger("shmelim.notify"))


@runtime_checkable
class Notifier(Protocol):
    """Who is told of what people should know, such as a :class:`~shmelim.notify.slack.SlackNotifier`."""

    def send_message(self, text: str, level: str = "info") -> object:
        """Pass a message on; `level` is info, success, warning or error. False: it was not taken."""


def checked_notifier(given: Notifier | None) -> Notifier | None:
    """Return a notifier, or None; ``TypeError`` if it is a text, as the URL of a webhook, which would tell nobody.

    It is not asked for anything, which may be costly.
    """
    if isinstance(given, str):
        raise TypeError("slack_notifier must be an object with send_message(), as SlackNotifier(url), not a text")
    return given


class Undelivered(NamedTuple):
    """Messages that a notifier has taken and cannot deliver."""

    messages: int
    since_ms: int  # since 1970, UTC
    why: str


class _Unsent(NamedTuple):
    text: str
    level: str
    is_known: bool  # an earlier message of the problem was taken
    since_ms: int


class ProblemMessages:
    """Sends a message when a problem is raised or gets worse, and unless `ends` is false another when it ends.

    What the notifier (asked for each time) refuses, by False or an error, is kept for :meth:`send_again` as long
    as it holds, and what comes after it waits behind it; of a problem that ends before anybody heard of it,
    nothing is sent. A notifier may have ``undelivered()``, which says what it has taken and not delivered yet.

    Thread-safe and fork-safe without a lock: each step is one operation of a dict.
    """

    def __init__(self, problems: Problems, notifier: Callable[[], Notifier | None], *, ends: bool = True) -> None:
        self._problems = problems
        self._notifier = notifier
        self._ends = ends
        self._unsent: dict[tuple[str, str], _Unsent] = {}  # the oldest first
        self._numbers = itertools.count()
        problems.subscribe(self._on_change)

    def send(self, text: str, level: str, about: tuple[str, str] | None = None, *, is_known: bool = True) -> None:
        """Send a message about a problem or none, once those before it are sent; else keep it behind them."""
        if self._unsent:
            self.send_again()
        if not self._unsent and self._send(text, level):
            return
        key = about or ("", str(next(self._numbers)))
        self._unsent[key] = _Unsent(text, level, is_known, now_ms())
        if len(self._unsent) > _MOST:
            self._unsent.pop(next(iter(list(self._unsent))), None)

    def _send(self, text: str, level: str) -> bool:
        """Pass a message on; False: it was not taken. What the notifier raises is logged."""
        try:
            notifier = self._notifier()
            if notifier is None:
                return True
            return carried_out(notifier.send_message(printable(text), level=level), "send_message") is not False
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a notifier that runs coroutines can raise CancelledError
            _limited(logging.ERROR, "notifier", "a message could not be sent: %s", text, exc_info=error)
            return False

    def send_again(self) -> None:
        """Send what was not taken, up to the first message that is refused again."""
        for key in list(self._unsent):
            unsent = self._unsent.get(key)
            if unsent is None:
                continue
            holds = not key[0] or unsent.level == "success" or self._problems.stands(*key)
            if holds and not self._send(unsent.text, unsent.level):
                return  # the others would wait as long, and for nothing
            self._unsent.pop(key, None)

    def report_undelivered(self, problems: Problems) -> None:
        """Raise or clear the problem that the notifier has not taken messages, or has not delivered them."""
        found: object = None
        if unsent := next(iter(list(self._unsent.values())), None):
            found = Undelivered(len(self._unsent), unsent.since_ms, "the notifier refuses them")
        else:
            with contextlib.suppress(Exception):  # a notifier of somebody's own may say anything, or fail
                asked = getattr(self._notifier(), "undelivered", None)
                found = asked() if callable(asked) else None
        if not isinstance(found, Undelivered):
            problems.clear(UNDELIVERED)
            return
        count = "1 alert waits" if found.messages == 1 else f"{found.messages} alerts wait"
        problems.report(
            UNDELIVERED,
            f"{count} to be delivered: {found.why}",
            remedy="see whether Slack can be reached from here and the webhook is valid; "
            "they are sent once it can be",
            since_ms=found.since_ms,
        )

    def _on_change(self, change: Change, problem: Problem) -> None:
        if problem.name == UNDELIVERED:
            return  # nobody would hear of it
        key = problem.name, problem.subject
        earlier = self._unsent.pop(key, None)
        is_known = change != "raised" if earlier is None else earlier.is_known
        if change != "cleared":
            text, level = str(problem), "warning" if problem.severity == "notice" else "error"
        elif is_known and self._ends:
            text, level = over(problem), "success"
        else:
            return
        self.send(text, level, key, is_known=is_known)


def take_over(problems: Problems, reported: object) -> None:
    """Let those problems stand that a server's health check lists, so that subscribers hear of changes.

    `problems` should be that server's alone: what is not listed is over. What is not a problem is passed over.
    """
    listed: dict[tuple[str, str], Problem] = {}
    for row in reported if isinstance(reported, list) else []:
        if isinstance(row, Mapping) and row.keys() == set(Problem._fields):
            with contextlib.suppress(msgspec.ValidationError):
                each = msgspec.convert([row[name] for name in Problem._fields], Problem)
                listed[each.name, each.subject] = each
    for old in problems.standing():
        if (old.name, old.subject) not in listed:
            problems.clear(old.name, old.subject)
    for each in listed.values():
        problems.report(**each._asdict())
