"""Eliminating, and settling what that owes: limit orders to delete, positions to close, collateral to slash.

What is owed stands in the store from the elimination on. It is settled right after it; what fails then, or is
broken off by a crash, is tried again in each later pass until it is done.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from shmelim.eliminations.debts.states import IN_DOUBT, LIMIT_ORDERS, OWED, POSITIONS, SLASH
from shmelim.eliminations.record import generate_row, normalise
from shmelim.eliminations.rules.alerts import ENDS_A_PASS, named
from shmelim.eliminations.rules.flattening import Flattening
from shmelim.eliminations.rules.iteration import Context, Iteration
from shmelim.eliminations.rules.slashing import Slashing

_log = logging.getLogger("shmelim.processing")


class Settling:
    """Records eliminations, and settles their debts."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.flattening = Flattening(context)
        self._slashing = Slashing(context)

    def eliminate_now(
        self, hotkey: str, reason: str, dd: float | None, iteration: Iteration, *, slash: bool = True
    ) -> None:
        """Eliminate as of this moment; otherwise as :meth:`eliminate`."""
        row = generate_row(hotkey, dd, reason, self._context.environment.now_ms())
        self.eliminate(normalise(row), iteration, slash=slash)

    def eliminate(self, record: Mapping[str, Any], iteration: Iteration, *, slash: bool = True) -> None:
        """Record an elimination with what it owes, in one transaction, and settle that; the first reason stays."""
        hotkey, state = record["hotkey"], self._context.state
        if self._context.reader.is_hotkey_eliminated(hotkey):
            return
        iteration.check()
        once_within_ms = self._context.environment.slash_once_within_ms
        outcome = state.eliminate(
            hotkey, dict(record), self._owed(slash=slash), iteration.replacements, once_within_ms
        )
        if outcome == "superseded":
            iteration.superseded = True
            iteration.check()
        if outcome == "added":
            _log.info("eliminated miner %s: %s (%s)", hotkey, record["reason"], record.get("dd"))
            # Perhaps not all of what it owes: a slash may have been made before.
            for debt in state.get_debts(hotkey):
                self._settle(debt, iteration)

    def _owed(self, *, slash: bool) -> list[str]:
        """Return what an elimination owes: nothing that nobody could ever settle here."""
        collaborators = self._context.collaborators
        with_whom = {
            LIMIT_ORDERS: collaborators.limit_order_manager,
            POSITIONS: collaborators.position_manager,
            SLASH: self._context.contract if slash else None,
        }
        return [kind for kind, collaborator in with_whom.items() if collaborator is not None]

    def settle_all(self, iteration: Iteration) -> None:
        """Settle everything that is owed, as far as that can be done now."""
        debts = self._context.state.get_debts()
        # What was told of debts that no longer stand can be forgotten.
        self._slashing.forget_others(debts)
        for kind in (LIMIT_ORDERS, POSITIONS):
            self._context.alerts.clear_others(kind, {debt["hotkey"] for debt in debts if debt["kind"] == kind})
        for debt in debts:
            if self._context.is_stopping():
                return
            self._settle(debt, iteration)

    def _settle(self, debt: Mapping[str, Any], iteration: Iteration) -> None:
        """Settle one debt; a failure is reported and recorded, and it stays owed."""
        hotkey, kind, context = debt["hotkey"], debt["kind"], self._context
        if debt["state"] == IN_DOUBT:
            # For a person to settle, who must hear of it.
            self._slashing.remind(debt)
            return
        iteration.check()
        if debt["state"] != OWED:
            self._slashing.review(debt)
            return
        record = context.reader.get_elimination(hotkey)
        if record is None:
            return  # taken back meanwhile, and the debt with it
        if kind == SLASH:
            self._slashing.make(hotkey, record)
            return
        try:
            if self._make(hotkey, kind, record, iteration):
                context.state.settle_debt(hotkey, kind)
                context.alerts.clear(kind, hotkey)
        except ENDS_A_PASS:
            raise
        except BaseException as error:
            context.alerts.failed(kind, hotkey, f"{kind} of eliminated miner {hotkey} failed", error)
            context.state.fail_debt(hotkey, kind, named(error))

    def _make(self, hotkey: str, kind: str, record: Mapping[str, Any], iteration: Iteration) -> bool:
        """Make an effect that may be repeated; False if there is nobody to make it with now."""
        collaborators = self._context.collaborators
        if kind == LIMIT_ORDERS and collaborators.limit_order_manager is not None:
            deleted = collaborators.limit_order_manager.delete_all_limit_orders_for_hotkey(hotkey)
            _log.info("deleted the limit orders of eliminated miner %s: %s", hotkey, deleted)
            return True
        if kind == POSITIONS and collaborators.position_manager is not None:
            self.flattening.close(hotkey, record, iteration)
            return True
        return False
