"""What an elimination still owes: its effects outside of the state, recorded with it and settled afterwards.

A debt is recorded in the transaction of its elimination, so that after a crash it is known what is still to be
done. Deleting limit orders and closing positions may be repeated; a slash moves money and may not::

    owed ──begin──▶ attempting ──settle──▶ (gone, on record as made or declined)
     ▲                │    │
     └──certainly─────┘    └──nobody knows──▶ in doubt ──by hand, or by a late answer──▶ (gone), or owed
        not made

*attempting* is durable before the contract is called, and a lease: the process that attempts it renews it through
the server. A slash whose lease has run out may have been made: it is put in doubt, is never repeated, and waits
for a person, or for its answer that comes late.

A slash is owed for a cause: the rule that eliminated the miner, and which of his registrations that was. When his
elimination is taken back it *rests* (it is not due), and is due again when he is eliminated again. Of each cause
the slash that was made, or declined, stays on record: no second one is owed for it. What an older version recorded
without a rule counts for every rule.

An attempt has a token, unlike that of any other attempt, past and future.
"""

from __future__ import annotations

import os
import secrets
from typing import Any, Final, NamedTuple

LIMIT_ORDERS: Final = "limit_orders"
POSITIONS: Final = "positions"
SLASH: Final = "slash"
KINDS: Final = (LIMIT_ORDERS, POSITIONS, SLASH)
"""In the order in which they are settled."""

OWED: Final = "owed"
ATTEMPTING: Final = "attempting"
IN_DOUBT: Final = "in_doubt"

MADE: Final = "made"
DECLINED: Final = "declined"
NOT_MADE: Final = "not made"
DOUBTFUL: Final = "in doubt"
OUTCOMES: Final = (MADE, DECLINED, NOT_MADE, DOUBTFUL)
"""What may become of an attempt at a slash."""

BY_CONTRACT: Final = "contract"
BY_HAND: Final = "hand"

DRAWDOWN: Final = "drawdown"
CHALLENGE_PERIOD: Final = "challenge_period"
PERF_LEDGER: Final = "perf_ledger"
ANY_RULE: Final = ""
"""The rule of what an older version recorded."""
_RULES_OF: Final = {
    "MAX_TOTAL_DRAWDOWN": DRAWDOWN,
    "FAILED_CHALLENGE_PERIOD_TIME": CHALLENGE_PERIOD,
    "FAILED_CHALLENGE_PERIOD_DRAWDOWN": CHALLENGE_PERIOD,
    "LIQUIDATED": PERF_LEDGER,
    "PLAGIARISM": CHALLENGE_PERIOD,  # of which the challenge period tells, too
}


class Debt(NamedTuple):
    """One effect that an elimination owes; times are in milliseconds since 1970, UTC."""

    hotkey: str
    kind: str  # one of KINDS
    rule: str  # of a slash, with the registration its cause; of the others ANY_RULE and 0
    registration: int  # how often the miner had come back after a departure
    state: str  # OWED; a slash also ATTEMPTING or IN_DOUBT
    ordinal: int  # the place of its elimination among those that owe something
    due: bool  # False: it rests, as its elimination was taken back
    since_ms: int
    eliminated_ms: int  # as the elimination's record had it; of a slash that stands for two, the later one's
    attempts: int = 0  # how often it failed
    error: str | None = None  # the last failure
    attempt: str | None = None  # the token of a slash's last attempt
    in_doubt_since_ms: int | None = None
    reason: str | None = None  # of a slash: that of the elimination when it became owed
    share: float | None = None  # of the collateral, 0 to 1, as it was then; None: the contract decides
    share_asked: bool = False  # whether the share is known; else whoever makes the slash asks for it

    def as_dict(self) -> dict[str, Any]:
        """Return it as callers of the server get it, who see an attempt only while it stands."""
        named = self._asdict()
        del named["ordinal"]
        return named | {"attempt": None if self.state == OWED else self.attempt}


class Slash(NamedTuple):
    """The slash of a hotkey for one cause that was made or declined; times are in ms since 1970, UTC."""

    hotkey: str
    rule: str
    registration: int
    made_ms: int  # when it was recorded as made, or declined
    eliminated_ms: int  # the time of the elimination that owed it
    by: str  # who says that it was made: BY_CONTRACT, or BY_HAND of a person who settled it
    outcome: str = MADE  # or DECLINED
    reason: str | None = None
    share: float | None = None  # None: the contract's own, or not known
    answer: str | None = None  # of the contract


def rule_of(reason: str | None) -> str:
    """Return the rule that eliminates for a reason; ANY_RULE where none of those that slash does."""
    return _RULES_OF.get(reason or "", ANY_RULE)


def new_attempt() -> str:
    """Return a token for an attempt, with the id of this process for people to read."""
    return f"{os.getpid()}-{secrets.token_hex(8)}"
