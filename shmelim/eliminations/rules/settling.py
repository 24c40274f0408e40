"""Eliminating, and settling what that owes: limit orders to delete, positions to close, collateral to slash.

What is owed stands in the store from the elimination on. It is settled right after it; what fails then, or is
broken off by a crash, is tried again in each later pass until it is done.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from shmelim.eliminations.calls import ProcessingCalls
from shmelim.eliminations.debts.states import IN_DOUBT, LIMIT_ORDERS, OWED, POSITIONS, SLASH
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.rules.alerts import Alerts, is_failure
from shmelim.eliminations.rules.flattening import Flattening
from shmelim.eliminations.rules.iteration import NOT_A_MINERS, Iteration
from shmelim.eliminations.rules.slashing import Slashing
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.environment import ValidatorEnvironment
from shmelim.system.logs import LimitedLog

_log = logging.getLogger("shmelim.processing")
_limited = LimitedLog(_log)


class Settling:
    """Records eliminations, and settles their debts."""

    def __init__(
        self,
        collaborators: Collaborators,
        environment: ValidatorEnvironment,
        reader: EliminationReader,
        state: ProcessingCalls,
        alerts: Alerts,
    ) -> None:
        self._collaborators = collaborators
        self._environment = environment
        self._reader = reader
        self._state = state
        self._alerts = alerts
        self.flattening = Flattening(collaborators, environment, state)
        self._slashing = Slashing(collaborators, environment, state, alerts)

    def eliminate(self, record: Mapping[str, Any], iteration: Iteration, *, slash: bool) -> None:
        """Record an elimination with what it owes, in one transaction, and settle that; the first reason stays."""
        hotkey = record["hotkey"]
        if self._reader.is_hotkey_eliminated(hotkey):
            return
        iteration.check()
        once_within_ms = self._environment.slash_once_within_ms
        owed = self._owed(slash=slash)
        outcome = self._state.eliminate(hotkey, dict(record), owed, iteration.replacements, once_within_ms)
        if outcome == "superseded":
            iteration.supersede()
        if outcome == "added":
            _log.info("eliminated miner %s: %s (%s)", hotkey, record["reason"], record.get("dd"))
            # Perhaps not all of `owed`: a slash may have been made before.
            for debt in self._state.get_debts(hotkey):
                self._settle(debt, iteration)

    def _owed(self, *, slash: bool) -> list[str]:
        """Return what an elimination owes: nothing that this validator has no collaborator for.

        Nobody could ever settle such a debt, so it is not recorded.
        """
        with_whom = [
            (LIMIT_ORDERS, self._collaborators.limit_order_manager),
            (POSITIONS, self._collaborators.position_manager),
            (SLASH, self._collaborators.contract_manager if slash else None),
        ]
        return [kind for kind, collaborator in with_whom if collaborator is not None]

    def settle_all(self, iteration: Iteration) -> None:
        """Settle everything that is owed, as far as that can be done now."""
        debts = self._state.get_debts()
        # What was told of debts that no longer stand can be forgotten.
        self._slashing.forget_others(debts)
        for kind in (LIMIT_ORDERS, POSITIONS):
            self._alerts.only(kind, {debt["hotkey"] for debt in debts if debt["kind"] == kind})
        for debt in debts:
            if iteration.stopping():
                return
            self._settle(debt, iteration)

    def _settle(self, debt: Mapping[str, Any], iteration: Iteration) -> None:
        """Settle one debt; a failure is reported and recorded, and it stays owed."""
        if debt["state"] == IN_DOUBT:
            # For a person to settle, who must hear of it.
            self._slashing.remind(debt)
            return
        iteration.check()
        hotkey, kind = debt["hotkey"], debt["kind"]
        if debt["state"] != OWED:
            self._slashing.review(debt)
            return
        record = self._reader.get_elimination(hotkey)
        if record is None:
            return  # taken back meanwhile, and the debt with it
        if kind == SLASH:
            self._slashing.make(hotkey, record)
            return
        try:
            done = self._make(hotkey, kind, record, iteration)
        except NOT_A_MINERS:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            what = f"{type(error).__name__}: {error}"
            self._alerts.failed(kind, hotkey, f"{kind} of eliminated miner {hotkey} failed: {what}", error)
            self._state.fail_debt(hotkey, kind, what)
        else:
            if done:
                self._state.settle_debt(hotkey, kind)
                self._alerts.succeeded(kind, hotkey)

    def _make(self, hotkey: str, kind: str, record: Mapping[str, Any], iteration: Iteration) -> bool:
        """Make an effect that may be repeated; False if there is nobody to make it with now."""
        if kind == LIMIT_ORDERS:
            manager = self._collaborators.limit_order_manager
            if manager is None:
                return False
            deleted = manager.delete_all_limit_orders_for_hotkey(hotkey)
            _log.info("deleted the limit orders of eliminated miner %s: %s", hotkey, deleted)
            return True
        if kind == POSITIONS:
            if self._collaborators.position_manager is None:
                return False
            self.flattening.close_open(hotkey, record, iteration)
            return True
        _limited(logging.WARNING, "unknown", "a debt of an unknown kind: %s of miner %s", kind, hotkey)
        return False
