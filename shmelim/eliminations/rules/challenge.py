"""Eliminating the miners who failed the challenge period."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shmelim.eliminations.record import generate_row
from shmelim.eliminations.rules.iteration import Context, Iteration
from shmelim.eliminations.rules.settling import Settling
from shmelim.eliminations.salvage import salvage


@dataclass(eq=False)
class ChallengePeriod:
    """Eliminates those who failed, and has their reasons forgotten once they are recorded."""

    context: Context
    settling: Settling
    # The reasons that a pass could not record: they alone make no tick due.
    left_over: dict[str, str] = field(default_factory=dict)

    def apply(self, iteration: Iteration) -> None:
        """Eliminate the miners who wait for it."""
        challenge: Any = self.context.collaborators.challengeperiod_manager
        if challenge is None or not challenge.has_elimination_reasons():
            return
        waiting = dict(challenge.get_all_elimination_reasons())
        recorded: list[str] = []

        def eliminate(hotkey: str, reason: Any) -> None:
            row = generate_row(hotkey, _second(reason), _first(reason), self.context.environment.now_ms())
            self.settling.eliminate(salvage(row, row["elimination_initiated_time_ms"])[0], iteration)
            recorded.append(hotkey)

        kind, stopping = "challenge-period elimination", self.context.is_stopping
        failed = self.context.alerts.each(kind, waiting.items(), eliminate, stopping)
        if failed is None:
            return
        self.left_over = _in_words(waiting) if failed else {}
        # Not asked as an attribute: a mock has every one.
        if inspect.getattr_static(challenge, "pop_elimination_reasons", None) is not None:
            challenge.pop_elimination_reasons(recorded)
        # Those that came meanwhile are not recorded anywhere yet.
        elif not failed and _reasons(challenge.get_all_elimination_reasons()) == _reasons(waiting):
            challenge.clear_elimination_reasons()

    def is_waiting(self) -> bool:
        """Whether miners wait to be eliminated, other than those with whom that failed."""
        challenge: Any = self.context.collaborators.challengeperiod_manager
        try:
            waiting = challenge is not None and bool(challenge.has_elimination_reasons())
            if waiting and self.left_over:
                waiting = _in_words(challenge.get_all_elimination_reasons()) != self.left_over
        except Exception as error:
            text = "eliminations: whether reasons wait cannot be asked"
            self.context.alerts.failed("step", "reasons", text, error)
            return False
        self.context.alerts.clear("step", "reasons")
        return waiting


def _reasons(waiting: Mapping[str, Any]) -> dict[str, str]:
    """Return who waits to be eliminated and why, as text: what else is said of them may not even equal itself."""
    return _in_words({hotkey: _first(reason) for hotkey, reason in waiting.items()})


def _first(why: Any) -> Any:
    """Return the reason of ``(reason, drawdown)``, or of a reason alone."""
    return why[0] if isinstance(why, Sequence) and not isinstance(why, str) and why else why


def _second(why: Any) -> Any:
    """Return the drawdown of ``(reason, drawdown)``; None if it is not there."""
    return why[1] if isinstance(why, Sequence) and not isinstance(why, str) and len(why) > 1 else None


def _in_words(waiting: Mapping[str, Any]) -> dict[str, str]:
    return {hotkey: str(reason) for hotkey, reason in waiting.items()}
