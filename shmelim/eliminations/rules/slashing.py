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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from shmelim.eliminations.debts.states import SLASH, attempt_is_alive, attempt_is_mine, new_attempt
from shmelim.eliminations.rules.alerts import ENDS_A_PASS, WISHES, named
from shmelim.eliminations.rules.iteration import Context
from shmelim.errors import SlashNotMadeError
from shmelim.system.logs import LimitedLog

# Kinds of alerts: of a slash that was not made there is one for each miner, of a doubt one for each attempt.
_NOT_MADE: Final = "slash not made"
_DOUBT: Final = "slash in doubt"

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

    def make(self, hotkey: str, record: Mapping[str, Any]) -> None:
        """Make the slash that an elimination owes, if it is still owed."""
        contract = self.context.contract
        if contract is None:
            return
        try:
            self._attempt(hotkey, self._prepare(contract, hotkey, record["reason"]))
        except ENDS_A_PASS:
            raise
        except BaseException as error:
            # It was before the contract was called: what the contract raises is an outcome.
            self.context.alerts.failed(_NOT_MADE, hotkey, f"slash of miner {hotkey} was not made", error)
            self.context.state.fail_debt(hotkey, SLASH, named(error))

    def _attempt(self, hotkey: str, slash: Callable[[], Any]) -> None:
        token = new_attempt()
        _attempts[token] = None
        begun = True  # also if the server's answer is lost, and nobody knows
        outcome = _Outcome("not made", "broken off before the contract was called")
        try:
            begun = self.context.state.begin_slash(hotkey, token)
            if begun:
                outcome = _Outcome("unknown", "the call to the contract was broken off")
                outcome = _call(slash, hotkey)
        finally:
            # Also on the way out of the process.
            if begun:
                _attempts[token] = outcome
                self._record(hotkey, token)
            else:
                _attempts.pop(token, None)

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

    def remind(self, debt: Mapping[str, Any]) -> None:
        """Tell of a slash that is in doubt, unless this process did; who found the doubt may be gone."""
        if not self.context.alerts.stands(_DOUBT, debt["attempt"]):
            self._report_doubt(debt["hotkey"], debt["attempt"], debt["error"])

    def forget_others(self, debts: Iterable[Mapping[str, Any]]) -> None:
        """Forget what was told of slashes that are not among these debts."""
        slashes = [debt for debt in debts if debt["kind"] == SLASH]
        self.context.alerts.clear_others(_NOT_MADE, {debt["hotkey"] for debt in slashes})
        self.context.alerts.clear_others(_DOUBT, {debt["attempt"] for debt in slashes})

    def review(self, debt: Mapping[str, Any]) -> None:
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
    except WISHES:
        raise
    except BaseException as error:
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
