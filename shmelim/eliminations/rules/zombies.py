"""Eliminating the miners who have a directory and are not in the metagraph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from shmelim.eliminations.record import EliminationReason
from shmelim.eliminations.rules.membership import Membership
from shmelim.eliminations.rules.tick import Found, Tick


def zombies(tick: Tick, membership: Membership) -> Iterator[tuple[str, Callable[[], Found | None]]]:
    """Yield the zombies, who are never slashed."""
    context = tick.context
    if context.is_backtesting:
        return
    # Those eliminated already, and the one that is not a zombie.
    known = {*membership.roster.now().eliminated, context.environment.development_hotkey}
    candidates = (hotkey for hotkey in context.environment.miner_hotkeys() if hotkey not in known)
    for hotkey in membership.missing(candidates):
        yield hotkey, lambda hotkey=hotkey: _judge(tick, hotkey)  # type: ignore[misc]


def _judge(tick: Tick, hotkey: str) -> Found | None:
    if not tick.context.can_be_a_miner(hotkey):
        return None
    return tick.found(hotkey, EliminationReason.ZOMBIE, None, slash=False)
