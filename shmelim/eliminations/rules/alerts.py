"""What failed, told once: each failure is logged when it happens, and sent to Slack until that has it."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from types import TracebackType

    from shmelim.eliminations.validator.collaborators import Collaborators

_MOST: Final = 10_000  # failures that are remembered

_log = logging.getLogger("shmelim.processing")


def is_failure(error: BaseException) -> bool:
    """Tell whether an error is a failure of what was tried, and not somebody's wish to end the process.

    A collaborator that runs coroutines can raise ``asyncio.CancelledError``, which is no ``Exception``.
    """
    return not isinstance(error, (KeyboardInterrupt, GeneratorExit, SystemExit))


class Alerts:
    """Remembers which failures were told, by their kind and by whom they concern. Thread-safe.

    Parameters
    ----------
    collaborators
        Whose ``slack_notifier`` is told.

    """

    def __init__(self, collaborators: Collaborators) -> None:
        self._collaborators = collaborators
        # Each step on them is one operation of the dict: no lock that a forked child could inherit held.
        self._told: dict[tuple[str, str], object] = {}
        self._unsent: dict[tuple[str, str], str] = {}

    def failed(self, kind: str, whom: str, text: str, error: BaseException | None = None) -> None:
        """Report a failure: to the log each time, to Slack the first time since it last went well."""
        mine = object()
        first = self._told.setdefault((kind, whom), mine) is mine
        if len(self._told) > _MOST:
            self._forget(next(iter(list(self._told))))
        text = _in_one_line(text)
        # The whole trace once: the repetitions say the same.
        _log.error("%s", text, exc_info=error if first else None)
        if first and not self.tell(text, "error"):
            self._unsent[kind, whom] = text

    def is_known(self, kind: str, whom: str) -> bool:
        """Tell whether that was reported, and has not gone well since."""
        return (kind, whom) in self._told

    def succeeded(self, kind: str, whom: str) -> None:
        """Say that it went well, so that the next failure is told again."""
        self._forget((kind, whom))

    def send_again(self) -> None:
        """Send what Slack did not take, and what still holds."""
        for told in list(self._unsent):
            text = self._unsent.pop(told, None)
            if text is not None and not self.tell(text, "error"):
                self._unsent[told] = text
                return  # the others would wait as long, and for nothing

    def only(self, kind: str, failed: Collection[str]) -> None:
        """Say that of this kind nothing failed but for these."""
        for told in list(self._told):
            if told[0] == kind and told[1] not in failed:
                self._forget(told)

    def tell(self, text: str, level: str) -> bool:
        """Send a message to Slack; what fails there is logged, since nothing may depend on it.

        Returns
        -------
        bool
            False if it raised, or answered False.

        """
        try:
            notifier = self._collaborators.slack_notifier
            return notifier is None or notifier.send_message(_in_one_line(text), level=level) is not False
        except BaseException as error:
            if not is_failure(error):
                raise
            _log.exception("a message to Slack could not be sent: %s", _in_one_line(text))
            return False

    def _forget(self, told: tuple[str, str]) -> None:
        self._told.pop(told, None)
        self._unsent.pop(told, None)

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
