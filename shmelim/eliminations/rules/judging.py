"""Eliminating the scored miners whose drawdown is too large."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shmelim.eliminations.record import EliminationReason, generate_row, normalise
from shmelim.eliminations.rules.alerts import Alerts
from shmelim.eliminations.rules.iteration import NOT_A_MINERS, Iteration
from shmelim.eliminations.rules.roster import Roster
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.environment import ValidatorEnvironment


@dataclass(eq=False)
class DrawdownRule:
    """Judges the ledgers of the bucket that is scored, except those that are being built again."""

    collaborators: Collaborators
    environment: ValidatorEnvironment
    alerts: Alerts
    roster: Roster
    eliminate: Callable[[Mapping[str, Any], Iteration], None]

    def apply(self, iteration: Iteration) -> None:
        """Eliminate those whose drawdown is too large."""
        positions, challenge = self.collaborators.position_manager, self.collaborators.challengeperiod_manager
        ledgers = None if positions is None else positions.perf_ledger_manager
        if ledgers is None or challenge is None:
            return
        scored = dict.fromkeys(challenge.get_hotkeys_by_bucket(self.environment.scored_bucket))
        if not scored:
            return
        judged = ledgers.filtered_ledger_for_scoring(portfolio_only=True, hotkeys=list(scored))
        eliminated = self.roster.now().eliminated
        stale = _stale(ledgers)
        with self.alerts.round("drawdown elimination", *NOT_A_MINERS) as this_round:
            for hotkey, ledger in judged.items():
                if hotkey in stale or hotkey in eliminated or hotkey not in scored:
                    continue
                with this_round.guard(hotkey):
                    beyond, percentage = self.environment.drawdown(ledger)
                    if beyond and not iteration.stopping():
                        reason = EliminationReason.MAX_TOTAL_DRAWDOWN
                        row = generate_row(hotkey, percentage, reason, self.environment.now_ms())
                        self.eliminate(normalise(row), iteration)


def _stale(ledgers: Any) -> frozenset[str]:
    """Return the hotkeys whose ledger must not be judged, asked once: the list may live in another process."""
    hotkeys = ledgers.perf_ledger_hks_to_invalidate
    if isinstance(hotkeys, (str, bytes)):
        raise TypeError(f"perf_ledger_hks_to_invalidate must be hotkeys, not {type(hotkeys).__name__}")
    try:
        return frozenset(hotkeys)
    except TypeError as error:
        raise TypeError(f"perf_ledger_hks_to_invalidate must be hotkeys: {error}") from error
