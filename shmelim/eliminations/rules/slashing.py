"""Slashing collateral: at most once for an elimination, whatever happens meanwhile.

Money moves in the contract's call, and no store can be changed in the same instant. So an attempt is recorded,
durably and with a token, before the contract is called, and its outcome afterwards:

1. ``begin``: the debt is *attempting*, with the token of this attempt. Nothing moved yet.
2. The contract is called.
3. It returned None or True: *settled*. It raised ``SlashNotMadeError``, or returned a coroutine, which does
   nothing until somebody runs it: *owed* again. Anything else: *in doubt*.

If it fails before 1 (the share cannot be found out, the contract's method does not take it), nothing was made: it
stays *owed*.

A process that dies between 1 and 3 leaves an attempt whose process is gone. Nobody knows whether money moved: it
is put *in doubt*, told to people, and never made again by itself. If a living process could not record an outcome,
because the server was away, it remembers it and records it in a later pass.

A sync can take back an elimination that was only just made, and the next tick makes it again; the money does not
come back that way. So the server keeps the last slash made of each miner, and another elimination that is close in
time to the one that owed it owes no slash.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from shmelim.eliminations.debts.states import IN_DOUBT, OWED, SLASH, attempt_is_alive, attempt_is_mine, new_attempt
from shmelim.eliminations.rules.alerts import ENDS_A_TICK, WISHES, named
from shmelim.eliminations.rules.deadlines import (
    NotAskedError,
    StuckError,
    check_turn,
    is_left_to_a_thread,
)
from shmelim.eliminations.rules.tick import Context, Tick
from shmelim.errors import SlashNotMadeError
from shmelim.system.logs import LimitedLog

# Kinds of alerts: of a slash that was not made there is one for each miner, of a doubt one for each attempt.
_NOT_MADE: Final = "slash not made"
_DOUBT: Final = "slash in doubt"
_UNDER_WAY: Final = "slash under way"

_SHOWN: Final = 100  # characters of an answer

_log = logging.getLogger("shmelim.processing")
_limited = LimitedLog(_log)


class _Outcome(NamedTuple):
    """What became of an attempt: ``made``, ``not made`` or ``unknown``, and why."""

    made: str
    error: str = ""


# The attempts of this process: None while they are under way, and how they ended until that is recorded. Each step
# is one operation of the dict, so that any thread may look.
_attempts: dict[str, _Outcome | None] = {}
os.register_at_fork(after_in_child=_attempts.clear)


@dataclass(eq=False)
class Slashing:
    """Makes slashes, and finds out about those that were broken off."""

    context: Context

    def settle_all(self, tick: Tick) -> None:
        """Make what is owed, remind of what is in doubt, and see how attempts ended."""
        debts = [debt for debt in tick.look_at_debts() if debt["kind"] == SLASH]
        # What was told of debts that no longer stand can be forgotten.
        self.context.alerts.clear_others(_NOT_MADE, {debt["hotkey"] for debt in debts})
        self.context.alerts.clear_others(_DOUBT, {debt["attempt"] for debt in debts})
        for debt in debts:
            if self.context.is_stopping():
                return
            if debt["state"] == IN_DOUBT:
                self._remind(debt)
                continue
            tick.check()
            if debt["state"] != OWED:
                self._review(debt)
            elif (record := self.context.reader.get_elimination(debt["hotkey"])) is not None:
                self._make(debt["hotkey"], record)

    def _make(self, hotkey: str, record: Mapping[str, Any]) -> None:
        """Make the slash that an elimination owes, if it is still owed."""
        contract = self.context.contract
        if contract is None:
            return
        try:
            self._attempt(hotkey, self._prepare(contract, hotkey, record["reason"]))
        except StuckError as error:
            text = f"the slash of miner {hotkey} is under way: {error}. Its answer will settle it when it comes"
            self.context.alerts.failed(_UNDER_WAY, hotkey, text)
        except ENDS_A_TICK:
            raise
        except BaseException as error:
            # It was before the contract was called: what the contract raises is an outcome.
            self.context.alerts.failed(_NOT_MADE, hotkey, f"slash of miner {hotkey} was not made", error)
            self.context.state.fail_debt(hotkey, SLASH, named(error))

    def _attempt(self, hotkey: str, slash: Callable[[], Any]) -> None:
        token = new_attempt()
        _attempts[token] = None
        begun = False
        try:
            begun = self.context.state.begin_slash(hotkey, token)
        except BaseException:
            # The server's answer may be lost: nobody knows whether it was begun, and the contract was not called.
            _attempts[token] = _Outcome("not made", "broken off before the contract was called")
            self._record(hotkey, token)
            raise
        if not begun:
            _attempts.pop(token, None)
            return
        seconds = self.context.environment.slash_deadline_s
        carry_out = functools.partial(self._carry_out, hotkey, token, slash)
        try:
            self.context.ask("the contract", carry_out, hotkey, seconds, patient=True)
        except NotAskedError as error:
            _attempts[token] = _Outcome("not made", str(error))
            self._record(hotkey, token)

    def _carry_out(self, hotkey: str, token: str, slash: Callable[[], Any]) -> None:
        """Call the contract and record its answer, however late it comes."""
        outcome = _Outcome("not made", "its turn came too late")
        try:
            check_turn()
            outcome = _Outcome("unknown", "the call to the contract was broken off")
            outcome = _call(slash, hotkey)
        finally:
            # Also on the way out of the process.
            _attempts[token] = outcome
            self._record(hotkey, token)

    def _prepare(self, contract: Any, hotkey: str, reason: str) -> Callable[[], Any]:
        """Return the call to the contract; raises while nothing has moved yet, where it could not be made."""
        method = contract.slash_miner_collateral_proportion
        if not callable(method):
            raise TypeError(f"slash_miner_collateral_proportion is not callable, but {type(method).__name__}")
        proportion = self.context.environment.slash_proportion(reason)
        options = {} if proportion is None else {"slash_proportion": proportion}
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):
            pass  # it has none that can be read
        else:
            signature.bind(hotkey, **options)
        if inspect.iscoroutinefunction(method):
            raise TypeError("slash_miner_collateral_proportion is a coroutine function, which nothing here runs")
        return functools.partial(method, hotkey, **options)

    def _remind(self, debt: Mapping[str, Any]) -> None:
        """Tell of a slash that is in doubt, unless this process did; who found the doubt may be gone."""
        if not self.context.alerts.stands(_DOUBT, debt["attempt"]):
            self._report_doubt(debt["hotkey"], debt["attempt"], debt["error"])

    def _review(self, debt: Mapping[str, Any]) -> None:
        """Look at a slash that is being attempted, and record how it ended if the attempt is over."""
        hotkey, token = debt["hotkey"], debt["attempt"] or ""
        if token in _attempts:
            self._record(hotkey, token)
        elif attempt_is_mine(token) or not attempt_is_alive(token):
            error = "the process that attempted it is gone"
            if self.context.state.doubt_slash(hotkey, token, error):
                self._report_doubt(hotkey, token, error)

    def _record(self, hotkey: str, token: str) -> None:
        """Record how an attempt ended; what cannot be recorded now is kept for a later pass."""
        outcome, state, alerts = _attempts.get(token), self.context.state, self.context.alerts
        if outcome is None:
            return  # it is under way
        made, error = outcome
        try:
            if made == "made":
                recorded = state.settle_debt(hotkey, SLASH, token)
            else:
                recorded = state.fail_debt(hotkey, SLASH, error, token, in_doubt=made == "unknown")
        except WISHES:
            raise
        except BaseException:
            text = "slash of miner %s: %s, which could not be recorded yet"
            _limited(logging.ERROR, "unrecorded", text, hotkey, made, exc_info=True)
            return
        _attempts.pop(token, None)
        alerts.clear(_UNDER_WAY, hotkey)
        if recorded and made == "made":
            alerts.clear(_NOT_MADE, hotkey)
            _log.info("slashed the collateral of miner %s", hotkey)
        elif recorded and made == "unknown":
            self._report_doubt(hotkey, token, error)
        elif recorded:
            alerts.failed(_NOT_MADE, hotkey, f"slash of miner {hotkey} was not made: {error}")
        elif made != "not made":
            # A person settled it meanwhile, perhaps, and should know how it really ended.
            text = f"slash of miner {hotkey}: {made}, but another outcome is on record"
            alerts.tell(text, "warning")
            _log.warning("%s", text)

    def _report_doubt(self, hotkey: str, token: str, error: str | None) -> None:
        argument = f"{'-- ' if hotkey.startswith('-') else ''}{shlex.quote(hotkey)}"
        text = (
            f"slash of miner {hotkey}: nobody knows whether it was made ({error}). It is not repeated;"
            f" look at the contract, then say what you found: shmelim slash resolve {argument}"
        )
        self.context.alerts.clear(_NOT_MADE, hotkey)
        self.context.alerts.failed(_DOUBT, token, text)


def _call(slash: Callable[[], Any], hotkey: str) -> _Outcome:
    """Call the contract and say what became of it."""
    try:
        return _outcome_of(slash())
    except SlashNotMadeError as error:
        return _Outcome("not made", str(error))
    except BaseException as error:
        if isinstance(error, WISHES) and not is_left_to_a_thread():
            raise
        _log.exception("the contract failed to slash miner %s", hotkey)
        return _Outcome("unknown", f"the contract raised {named(error)}")


def _outcome_of(answer: Any) -> _Outcome:
    """Say what a contract's answer means: only True, or None, says that it was made."""
    if answer is None or answer is True or (isinstance(answer, np.bool_) and answer):
        return _Outcome("made")
    if inspect.iscoroutine(answer) and inspect.getcoroutinestate(answer) == inspect.CORO_CREATED:
        answer.close()
        text = "the contract answered with a coroutine, which nobody runs; it must wait itself"
        return _Outcome("not made", text)
    return _Outcome("unknown", f"the contract answered {type(answer).__name__} {repr(answer)[:_SHOWN]}")
