"""Faults on demand: every effect of the reference validator passes a point before it and a point after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class InjectedError(Exception):
    """What a collaborator raises because a test told it to."""


@dataclass
class Fault:
    """What happens at a point: ``times`` times, for one hotkey or for all."""

    point: str
    act: Callable[[], object]
    hotkey: str | None = None
    times: int | None = 1
    happened: int = 0

    def fits(self, point: str, hotkey: str | None) -> bool:
        return (
            self.point in (point, "*")
            and self.hotkey in (None, hotkey)
            and (self.times is None or self.happened < self.times)
        )


class Faults:
    """The faults that are planned, and the points that were passed.

    Nothing happens while it is not ``armed``.

    A point is named after what is done: ``"slash"`` is passed before the effect, ``"slash!"`` after it.
    """

    def __init__(self) -> None:
        self.armed = True
        self.passed: list[tuple[str, str | None]] = []
        self._planned: list[Fault] = []

    def at(
        self, point: str, act: Callable[[], object], *, hotkey: str | None = None, times: int | None = 1
    ) -> Fault:
        """Do something at a point."""
        fault = Fault(point, act, hotkey, times)
        self._planned.append(fault)
        return fault

    def fail(
        self,
        point: str,
        error: BaseException | None = None,
        *,
        hotkey: str | None = None,
        times: int | None = 1,
    ) -> Fault:
        """Raise an error at a point."""

        def act() -> None:
            raise error or InjectedError(f"{point} failed for {hotkey or 'everybody'}")

        return self.at(point, act, hotkey=hotkey, times=times)

    def clear(self) -> None:
        """Let everything go well from now on."""
        self._planned.clear()

    def reached(self, point: str, hotkey: str | None = None) -> None:
        """Pass a point."""
        self.passed.append((point, hotkey))
        for fault in self._planned if self.armed else ():
            if fault.fits(point, hotkey):
                fault.happened += 1
                fault.act()

    def count(self, point: str, hotkey: str | None = None) -> int:
        """How often a point was passed."""
        return sum(name == point and hotkey in (None, whom) for name, whom in self.passed)
