"""Closing an eliminated miner's positions.

A position is closed by a flat order at the time of the elimination, so that every validator that eliminates the
miner writes the same. Closing is idempotent: what is closed already is left alone, so it is repeated until a whole
pass went well.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shmelim.eliminations.rules.alerts import WISHES, OvertakenError
from shmelim.eliminations.rules.iteration import Context, Iteration
from shmelim.system.logs import LimitedLog

_log = logging.getLogger("shmelim.processing")
_limited = LimitedLog(_log)


@dataclass(eq=False)
class Flattening:
    """Closes positions."""

    context: Context
    # Positions that were closed in memory and could not be saved, as (hotkey, uuid) -> pair. A manager that hands
    # out its own objects shows them as closed from then on, though nothing of it is on disk.
    unsaved: dict[tuple[str, str], str] = field(default_factory=dict)

    def close(
        self,
        hotkey: str,
        record: Mapping[str, Any],
        iteration: Iteration,
        positions: Iterable[Any] | None = None,
    ) -> None:
        """Close a miner's open positions, or those given, and those that could not be saved before.

        Once all were tried, the first error is raised. After OvertakenError, which says that a sync came, nothing
        more is saved.
        """
        if positions is None:
            manager: Any = self.context.collaborators.position_manager
            positions = manager.get_positions_for_one_hotkey(hotkey, only_open_positions=True)
        first: BaseException | None = None
        found: dict[str, str] = {}
        for position in positions:
            try:
                found[position.position_uuid] = position.trade_pair.trade_pair_id
            except Exception as error:
                _limited(logging.WARNING, "unreadable", "a position of miner %s cannot be read: %s", hotkey, error)
                first = first or error
        found |= {uuid: pair for (owner, uuid), pair in list(self.unsaved.items()) if owner == hotkey}
        for uuid, pair in found.items():
            iteration.check()
            try:
                self._close_one(hotkey, uuid, pair, record, iteration)
            except (OvertakenError, *WISHES):
                raise
            except BaseException as error:
                text = "position %s of miner %s could not be closed: %s"
                _limited(logging.WARNING, "open", text, uuid, hotkey, error)
                first = first or error
        if first is not None:
            raise first

    def _close_one(
        self, hotkey: str, uuid: str, pair: str, record: Mapping[str, Any], iteration: Iteration
    ) -> None:
        collaborators: Any = self.context.collaborators
        locks = iteration.position_locks
        with contextlib.nullcontext() if locks is None else locks.get_lock(hotkey, pair):
            manager = collaborators.position_manager
            # Read again: orders may have come in until the lock was ours.
            position = manager.get_miner_position_by_uuid(hotkey, uuid)
            if position is None or (position.is_closed_position and (hotkey, uuid) not in self.unsaved):
                self.unsaved.pop((hotkey, uuid), None)
                return
            own = collaborators.live_price_fetcher
            fetcher = self.context.environment.live_price_fetcher if own is None else own
            order = None if position.is_closed_position else self._flat_order(position, record, fetcher, iteration)
            # After the price, which may be long in coming, and before anything is changed: the position may be
            # the manager's own object, and what a sync has taken back must not stay closed in it.
            iteration.check()
            self.unsaved[hotkey, uuid] = pair
            if order is not None:
                position.add_order(order, fetcher)
            manager.save_miner_position(position, delete_open_position_if_exists=True)
            self.unsaved.pop((hotkey, uuid), None)
            queue, message = collaborators.shared_queue_websockets, None
            if queue is not None:
                with _only_logged("position %s of miner %s could not be made a message", uuid, hotkey):
                    message = position.to_websocket_dict()
        _log.info("closed position %s (%s) of eliminated miner %s", uuid, pair, hotkey)
        # Outside of the lock, as the queue may be full.
        if message is not None:
            with _only_logged("the WebSocket queue was not told of closed position %s of miner %s", uuid, hotkey):
                queue.put(message)

    def _flat_order(self, position: Any, record: Mapping[str, Any], fetcher: Any, iteration: Iteration) -> Any:
        environment = self.context.environment
        eliminated_ms = record["elimination_initiated_time_ms"]
        time_ms = eliminated_ms if environment.is_plausible(eliminated_ms) else environment.now_ms()
        if position.orders:
            # Two orders at one time would have no order.
            time_ms = max(time_ms, position.orders[-1].processed_ms + 1)
        given = iteration.price_sources
        source = given.get(position.trade_pair) if given else None
        if source is None:
            prices = record.get("price_info") or {}
            source = environment.price_source(position.trade_pair, prices, time_ms)
        return position.generate_fake_flat_order(position, time_ms, fetcher, source)


@contextlib.contextmanager
def _only_logged(text: str, *args: object) -> Iterator[None]:
    try:
        yield
    except Exception:
        _limited(logging.ERROR, text, text, *args, exc_info=True)
