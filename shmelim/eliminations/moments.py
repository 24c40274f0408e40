"""Moments of the past, as people name them: an event of the history, or a time."""

from __future__ import annotations

import datetime as dt
from typing import Final, NamedTuple

from shmelim.system import clock

_ROUNDED_MS: Final = 1000  # what "now" may be ahead by, as people and clocks round it
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_LAST: Final = (1 << 63) - 1  # what SQLite can hold
_FIRST_MS: Final = 100_000_000_000  # 1973; a smaller number is an event's
_YEAR_1: Final = -62_135_596_800_000  # a zone may lead to before it, where there is no name for a moment


class Moment(NamedTuple):
    """A moment: after an event, or, where that is None, at a time (ms since 1970, UTC)."""

    event: int | None
    at_ms: int | None = None

    def __str__(self) -> str:
        if self.at_ms is None:
            return f"event {self.event}"
        # As it can be given back.
        time = _EPOCH + dt.timedelta(milliseconds=self.at_ms)
        return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    @classmethod
    def of(cls, when: int | str | dt.datetime) -> Moment:
        """Return the moment that is meant by an event's number, ms since 1970, or a time as ISO 8601 has it.

        A time without a zone is UTC. ValueError: it is none of these, or in the future, which nobody knows.
        """
        if isinstance(when, str) and when.strip().isascii() and when.strip().isdigit():
            when = int(when)
        if isinstance(when, bool) or not isinstance(when, (int, str, dt.datetime)):
            raise TypeError(f"a moment is an event's number, ms since 1970, or ISO 8601, not {when!r}")
        if isinstance(when, int):
            if not 0 <= when <= _LAST:
                raise ValueError(f"a moment is 0 to {_LAST}, not {when}")
            return cls(when) if when < _FIRST_MS else cls(None, _past(when, when))
        time = when
        if isinstance(time, str):
            try:
                time = dt.datetime.fromisoformat(time.strip())
            except ValueError:
                text = f"{when!r} is not a moment: give an event's number, ms since 1970, or a time such as"
                raise ValueError(f"{text} 2026-01-31T12:00:00Z") from None
        zoned = time if time.tzinfo is not None else time.replace(tzinfo=dt.UTC)
        at_ms = max((zoned - _EPOCH) // dt.timedelta(milliseconds=1), _YEAR_1)
        return cls(None, _past(at_ms, when))


def _past(at_ms: int, said: object) -> int:
    now = clock.now_ms()
    if at_ms > now + _ROUNDED_MS:
        raise ValueError(f"{said!r} is in the future: it is {Moment(None, now)}")
    return at_ms


def carried(when: int | str | dt.datetime) -> int | str:
    """Return the same moment as a message can carry it; errors are those of :meth:`Moment.of`."""
    Moment.of(when)
    return when.isoformat() if isinstance(when, dt.datetime) else when
