"""Deleting what is left of miners who were eliminated long ago and have left the metagraph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shmelim.eliminations.calls import ProcessingCalls
from shmelim.eliminations.debts.states import SLASH
from shmelim.eliminations.rules.alerts import Alerts
from shmelim.eliminations.rules.iteration import NOT_A_MINERS, Iteration
from shmelim.eliminations.rules.membership import Membership
from shmelim.eliminations.rules.roster import Roster
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.environment import ValidatorEnvironment

_log = logging.getLogger("shmelim.processing")


@dataclass(eq=False)
class Expiry:
    """Deletes expired eliminations.

    What is left of a miner goes in this order, so that a crash between two steps leaves the row and all is
    repeated: the entry in the challenge period, the positions, the directory, the row. A row stays while its slash
    is owed or in doubt; limit orders and positions that are still owed go with the rest.
    """

    collaborators: Collaborators
    environment: ValidatorEnvironment
    state: ProcessingCalls
    alerts: Alerts
    roster: Roster
    membership: Membership
    keep_directories: bool
    unwritten: bool = False  # whether entries were removed from the challenge period that are still on its disk

    def delete(self, iteration: Iteration) -> None:
        """Delete all that is expired."""
        old_enough = self._old_enough()
        expired = self.membership.missing(old_enough)
        if not expired:
            return
        slashes = {debt["hotkey"] for debt in self.state.get_debts() if debt["kind"] == SLASH}
        gone: list[str] = []
        with self.alerts.round("deletion", *NOT_A_MINERS) as this_round:
            for hotkey in expired:
                if iteration.stopping():
                    return
                if hotkey in slashes:
                    continue
                iteration.check()
                with this_round.guard(hotkey):
                    self._remove_challenge_entry(hotkey)
                    self._remove_positions(hotkey)
                    if not self.keep_directories:
                        self.environment.remove_miner_directory(hotkey)
                    gone.append(hotkey)
        self._write_challenge_entries()
        iteration.check()
        if gone:
            # Somebody may have been eliminated anew meanwhile: that row stays.
            deleted = self.state.delete_eliminations(gone, {hotkey: old_enough[hotkey] for hotkey in gone})
            _log.info("deleted %d expired eliminations: %s", len(deleted), ", ".join(deleted[:10]))

    def is_due(self, record: Mapping[str, Any]) -> bool:
        """Whether an elimination would be deleted at once, if it were made."""
        latest = self.environment.now_ms() - self.environment.deletion_delay_ms
        old = bool(record["elimination_initiated_time_ms"] <= latest)
        return old and bool(self.membership.missing([record["hotkey"]]))

    def _old_enough(self) -> dict[str, int]:
        """Return when each was eliminated, of those of whom that is long enough ago."""
        latest = self.environment.now_ms() - self.environment.deletion_delay_ms
        eliminated = self.roster.now().eliminated
        return {hotkey: time_ms for hotkey, time_ms in eliminated.items() if time_ms <= latest}

    def _remove_challenge_entry(self, hotkey: str) -> None:
        challenge: Any = self.collaborators.challengeperiod_manager
        if challenge is not None and challenge.has_miner(hotkey):
            self.unwritten = True
            challenge.remove_miner(hotkey)

    def _write_challenge_entries(self) -> None:
        """Have removals of entries stored, before the rows that would tell a later pass to remove them again."""
        challenge: Any = self.collaborators.challengeperiod_manager
        if self.unwritten and challenge is not None:
            challenge._write_challengeperiod_from_memory_to_disk()  # noqa: SLF001 - the field's name for it
        self.unwritten = False

    def _remove_positions(self, hotkey: str) -> None:
        positions = self.collaborators.position_manager
        if positions is not None:
            for position in list(positions.get_positions_for_one_hotkey(hotkey)):
                positions.delete_position(position)
