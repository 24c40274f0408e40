"""Eliminating the scored miners whose drawdown is too large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmelim.eliminations.record import EliminationReason, generate_row, normalise
from shmelim.eliminations.rules.iteration import NOT_A_MINERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shmelim.eliminations.rules.alerts import Alerts
    from shmelim.eliminations.rules.iteration import Iteration
    from shmelim.eliminations.rules.roster import Roster
    from shmelim.eliminations.validator.collaborators import Collaborators
    from shmelim.eliminations.validator.environment import ValidatorEnvironment


class DrawdownRule:
    """Judges the ledgers of the bucket that is scored, but for those that are being built again.

    Parameters
    ----------
    collaborators, environment, alerts, roster
        As of the processor.
    eliminate
        Records an elimination and settles what it owes; the first reason stays.

    """

    def __init__(
        self,
        collaborators: Collaborators,
        environment: ValidatorEnvironment,
        alerts: Alerts,
        roster: Roster,
        eliminate: Callable[[Mapping[str, Any], Iteration], None],
    ) -> None:
        self._collaborators = collaborators
        self._environment = environment
        self._alerts = alerts
        self._roster = roster
        self._eliminate = eliminate

    def apply(self, iteration: Iteration, stopping: Callable[[], bool]) -> None:
        """Eliminate those whose drawdown is too large."""
        positions, challenge = self._collaborators.position_manager, self._collaborators.challengeperiod_manager
        ledgers = None if positions is None else positions.perf_ledger_manager
        if ledgers is None or challenge is None:
            return
        scored = dict.fromkeys(challenge.get_hotkeys_by_bucket(self._environment.scored_bucket))
        if not scored:
            return
        judged = ledgers.filtered_ledger_for_scoring(portfolio_only=True, hotkeys=list(scored))
        eliminated = self._roster.now().eliminated
        stale = _stale(ledgers)
        with self._alerts.round("drawdown elimination", *NOT_A_MINERS) as this_round:
            for hotkey, ledger in judged.items():
                if hotkey in stale or hotkey in eliminated or hotkey not in scored:
                    continue
                with this_round.guard(hotkey):
                    beyond, percentage = self._environment.drawdown(ledger)
                    if beyond and not stopping():
                        reason = EliminationReason.MAX_TOTAL_DRAWDOWN
                        row = generate_row(hotkey, percentage, reason, self._environment.now_ms())
                        self._eliminate(normalise(row), iteration)


def _stale(ledgers: Any) -> frozenset[str]:
    """Return whose ledger must not be judged, fetched once: the list may live in another process."""
    hotkeys = ledgers.perf_ledger_hks_to_invalidate
    if isinstance(hotkeys, (str, bytes)):
        raise TypeError(f"perf_ledger_hks_to_invalidate must be hotkeys, not {type(hotkeys).__name__}")
    try:
        return frozenset(hotkeys)
    except TypeError as error:
        raise TypeError(f"perf_ledger_hks_to_invalidate must be hotkeys: {error}") from error
