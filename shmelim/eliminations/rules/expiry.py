"""Deleting what is left of miners who were eliminated long ago and have left the metagraph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shmelim.eliminations.debts.states import OWED, SLASH
from shmelim.eliminations.rules.alerts import named
from shmelim.eliminations.rules.membership import Membership
from shmelim.eliminations.rules.tick import Context, Tick
from shmelim.system import clock
from shmelim.system.coroutines import carried_out
from shmelim.system.text import get_logger

_NOBODYS: Final = "not a hotkey"
_CLOCK: Final = "clock", "the time"
_LEAP: Final = 60.0  # seconds

_log = get_logger("shmelim.processing")


@dataclass(eq=False)
class Expiry:
    """Deletes expired eliminations.

    What is left of a miner goes in this order, so that a crash between two steps leaves the row and all is
    repeated: the entry in the challenge period, the positions, the directory, the row. A row stays while its slash
    is owed or in doubt, unless there is no contract manager; limit orders and positions that are still owed go
    with the rest.
    """

    context: Context
    membership: Membership
    times: tuple[float, float] | None = None  # of the last pass: the time, and seconds that nobody sets
    unwritten: bool = False  # whether entries were removed from the challenge period that are still on its disk

    def delete(self, tick: Tick) -> None:
        """Delete all that is expired; nothing, where the time has leapt since the last pass."""
        if self._has_leapt():
            return
        state, listed = self.context.state, self.membership.roster.now()
        first, latest = self._expired()
        old_enough = {hotkey: ms for hotkey, ms in listed.eliminated.items() if first <= ms <= latest}
        if not (old_enough or listed.zombies):
            self.context.alerts.clear_others(_NOBODYS, ())
            return

        def look() -> list[str]:
            nobodys = self._nobodys()
            return self.membership.missing(hotkey for hotkey in old_enough if hotkey not in nobodys)

        expired = self.context.ask("metagraph", look)
        if not expired:
            return
        slashes = {debt["hotkey"] for debt in state.get_debts() if self._keeps_row(debt)}
        gone: dict[str, int] = {}

        def remove(hotkey: str, time_ms: int) -> None:
            tick.check()
            self.context.ask("deletion", lambda: self._remove(hotkey, tick), hotkey)
            gone[hotkey] = time_ms

        due = ((hotkey, old_enough[hotkey]) for hotkey in expired if hotkey not in slashes)
        if self.context.alerts.each("deletion", due, remove, self.context.is_stopping) is None:
            return
        self.context.ask("challenge entries", self._write_challenge_entries)
        tick.check()
        if gone:
            # Somebody may have been eliminated anew meanwhile: that row stays.
            deleted = state.delete_eliminations(list(gone), gone)
            _log.info("deleted %d expired eliminations: %s", len(deleted), ", ".join(deleted[:10]))

    def _has_leapt(self) -> bool:
        """Tell whether the default clock went otherwise than the machine's since the last pass, and report it."""
        context = self.context
        now, before = (context.environment.now_ms() / 1000, clock.boottime()), self.times
        self.times = now
        if before is None or context.environment.has_own_clock:
            return False
        leap = now[0] - before[0] - (now[1] - before[1])
        if abs(leap) <= _LEAP:
            context.alerts.clear(*_CLOCK)
            return False
        text = f"the time has leapt by {leap:+.0f} s since the last tick: nothing is deleted in this one"
        context.alerts.failed(*_CLOCK, text)
        return True

    def _keeps_row(self, debt: Mapping[str, Any]) -> bool:
        """Whether a slash is to be made, or may have been; one that nobody can make outlives its row."""
        if debt["kind"] != SLASH:
            return False
        return debt["state"] != OWED or (debt["due"] and self.context.contract is not None)

    def is_due(self, record: Mapping[str, Any]) -> bool:
        """Whether an elimination would be deleted at once, if it were made."""
        first, latest = self._expired()
        old = bool(first <= record["elimination_initiated_time_ms"] <= latest)
        return old and bool(self.membership.missing([record["hotkey"]]))

    def _nobodys(self) -> set[str]:
        """Return those eliminated as zombies whose names no miner can have, and report them."""
        names: dict[str, str] = {}
        for hotkey in self.membership.roster.now().zombies:
            try:
                if not self.context.can_be_a_miner(hotkey):
                    names[hotkey] = "cannot be a hotkey"
            except Exception as error:  # the environment's rule; the others are deleted all the same
                names[hotkey] = f"cannot be told from what is not a hotkey ({named(error)})"
        self.context.alerts.clear_others(_NOBODYS, names)
        for name, why in names.items():
            text = f"{name!r} is eliminated as a ZOMBIE and {why}; nothing of it is deleted"
            self.context.alerts.failed(_NOBODYS, name, text)
        return set(names)

    def _expired(self) -> tuple[int, int]:
        """Return the first and the last time of what is expired: an odd time is no reason to delete."""
        environment = self.context.environment
        return environment.plausible_since_ms, environment.now_ms() - environment.deletion_delay_ms

    def _remove(self, hotkey: str, tick: Tick) -> None:
        self._remove_challenge_entry(hotkey)
        tick.check()
        self._remove_positions(hotkey)
        tick.check()
        if not self.context.is_backtesting:
            self.context.environment.remove_miner_directory(hotkey)

    def _remove_challenge_entry(self, hotkey: str) -> None:
        challenge = self.context.collaborators.challengeperiod_manager
        if challenge is not None and challenge.has_miner(hotkey):
            self.unwritten = True
            carried_out(challenge.remove_miner(hotkey), "remove_miner")

    def _write_challenge_entries(self) -> None:
        """Have removals of entries stored, before the rows that would tell a later pass to remove them again."""
        challenge = self.context.collaborators.challengeperiod_manager
        if self.unwritten and challenge is not None:
            written = challenge._write_challengeperiod_from_memory_to_disk()  # noqa: SLF001 - the field's name
            carried_out(written, "_write_challengeperiod_from_memory_to_disk")
        self.unwritten = False

    def _remove_positions(self, hotkey: str) -> None:
        positions = self.context.collaborators.position_manager
        if positions is not None:
            for position in list(positions.get_positions_for_one_hotkey(hotkey)):
                carried_out(positions.delete_position(position), "delete_position")
