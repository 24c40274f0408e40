"""Limit orders in a process of their own: accepted, filled when a price crosses them, deleted with their miner.

Run it: ``python examples/limit_orders.py``
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

from shmelim.service import RPCServiceBase
from shmelim.table import Writer


class LimitOrderServer:
    """The state: order number -> order, in the order in which they came. A killed server's orders are gone."""

    def __init__(self, table: str | None = None) -> None:
        self.table = Writer(table)
        self.orders: dict[int, dict[str, Any]] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()

    def health_check_rpc(self) -> dict[str, Any]:
        """Say how the server is."""
        return {"status": "ok", "timestamp_ms": time.time_ns() // 1_000_000, "num_orders": len(self.orders)}

    def add_limit_order_rpc(self, hotkey: str, pair: str, side: str, limit: float) -> int:
        """Accept an order; return its number."""
        if side not in {"buy", "sell"}:
            raise ValueError(f"a side is buy or sell, not {side!r}")
        if not isinstance(limit, (int, float)) or not limit > 0:
            raise ValueError(f"a limit is more than 0, not {limit!r}")
        with self.lock:
            number = next(self.numbers)
            self.orders[number] = {"hotkey": hotkey, "pair": pair, "side": side, "limit": limit}
            self.table.put(str(number), self.orders[number])
            return number

    def get_limit_order_rpc(self, number: int) -> dict[str, Any] | None:
        """Return an order; None if it is not open any more."""
        return self.orders.get(number)

    def price_moved_rpc(self, pair: str, price: float) -> list[int]:
        """Fill what a new price crosses; return the numbers of the filled orders."""
        with self.lock:
            filled = [
                number
                for number, order in self.orders.items()
                if order["pair"] == pair
                and (price <= order["limit"] if order["side"] == "buy" else price >= order["limit"])
            ]
            self._delete(filled)
            return filled

    def delete_all_limit_orders_for_hotkey_rpc(self, hotkey: str) -> int:
        """Delete a miner's orders; return how many there were."""
        with self.lock:
            doomed = [number for number, order in self.orders.items() if order["hotkey"] == hotkey]
            self._delete(doomed)
            return len(doomed)

    def _delete(self, numbers: list[int]) -> None:
        with self.table.transaction() as transaction:
            for number in numbers:
                del self.orders[number]
                transaction.remove(str(number))


class LimitOrderManager(RPCServiceBase):
    """What the validator holds: the complete service."""

    def __init__(self, port: int = 50003, running_unit_tests: bool = False, **options: Any) -> None:
        options.setdefault("published_table", "limit-orders")
        super().__init__("LimitOrderManagerServer", port, running_unit_tests, **options)
        self._initialize_service()

    def _create_direct_server(self) -> LimitOrderServer:
        return LimitOrderServer()

    def _start_server_process(self, address: Any, authkey: Any, server_ready: Any) -> Any:
        return self._spawn_server(
            LimitOrderServer, self.published_table, address=address, authkey=authkey, server_ready=server_ready
        )

    def add_limit_order(self, hotkey: str, pair: str, side: str, limit: float) -> int:
        """Accept an order; return its number."""
        return int(self._server_proxy.add_limit_order_rpc(hotkey, pair, side, limit))

    def get_limit_order(self, number: int) -> dict[str, Any] | None:
        """Return an order, from shared memory; None if it is not open any more."""
        return self._server_table.get(str(number))

    def price_moved(self, pair: str, price: float) -> list[int]:
        """Fill what a new price crosses; return the numbers of the filled orders."""
        return list(self._server_proxy.price_moved_rpc(pair, price))

    def delete_all_limit_orders_for_hotkey(self, hotkey: str) -> int:
        """Delete a miner's orders; return how many there were."""
        return int(self._server_proxy.delete_all_limit_orders_for_hotkey_rpc(hotkey))


if __name__ == "__main__":
    with LimitOrderManager(enable_health_check=True) as orders:
        orders.add_limit_order("5Miner", "BTC/USD", "buy", 95_000)
        orders.add_limit_order("5Other", "BTC/USD", "sell", 99_000)
        print("filled at 94,900:", orders.price_moved("BTC/USD", 94_900))
        print("deleted with 5Other:", orders.delete_all_limit_orders_for_hotkey("5Other"))
        print("healthy:", orders.health_check())
