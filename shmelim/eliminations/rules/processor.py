"""Who is eliminated, and when: the rules in their order, in one pass called a tick.

A tick runs in the process that holds the collaborators. It reads from the table, decides, and writes through the
server, so it is the same whether the server lives in this process or in another.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from shmelim.eliminations.debts.states import POSITIONS
from shmelim.eliminations.record import EliminationReason, normalise
from shmelim.eliminations.rules.alerts import ENDS_A_PASS, OvertakenError
from shmelim.eliminations.rules.challenge import ChallengePeriod
from shmelim.eliminations.rules.expiry import Expiry
from shmelim.eliminations.rules.iteration import Context, Iteration
from shmelim.eliminations.rules.judging import DrawdownRule
from shmelim.eliminations.rules.membership import Membership
from shmelim.eliminations.rules.settling import Settling
from shmelim.errors import NoCollaboratorsError
from shmelim.system.logs import LimitedLog

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger("shmelim.processing")
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
        self._membership = Membership(context)
        self._settling = Settling(context)
        self._expiry = Expiry(context, self._membership)
        self._challenge = ChallengePeriod(context, self._settling)
        self._drawdown = DrawdownRule(context, self._settling, self._membership.roster)

    def refresh_allowed(self, refresh_interval_ms: int) -> bool:
        """Whether more than so many milliseconds have passed since the last tick; in direct mode always."""
        passed_ms = self.context.environment.now_ms() - self._last_update_ms
        # A clock that was set back would otherwise stop everything until it is there again.
        always = bool(getattr(self.context.collaborators, "running_unit_tests", False))
        return always or passed_ms > refresh_interval_ms or passed_ms < 0

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
        context, alerts = self.context, self.context.alerts
        if not self.refresh_allowed(context.environment.check_interval_ms) and not self._challenge.is_waiting():
            return True
        alerts.messages.send_again()
        iteration = context.begin(position_locks, iteration_epoch)
        steps: dict[str, Callable[[Iteration], None]] = {
            "departed hotkeys": self._departed,
            "debts": self._settling.settle_all,
            "first refresh": self._first_refresh,
            "perf-ledger eliminations": self._perf_ledger,
            "challenge-period eliminations": self._challenge.apply,
            "drawdown eliminations": self._drawdown.apply,
            "zombies": self._zombies,
            "deletion of expired eliminations": self._expiry.delete,
        }
        well = True
        for name, step in steps.items():
            if context.is_stopping():
                return True
            try:
                step(iteration)
            except OvertakenError as overtaken:
                _limited(logging.WARNING, "overtaken", "the rest of this tick is left to the next: %s", overtaken)
                return well
            except ENDS_A_PASS:
                raise
            except BaseException as error:
                well = False
                alerts.failed("step", name, f"eliminations: {name} failed", error)
            else:
                alerts.clear("step", name)
        # Only here, after it ran: a tick that was not due says nothing of what fails in one that is.
        alerts.clear("loop", "tick")
        if well:
            self.set_last_update_time()
        return well

    def _alone(self, step: Callable[[Iteration], None], position_locks: Any, epoch: Any) -> None:
        """Make one step outside of a tick."""
        try:
            step(self.context.begin(position_locks, epoch))
        except OvertakenError as overtaken:
            _limited(logging.WARNING, "overtaken", "broken off: %s", overtaken)

    def handle_departed(self) -> list[str]:
        """Tell the server who is registered, if that changed; returns the hotkeys whose departure was recorded."""
        return self._membership.look()

    def settle_debts(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Settle what eliminations owe since earlier ticks."""
        self._alone(self._settling.settle_all, position_locks, iteration_epoch)

    def handle_first_refresh(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Close the positions that are open of miners already eliminated; once."""
        self._alone(self._first_refresh, position_locks, iteration_epoch)

    def handle_perf_ledger_eliminations(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Eliminate the miners whose ledger shows that they were liquidated."""
        self._alone(self._perf_ledger, position_locks, iteration_epoch)

    def handle_challenge_period_eliminations(
        self, position_locks: Any = None, iteration_epoch: Any = None
    ) -> None:
        """Eliminate the miners who failed the challenge period."""
        self._alone(self._challenge.apply, position_locks, iteration_epoch)

    def handle_mdd_eliminations(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Eliminate the scored miners whose drawdown is too large."""
        self._alone(self._drawdown.apply, position_locks, iteration_epoch)

    def handle_zombies(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Eliminate the miners who have a directory and are not in the metagraph."""
        self._alone(self._zombies, position_locks, iteration_epoch)

    def delete_expired(self, position_locks: Any = None, iteration_epoch: Any = None) -> None:
        """Delete what is left of miners who were eliminated long ago and have left the metagraph."""
        self._alone(self._expiry.delete, position_locks, iteration_epoch)

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
        collaborators, record = self.context.collaborators, self.context.reader.get_elimination(hotkey)
        if record is None:
            return
        if collaborators.limit_order_manager is not None:
            try:
                collaborators.limit_order_manager.delete_all_limit_orders_for_hotkey(hotkey)
            except Exception:
                _log.exception("the limit orders of eliminated miner %s could not be deleted", hotkey)
        if collaborators.position_manager is not None:
            iteration = self.context.begin(position_locks, iteration_epoch)
            iteration.price_sources = trade_pair_to_price_source_used_for_elimination_check
            self._settling.flattening.close(hotkey, record, iteration)

    def _departed(self, _iteration: Iteration) -> None:
        self._membership.look()
        if lost := self._membership.unbelieved():
            text = (
                f"{lost} hotkeys are missing from the metagraph at once, and are not recorded as departed."
                " If they are really gone: shmelim missing --accept"
            )
            self.context.alerts.failed("departures", "the metagraph", text)
        else:
            self.context.alerts.clear("departures", "the metagraph")

    def _first_refresh(self, iteration: Iteration) -> None:
        context, positions = self.context, self.context.collaborators.position_manager
        if context.is_backtesting or positions is None or context.state.get_first_refresh_ran():
            return
        # Those whose positions are owed are closed as debts.
        owing = {debt["hotkey"] for debt in context.state.get_debts() if debt["kind"] == POSITIONS}
        rows = {hk: row for hk, row in context.reader.get_eliminations_dict().items() if hk not in owing}
        found = positions.get_positions_for_hotkeys(list(rows), only_open_positions=True)
        miners = ((hotkey, listed) for hotkey, listed in found.items() if listed and hotkey in rows)

        def close(hotkey: str, listed: Any) -> None:
            self._settling.flattening.close(hotkey, rows[hotkey], iteration, listed)

        if context.alerts.each("first refresh", miners, close, context.is_stopping) == set():
            context.state.set_first_refresh_ran(True)

    def _perf_ledger(self, iteration: Iteration) -> None:
        if (ledgers := self.context.ledgers) is None:
            return
        eliminated = self._membership.roster.now().eliminated
        rows = ((_whose(row, place), row) for place, row in enumerate(ledgers.get_perf_ledger_eliminations()))
        miners = (one for one in rows if one[0] not in eliminated)

        def eliminate(_hotkey: str, row: Any) -> None:
            record = normalise(row)
            # Ledgers still name miners who, with their eliminations, are long gone.
            if not self._expiry.is_due(record):
                self._settling.eliminate(record, iteration)

        self.context.alerts.each("perf-ledger elimination", miners, eliminate, self.context.is_stopping)

    def _zombies(self, iteration: Iteration) -> None:
        context = self.context
        if context.is_backtesting:
            return
        # Those eliminated already, and the one that is not a zombie.
        known = {*self._membership.roster.now().eliminated, context.environment.development_hotkey}
        missing = self._membership.missing(hk for hk in context.environment.miner_hotkeys() if hk not in known)

        def eliminate(hotkey: str, _: None) -> None:
            self._settling.eliminate_now(hotkey, EliminationReason.ZOMBIE, None, iteration, slash=False)

        context.alerts.each("zombie elimination", ((hk, None) for hk in missing), eliminate, context.is_stopping)


def _whose(row: Any, place: int) -> str:
    """Return whose a row is, for a message, also where it does not say."""
    hotkey = row.get("hotkey") if hasattr(row, "get") else None
    return hotkey if isinstance(hotkey, str) else f"number {place} of the list"


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
