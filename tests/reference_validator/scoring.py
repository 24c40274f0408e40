"""How miners do: their ledgers, their probation, and the collateral that they can lose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from reference_validator.disk import Disk
    from reference_validator.faults import Faults

LIQUIDATED_BELOW = 0.5


class Ledger:
    """A miner's equity over time, beginning with 1."""

    def __init__(self, points: Iterable[tuple[int, float]] = ()) -> None:
        self.points = list(points)

    def drawdown(self) -> float:
        """The largest fall from a peak, as a share of the peak."""
        peak, worst = 1.0, 0.0
        for _, equity in self.points:
            peak = max(peak, equity)
            worst = max(worst, 1 - equity / peak)
        return round(worst, 12)


class Ledgers:
    """All ledgers; those that are stale are being built again."""

    def __init__(self, disk: Disk, faults: Faults) -> None:
        self._disk = disk
        self._faults = faults
        self.stale: dict[str, int] = {}
        self._ledgers = {hotkey: Ledger(points) for hotkey, points in disk.read("ledgers", {}).items()}
        self._liquidated: dict[str, list[Any]] = disk.read("liquidated", {})

    def note(self, hotkey: str, at_ms: int, equity: float, prices: dict[str, float] | None = None) -> None:
        ledger = self._ledgers.setdefault(hotkey, Ledger())
        ledger.points.append((at_ms, equity))
        if equity < LIQUIDATED_BELOW and hotkey not in self._liquidated:
            self._liquidated[hotkey] = [ledger.drawdown(), at_ms, prices or {}]
            self._disk.write("liquidated", self._liquidated)
        self._disk.write("ledgers", {hotkey: ledger.points for hotkey, ledger in self._ledgers.items()})

    def of(self, hotkeys: Iterable[str]) -> dict[str, Ledger]:
        self._faults.reached("ledgers")
        return {hotkey: self._ledgers[hotkey] for hotkey in hotkeys if hotkey in self._ledgers}

    def liquidated(self) -> list[tuple[Any, ...]]:
        """Who fell too low, how low, when, and at which prices."""
        self._faults.reached("liquidated")
        return [(hotkey, *what) for hotkey, what in self._liquidated.items()]

    def forget(self, hotkey: str) -> None:
        self._ledgers.pop(hotkey, None)
        self._liquidated.pop(hotkey, None)


class Probation:
    """In which stage each miner is, and who failed; written when it is told to."""

    def __init__(self, disk: Disk, faults: Faults) -> None:
        self._disk = disk
        self._faults = faults
        self.stages: dict[str, str] = disk.read("stages", {})
        self.failed: dict[str, tuple[str, float | None]] = {
            hotkey: tuple(why) for hotkey, why in disk.read("failed", {}).items()
        }

    def fail(self, hotkey: str, reason: str, drawdown: float | None) -> None:
        self.failed[hotkey] = (reason, drawdown)
        self._disk.write("failed", self.failed)

    def has_failed(self) -> bool:
        self._faults.reached("has failed")
        return bool(self.failed)

    def all_failed(self) -> dict[str, tuple[str, float | None]]:
        self._faults.reached("all failed")
        return dict(self.failed)

    def clear_failed(self) -> None:
        self._faults.reached("clear failed")
        self.failed.clear()
        self._disk.write("failed", self.failed)
        self._faults.reached("clear failed!")

    def in_stage(self, stage: str) -> list[str]:
        self._faults.reached("in stage")
        return [hotkey for hotkey, found in self.stages.items() if found == stage]

    def has(self, hotkey: str) -> bool:
        return hotkey in self.stages

    def remove(self, hotkey: str) -> None:
        self._faults.reached("remove", hotkey)
        self.stages.pop(hotkey, None)
        self._faults.reached("remove!", hotkey)

    def save(self) -> None:
        self._faults.reached("save stages")
        self._disk.write("stages", self.stages)
        self._faults.reached("save stages!")


class NothingMovedError(Exception):
    """The chain refused a transfer before anything of it was carried out."""


class Collateral:
    """Deposits, and the log of what was taken of them: a line there is money that moved."""

    def __init__(self, disk: Disk, faults: Faults) -> None:
        self._disk = disk
        self._faults = faults
        self.answer: Any = None

    def deposit(self, hotkey: str, amount: float) -> None:
        deposits = self._disk.read("deposits", {})
        self._disk.write("deposits", deposits | {hotkey: deposits.get(hotkey, 0.0) + amount})

    def balance(self, hotkey: str) -> float:
        taken = sum(amount for owner, amount in self._disk.lines("slashes") if owner == hotkey)
        return self._disk.read("deposits", {}).get(hotkey, 0.0) - taken

    def slash(self, hotkey: str, share: float | None = None) -> Any:
        self._faults.reached("slash", hotkey)
        amount = self.balance(hotkey) * (0.25 if share is None else share)
        self._disk.append("slashes", [hotkey, amount])
        self._faults.reached("slash!", hotkey)
        return self.answer

    def slashes(self) -> list[str]:
        """Whose collateral was slashed, in order."""
        return [hotkey for hotkey, _ in self._disk.lines("slashes")]

    def taken(self, hotkey: str) -> list[float]:
        return [amount for owner, amount in self._disk.lines("slashes") if owner == hotkey]
