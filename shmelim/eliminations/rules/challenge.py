"""Eliminating the miners who failed the challenge period."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shmelim.eliminations.record import generate_row
from shmelim.eliminations.rules.tick import Context, Found, Tick
from shmelim.eliminations.salvage import salvage


@dataclass(eq=False)
class ChallengePeriod:
    """Finds those who failed, and has their reasons forgotten once they are recorded."""

    context: Context
    # The reasons that a tick could not record: they alone make no tick due.
    left_over: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, Any] = field(default_factory=dict)  # at the last look

    def failed(self, tick: Tick) -> Iterator[tuple[str, Callable[[], Found | None]]]:
        """Yield those who wait to be eliminated."""
        challenge: Any = self.context.collaborators.challengeperiod_manager
        self.waiting = {}
        if challenge is None or not challenge.has_elimination_reasons():
            return
        self.waiting = dict(challenge.get_all_elimination_reasons())
        now_ms = tick.context.environment.now_ms()
        for hotkey, why in self.waiting.items():
            row = generate_row(hotkey, _second(why), _first(why), now_ms)
            yield hotkey, lambda row=row: Found(salvage(row, now_ms)[0])  # type: ignore[misc]

    def forget(self, failed: set[str]) -> None:
        """Have the reasons forgotten that were recorded: all of the last look but those of these hotkeys."""
        if not self.waiting:
            return
        challenge: Any = self.context.collaborators.challengeperiod_manager
        self.left_over = _in_words(self.waiting) if failed else {}
        # Not asked as an attribute: a mock has every one.
        if inspect.getattr_static(challenge, "pop_elimination_reasons", None) is not None:
            challenge.pop_elimination_reasons([hotkey for hotkey in self.waiting if hotkey not in failed])
        # Those that came meanwhile are not recorded anywhere yet.
        elif not failed and _reasons(challenge.get_all_elimination_reasons()) == _reasons(self.waiting):
            challenge.clear_elimination_reasons()

    def is_waiting(self) -> bool:
        """Whether miners wait to be eliminated, other than those with whom that failed."""

        def ask() -> bool:
            challenge: Any = self.context.collaborators.challengeperiod_manager
            if challenge is None or not challenge.has_elimination_reasons():
                return False
            return not self.left_over or _in_words(challenge.get_all_elimination_reasons()) != self.left_over

        waiting = False
        with self.context.alerts.about("step", "reasons", "eliminations: whether reasons wait cannot be asked"):
            waiting = self.context.ask("has_elimination_reasons", ask)
        return waiting  # noqa: RET504 - the block may have been left by an error


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
