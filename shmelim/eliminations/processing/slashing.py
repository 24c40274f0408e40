"""Slashing collateral: at most once for an elimination, whatever happens meanwhile.

Money moves in the contract's call, and no store can be changed in the same instant. So an attempt is recorded,
durably and with a token, before the contract is called, and its outcome afterwards:

1. ``begin``: the debt is *attempting*, with the token of this attempt. Nothing moved yet.
2. The contract is called.
3. It returned: *settled*. It raised ``SlashNotMadeError``: *owed* again. Anything else: *in doubt*.

A process that dies between 1 and 3 leaves an attempt whose process is gone. Nobody knows whether money moved: it
is put *in doubt*, told to people, and never made again by itself. What a living process knows of an attempt and
could not record, because the server was away, it remembers and records in a later pass.

A sync can take an elimination back that was only just made, and the next tick makes it again. The money does not
come back that way. So the server keeps the last slash of each miner that was made, and an elimination whose time
is close to that of the one which owed it owes none.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shmelim.eliminations.debts import ATTEMPTING, SLASH, attempt_is_alive, attempt_is_mine, new_attempt
from shmelim.errors import SlashNotMadeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shmelim.eliminations.collaborators import Collaborators
    from shmelim.eliminations.environment import ValidatorEnvironment
    from shmelim.eliminations.processing.alerts import Alerts
    from shmelim.eliminations.processing.statecalls import StateCalls

__all__ = ["Slashing"]

_KIND: Final = "slash"

_log = logging.getLogger("shmelim.processing")


class _Outcome(NamedTuple):
    """What became of an attempt: ``made``, ``not made`` or ``unknown``, and why."""

    made: str
    error: str = ""


class _Attempts:
    """The attempts of this process: those under way, and those whose outcome is not recorded yet. Thread-safe."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.ended: dict[str, _Outcome] = {}


_attempts = _Attempts()


def _forget_attempts() -> None:
    global _attempts  # noqa: PLW0603
    _attempts = _Attempts()


os.register_at_fork(after_in_child=_forget_attempts)


class Slashing:
    """Makes slashes, and finds out about those that were broken off.

    Parameters
    ----------
    collaborators, environment, state, alerts
        As of the processor.

    """

    def __init__(
        self,
        collaborators: Collaborators,
        environment: ValidatorEnvironment,
        state: StateCalls,
        alerts: Alerts,
    ) -> None:
        self._collaborators = collaborators
        self._environment = environment
        self._state = state
        self._alerts = alerts

    def make(self, hotkey: str, record: Mapping[str, Any]) -> None:
        """Make the slash that an elimination owes, if it is still owed."""
        contract = self._collaborators.contract_manager
        if contract is None:
            return
        proportion = self._environment.slash_proportion(record["reason"])
        attempts = _attempts
        token = new_attempt()
        attempts.running.add(token)
        begun = True  # also while nobody knows, because the server's answer was lost
        outcome = _Outcome("not made", "broken off before the contract was called")
        try:
            begun = self._state.begin_slash(hotkey, token)
            if begun:
                outcome = _Outcome("unknown", "the call to the contract was broken off")
                outcome = _call(contract, hotkey, proportion)
        finally:
            # Also on the way out of the process.
            if begun:
                attempts.ended[token] = outcome
            attempts.running.discard(token)
            if begun:
                self._record(hotkey, token, attempts)

    def review(self, debt: Mapping[str, Any]) -> None:
        """Look at a slash that is being attempted: if nobody does any more, record how it ended."""
        hotkey, token = debt["hotkey"], debt.get("attempt") or ""
        attempts = _attempts
        if debt["state"] != ATTEMPTING or token in attempts.running:
            return
        if token in attempts.ended:
            self._record(hotkey, token, attempts)
        elif attempt_is_mine(token) or not attempt_is_alive(token):
            error = "the process that attempted it is gone"
            if self._state.doubt_slash(hotkey, token, error):
                self._report_doubt(hotkey, error)

    def _record(self, hotkey: str, token: str, attempts: _Attempts) -> None:
        """Record how an attempt ended; what cannot be recorded now is kept for a later pass."""
        made, error = outcome = attempts.ended[token]
        try:
            if made == "made":
                recorded = self._state.settle_debt(hotkey, SLASH, token)
            else:
                doubtful = made == "unknown"
                recorded = self._state.fail_debt(hotkey, SLASH, error, token, in_doubt=doubtful)
        except Exception:
            _log.exception("slash of miner %s: %s, which could not be recorded yet", hotkey, made)
            return
        attempts.ended.pop(token, None)
        if recorded:
            self._report(hotkey, outcome)
        elif made != "not made":
            # A person settled it meanwhile, say; who is to know how it really ended.
            self._alerts.tell(f"slash of miner {hotkey}: {made}, but another outcome is on record", "warning")
            _log.warning("slash of miner %s: %s, but another outcome is on record", hotkey, made)

    def _report(self, hotkey: str, outcome: _Outcome) -> None:
        if outcome.made == "made":
            self._alerts.succeeded(_KIND, hotkey)
            _log.info("slashed the collateral of miner %s", hotkey)
        elif outcome.made == "not made":
            self._alerts.failed(_KIND, hotkey, f"slash of miner {hotkey} was not made: {outcome.error}")
        else:
            self._report_doubt(hotkey, outcome.error)

    def _report_doubt(self, hotkey: str, error: str) -> None:
        text = (
            f"slash of miner {hotkey}: nobody knows whether it was made ({error}). It is not repeated;"
            f" look at the contract, then say what you found: shmelim slash resolve {hotkey}"
        )
        self._alerts.failed(_KIND, hotkey, text)


def _call(contract: Any, hotkey: str, proportion: float | None) -> _Outcome:
    """Call the contract and say what became of it."""
    try:
        if proportion is None:
            made = contract.slash_miner_collateral_proportion(hotkey)
        else:
            made = contract.slash_miner_collateral_proportion(hotkey, proportion)
    except SlashNotMadeError as error:
        return _Outcome("not made", str(error))
    except Exception as error:
        _log.exception("the contract failed to slash miner %s", hotkey)
        return _Outcome("unknown", f"the contract raised {type(error).__name__}: {error}")
    if made is False:
        return _Outcome("unknown", "the contract answered False")
    return _Outcome("made")
