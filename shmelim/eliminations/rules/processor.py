"""Who is eliminated, and when: the rules in their order, in one pass called a tick.

A tick runs in the process that holds the collaborators. It reads from the table, decides, and writes through the
server, so it is the same whether the server lives in this process or in another.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Concatenate, Final, ParamSpec, TypeAlias, TypeVar

from shmelim.eliminations.debts.states import CHALLENGE_PERIOD, DRAWDOWN, PERF_LEDGER, POSITIONS, SLASH
from shmelim.eliminations.rules import deadlines
from shmelim.eliminations.rules.alerts import ENDS_A_TICK, OvertakenError
from shmelim.eliminations.rules.challenge import ChallengePeriod
from shmelim.eliminations.rules.closing import Closing
from shmelim.eliminations.rules.drawdown import fallen
from shmelim.eliminations.rules.expiry import Expiry
from shmelim.eliminations.rules.judging import Candidate, Judging, Outcome
from shmelim.eliminations.rules.membership import Membership
from shmelim.eliminations.rules.perf_ledger import liquidated
from shmelim.eliminations.rules.slashing import Slashing, checked_share
from shmelim.eliminations.rules.tick import Context, Tick
from shmelim.eliminations.rules.zombies import zombies
from shmelim.errors import NoCollaboratorsError
from shmelim.system.logs import LimitedLog
from shmelim.system.text import get_logger

P = ParamSpec("P")
R = TypeVar("R")
Step: TypeAlias = Callable[[Tick], None]
Candidates: TypeAlias = Iterator[Candidate]

_RULES: Final = {
    "perf-ledger elimination": PERF_LEDGER,
    "challenge-period elimination": CHALLENGE_PERIOD,
    "drawdown elimination": DRAWDOWN,
}
_DEPARTED: Final = "departed hotkeys"
_AGAIN_MS: Final = 10_000  # until a tick that failed is repeated the first time
_MOST_DOUBLED: Final = 20

_log = get_logger("shmelim.processing")
_limited = LimitedLog(_log)


class EliminationProcessor:
    """Eliminates miners by the rules, and settles what eliminations owe.

    Any of the collaborators may be replaced at any time; the next use takes the new one. With `is_backtesting`
    there is no first refresh, nobody is slashed, and the miners' directories make no zombies and are not removed:
    collateral and directories are those of a living validator.

    Any thread may call any method. Two ticks at once do nothing twice: who comes first records an elimination,
    positions are closed under their lock, and there is one attempt at a slash.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._last_update_ms = 0
        # A tick of which a step failed is repeated before the interval is over, with growing pauses.
        self._failed_in_a_row = 0
        self._membership = membership = Membership(context)
        self._judging = Judging(context)
        self._closing = Closing(context)
        self._slashing = Slashing(context)
        self._within: set[tuple[int, int]] = set()  # the threads that are within a tick
        self._expiry = expiry = Expiry(context, membership)
        challenge = self._challenge = ChallengePeriod(context)
        rule = functools.partial
        # First all eliminations are recorded, then positions closed, then slashes made.
        self._steps: dict[str, Step] = {
            _DEPARTED: lambda _tick: self._departed(),
            "first refresh": self._first_refresh,
            "perf-ledger eliminations": rule(
                self._apply, "perf-ledger elimination", lambda tick: liquidated(tick, membership, expiry)
            ),
            "challenge-period eliminations": rule(
                self._apply, "challenge-period elimination", challenge.failed, then=challenge.forget
            ),
            "drawdown eliminations": rule(
                self._apply, "drawdown elimination", lambda tick: fallen(tick, membership)
            ),
            "zombies": rule(self._apply, "zombie elimination", lambda tick: zombies(tick, membership)),
            "positions": self._closing.settle_all,
            "slashes": self._slashing.settle_all,
            "deletion of expired eliminations": expiry.delete,
        }

    def refresh_allowed(self, refresh_interval_ms: int) -> bool:
        """Whether more than so many milliseconds have passed since the last tick; in direct mode always."""
        passed_ms = self.context.environment.now_ms() - self._last_update_ms
        # A clock that was set back would otherwise stop everything until it is there again.
        return self.context.is_direct or passed_ms > refresh_interval_ms or passed_ms < 0

    def set_last_update_time(self, skip_message: bool = False) -> None:
        """Note that a tick was made now."""
        self._last_update_ms = self.context.environment.now_ms()
        if not skip_message:
            _log.debug("processed the eliminations")

    def get_last_update_time_ms(self) -> int:
        """Return when the last tick was made, in milliseconds since 1970, UTC; 0 if there was none."""
        return self._last_update_ms

    def process_eliminations(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Make a tick, if one is due; StateUnavailableError if the server does not answer or cannot store it.

        `position_locks` are the locks to use, by default the collaborators'. `iteration_epoch` is what
        ``sync_epoch`` was when the caller began, by default what it is now. So too for each single step.
        """
        self.tick(position_locks, iteration_epoch)

    def tick(self, position_locks: Any = None, iteration_epoch: Any = None) -> bool:
        """As :meth:`process_eliminations`; False if a step failed, and the next tick should come soon.

        A step that fails stops none of the later ones. A sync that comes meanwhile ends the tick, and the next
        one is due at once.
        """
        with self._entered() as is_first:
            return not is_first or self._tick(position_locks, iteration_epoch)

    @contextlib.contextmanager
    def _entered(self) -> Iterator[bool]:
        """Whether this thread is not within a tick already: one of the validator's objects may call back."""
        here = os.getpid(), threading.get_ident()  # a child that is forked in a tick has the same thread
        if here in self._within or deadlines.is_within(self.context):
            text = "a tick was asked for from within a tick, by one of the validator's objects: left to that one"
            _limited(logging.WARNING, "within", text)
            yield False
            return
        self._within.add(here)
        try:
            yield True
        finally:
            self._within.discard(here)

    def _tick(self, position_locks: Any, iteration_epoch: Any) -> bool:
        context, alerts = self.context, self.context.alerts
        self._slashing.record_ended()
        interval_ms = context.environment.check_interval_ms
        if self._failed_in_a_row:
            interval_ms = min(interval_ms, _AGAIN_MS << min(self._failed_in_a_row - 1, _MOST_DOUBLED))
        if not (context.is_backtesting or self.refresh_allowed(interval_ms) or self._challenge.is_waiting()):
            self.glance()
            return True
        alerts.messages.send_again()
        alerts.messages.report_undelivered(alerts)
        tick = context.begin(position_locks, iteration_epoch)
        well = True
        for name, step in self._steps.items():
            if context.is_stopping():
                return True
            try:
                step(tick)
            except OvertakenError as overtaken:
                _limited(logging.WARNING, "overtaken", "the rest of this tick is left to the next: %s", overtaken)
                context.report_changes(at_once=True)
                return well
            except ENDS_A_TICK:
                raise
            except BaseException as error:
                well = False
                alerts.failed("step", name, f"eliminations: {name} failed", error)
            else:
                alerts.clear("step", name)
        # Only here, after it ran: a tick that was not due says nothing of what fails in one that is.
        alerts.clear("loop", "tick")
        self._failed_in_a_row = 0 if well else self._failed_in_a_row + 1
        self.set_last_update_time()
        if well:
            context.whole_ms = self._last_update_ms
        context.report()
        return well

    def glance(self, *, is_first: bool = False) -> None:
        """Look at the metagraph outside of a tick: who has returned is registered at once.

        At the first look, its list may not be there yet.
        """
        with self.context.alerts.about("step", _DEPARTED, f"eliminations: {_DEPARTED} failed"):
            try:
                self._departed()
            except TypeError as error:
                if not is_first:
                    raise
                _log.warning("the metagraph has no list of hotkeys yet: %s", error)
        self.context.report_changes(at_once=is_first)

    def _alone(self, name: str, position_locks: Any, epoch: Any) -> None:
        """Make one step outside of a tick, and settle what is owed then."""
        with self._entered() as is_first:
            if not is_first:
                return
            self._slashing.record_ended()
            tick = self.context.begin(position_locks, epoch)
            try:
                for each in dict.fromkeys((name, "positions", "slashes")):
                    self._steps[each](tick)
            except OvertakenError as overtaken:
                _limited(logging.WARNING, "overtaken", "broken off: %s", overtaken)

    def handle_departed(self) -> list[str]:
        """Tell the server who is registered, if that changed; returns the hotkeys whose departure was recorded."""
        return self.context.ask("metagraph", self._membership.look)

    def settle_debts(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Settle what eliminations owe since earlier ticks."""
        self._alone("positions", position_locks, iteration_epoch)

    def handle_first_refresh(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Close the positions that are open of miners already eliminated; once."""
        self._alone("first refresh", position_locks, iteration_epoch)

    def handle_perf_ledger_eliminations(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Eliminate the miners whose ledger shows that they were liquidated."""
        self._alone("perf-ledger eliminations", position_locks, iteration_epoch)

    def handle_challenge_period_eliminations(
        self, position_locks: Any = None, iteration_epoch: Any = None
    ) -> None:
        """Eliminate the miners who failed the challenge period."""
        self._alone("challenge-period eliminations", position_locks, iteration_epoch)

    def handle_mdd_eliminations(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Eliminate the scored miners whose drawdown is too large."""
        self._alone("drawdown eliminations", position_locks, iteration_epoch)

    def handle_zombies(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Eliminate the miners who have a directory and are not in the metagraph."""
        self._alone("zombies", position_locks, iteration_epoch)

    def delete_expired(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Delete what is left of miners who were eliminated long ago and have left the metagraph."""
        self._alone("deletion of expired eliminations", position_locks, iteration_epoch)

    def handle_eliminated_miner(
        self,
        hotkey: str,
        trade_pair_to_price_source_used_for_elimination_check: Mapping[Any, Any] | None = None,
        position_locks: Any = None,
        iteration_epoch: Any = None,
    ) -> None:
        """Delete the limit orders and close the open positions of a miner who is eliminated; else do nothing.

        The price sources are by trade pair; those that are missing are made from the record's ``price_info``.
        """
        context, record = self.context, self.context.reader.get_elimination(hotkey)
        if record is None:
            return
        if (orders := context.collaborators.limit_order_manager) is not None:
            try:
                self._closing.delete_limit_orders(orders, hotkey)
            except ENDS_A_TICK:
                raise
            except BaseException:
                _log.exception("the limit orders of eliminated miner %s could not be deleted", hotkey)
        if context.collaborators.position_manager is not None:
            tick = context.begin(position_locks, iteration_epoch)
            tick.price_sources = trade_pair_to_price_source_used_for_elimination_check
            self._closing.close(hotkey, record, tick)

    def _departed(self) -> None:
        def look() -> int:
            self._membership.look()
            return self._membership.unbelieved()

        if lost := self.context.ask("metagraph", look):
            text = f"{lost} hotkeys are missing from the metagraph at once, and are not recorded as departed"
            self.context.alerts.failed("departures", "the metagraph", text)
        else:
            self.context.alerts.clear("departures", "the metagraph")

    def _first_refresh(self, tick: Tick) -> None:
        context, positions = self.context, self.context.collaborators.position_manager
        if context.is_backtesting or positions is None or context.state.get_first_refresh_ran():
            context.alerts.clear_others("first refresh", ())
            return
        # Those whose positions are owed are closed as debts.
        owing = {debt["hotkey"] for debt in context.state.get_debts() if debt["kind"] == POSITIONS}
        rows = {hk: row for hk, row in context.reader.get_eliminations_dict().items() if hk not in owing}

        def look() -> Mapping[str, Any]:
            of_many = getattr(positions, "get_positions_for_hotkeys", None)
            if of_many is None:
                return dict.fromkeys(rows)  # each is asked for when it is closed
            found = dict(of_many(list(rows), only_open_positions=True))
            return {hotkey: listed for hotkey, listed in found.items() if listed and hotkey in rows}

        miners = context.ask("first refresh", look).items()

        def close(hotkey: str, listed: Any) -> None:
            self._closing.close(hotkey, rows[hotkey], tick, listed)

        if context.alerts.each("first refresh", miners, close, context.is_stopping) == set():
            context.state.set_first_refresh_ran(True)

    def _apply(
        self,
        kind: str,
        look: Callable[[Tick], Candidates],
        tick: Tick,
        then: Callable[[Tick, set[str]], None] | None = None,
    ) -> None:
        """Record all that a rule finds; what it cannot judge or record is that miner's failure."""
        context = self.context
        found = self._judging.outcomes(kind, context.ask(kind, lambda: list(look(tick))))
        failed = context.alerts.each(kind, found, functools.partial(self._record, kind, tick), context.is_stopping)
        if then is not None and found and failed is not None:
            forget = functools.partial(then, tick, failed)
            context.ask(kind, forget)

    def _record(self, kind: str, tick: Tick, hotkey: str, found: Outcome) -> None:
        """Record an elimination with what it owes, in one transaction; the first reason stays."""
        if isinstance(found, BaseException):
            raise found
        if self.context.reader.is_hotkey_eliminated(hotkey):
            return
        tick.check()
        record = found.record
        owed = self._owed(slash=found.slash)
        share, asked = self._share_of(record["reason"]) if SLASH in owed else (None, False)
        rule = _RULES.get(kind)
        outcome = self.context.state.eliminate(hotkey, record, owed, tick.replacements, rule, share, asked)
        if outcome == "superseded":
            tick.superseded = True
            tick.check()
        if outcome == "added":
            _log.info("eliminated miner %s: %s (%s)", hotkey, record["reason"], record.get("dd"))

    def _share_of(self, reason: str) -> tuple[float | None, bool]:
        """Return the share that is taken for a reason, and whether the environment could say it.

        An elimination does not wait for that: else it is asked again when the slash is made.
        """
        proportion = self.context.environment.slash_proportion
        try:
            return self.context.ask("the share to slash", lambda: checked_share(proportion(reason))), True
        except ENDS_A_TICK:
            raise
        except BaseException as error:
            _limited(logging.ERROR, "share", "the share for %s is not known yet: %s", reason, error)
            return None, False

    def _owed(self, *, slash: bool) -> list[str]:
        """Return what an elimination owes.

        A slash also while there is no contract manager. Limit orders and positions where there is, or was,
        somebody who has them: else there are none.
        """
        owed = self.context.owed()
        return [*owed, SLASH] if slash and not self.context.is_backtesting else owed


def processed(method: Callable[Concatenate[EliminationProcessor, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Return the processor's method, for an object that has a ``_processor``, or None.

    Then the object's ``_follow()`` has the files show what was changed, where somebody waits for that.
    """

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._processor is None:
            raise NoCollaboratorsError(
                f"{method.__name__} cannot run in the server's process, which has no metagraph and no positions",
                hint=f"call EliminationManager.{method.__name__} in the process that holds them",
            )
        try:
            return method(self._processor, *args, **kwargs)
        finally:
            self._follow()

    return call
