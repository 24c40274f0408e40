"""Live prices in a process of their own: the latest one of each pair; stale ones are not given out.

They are published in shared memory: who wants one reads it there, and asks nobody.

Run it: ``python examples/price_fetcher.py``
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from shmelim.service import RPCServiceBase
from shmelim.table import Writer


class PriceServer:
    """The state: pair -> (price, when it came in). Lives in the server process, or in direct mode in this one.

    A killed server's successor begins with what that published.
    """

    def __init__(self, stale_after_s: float, table: str | None = None) -> None:
        self.stale_after_s = stale_after_s
        self.table = Writer(table, keep=True)
        self.prices: dict[str, tuple[float, float]] = dict(self.table.reader())
        self.lock = threading.Lock()  # each connection has a thread of its own

    def health_check_rpc(self) -> dict[str, Any]:
        """Say how the server is."""
        return {"status": "ok", "timestamp_ms": time.time_ns() // 1_000_000, "num_pairs": len(self.prices)}

    def put_price_rpc(self, pair: str, price: float) -> None:
        """Take a price in."""
        if not isinstance(pair, str) or "/" not in pair:
            raise ValueError(f"a pair looks like BTC/USD, not {pair!r}")
        if not isinstance(price, (int, float)) or not 0 < price < math.inf:
            raise ValueError(f"the price of {pair} must be more than 0, not {price!r}")
        with self.lock:
            self.prices[pair] = float(price), time.monotonic()
            self.table.put(pair, self.prices[pair])

    def get_price_rpc(self, pair: str) -> float | None:
        """Return the latest price of a pair; None if there is none, or it is stale."""
        with self.lock:
            price, since = self.prices.get(pair, (None, 0.0))
        return price if time.monotonic() - since <= self.stale_after_s else None


class PriceFetcher(RPCServiceBase):
    """What the validator holds: the complete service."""

    def __init__(
        self, port: int = 50001, running_unit_tests: bool = False, *, stale_after_s: float = 60, **options: Any
    ) -> None:
        options.setdefault("published_table", "prices")
        super().__init__("LivePriceFetcher", port, running_unit_tests, **options)
        self.stale_after_s = stale_after_s
        self._initialize_service()

    def _create_direct_server(self) -> PriceServer:
        return PriceServer(self.stale_after_s)

    def _start_server_process(self, address: Any, authkey: Any, server_ready: Any) -> Any:
        arguments = self.stale_after_s, self.published_table
        return self._spawn_server(
            PriceServer, *arguments, address=address, authkey=authkey, server_ready=server_ready
        )

    def put_price(self, pair: str, price: float) -> None:
        """Take a price in."""
        self._server_proxy.put_price_rpc(pair, price)

    def get_price(self, pair: str) -> float | None:
        """Return what ``get_price_rpc`` would, from shared memory."""
        price, since = self._server_table.get(pair, (None, 0.0))
        return price if time.monotonic() - since <= self.stale_after_s else None


if __name__ == "__main__":
    with PriceFetcher(enable_health_check=True) as prices:
        prices.put_price("BTC/USD", 97_250.5)
        print("BTC/USD", prices.get_price("BTC/USD"), "| ETH/USD", prices.get_price("ETH/USD"))
        print("healthy:", prices.health_check())
