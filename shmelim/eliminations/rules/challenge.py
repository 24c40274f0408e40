"""Eliminating the miners who failed the challenge period."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shmelim.eliminations.record import generate_row, normalise
from shmelim.eliminations.rules.alerts import Alerts
from shmelim.eliminations.rules.iteration import NOT_A_MINERS, Iteration
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.environment import ValidatorEnvironment


@dataclass(eq=False)
class ChallengePeriod:
    """Eliminates those who failed, and has their reasons forgotten once they are recorded."""

    collaborators: Collaborators
    environment: ValidatorEnvironment
    alerts: Alerts
    eliminate: Callable[[Mapping[str, Any], Iteration], None]
    # The reasons that a pass could not record: they alone make no tick due.
    left_over: dict[str, str] = field(default_factory=dict)

    def apply(self, iteration: Iteration) -> None:
        """Eliminate the miners who wait for it."""
        challenge = self.collaborators.challengeperiod_manager
        if challenge is None or not challenge.has_elimination_reasons():
            return
        waiting = dict(challenge.get_all_elimination_reasons())
        recorded: list[str] = []
        with self.alerts.round("challenge-period elimination", *NOT_A_MINERS) as this_round:
            for hotkey, reason in waiting.items():
                if iteration.stopping():
                    return
                with this_round.guard(hotkey):
                    row = generate_row(hotkey, reason[1], reason[0], self.environment.now_ms())
                    self.eliminate(normalise(row), iteration)
                    recorded.append(hotkey)
        self.left_over = _in_words(waiting) if this_round.failed else {}
        # Not asked as an attribute: a mock has every one.
        if inspect.getattr_static(challenge, "pop_elimination_reasons", None) is not None:
            challenge.pop_elimination_reasons(recorded)
        # Those that came meanwhile are not recorded anywhere yet.
        elif not this_round.failed and _reasons(challenge.get_all_elimination_reasons()) == _reasons(waiting):
            challenge.clear_elimination_reasons()

    def is_waiting(self) -> bool:
        """Whether miners wait to be eliminated, other than those with whom that failed."""
        challenge = self.collaborators.challengeperiod_manager
        try:
            waiting = challenge is not None and bool(challenge.has_elimination_reasons())
            if waiting and self.left_over:
                waiting = _in_words(challenge.get_all_elimination_reasons()) != self.left_over
        except Exception as error:
            text = f"eliminations: whether reasons wait cannot be asked: {type(error).__name__}: {error}"
            self.alerts.failed("step", "reasons", text, error)
            return False
        self.alerts.succeeded("step", "reasons")
        return waiting


def _reasons(waiting: Mapping[str, Any]) -> dict[str, str]:
    """Return who waits to be eliminated and why, as text: what else is said of them may not even equal itself."""
    return {hotkey: str(reason[0]) for hotkey, reason in waiting.items()}


def _in_words(waiting: Mapping[str, Any]) -> dict[str, str]:
    """Return all that is said of those who wait, as text."""
    return {hotkey: str(reason) for hotkey, reason in waiting.items()}
