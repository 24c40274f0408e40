"""Closing an eliminated miner's positions.

A position is closed by a flat order at the time of the elimination, so that every validator that eliminates the
miner writes the same. Closing is idempotent: what is closed already is left alone, so it is repeated until a whole
pass went well.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shmelim.eliminations.calls import ProcessingCalls
from shmelim.eliminations.rules.alerts import is_failure
from shmelim.eliminations.rules.iteration import Iteration, OvertakenError
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.environment import ValidatorEnvironment
from shmelim.system.logs import LimitedLog

_log = logging.getLogger("shmelim.processing")
_limited = LimitedLog(_log)


@dataclass(eq=False)
class Flattening:
    """Closes positions."""

    collaborators: Collaborators
    environment: ValidatorEnvironment
    state: ProcessingCalls
    # Positions that were closed in memory and could not be saved, as (hotkey, uuid) -> pair. A manager that hands
    # out its own objects shows them as closed from then on, though nothing of it is on disk.
    unsaved: dict[tuple[str, str], str] = field(default_factory=dict)

    def close_open(self, hotkey: str, record: Mapping[str, Any], iteration: Iteration) -> None:
        """Close all open positions of a miner; otherwise as :meth:`close`."""
        positions = self.collaborators.position_manager.get_positions_for_one_hotkey(
            hotkey, only_open_positions=True
        )
        self.close(hotkey, positions, record, iteration)

    def close(
        self, hotkey: str, positions: Iterable[Any], record: Mapping[str, Any], iteration: Iteration
    ) -> None:
        """Close these positions of a miner, and those that could not be saved before.

        Once all were tried, the first error is raised. After OvertakenError, which says that a sync came, nothing
        more is saved.
        """
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
            except OvertakenError:
                raise
            except BaseException as error:
                if not is_failure(error):
                    raise
                _limited(
                    logging.WARNING, "open", "position %s of miner %s could not be closed: %s", uuid, hotkey, error
                )
                first = first or error
        if first is not None:
            raise first

    def _close_one(
        self, hotkey: str, uuid: str, pair: str, record: Mapping[str, Any], iteration: Iteration
    ) -> None:
        locks = iteration.position_locks
        message: Any = None
        with contextlib.nullcontext() if locks is None else locks.get_lock(hotkey, pair):
            manager = self.collaborators.position_manager
            # Read again: orders may have come in until the lock was ours.
            position = manager.get_miner_position_by_uuid(hotkey, uuid)
            if position is None or (position.is_closed_position and (hotkey, uuid) not in self.unsaved):
                self.unsaved.pop((hotkey, uuid), None)
                return
            fetcher = self._price_fetcher()
            order = None if position.is_closed_position else self._flat_order(position, record, fetcher, iteration)
            # After the price, which may be long in coming, and before anything is changed: the position may be
            # the manager's own object, and what a sync has taken back must not stay closed in it.
            iteration.check()
            self.unsaved[hotkey, uuid] = pair
            if order is not None:
                position.add_order(order, fetcher)
            manager.save_miner_position(position, delete_open_position_if_exists=True)
            self.unsaved.pop((hotkey, uuid), None)
            message = self._message(position)
        _log.info("closed position %s (%s) of eliminated miner %s", uuid, pair, hotkey)
        self._tell_websockets(hotkey, message)

    def _flat_order(self, position: Any, record: Mapping[str, Any], fetcher: Any, iteration: Iteration) -> Any:
        eliminated_ms = record["elimination_initiated_time_ms"]
        time_ms = eliminated_ms
        if position.orders:
            # Two orders at one time would have no order.
            time_ms = max(time_ms, position.orders[-1].processed_ms + 1)
        given = iteration.price_sources
        source = given.get(position.trade_pair) if given else None
        if source is None:
            price_info = record.get("price_info") or {}
            source = self.environment.price_source(position.trade_pair, price_info, eliminated_ms)
        return position.generate_fake_flat_order(position, time_ms, fetcher, source)

    def _price_fetcher(self) -> Any:
        own = self.collaborators.live_price_fetcher
        return self.environment.live_price_fetcher if own is None else own

    def _message(self, position: Any) -> Any:
        if self.collaborators.shared_queue_websockets is None:
            return None
        try:
            return position.to_websocket_dict()
        except Exception:
            text = "position %s could not be made a message"
            _limited(logging.ERROR, "message", text, position.position_uuid, exc_info=True)
            return None

    def _tell_websockets(self, hotkey: str, message: Any) -> None:
        """Tell those who watch, outside of the lock, as the queue may be full; a failure is only logged."""
        queue = self.collaborators.shared_queue_websockets
        if queue is None or message is None:
            return
        try:
            queue.put(message)
        except Exception:
            text = "the WebSocket queue was not told of a closed position of miner %s"
            _limited(logging.ERROR, "websockets", text, hotkey, exc_info=True)
