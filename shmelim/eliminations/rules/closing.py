"""Closing an eliminated miner's positions, and deleting the limit orders.

A position is closed by a flat order at the time of the elimination, so that every validator that eliminates the
miner writes the same. Closing is idempotent: what is closed already is left alone, so it is repeated until all of
it went well. Each position is closed in a thread of its own, which asks before each effect whether its turn is
still its own: one whose lock is never released keeps neither another miner's nor the same miner's others open.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from shmelim.eliminations.debts.states import LIMIT_ORDERS, OWED, POSITIONS
from shmelim.eliminations.rules.alerts import ENDS_A_TICK, named
from shmelim.eliminations.rules.deadlines import StuckError
from shmelim.eliminations.rules.tick import WHO, Context, Tick
from shmelim.errors import ShmelimError
from shmelim.system.clock import monotonic
from shmelim.system.coroutines import carried_out, truth
from shmelim.system.logs import LimitedLog
from shmelim.system.text import get_logger

_QUEUES_PART: Final = 4
_MOST_HANGING: Final = 4  # of a miner's positions
_LEAST_PART: Final = 4

_log = get_logger("shmelim.processing")
_limited = LimitedLog(_log)


class NotClosedError(ShmelimError):
    """The validator's own objects did not do what they were asked for."""


@dataclass(eq=False)
class Closing:
    """Settles what eliminations owe in limit orders and positions."""

    context: Context
    # Positions that were closed in memory and could not be saved, as (hotkey, uuid) -> pair. A manager that hands
    # out its own objects shows them as closed from then on, though nothing of it is on disk.
    unsaved: dict[tuple[str, str], str] = field(default_factory=dict)

    def settle_all(self, tick: Tick) -> None:
        """Settle everything of the kind that is owed; a failure is recorded and reported, and it stays owed."""
        context = self.context
        debts = [debt for debt in tick.look_at_debts() if debt["kind"] in WHO and debt["due"]]
        for kind in WHO:
            context.alerts.clear_others(kind, {debt["hotkey"] for debt in debts if debt["kind"] == kind})
        for debt in debts:
            if context.is_stopping():
                return
            tick.check()
            record = context.reader.get_elimination(debt["hotkey"])
            if record is not None and debt["state"] == OWED:  # else taken back meanwhile, and the debt with it
                self._settle(debt["hotkey"], debt["kind"], record, tick)

    def _settle(self, hotkey: str, kind: str, record: Mapping[str, Any], tick: Tick) -> None:
        context = self.context
        try:
            manager = getattr(context.collaborators, WHO[kind])
            if manager is None:
                text = f"{kind.replace('_', ' ')} of {hotkey} are owed: there is no {WHO[kind]}"
                context.alerts.failed(kind, hotkey, text)
                return
            if kind == LIMIT_ORDERS:
                deleted = self.delete_limit_orders(manager, hotkey)
                _log.info("deleted the limit orders of eliminated miner %s: %s", hotkey, deleted)
            else:
                self.close(hotkey, record, tick)
            context.state.settle_debt(hotkey, kind)
            context.alerts.clear(kind, hotkey)
        except ENDS_A_TICK:
            raise
        except BaseException as error:
            context.alerts.failed(kind, hotkey, f"{kind} of eliminated miner {hotkey} failed", error)
            context.state.fail_debt(hotkey, kind, named(error))

    def delete_limit_orders(self, manager: Any, hotkey: str) -> Any:
        """Delete a miner's limit orders; return what the manager answers."""
        deleted = self.context.ask(
            LIMIT_ORDERS, lambda: manager.delete_all_limit_orders_for_hotkey(hotkey), hotkey
        )
        return carried_out(deleted, "delete_all_limit_orders_for_hotkey")

    def close(
        self, hotkey: str, record: Mapping[str, Any], tick: Tick, positions: Iterable[Any] | None = None
    ) -> None:
        """Close a miner's open positions, or those given, and those that could not be saved before.

        Once all were tried, the first error is raised. After OvertakenError, which says that a sync came, nothing
        more is saved. Together they have ``call_deadline_s``, and each at least a part of it; once several hang,
        his others wait for another tick.
        """
        context = self.context
        deadline = monotonic() + context.environment.call_deadline_s
        found, first = context.ask(POSITIONS, lambda: self._found(hotkey, positions), hotkey)
        hanging, absent = 0, set()
        for uuid, pair in found.items():
            seconds = max(deadline - monotonic(), context.environment.call_deadline_s / _LEAST_PART)
            close = functools.partial(self._close_one, hotkey, uuid, pair, record, tick)
            try:
                if not context.ask(POSITIONS, close, f"{hotkey}, {uuid}", seconds):
                    absent.add(uuid)
            except ENDS_A_TICK:
                raise
            except BaseException as error:
                text = "position %s of miner %s could not be closed: %s"
                _limited(logging.WARNING, "open", text, uuid, hotkey, error)
                first = first or error
                hanging += isinstance(error, StuckError)
                if hanging == _MOST_HANGING:
                    break
        if absent and first is None:
            context.ask(POSITIONS, lambda: self._expect_gone(hotkey, absent), hotkey)
        if first is not None:
            raise first

    def _expect_gone(self, hotkey: str, absent: Container[Any]) -> None:
        """Raise NotClosedError if the manager, which did not find one by its uuid, lists it as open."""
        manager: Any = self.context.collaborators.position_manager
        for position in manager.get_positions_for_one_hotkey(hotkey, only_open_positions=True):
            if position.position_uuid in absent and not _is_closed(position):
                raise NotClosedError(
                    f"get_miner_position_by_uuid does not find position {position.position_uuid!r}, listed as open"
                )

    def _found(self, hotkey: str, positions: Iterable[Any] | None) -> tuple[dict[str, str], BaseException | None]:
        """Return the trade pair of each position to be closed, by its uuid; and why one cannot be read."""
        if positions is None:
            manager: Any = self.context.collaborators.position_manager
            positions = manager.get_positions_for_one_hotkey(hotkey, only_open_positions=True)
        first: BaseException | None = None
        found: dict[str, str] = {}
        for position in positions:
            try:
                found[position.position_uuid] = position.trade_pair.trade_pair_id
            except ENDS_A_TICK:
                raise
            except BaseException as error:
                _limited(logging.WARNING, "unreadable", "a position of miner %s cannot be read: %s", hotkey, error)
                first = first or error
        found |= {uuid: pair for (owner, uuid), pair in list(self.unsaved.items()) if owner == hotkey}
        return found, first

    def _close_one(self, hotkey: str, uuid: str, pair: str, record: Mapping[str, Any], tick: Tick) -> bool:
        """Close a position, unless it is closed; False if it is not there any more."""
        tick.check()
        collaborators: Any = self.context.collaborators
        with tick.position_locks.get_lock(hotkey, pair):
            manager = collaborators.position_manager
            # Read again: orders may have come in until the lock was ours.
            position = manager.get_miner_position_by_uuid(hotkey, uuid)
            if position is None or (_is_closed(position) and (hotkey, uuid) not in self.unsaved):
                self.unsaved.pop((hotkey, uuid), None)
                return position is not None
            own = collaborators.live_price_fetcher
            fetcher = self.context.environment.live_price_fetcher if own is None else own
            was_open = not _is_closed(position)
            order = self._flat_order(position, record, fetcher, tick) if was_open else None
            if was_open and order is None:
                raise NotClosedError(f"generate_fake_flat_order returned None for position {uuid} ({pair})")
            # After the price, which may be long in coming, and before anything is changed: the position may be
            # the manager's own object, and what a sync has taken back must not stay closed in it.
            tick.check()
            self.unsaved[hotkey, uuid] = pair
            if was_open:
                carried_out(position.add_order(order, fetcher), "add_order")
                if not _is_closed(position):
                    raise NotClosedError(f"position {uuid} ({pair}) is open after its flat order")
            saved = manager.save_miner_position(position, delete_open_position_if_exists=True)
            carried_out(saved, "save_miner_position")
            self.unsaved.pop((hotkey, uuid), None)
        _log.info("closed position %s (%s) of eliminated miner %s", uuid, pair, hotkey)
        # Outside of the lock, as the queue may be full.
        queue = collaborators.shared_queue_websockets
        if queue is not None:
            with self.context.alerts.about(
                "websockets", "the queue", f"position {uuid} of miner {hotkey} not told"
            ):
                message = position.to_websocket_dict()
                # A part of the time that the miner's positions have together: a full queue keeps none open.
                seconds = self.context.environment.call_deadline_s / _QUEUES_PART
                put = functools.partial(queue.put, message)
                carried_out(self.context.ask("websockets", put, seconds=seconds), "put")
        return True

    def _flat_order(self, position: Any, record: Mapping[str, Any], fetcher: Any, tick: Tick) -> Any:
        environment = self.context.environment
        eliminated_ms = record["elimination_initiated_time_ms"]
        time_ms = eliminated_ms if environment.is_plausible(eliminated_ms) else environment.now_ms()
        if position.orders:
            # Two orders at one time would have no order.
            time_ms = max(time_ms, position.orders[-1].processed_ms + 1)
        source = tick.price_sources.get(position.trade_pair) if tick.price_sources else None
        if source is None:
            prices = record.get("price_info") or {}
            source = environment.price_source(position.trade_pair, prices, time_ms)
        return position.generate_fake_flat_order(position, time_ms, fetcher, source)


def _is_closed(position: Any) -> bool:
    return truth(position.is_closed_position, "is_closed_position")
