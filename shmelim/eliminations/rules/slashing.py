"""Slashing collateral: at most once for a cause, whatever happens meanwhile.

Money moves in the contract's call, and no store can be changed in the same instant. So an attempt is recorded,
durably and with a token, before the contract is called, and its outcome afterwards:

1. ``begin``: the debt is *attempting*, with the token of this attempt. Nothing moved yet.
2. The contract is called.
3. The environment's rule says what its answer means: *made* or *declined* settles it, *not made* has it owed
   again, to be tried after a pause that grows, and *in doubt* leaves it to a person, as a coroutine does.

If it fails before 1 (the share cannot be found out, the contract's method does not take it), nothing was made: it
stays *owed*.

From 1 to 3 a thread renews the attempt's lease at the server. A process that dies in between renews it no more.
Nobody knows whether money moved: once the lease has run out the slash is put *in doubt*, told to people, and never
made again by itself. If a living process could not record an outcome, because the server was away, it remembers it
and records it before the next pass of the loop does anything else; that settles a doubt, too.

Which slashes are owed, and which are held, is the server's business (:mod:`shmelim.eliminations.debts.states`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any, Final, NamedTuple

from shmelim.eliminations.calls import ServerAwayError
from shmelim.eliminations.debts.states import (
    DECLINED,
    DOUBTFUL,
    IN_DOUBT,
    MADE,
    NOT_MADE,
    OUTCOMES,
    OWED,
    SLASH,
    new_attempt,
)
from shmelim.eliminations.rules.alerts import ENDS_A_TICK, WISHES, named, sendable
from shmelim.eliminations.rules.deadlines import NotAskedError, StuckError, check_turn, is_left_to_a_thread
from shmelim.eliminations.rules.tick import Context, Tick
from shmelim.system.coroutines import is_unrun
from shmelim.system.logs import LimitedLog
from shmelim.system.text import get_logger

# Kinds of alerts: of a slash that was not made there is one for each miner, of a doubt one for each attempt.
_NOT_MADE: Final = "slash not made"
_DOUBT: Final = "slash in doubt"
_UNDER_WAY: Final = "slash under way"
_UNRECORDED: Final = "slash not recorded"

_NO_CONTRACT: Final = "no contract manager", "the contract manager"

_PAUSE_MS: Final = 60_000  # after the second failure; three times that after the third, and so on
_MOST_DOUBLED: Final = 20
_LONGEST_PAUSE_MS: Final = 6 * 3_600_000

_SHOWN: Final = 100  # characters of an answer

_log = get_logger("shmelim.processing")
_limited = LimitedLog(_log)


class _Outcome(NamedTuple):
    """What became of an attempt, one of OUTCOMES, and why."""

    what: str
    said: str


@dataclass(eq=False)
class _Attempt:
    """An attempt of this process, kept until it is recorded how it ended."""

    whose: Slashing
    debt: Mapping[str, Any]
    outcome: _Outcome | None = None  # while it is under way


# By token. Each step is one operation of the dict, so that any thread may look.
_attempts: dict[str, _Attempt] = {}
os.register_at_fork(after_in_child=_attempts.clear)

_RENEWALS: Final = 4  # within one lease
_LEAST_RENEWAL: Final = 0.05  # seconds: without a lease there is nothing to renew


@dataclass(eq=False)
class Slashing:
    """Makes slashes, and finds out about those that were broken off."""

    context: Context
    # When a slash failed that this process tried, by the environment's clock; after a restart it is tried at once.
    _failed_ms: dict[tuple[str, str, int], int] = field(default_factory=dict)
    _told_held: Mapping[str, Any] | None = None

    def settle_all(self, tick: Tick) -> None:
        """Make what is owed, remind of what is in doubt, and see how attempts ended."""
        debts = [debt for debt in tick.look_at_debts() if debt["kind"] == SLASH]
        # What was told of debts that no longer stand, or that rest, can be forgotten.
        under_way = {attempt.debt["hotkey"] for attempt in list(_attempts.values())}
        for kind in (_UNRECORDED, _UNDER_WAY):
            self.context.alerts.clear_others(kind, under_way)
        self.context.alerts.clear_others(_DOUBT, {debt["attempt"] for debt in debts})
        owed = [debt for debt in debts if debt["state"] == OWED and debt["due"]]
        self.context.alerts.clear_others(_NOT_MADE, {debt["hotkey"] for debt in owed})
        can_begin = self._can_begin(owed)
        for debt in debts:
            if self.context.is_stopping():
                return
            if debt["state"] == IN_DOUBT:
                if debt["attempt"] in _attempts:
                    self._record(debt["attempt"])  # its answer came late
                elif not self.context.alerts.stands(_DOUBT, debt["attempt"]):
                    self._report_doubt(debt["hotkey"], debt["attempt"], debt["error"])  # who found it may be gone
                continue
            tick.check()
            if debt["state"] != OWED:
                self._review(debt)
            elif can_begin and debt["due"] and self._is_time(debt):
                can_begin = self._make(debt) or self._can_begin(owed)

    def _can_begin(self, owed: Sequence[Mapping[str, Any]]) -> bool:
        """Whether slashes may be begun now; where some are owed that may not, people are told."""
        context, alerts = self.context, self.context.alerts
        if not owed or context.is_backtesting:
            alerts.clear(*_NO_CONTRACT)
            return False
        if context.contract is None:
            text = f"{len(owed)} slashes are owed, and there is no contract_manager to make them"
            alerts.failed(*_NO_CONTRACT, text)
            return False
        alerts.clear(*_NO_CONTRACT)
        held = context.state.get_money_held()
        if held is not None and held != self._told_held:
            text = (
                f"{len(owed)} slashes are held, and none is begun until a person says so: {held['why']}."
                " See `shmelim debts` and `shmelim slash list`, then say: shmelim slash release"
            )
            alerts.messages.send(text, "error")
            _log.error("%s", text)
        self._told_held = held
        return held is None

    def _is_time(self, debt: Mapping[str, Any]) -> bool:
        """Whether a slash that failed may be tried again: at once the first time, then after growing pauses."""
        failed_ms = self._failed_ms.get(_cause(debt))
        if failed_ms is None or not debt["attempts"]:
            return True
        pause_ms = min(_PAUSE_MS * ((1 << min(debt["attempts"] - 1, _MOST_DOUBLED)) - 1), _LONGEST_PAUSE_MS)
        # Also where the clock was set back.
        return not 0 <= self.context.environment.now_ms() - failed_ms < pause_ms

    def _make(self, debt: Mapping[str, Any]) -> bool:
        """Make a slash, if it is still owed; False where the server let it not be begun."""
        hotkey = debt["hotkey"]
        self._failed_ms.pop(_cause(debt), None)
        try:
            return self._attempt(debt, self._prepared(debt))
        except StuckError as error:
            text = f"the slash of miner {hotkey} is under way: {error}. Its answer will settle it when it comes"
            self.context.alerts.failed(_UNDER_WAY, hotkey, text)
        except ENDS_A_TICK:
            raise
        except BaseException as error:
            # It was before the contract was called: what the contract raises is an outcome.
            self._failed_ms[_cause(debt)] = self.context.environment.now_ms()
            self.context.alerts.failed(_NOT_MADE, hotkey, f"slash of miner {hotkey} was not made", error)
            self.context.state.fail_debt(hotkey, SLASH, named(error), None, False, *_cause(debt)[1:])  # noqa: FBT003
        return True

    def _attempt(self, debt: Mapping[str, Any], slash: Callable[[], Any]) -> bool:
        hotkey, environment = debt["hotkey"], self.context.environment
        token = new_attempt()
        attempt = _attempts[token] = _Attempt(self, debt)
        begun = False
        try:
            begun = self.context.state.begin_slash(
                hotkey,
                token,
                debt["rule"],
                debt["registration"],
                environment.now_ms(),
                environment.max_slashes_per_hour,
            )
        except BaseException:
            # The server's answer may be lost: nobody knows whether it was begun, and the contract was not called.
            attempt.outcome = _Outcome(NOT_MADE, "broken off before the contract was called")
            self._record(token)
            raise
        if not begun:
            _attempts.pop(token, None)
            return False
        carry_out = functools.partial(self._carry_out, attempt, token, slash)
        try:
            self.context.ask("the contract", carry_out, hotkey, environment.slash_deadline_s, patient=True)
        except NotAskedError as error:
            attempt.outcome = _Outcome(NOT_MADE, str(error))
            self._record(token)
        return True

    def _carry_out(self, attempt: _Attempt, token: str, slash: Callable[[], Any]) -> None:
        """Call the contract and record its answer, however late it comes."""
        outcome = _Outcome(NOT_MADE, "its turn came too late")
        hotkey, over = attempt.debt["hotkey"], threading.Event()
        renewing = threading.Thread(
            target=self._renew, args=(hotkey, token, over), name="shmelim-lease", daemon=True
        )
        try:
            check_turn()
            renewing.start()
            outcome = _Outcome(DOUBTFUL, "the call to the contract was broken off")
            outcome = _call(slash, hotkey, self.context.environment.slash_outcome)
        finally:
            # Also on the way out of the process.
            over.set()
            attempt.outcome = outcome
            if outcome.what == NOT_MADE:
                self._failed_ms[_cause(attempt.debt)] = self.context.environment.now_ms()
            self._record(token)

    def _renew(self, hotkey: str, token: str, over: threading.Event) -> None:
        """Renew an attempt's lease until it is over."""
        while not over.wait(max(self.context.environment.slash_lease_s / _RENEWALS, _LEAST_RENEWAL)):
            try:
                self.context.state.renew_slash(hotkey, token)
            except Exception:
                # A server that is away gives each attempt one lease when it is back.
                text = "the lease of the slash of miner %s could not be renewed"
                _limited(logging.WARNING, "lease", text, hotkey, exc_info=True)

    def _prepared(self, debt: Mapping[str, Any]) -> Callable[[], Any]:
        prepare = functools.partial(self._prepare, self.context.contract, debt)
        try:
            return self.context.ask("the share to slash", prepare, debt["hotkey"])
        except StuckError as error:
            raise TimeoutError(str(error)) from error  # the contract was not called, and nothing is under way

    def _prepare(self, contract: Any, debt: Mapping[str, Any]) -> Callable[[], Any]:
        """Return the call to the contract; raises while nothing has moved yet, where it could not be made."""
        method = contract.slash_miner_collateral_proportion
        if not callable(method):
            raise TypeError(f"slash_miner_collateral_proportion is not callable, but {type(method).__name__}")
        hotkey, share = debt["hotkey"], debt["share"]
        if not debt["share_asked"]:
            # It could not be asked when the slash became owed, or an older version recorded it.
            share = checked_share(self.context.environment.slash_proportion(self._reason_of(debt)))
        options = {} if share is None else {"slash_proportion": share}
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):
            pass  # it has none that can be read
        else:
            signature.bind(hotkey, **options)
        if inspect.iscoroutinefunction(method):
            raise TypeError("slash_miner_collateral_proportion is a coroutine function, which nothing here runs")
        return functools.partial(method, hotkey, **options)

    def _reason_of(self, debt: Mapping[str, Any]) -> str:
        reason = debt["reason"]
        if reason is None:
            record = self.context.reader.get_elimination(debt["hotkey"])
            if record is None:
                raise LookupError("neither the debt nor an elimination says for which reason it is")
            reason = record["reason"]
        return str(reason)

    def _review(self, debt: Mapping[str, Any]) -> None:
        """Look at a slash that is being attempted, and record how it ended if the attempt is over."""
        hotkey, token = debt["hotkey"], debt["attempt"] or ""
        if token in _attempts:
            self._record(token)
        else:
            error = "the process that attempted it was not heard of any more"
            if self.context.state.doubt_slash(hotkey, token, error):
                self._report_doubt(hotkey, token, error)

    def record_ended(self) -> None:
        """Record how attempts ended that could not be recorded then; before a person's word of them counts."""
        for token, attempt in list(_attempts.items()):
            if attempt.whose is self:
                self._record(token)

    def _record(self, token: str) -> None:
        """Record how an attempt ended; what cannot be recorded now is kept for a later pass."""
        attempt, state, alerts = _attempts.get(token), self.context.state, self.context.alerts
        if attempt is None or attempt.outcome is None:
            return  # it is recorded, or under way
        debt, (what, said) = attempt.debt, attempt.outcome
        hotkey = debt["hotkey"]
        try:
            if what in (MADE, DECLINED):
                recorded = state.settle_debt(hotkey, SLASH, token, what == DECLINED, said)
            else:
                recorded = state.fail_debt(hotkey, SLASH, said or what, token, in_doubt=what == DOUBTFUL)
            contradicted = not recorded and self._is_contradicted(what, debt)
        except WISHES:
            raise
        except ServerAwayError:
            text = "slash of miner %s: %s, which could not be recorded yet"
            _limited(logging.ERROR, "unrecorded", text, hotkey, what, exc_info=True)
            return
        except BaseException as error:
            # The server is there: its health should say so.
            text = f"slash of miner {hotkey}: {what}, which could not be recorded yet"
            alerts.failed(_UNRECORDED, hotkey, text, error)
            return
        _attempts.pop(token, None)
        alerts.clear(_UNDER_WAY, hotkey)
        alerts.clear(_UNRECORDED, hotkey)
        if recorded and what in (MADE, DECLINED):
            alerts.clear(_NOT_MADE, hotkey)
            alerts.clear(_DOUBT, token)
            _log.info("slash of the collateral of miner %s: %s (%s)", hotkey, what, said)
        elif recorded and what == DOUBTFUL:
            self._report_doubt(hotkey, token, said)
        elif recorded:
            alerts.clear(_DOUBT, token)
            alerts.failed(_NOT_MADE, hotkey, f"slash of miner {hotkey} was not made: {said}")
        elif contradicted:
            # A person should know how it really ended.
            text = (
                f"slash of miner {hotkey}: {what} ({said}), but another outcome is on record."
                " Compare `shmelim debts` and `shmelim slash list` with the contract; `shmelim slash re-arm` lets"
                " him be slashed once more"
            )
            alerts.messages.send(text, "error")
            _log.error("%s", text)

    def _is_contradicted(self, outcome: str, debt: Mapping[str, Any]) -> bool:
        """Whether something else is on record of an attempt that ended so: a person said it meanwhile, perhaps.

        A doubt contradicts nothing.
        """
        if outcome == DOUBTFUL:
            return False
        slashes = self.context.state.get_slashes(debt["hotkey"])
        on_record = next((slash["outcome"] for slash in slashes if _cause(slash) == _cause(debt)), NOT_MADE)
        return on_record != outcome

    def _report_doubt(self, hotkey: str, token: str, error: str | None) -> None:
        argument = f"{'-- ' if hotkey.startswith('-') else ''}{shlex.quote(hotkey)}"
        text = f"slash of miner {hotkey}: nobody knows whether it was made ({error}). It is not repeated"
        remedy = f"look at the contract, then say what you found: shmelim slash resolve {argument}"
        self.context.alerts.clear(_NOT_MADE, hotkey)
        self.context.alerts.failed(_DOUBT, token, text, remedy=remedy)


def _cause(debt: Mapping[str, Any]) -> tuple[str, str, int]:
    return debt["hotkey"], debt["rule"], debt["registration"]


def checked_share(share: Any) -> float | None:
    """Return a share of the collateral, 0 to 1, or None; ValueError, TypeError: it is neither."""
    if share is None:
        return None
    # What NumPy has for True is no number either, and would be the whole.
    is_number = isinstance(share, (Real, Decimal)) and not isinstance(share, bool)
    if not is_number or not 0 <= (number := float(share)) <= 1:  # NaN is neither
        raise ValueError(f"the share to slash must be 0 to 1 or None, not {share!r}")
    return number


def _call(slash: Callable[[], Any], hotkey: str, outcome_of: Callable[[Any], str]) -> _Outcome:
    """Call the contract and say what became of it, by the environment's rule."""
    error: BaseException | None = None
    try:
        answer = slash()
    except BaseException as raised:
        _let_pass(raised)
        answer = error = raised
    # From here on the contract has answered: what fails now says nothing of the money.
    if error is None and is_unrun(answer):
        # What the method did before it made one, nobody knows.
        return _Outcome(DOUBTFUL, "the contract answered with a coroutine, which nobody runs; it must wait itself")
    # Not imported for this: without it nobody has a boolean of it.
    if isinstance(answer, getattr(sys.modules.get("numpy"), "bool_", ())):
        answer = bool(answer)
    said = f"the contract {f'answered {_shown(answer)}' if error is None else f'raised {named(error)}'}"
    try:
        what = outcome_of(answer)
    except BaseException as failure:
        _let_pass(failure)
        return _Outcome(DOUBTFUL, f"{said}, of which slash_outcome says nothing: {named(failure)}")
    if not (isinstance(what, str) and what in OUTCOMES):
        return _Outcome(DOUBTFUL, f"{said}, which slash_outcome calls {_shown(what)}")
    if error is not None and what == DOUBTFUL:
        _log.error("the contract failed to slash miner %s", hotkey, exc_info=error)
    return _Outcome(what, said)


def _let_pass(error: BaseException) -> None:
    """Raise what wishes to end the process, in a thread that may do so."""
    if isinstance(error, WISHES) and not is_left_to_a_thread():
        raise error


def _shown(answer: Any) -> str:
    try:
        text = sendable(repr(answer)[:_SHOWN])
    except Exception as error:
        text = f"that cannot be shown: {named(error)}"
    return f"{type(answer).__name__} {text}"
