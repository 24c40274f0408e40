"""The reference validator as a whole."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from reference_validator.disk import Disk
from reference_validator.faults import Faults
from reference_validator.scoring import Collateral, Ledgers, Probation
from reference_validator.trading import PAIRS, Book, Holding, LimitOrders, Locks, Prices

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
START = 1_750_000_000_000


class Registry:
    """Who is registered."""

    def __init__(self, disk: Disk, faults: Faults) -> None:
        self._disk = disk
        self._faults = faults
        self._hotkeys: list[str] = disk.read("registered", [])

    @property
    def hotkeys(self) -> list[str]:
        self._faults.reached("registry")
        return self._hotkeys

    def has_hotkey(self, hotkey: str) -> bool:
        return hotkey in self._hotkeys

    def set_to(self, anything: Any) -> None:
        """Show what a registry should not: None, or what is no hotkey."""
        self._hotkeys = anything

    def set(self, hotkeys: list[str]) -> None:
        self._hotkeys = list(hotkeys)
        self._disk.write("registered", self._hotkeys)


class Inbox:
    """Takes messages, for Slack and for WebSockets."""

    def __init__(self, faults: Faults, name: str) -> None:
        self._faults = faults
        self._name = name
        self.messages: list[Any] = []

    def send_message(self, text: str, level: str = "info") -> None:
        self._faults.reached(self._name)
        self.messages.append((level, text))

    def put(self, message: Any) -> None:
        self._faults.reached(self._name)
        self.messages.append(message)


class ReferenceValidator:
    """A validator with its own clock.

    Parameters
    ----------
    directory
        Where it keeps its state; None: in memory.
    live
        Whether its book gives out its own objects instead of copies.

    """

    def __init__(self, directory: Path | None = None, *, live: bool = False) -> None:
        self.faults = Faults()
        self.directory = directory
        self.disk = Disk(None if directory is None else directory / "disk")
        self.now_ms = self.disk.read("now", START)
        self.registry = Registry(self.disk, self.faults)
        self.prices = Prices(self.faults)
        self.book = Book(self.disk, self.faults, live=live)
        self.limit_orders = LimitOrders(self.disk, self.faults)
        self.locks = Locks(self.faults)
        self.ledgers = Ledgers(self.disk, self.faults)
        self.probation = Probation(self.disk, self.faults)
        self.collateral = Collateral(self.disk, self.faults)
        self.slack = Inbox(self.faults, "slack")
        self.websockets = Inbox(self.faults, "websockets")
        self.syncing = SimpleNamespace(value=False)
        self.epoch = SimpleNamespace(value=0)
        self.ending: dict[str, bool] = {}
        self._numbers = itertools.count(len(self.book.hotkeys))

    @property
    def miners_directory(self) -> Path | None:
        return None if self.directory is None else self.directory / "miners"

    def pass_time(self, milliseconds: int) -> None:
        self.now_ms += milliseconds
        self.disk.write("now", self.now_ms)

    def register(self, *hotkeys: str, stage: str = "scored", deposit: float = 100.0) -> None:
        """Let miners come, with a deposit, a directory and a flat ledger."""
        self.registry.set([*self.registry.hotkeys, *hotkeys])
        for hotkey in hotkeys:
            self.probation.stages[hotkey] = stage
            self.collateral.deposit(hotkey, deposit)
            self.ledgers.note(hotkey, self.now_ms, 1.0)
            if self.miners_directory is not None:
                (self.miners_directory / hotkey).mkdir(parents=True, exist_ok=True)
        self.probation.save()

    def deregister(self, *hotkeys: str) -> None:
        self.registry.set([hotkey for hotkey in self.registry.hotkeys if hotkey not in hotkeys])

    def open_position(self, hotkey: str, pair: str = PAIRS[0], *, at_ms: int | None = None) -> Holding:
        at_ms = self.now_ms if at_ms is None else at_ms
        holding = Holding(f"{hotkey}-{next(self._numbers)}", hotkey, pair)
        holding.trade(1.0, self.prices.at(pair, at_ms), at_ms)
        self.book.store(holding)
        return holding

    def lose(self, hotkey: str, share: float) -> None:
        """Let a miner's equity stand at 1 less a share."""
        self.ledgers.note(
            hotkey, self.now_ms, 1.0 - share, {pair: self.prices.at(pair, self.now_ms) for pair in PAIRS}
        )

    def is_flat(self, hotkey: str) -> bool:
        """Whether a miner holds nothing, on disk, and nothing waits to become something."""
        flat = all(holding.closed and abs(holding.size) < 1e-9 for holding in self.book.on_disk(hotkey))
        return flat and not self.disk.read("limit orders", {}).get(hotkey)

    def sync(self, replace: Callable[[], object]) -> None:
        """Replace things as a sync does: others pause meanwhile, and see another epoch afterwards."""
        self.syncing.value = True
        try:
            replace()
        finally:
            self.epoch.value += 1
            self.syncing.value = False
