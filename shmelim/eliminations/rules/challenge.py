"""Eliminating the miners who failed the challenge period."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from shmelim.eliminations.record import generate_row, normalise
from shmelim.eliminations.rules.iteration import NOT_A_MINERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shmelim.eliminations.rules.alerts import Alerts
    from shmelim.eliminations.rules.iteration import Iteration
    from shmelim.eliminations.validator.collaborators import Collaborators
    from shmelim.eliminations.validator.environment import ValidatorEnvironment


class ChallengePeriod:
    """Eliminates those who failed, and has their reasons forgotten once they are recorded.

    Parameters
    ----------
    collaborators, environment, alerts
        As of the processor.
    eliminate
        Records an elimination and settles what it owes; the first reason stays.

    """

    def __init__(
        self,
        collaborators: Collaborators,
        environment: ValidatorEnvironment,
        alerts: Alerts,
        eliminate: Callable[[Mapping[str, Any], Iteration], None],
    ) -> None:
        self._collaborators = collaborators
        self._environment = environment
        self._alerts = alerts
        self._eliminate = eliminate
        # The reasons that a pass could not record: they alone make no tick due.
        self._left_over: dict[str, str] = {}

    def apply(self, iteration: Iteration, stopping: Callable[[], bool]) -> None:
        """Eliminate the miners who wait for it."""
        challenge = self._collaborators.challengeperiod_manager
        if challenge is None or not challenge.has_elimination_reasons():
            return
        waiting = dict(challenge.get_all_elimination_reasons())
        recorded: list[str] = []
        with self._alerts.round("challenge-period elimination", *NOT_A_MINERS) as this_round:
            for hotkey, reason in waiting.items():
                if stopping():
                    return
                with this_round.guard(hotkey):
                    row = generate_row(hotkey, reason[1], reason[0], self._environment.now_ms())
                    self._eliminate(normalise(row), iteration)
                    recorded.append(hotkey)
        self._left_over = _in_words(waiting) if this_round.failed else {}
        # Not asked as an attribute: a mock has every one.
        if inspect.getattr_static(challenge, "pop_elimination_reasons", None) is not None:
            challenge.pop_elimination_reasons(recorded)
        # Those that came meanwhile are nowhere recorded yet.
        elif not this_round.failed and _reasons(challenge.get_all_elimination_reasons()) == _reasons(waiting):
            challenge.clear_elimination_reasons()

    def is_waiting(self) -> bool:
        """Tell whether miners wait to be eliminated, others than those with whom that failed."""
        challenge = self._collaborators.challengeperiod_manager
        try:
            if challenge is None or not challenge.has_elimination_reasons():
                waiting = False
            else:
                left_over = self._left_over
                waiting = not left_over or _in_words(challenge.get_all_elimination_reasons()) != left_over
        except Exception as error:
            text = f"eliminations: whether reasons wait cannot be asked: {type(error).__name__}: {error}"
            self._alerts.failed("step", "reasons", text, error)
            return False
        self._alerts.succeeded("step", "reasons")
        return waiting


def _reasons(waiting: Mapping[str, Any]) -> dict[str, str]:
    """Return who waits to be eliminated and why, as text: what else is said of them need not even equal itself."""
    return {hotkey: str(reason[0]) for hotkey, reason in waiting.items()}


def _in_words(waiting: Mapping[str, Any]) -> dict[str, str]:
    """Return all that is said of those who wait, as text."""
    return {hotkey: str(reason) for hotkey, reason in waiting.items()}
