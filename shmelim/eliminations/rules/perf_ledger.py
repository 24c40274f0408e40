"""Eliminating the miners whose ledger shows that they were liquidated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

from shmelim.eliminations.rules.expiry import Expiry
from shmelim.eliminations.rules.membership import Membership
from shmelim.eliminations.rules.tick import Found, Tick
from shmelim.eliminations.salvage import salvage
from shmelim.system.logs import LimitedLog
from shmelim.system.text import get_logger

_SHOWN: Final = 10  # notes of a row

_limited = LimitedLog(get_logger("shmelim.processing"))


def liquidated(
    tick: Tick, membership: Membership, expiry: Expiry
) -> Iterator[tuple[str, Callable[[], Found | None]]]:
    """Yield who is named by the ledgers, and what makes an elimination of it."""
    if (ledgers := tick.context.ledgers) is None:
        return
    eliminated = membership.roster.now().eliminated
    for place, row in enumerate(ledgers.get_perf_ledger_eliminations()):
        hotkey = _whose(row, place)
        if hotkey not in eliminated:
            yield hotkey, lambda row=row, hotkey=hotkey: _judge(tick, expiry, hotkey, row)  # type: ignore[misc]


def _judge(tick: Tick, expiry: Expiry, hotkey: str, row: Any) -> Found | None:
    record, notes = salvage(row, tick.context.environment.now_ms())
    if notes:
        text = "the ledger's elimination of miner %s is stored without what cannot be: %s"
        _limited(logging.WARNING, "salvaged", text, hotkey, "; ".join(notes[:_SHOWN]))
    # Ledgers still name miners who, with their eliminations, are long gone.
    return None if expiry.is_due(record) else Found(record)


def _whose(row: Any, place: int) -> str:
    """Return whose a row is, for a message, also where it does not say."""
    try:
        hotkey = row.get("hotkey") if hasattr(row, "get") else None
        if isinstance(hotkey, str):
            return str(hotkey)
    except Exception:  # noqa: S110 - a row may live in a process that is gone, and the others are not passed over
        pass
    return f"number {place} of the list"
