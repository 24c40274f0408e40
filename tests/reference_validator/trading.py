"""What miners trade: prices, trades, holdings, and the book that keeps them."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reference_validator.disk import Disk
    from reference_validator.faults import Faults

PAIRS = ("BTC/USD", "ETH/USD", "EUR/USD")


class Prices:
    """A price for every pair at every time, the same each time it is asked."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def at(self, pair: str, at_ms: int) -> float:
        self._faults.reached("price")
        base = 1000.0 * (1 + PAIRS.index(pair))
        return base * (1 + 0.05 * math.sin(at_ms / 3.6e6 + len(pair)))


@dataclass
class Trade:
    """A change of a holding's size: buying is positive."""

    size: float
    price: float
    at_ms: int


@dataclass
class Holding:
    """What one miner holds of one pair, from the first trade until it is back at nothing."""

    id: str
    hotkey: str
    pair: str
    trades: list[Trade] = field(default_factory=list)
    closed: bool = False

    @property
    def size(self) -> float:
        return sum(trade.size for trade in self.trades)

    def trade(self, size: float, price: float, at_ms: int) -> None:
        if self.closed:
            raise ValueError(f"holding {self.id} is closed")
        if self.trades and at_ms <= self.trades[-1].at_ms:
            raise ValueError(f"holding {self.id} has a later trade than {at_ms}")
        self.trades.append(Trade(size, price, at_ms))
        self.closed = abs(self.size) < 1e-12


class Book:
    """All holdings, as they are on disk; it gives out copies, or with ``live`` the objects it has itself."""

    def __init__(self, disk: Disk, faults: Faults, *, live: bool = False) -> None:
        self._disk = disk
        self._faults = faults
        self._live = live
        self._objects: dict[str, dict[str, Holding]] = {}
        self.hotkeys: set[str] = set(disk.read("traders", []))

    def _of(self, hotkey: str) -> dict[str, Holding]:
        if hotkey not in self._objects:
            rows = self._disk.read(f"holdings {hotkey}", {})
            self._objects[hotkey] = {key: _holding(row) for key, row in rows.items()}
        return self._objects[hotkey]

    def holdings(self, hotkey: str, *, open_only: bool = False) -> list[Holding]:
        self._faults.reached("holdings", hotkey)
        return [self._out(found) for found in self._of(hotkey).values() if not (open_only and found.closed)]

    def holding(self, hotkey: str, id_: str) -> Holding | None:
        self._faults.reached("holding", hotkey)
        found = self._of(hotkey).get(id_)
        return None if found is None else self._out(found)

    def store(self, holding: Holding) -> None:
        self._faults.reached("store", holding.hotkey)
        of_miner = dict(self._of(holding.hotkey))
        of_miner[holding.id] = self._out(holding)
        self._write(holding.hotkey, of_miner)
        self._faults.reached("store!", holding.hotkey)

    def drop(self, holding: Holding) -> None:
        self._faults.reached("drop", holding.hotkey)
        of_miner = dict(self._of(holding.hotkey))
        of_miner.pop(holding.id, None)
        self._write(holding.hotkey, of_miner)
        self._faults.reached("drop!", holding.hotkey)

    def on_disk(self, hotkey: str) -> list[Holding]:
        """What a restart would find."""
        return [_holding(row) for row in self._disk.read(f"holdings {hotkey}", {}).values()]

    def _write(self, hotkey: str, of_miner: dict[str, Holding]) -> None:
        if hotkey not in self.hotkeys:
            self.hotkeys.add(hotkey)
            self._disk.write("traders", sorted(self.hotkeys))
        self._disk.write(f"holdings {hotkey}", {key: asdict(one) for key, one in of_miner.items()})
        self._objects[hotkey] = of_miner

    def _out(self, holding: Holding) -> Holding:
        return holding if self._live else _holding(asdict(holding))


def _holding(row: dict[str, Any]) -> Holding:
    return Holding(**row | {"trades": [Trade(**trade) for trade in row["trades"]]})


class LimitOrders:
    """Orders that wait for their price: how many, by miner."""

    def __init__(self, disk: Disk, faults: Faults) -> None:
        self._disk = disk
        self._faults = faults
        self.waiting: dict[str, int] = disk.read("limit orders", {})

    def place(self, hotkey: str) -> None:
        self.waiting[hotkey] = self.waiting.get(hotkey, 0) + 1
        self._disk.write("limit orders", self.waiting)

    def cancel_all(self, hotkey: str) -> int:
        self._faults.reached("cancel", hotkey)
        found = self.waiting.pop(hotkey, 0)
        self._disk.write("limit orders", self.waiting)
        self._faults.reached("cancel!", hotkey)
        return found


class Locks:
    """One lock for each miner and pair."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._locks: defaultdict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)

    def get_lock(self, hotkey: str, pair: str) -> threading.Lock:
        self._faults.reached("lock", hotkey)
        return self._locks[hotkey, pair]

    def held(self) -> list[tuple[str, str]]:
        return [key for key, lock in self._locks.items() if lock.locked()]
