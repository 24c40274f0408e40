"""Deleting what is left of miners who were eliminated long ago and have left the metagraph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shmelim.eliminations.debts.states import SLASH
from shmelim.eliminations.rules.iteration import Context, Iteration
from shmelim.eliminations.rules.membership import Membership

_log = logging.getLogger("shmelim.processing")


@dataclass(eq=False)
class Expiry:
    """Deletes expired eliminations.

    What is left of a miner goes in this order, so that a crash between two steps leaves the row and all is
    repeated: the entry in the challenge period, the positions, the directory, the row. A row stays while its slash
    is owed or in doubt; limit orders and positions that are still owed go with the rest.
    """

    context: Context
    membership: Membership
    unwritten: bool = False  # whether entries were removed from the challenge period that are still on its disk

    def delete(self, iteration: Iteration) -> None:
        """Delete all that is expired."""
        state, latest = self.context.state, self._latest()
        eliminated = self.membership.roster.now().eliminated
        old_enough = {hotkey: time_ms for hotkey, time_ms in eliminated.items() if time_ms <= latest}
        expired = self.membership.missing(old_enough)
        if not expired:
            return
        slashes = {debt["hotkey"] for debt in state.get_debts() if debt["kind"] == SLASH}
        gone: dict[str, int] = {}

        def remove(hotkey: str, time_ms: int) -> None:
            iteration.check()
            self._remove_challenge_entry(hotkey)
            self._remove_positions(hotkey)
            if not self.context.is_backtesting:
                self.context.environment.remove_miner_directory(hotkey)
            gone[hotkey] = time_ms

        due = ((hotkey, old_enough[hotkey]) for hotkey in expired if hotkey not in slashes)
        if self.context.alerts.each("deletion", due, remove, self.context.is_stopping) is None:
            return
        self._write_challenge_entries()
        iteration.check()
        if gone:
            # Somebody may have been eliminated anew meanwhile: that row stays.
            deleted = state.delete_eliminations(list(gone), gone)
            _log.info("deleted %d expired eliminations: %s", len(deleted), ", ".join(deleted[:10]))

    def is_due(self, record: Mapping[str, Any]) -> bool:
        """Whether an elimination would be deleted at once, if it were made."""
        old = bool(record["elimination_initiated_time_ms"] <= self._latest())
        return old and bool(self.membership.missing([record["hotkey"]]))

    def _latest(self) -> int:
        return self.context.environment.now_ms() - self.context.environment.deletion_delay_ms

    def _remove_challenge_entry(self, hotkey: str) -> None:
        challenge = self.context.collaborators.challengeperiod_manager
        if challenge is not None and challenge.has_miner(hotkey):
            self.unwritten = True
            challenge.remove_miner(hotkey)

    def _write_challenge_entries(self) -> None:
        """Have removals of entries stored, before the rows that would tell a later pass to remove them again."""
        challenge = self.context.collaborators.challengeperiod_manager
        if self.unwritten and challenge is not None:
            challenge._write_challengeperiod_from_memory_to_disk()  # noqa: SLF001 - the field's name for it
        self.unwritten = False

    def _remove_positions(self, hotkey: str) -> None:
        positions = self.context.collaborators.position_manager
        if positions is not None:
            for position in list(positions.get_positions_for_one_hotkey(hotkey)):
                positions.delete_position(position)
