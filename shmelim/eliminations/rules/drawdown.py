"""Eliminating the scored miners whose drawdown is too large."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from shmelim.eliminations.record import EliminationReason
from shmelim.eliminations.rules.membership import Membership, valid_hotkeys
from shmelim.eliminations.rules.tick import Found, Tick


def fallen(tick: Tick, membership: Membership) -> Iterator[tuple[str, Callable[[], Found | None]]]:
    """Yield who is scored, and what judges the ledger, except of those whose ledger is being built again."""
    context = tick.context
    challenge, ledgers = context.collaborators.challengeperiod_manager, context.ledgers
    if ledgers is None or challenge is None:
        return
    hotkeys, refused = valid_hotkeys(challenge.get_hotkeys_by_bucket(context.environment.scored_bucket))
    for what in refused:
        yield what, functools.partial(_refuse, what)
    scored = dict.fromkeys(hotkeys)
    if not scored:
        return
    ledger_of = ledgers.filtered_ledger_for_scoring(portfolio_only=True, hotkeys=list(scored))
    left_out = _stale(ledgers) | membership.roster.now().eliminated.keys()
    for hotkey, ledger in ledger_of.items():
        if hotkey in scored and hotkey not in left_out:
            yield hotkey, lambda hotkey=hotkey, ledger=ledger: _judge(tick, hotkey, ledger)  # type: ignore[misc]


def _refuse(what: str) -> Found | None:
    raise ValueError(f"the scored bucket holds what is not a hotkey: {what}")


def _judge(tick: Tick, hotkey: str, ledger: Any) -> Found | None:
    beyond, percentage = tick.context.environment.drawdown(ledger)
    # Numpy's are equal to them. Anything else, such as the percentage in its place or a method, is mostly true.
    if beyond not in (True, False, None):
        raise TypeError(f"drawdown must return a yes or no first, not {type(beyond).__name__}")
    return tick.found(hotkey, EliminationReason.MAX_TOTAL_DRAWDOWN, percentage) if beyond else None


def _stale(ledgers: Any) -> frozenset[str]:
    """Return the hotkeys whose ledger must not be judged, asked once: the list may live in another process."""
    hotkeys = ledgers.perf_ledger_hks_to_invalidate
    if isinstance(hotkeys, (str, bytes)):
        raise TypeError(f"perf_ledger_hks_to_invalidate must be hotkeys: not {type(hotkeys).__name__}")
    # A forked child's proxy of a dict cannot be iterated over: CPython makes a proxy of the iterator, which needs
    # the manager's own object. Its keys come as a list.
    keys = getattr(hotkeys, "keys", None)
    try:
        return frozenset(hotkeys if keys is None else keys())
    except TypeError as error:
        raise TypeError(f"perf_ledger_hks_to_invalidate must be hotkeys: {error}") from error
