"""Eliminating the scored miners whose drawdown is too large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shmelim.eliminations.record import EliminationReason
from shmelim.eliminations.rules.iteration import Context, Iteration
from shmelim.eliminations.rules.membership import Roster
from shmelim.eliminations.rules.settling import Settling


@dataclass(eq=False)
class DrawdownRule:
    """Judges the ledgers of the bucket that is scored, except those that are being built again."""

    context: Context
    settling: Settling
    roster: Roster

    def apply(self, iteration: Iteration) -> None:
        """Eliminate those whose drawdown is too large."""
        challenge, ledgers = self.context.collaborators.challengeperiod_manager, self.context.ledgers
        environment = self.context.environment
        if ledgers is None or challenge is None:
            return
        scored = dict.fromkeys(challenge.get_hotkeys_by_bucket(environment.scored_bucket))
        if not scored:
            return
        ledger_of = ledgers.filtered_ledger_for_scoring(portfolio_only=True, hotkeys=list(scored))
        left_out = _stale(ledgers) | self.roster.now().eliminated.keys()
        judged = (one for one in ledger_of.items() if one[0] in scored and one[0] not in left_out)

        def judge(hotkey: str, ledger: Any) -> None:
            beyond, percentage = environment.drawdown(ledger)
            # Asked of few, since the answer may live in another process.
            if beyond and not self.context.is_stopping():
                reason = EliminationReason.MAX_TOTAL_DRAWDOWN
                self.settling.eliminate_now(hotkey, reason, percentage, iteration)

        self.context.alerts.each("drawdown elimination", judged, judge)


def _stale(ledgers: Any) -> frozenset[str]:
    """Return the hotkeys whose ledger must not be judged, asked once: the list may live in another process."""
    hotkeys = ledgers.perf_ledger_hks_to_invalidate
    try:
        if not isinstance(hotkeys, (str, bytes)):
            return frozenset(hotkeys)
        problem: object = f"not {type(hotkeys).__name__}"
    except TypeError as error:
        problem = error
    raise TypeError(f"perf_ledger_hks_to_invalidate must be hotkeys: {problem}")
