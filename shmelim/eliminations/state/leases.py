"""Leases of attempts at slashes: one lives while its process renews it here, wherever that process is.

A process id says nothing: the asker may be in another pid namespace, or on the next boot. Leases are in memory; a
server that was just started knows of none, so each attempt that it finds has a grace to be heard of again.

Time is the monotonic clock: while the machine sleeps, so does the attempt.
"""

from __future__ import annotations

from time import monotonic
from typing import Final

from shmelim.eliminations.debts.states import ATTEMPTING, Debt
from shmelim.system.arguments import number

LEASE_S: Final = 30.0
LONGEST_LEASE_S: Final = 3600.0


class Leases:
    """Until when attempts live; thread-safe, as each step is one operation of a dict."""

    def __init__(self, seconds: float, grace_s: float) -> None:
        self._seconds = number("slash_lease_s", seconds, most=LONGEST_LEASE_S)
        self._until: dict[str, float] = {}
        self._heard_of_all = monotonic() + grace_s

    def renew(self, attempt: str) -> None:
        """Let an attempt live for one lease from now on."""
        now = monotonic()
        for each, until in list(self._until.items()):
            if until <= now:
                self._until.pop(each, None)
        self._until[attempt] = now + self._seconds

    def end(self, attempt: str) -> None:
        """Note that an attempt is over; idempotent."""
        self._until[attempt] = 0

    def is_live(self, debt: Debt) -> bool:
        """Whether the process that attempts a slash may be making it now."""
        if debt.attempt is None:
            return False
        # One in doubt lives where its process was only not heard of for a while.
        unheard = self._heard_of_all if debt.state == ATTEMPTING else 0
        return monotonic() < self._until.get(debt.attempt, unheard)
