"""The drawdown of a ledger, as the default rule reads it."""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from dataclasses import dataclass
from numbers import Real
from operator import is_
from typing import Any, Final

from shmelim.system.logs import LimitedLog
from shmelim.system.text import get_logger

_limited = LimitedLog(get_logger("shmelim.processing"))

LOOKS: Final = 12
"""At least one of so many looks at a ledger that seems unchanged reads all of it: once an hour, by default."""

_WORTHWHILE: Final = 8  # checkpoints; fewer are read faster than compared

_LEAST, _MOST = -1.0, 2.0  # what a factor can be; beyond 0 to 1 it counts as that
_DIGITS: Final = 9  # of a percentage: what binary fractions add or lose lies far behind


def ledger_drawdown_percentage(ledger: Any) -> float:
    """Return a ledger's drawdown as a percentage, as ``ValidatorEnvironment.drawdown`` says; None has 0."""
    if ledger is None:
        return 0.0
    return _percentage([checkpoint.mdd for checkpoint in ledger.cps])


class Drawdowns:
    """Drawdowns of ledgers that are asked again and again, most of which have not changed since.

    A ledger grows at its end: its last checkpoint changes until another one comes after it, and one that is built
    anew has other checkpoints. So while a ledger is the same object, with as many checkpoints, of which the first
    and the last two are the same objects, only the last two are read. As nothing keeps a ledger from changing the
    others in place, all are read every :data:`LOOKS`-th time.

    Thread-safe. Keeps no ledger alive; forgets everything when it is pickled.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def __reduce__(self) -> tuple[type[Drawdowns], tuple[()]]:
        return Drawdowns, ()

    def percentage(self, ledger: Any) -> float:
        """Return what :func:`ledger_drawdown_percentage` does, and raise as it does."""
        checkpoints = getattr(ledger, "cps", None)
        if not isinstance(checkpoints, list) or len(checkpoints) < _WORTHWHILE:
            return ledger_drawdown_percentage(ledger)
        count, ends, known = len(checkpoints), (checkpoints[0], *checkpoints[-2:]), self._known
        key = id(ledger)
        if (last := known.get(key)) is not None and last.is_of(ledger, count, ends):
            return _percentage([last.lowest, ends[1].mdd, ends[2].mdd])
        factors = [checkpoint.mdd for checkpoint in checkpoints]
        lowest = _lowest(factors)
        if lowest is None:  # read in full until it is sound
            return _in_percent(_lowest_understood(factors))
        # What cannot tell when it is gone is not remembered: another may stand at its place then.
        with contextlib.suppress(TypeError):
            gone = weakref.ref(ledger, lambda _: known.pop(key, None))
            # Not all at their first place, lest one look in so many reads everything.
            looks = LOOKS - 1 - len(known) % (LOOKS // 2)
            known[key] = _Known(gone, count, ends, min(factors[:-2]), looks)
        return _in_percent(lowest)


@dataclass(slots=True)
class _Known:
    """What is known of a ledger, and for how many looks more."""

    ledger: weakref.ref[Any]
    count: int
    ends: tuple[Any, ...]  # the first checkpoint and the last two
    lowest: float  # of all but the last two
    looks: int

    def is_of(self, ledger: Any, count: int, ends: tuple[Any, ...]) -> bool:
        self.looks -= 1
        return (
            self.looks >= 0 and count == self.count and self.ledger() is ledger and all(map(is_, ends, self.ends))
        )


def _percentage(factors: list[Any]) -> float:
    lowest = _lowest(factors)
    return _in_percent(_lowest_understood(factors) if lowest is None else lowest)


def _lowest(factors: list[Any]) -> float | None:
    """Return the lowest factor; None if one of them is not a factor."""
    if not factors:
        return 1.0
    try:
        # One sum finds a NaN anywhere, which a minimum passes over, and refuses what is not a number.
        lowest = float(min(factors)) if math.isfinite(sum(factors)) else math.nan
    except (TypeError, OverflowError):
        return None
    return lowest if _LEAST <= lowest <= _MOST else None


def _lowest_understood(factors: list[Any]) -> float:
    """Return the lowest of those that are factors: one bad checkpoint must hide no drawdown beside it."""
    understood: list[float] = []
    refused: list[Any] = []
    for factor in factors:
        is_number = isinstance(factor, Real) and not isinstance(factor, bool)
        (understood if is_number and _LEAST <= factor <= _MOST else refused).append(factor)
    text = f"{len(refused)} checkpoints of a ledger have an mdd that is not a factor, such as {refused[0]!r:.60}"
    if not understood:
        raise ValueError(f"{text}; 0.9 is 10 % down")
    _limited(logging.WARNING, "mdd", "%s: left out", text)
    return float(min(understood))


def _in_percent(lowest: float) -> float:
    # Rounded, since (1 - 0.9) * 100 is a little less than the 10 % that it stands for.
    return round((1.0 - min(max(lowest, 0.0), 1.0)) * 100.0, _DIGITS)
