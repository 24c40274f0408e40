"""Eliminating the miners who failed the challenge period."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shmelim.eliminations.record import generate_row
from shmelim.eliminations.rules.alerts import spelled
from shmelim.eliminations.rules.membership import valid_hotkeys
from shmelim.eliminations.rules.tick import Context, Found, Tick
from shmelim.eliminations.salvage import salvage
from shmelim.system.coroutines import carried_out, truth


@dataclass(eq=False)
class ChallengePeriod:
    """Finds those who failed, and has their reasons forgotten once they are recorded."""

    context: Context
    # The reasons that a tick has seen, until there are none: they alone make no tick due.
    seen: dict[str, str] = field(default_factory=dict)

    def failed(self, tick: Tick) -> Iterator[tuple[str, Callable[[], Found | None]]]:
        """Yield those who wait to be eliminated."""
        challenge: Any = self.context.collaborators.challengeperiod_manager
        if challenge is None or not truth(challenge.has_elimination_reasons(), "has_elimination_reasons"):
            return
        tick.reasons = dict(challenge.get_all_elimination_reasons())
        now_ms = tick.context.environment.now_ms()
        for hotkey, why in tick.reasons.items():
            reason, drawdown = _parts(why)
            # A stranger's values, which salvage alone looks at.
            row = generate_row(hotkey, None, "", now_ms) | {"dd": drawdown, "reason": reason}
            yield hotkey, lambda row=row: Found(salvage(row, now_ms)[0])  # type: ignore[misc]

    def forget(self, tick: Tick, failed: set[str]) -> None:
        """Have the reasons forgotten that were recorded: all that this tick saw but those of these hotkeys.

        Where they can be forgotten only together, none is while a miner's is not recorded yet.
        """
        if not tick.reasons:
            return
        challenge: Any = self.context.collaborators.challengeperiod_manager
        self.seen = _in_words(tick.reasons)
        # Not asked as an attribute: a mock has every one.
        if inspect.getattr_static(challenge, "pop_elimination_reasons", None) is not None:
            recorded = [hotkey for hotkey in tick.reasons if hotkey not in failed]
            carried_out(challenge.pop_elimination_reasons(recorded), "pop_elimination_reasons")
            return
        # What stands there for nobody is never recorded. If it were waited for, those who are taken back, or
        # register again, would be eliminated once more for what was recorded long ago.
        are_recorded = not valid_hotkeys(failed)[0]
        # Those that came meanwhile are not recorded anywhere yet.
        if are_recorded and _reasons(challenge.get_all_elimination_reasons()) == _reasons(tick.reasons):
            carried_out(challenge.clear_elimination_reasons(), "clear_elimination_reasons")

    def is_waiting(self) -> bool:
        """Whether miners wait to be eliminated, other than those of the last tick."""

        def ask() -> dict[str, str]:
            challenge: Any = self.context.collaborators.challengeperiod_manager
            if challenge is None or not truth(challenge.has_elimination_reasons(), "has_elimination_reasons"):
                return {}
            return _in_words(challenge.get_all_elimination_reasons())

        waiting = self.seen
        with self.context.alerts.about("step", "reasons", "eliminations: whether reasons wait cannot be asked"):
            waiting = self.context.ask("has_elimination_reasons", ask)
            self.seen = self.seen if waiting else {}
        return waiting != self.seen


def _reasons(waiting: Mapping[str, Any]) -> dict[str, str]:
    """Return who waits to be eliminated and why, as text: what else is said of them may not even equal itself."""
    return _in_words({hotkey: _parts(why)[0] for hotkey, why in waiting.items()})


def _parts(why: Any) -> tuple[Any, Any]:
    """Return reason and drawdown of ``(reason, drawdown)``, or of a reason alone; None for what is not there.

    A stranger's object may raise anything where it is looked at, and its miner is eliminated all the same.
    """
    try:
        if not isinstance(why, Sequence) or isinstance(why, str) or not why:
            return why, None
        return why[0], why[1] if len(why) > 1 else None
    except Exception:
        return None, None


def _in_words(waiting: Mapping[str, Any]) -> dict[str, str]:
    return {hotkey: spelled(reason, str) for hotkey, reason in waiting.items()}
