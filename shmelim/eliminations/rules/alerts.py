"""What failed in the processing, as problems: logged when it happens, sent to Slack once, until it goes well."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from shmelim.notify.problems import ProblemMessages
from shmelim.system.logs import LimitedLog
from shmelim.system.problems import Problems

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import TracebackType

    from shmelim.eliminations.validator.collaborators import Collaborators

_log = logging.getLogger("shmelim.processing")


def is_failure(error: BaseException) -> bool:
    """Tell whether an error is a failure of what was tried, and not somebody's wish to end the process.

    A collaborator that runs coroutines can raise ``asyncio.CancelledError``, which is no ``Exception``.
    """
    return not isinstance(error, (KeyboardInterrupt, GeneratorExit, SystemExit))


class Alerts:
    """The problems of the processing: the kind of failure is their name, whom it concerns their subject.

    Thread-safe and fork-safe.
    """

    def __init__(self, collaborators: Collaborators) -> None:
        self.problems = Problems()
        self._messages = ProblemMessages(self.problems, lambda: collaborators.slack_notifier, ends=False)
        self._limited = LimitedLog(_log)

    def failed(self, kind: str, whom: str, text: str, error: BaseException | None = None) -> None:
        """Report a failure: to the log each time, to Slack the first time since it last went well."""
        text = _in_one_line(text)
        if self.problems.stands(kind, whom):
            self._limited(logging.ERROR, kind, "%s", text)
        else:
            # The whole trace once: the repetitions say the same.
            _log.error("%s", text, exc_info=error)
        self.problems.report(kind, text, subject=whom)

    def is_known(self, kind: str, whom: str) -> bool:
        """Tell whether that was reported, and has not gone well since."""
        return self.problems.stands(kind, whom)

    def succeeded(self, kind: str, whom: str) -> None:
        """Say that it went well, so that the next failure is told again."""
        self.problems.clear(kind, whom)

    def only(self, kind: str, failed: Collection[str]) -> None:
        """Say that of this kind nothing failed but for these."""
        self.problems.clear_others(kind, failed)

    def send_again(self) -> None:
        """Send what Slack did not take, and what still holds."""
        self._messages.send_again()

    def tell(self, text: str, level: str) -> None:
        """Send a message to Slack; what fails there is logged, since nothing may depend on it."""
        self._messages.send(_in_one_line(text), level)

    @contextlib.contextmanager
    def round(self, kind: str, *passing: type[Exception]) -> Iterator[Round]:
        """Go round the miners for one rule: whoever failed in an earlier round, and not in this one, is well.

        Parameters
        ----------
        kind
            What is done in this round.
        passing
            Errors that are no miner's, and end the round.

        """
        this = Round(self, kind, passing)
        yield this
        self.only(kind, this.failed)


class Round:
    """One pass over many miners.

    Attributes
    ----------
    failed : set of str
        Whose part failed.

    """

    def __init__(self, alerts: Alerts, kind: str, passing: tuple[type[Exception], ...]) -> None:
        self._alerts = alerts
        self._kind = kind
        self._passing = passing
        self.failed: set[str] = set()

    def guard(self, hotkey: str) -> _Guard:
        """Do one miner's part; what it raises is reported, and stops nobody else's."""
        return _Guard(self, hotkey)

    def report(self, hotkey: str, error: BaseException) -> bool:
        """Report what a miner's part raised; False if it is no miner's, and ends the round."""
        if isinstance(error, self._passing) or not is_failure(error):
            return False
        self.failed.add(hotkey)
        text = f"{self._kind}: failed for miner {hotkey}: {type(error).__name__}: {error}"
        self._alerts.failed(self._kind, hotkey, text, error)
        return True


class _Guard:
    """A miner's part of a round; a class, as there is one for each miner in each tick."""

    __slots__ = ("_hotkey", "_round")

    def __init__(self, this_round: Round, hotkey: str) -> None:
        self._round = this_round
        self._hotkey = hotkey

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> bool:
        return error is not None and self._round.report(self._hotkey, error)


def _in_one_line(text: str) -> str:
    """Return text with everything escaped that a terminal would obey: hotkeys and errors are strangers' words."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
