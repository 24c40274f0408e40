"""What an elimination still owes: its effects outside of the state, recorded with it and settled afterwards.

A debt is recorded in the transaction of its elimination, so that whatever crashes afterwards leaves word of what
is still to be made. Deleting limit orders and closing positions may be repeated; a slash moves money and may not::

    owed ──begin──▶ attempting ──settle──▶ (gone)
     ▲                │    │
     └──certainly─────┘    └──nobody knows──▶ in doubt ──by hand──▶ (gone), or owed
        not made

*attempting* is durable before the contract is called. A slash that is found so after a crash may have been made:
it is in doubt, is never repeated, and waits for a person.

An attempt is known by a token, which tells its process from every other one, past and future.

Of each hotkey the last slash that was made stays on record when its debt is settled: if the elimination is taken
back and made again, the money must not be taken again.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from shmelim.system.processes import ProcessIdentity

LIMIT_ORDERS: Final = "limit_orders"
POSITIONS: Final = "positions"
SLASH: Final = "slash"
KINDS: Final = (LIMIT_ORDERS, POSITIONS, SLASH)
"""In the order in which they are settled."""

OWED: Final = "owed"
ATTEMPTING: Final = "attempting"
IN_DOUBT: Final = "in_doubt"

BY_CONTRACT: Final = "contract"
BY_HAND: Final = "hand"

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

# Any thread may take the next one.
_numbers = itertools.count(1)


class Debt(NamedTuple):
    """One effect that an elimination owes.

    Attributes
    ----------
    hotkey : str
        Who was eliminated.
    kind : str
        One of :data:`KINDS`.
    state : str
        ``"owed"``; a slash also ``"attempting"`` or ``"in_doubt"``.
    ordinal : int
        The place of its elimination among those that owe something.
    due : bool
        False for a slash that was begun and whose elimination was taken back: if it turns out that it was not
        made, it is not made any more.
    since_ms : int
        Since when, in milliseconds since 1970, UTC.
    eliminated_ms : int
        The time of the elimination, as its record had it; of a slash that stands for two, the later one's.
    attempts : int
        How often it failed.
    error : str or None
        The last failure.
    attempt : str or None
        The token of the last attempt of a slash.
    in_doubt_since_ms : int or None
        Since when it is in doubt.

    """

    hotkey: str
    kind: str
    state: str
    ordinal: int
    due: bool
    since_ms: int
    eliminated_ms: int
    attempts: int = 0
    error: str | None = None
    attempt: str | None = None
    in_doubt_since_ms: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as callers of the server get it; with no attempt, while none stands."""
        named = self._asdict()
        del named["ordinal"]
        return named | {"attempt": None if self.state == OWED else self.attempt}


class Slash(NamedTuple):
    """The last slash of a hotkey that was made.

    Attributes
    ----------
    hotkey : str
        Whose collateral.
    made_ms : int
        When it was recorded as made, in milliseconds since 1970, UTC.
    eliminated_ms : int
        The time of the elimination that owed it.
    by : str
        Who says that it was made: ``"contract"``, or ``"hand"`` of a person who settled it.

    """

    hotkey: str
    made_ms: int
    eliminated_ms: int
    by: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as callers of the server get it."""
        return self._asdict()


def new_attempt() -> str:
    """Return a token for an attempt of this process, which no other attempt ever has."""
    return f"{_token_of(ProcessIdentity.this_process())}.{next(_numbers)}"


def attempt_is_mine(token: str) -> bool:
    """Tell whether an attempt was made by this process, not by one before a fork or a restart."""
    return token.rpartition(".")[0] == _token_of(ProcessIdentity.this_process())


def attempt_is_alive(token: str) -> bool:
    """Tell whether the process that made an attempt still runs; False for what is no token."""
    process = token.rpartition(".")[0]
    pid = process.partition("-")[0]
    if not (pid.isascii() and pid.isdigit()):
        return False
    owner = ProcessIdentity.of(int(pid))
    return owner.is_running() and process == _token_of(owner)


def _token_of(process: ProcessIdentity) -> str:
    # A start counts from the boot, and after the next boot another process may have the same one.
    return f"{process.pid}-{process.started:.17g}-{_boot()}"


@cache
def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip().replace("-", "")
    except OSError:  # no Linux: there, starts are dates
        return ""
