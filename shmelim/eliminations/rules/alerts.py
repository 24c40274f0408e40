"""What fails in the processing, as problems: logged when it happens, sent to Slack once, until it goes well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from shmelim.eliminations.calls import ServerAwayError
from shmelim.eliminations.rules.deadlines import LeftBehindError, StuckError
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.errors import ShmelimError
from shmelim.notify.problems import ProblemMessages
from shmelim.system.logs import LimitedLog
from shmelim.system.problems import Problems
from shmelim.system.text import get_logger

_PATIENCE: Final = 10.0  # seconds for a message
_LONGEST: Final = 2000  # characters of a text, of which the server keeps fewer

_log = get_logger("shmelim.processing")
_limited = LimitedLog(_log)

WISHES: Final = (KeyboardInterrupt, GeneratorExit, SystemExit)
"""Wishes to end the process. Anything else is a failure, such as ``asyncio.CancelledError``: not an Exception."""


_REMEDIES: Final = {
    "limit_orders": "each tick tries again; `shmelim debts` shows what is owed",
    "positions": "each tick tries again; `shmelim debts` shows what is owed",
    "no contract manager": "assign a contract_manager",
    "slash not made": "it is tried again, with growing pauses; `shmelim debts` shows it",
    "slash not recorded": "each tick tries again; do not end this process before, as it alone knows the answer",
    "slash under way": "wait for the contract's answer; if it is known to hang, restart the validator",
    "websockets": "see to who reads the queue",
    "not a hotkey": "take the elimination away (`shmelim remove`), or have the environment's is_hotkey know it",
    "metagraph": "see to what fills the metagraph",
    "departures": "if they are really gone: shmelim missing --accept",
    "clock": "if the time is wrong now, set it right before the next tick",
    "shutdown": "see to the process that has the shutdown_dict; SIGTERM ends the processing all the same",
    "loop": "look at the error; see whether the server, or the sync that it names, is alive",
}
_REMEDY: Final = "the next tick tries again; if it lasts, look at what the error names"


class OvertakenError(ShmelimError):
    """A sync replaced what this tick began with: nothing more of it may be written."""


ENDS_A_TICK: Final = (OvertakenError, LeftBehindError, ServerAwayError, *WISHES)
"""Errors that are not one miner's."""


class Alerts(Problems):
    """The problems of the processing: the kind of failure is their name, whom it concerns their subject."""

    def __init__(self, collaborators: Collaborators, ask: Callable[..., Any]) -> None:
        super().__init__()
        self._collaborators = collaborators
        self._ask = ask
        self.messages = ProblemMessages(self, lambda: self, ends=False)

    def send_message(self, text: str, level: str = "info") -> object:
        """Pass a message to Slack, or whoever stands for it; False if that does not come back in time."""
        notifier = self._collaborators.slack_notifier
        if notifier is None:
            return None
        try:
            return self._ask("slack", lambda: notifier.send_message(text, level=level), seconds=_PATIENCE)
        except StuckError as error:
            _limited(logging.WARNING, "slack", "Slack is told later: %s", error)
            return False

    def undelivered(self) -> object:
        """Return what Slack has taken and not delivered, if it can say that."""
        asked = getattr(self._collaborators.slack_notifier, "undelivered", None)
        return asked() if callable(asked) else None

    def failed(
        self, kind: str, whom: str, text: str, error: BaseException | None = None, remedy: str | None = None
    ) -> None:
        """Report a failure: to the log each time, to Slack the first time since it last went well."""
        text = text if error is None else f"{text}: {named(error)}"
        remedy = remedy or _REMEDIES.get(kind, _REMEDY)
        if self.stands(kind, whom):
            _limited(logging.ERROR, kind, "%s; %s", text, remedy)
        else:
            # The whole trace once: the repetitions say the same.
            _log.error("%s; %s", text, remedy, exc_info=error)
        self.report(kind, text, subject=whom, remedy=remedy)

    @contextmanager
    def about(self, kind: str, whom: str, text: str) -> Iterator[None]:
        """Report what the block raises, unless that ends the tick, and go on behind it; else clear it."""
        try:
            yield
        except ENDS_A_TICK:
            raise
        except BaseException as error:
            self.failed(kind, whom, text, error)
        else:
            self.clear(kind, whom)

    def each(
        self,
        kind: str,
        miners: Iterable[tuple[str, Any]],
        part: Callable[[str, Any], object],
        stopping: Callable[[], bool] = lambda: False,
    ) -> set[str] | None:
        """Call ``part(hotkey, what)`` for each of the miners; a failure is reported, and stops nobody else's part.

        Who failed in an earlier round, and not in this one, is well. Returns whose part failed; None if the
        validator is stopping.
        """
        failed: set[str] = set()
        shown: set[str] = set()
        for hotkey, what in miners:
            if stopping():
                return None
            try:
                part(hotkey, what)
            except ENDS_A_TICK:
                raise
            except BaseException as error:
                failed.add(hotkey)
                shown.add(whom := spelled(hotkey, str))  # a stranger's key may be no text
                self.failed(kind, whom, f"{kind}: failed for miner {whom}", error)
        self.clear_others(kind, shown)
        return failed


def named(error: BaseException) -> str:
    """Return an error as a message tells it and the server takes it, also one that cannot say what it is."""
    try:
        return sendable(f"{type(error).__name__}: {error}")
    except Exception:
        return type(error).__name__


def sendable(text: str) -> str:
    """Return a stranger's text as it can be sent: not too long, and what has no UTF-8 escaped."""
    return text[:_LONGEST].encode("utf-8", "backslashreplace").decode()


def spelled(value: object, spell: Callable[[object], str] = repr) -> str:
    """Return a stranger's value as text; of one that raises when it is looked at, its type's name."""
    try:
        return spell(value)
    except Exception:
        return type(value).__name__
