"""Moments of the past, as people name them: an event of the history, or a time."""

from __future__ import annotations

import datetime as dt
from typing import Final, NamedTuple

_LAST: Final = (1 << 63) - 1  # what SQLite can hold
_FIRST_MS: Final = 100_000_000_000  # 1973; a smaller number is an event's


class Moment(NamedTuple):
    """A moment: after an event, or, where that is None, at a time (ms since 1970, UTC)."""

    event: int | None
    at_ms: int | None = None

    def __str__(self) -> str:
        return f"{self.at_ms} ms since 1970" if self.event is None else f"event {self.event}"

    @classmethod
    def of(cls, when: int | str | dt.datetime) -> Moment:
        """Return the moment that is meant by an event's number, ms since 1970, or a time as ISO 8601 has it.

        A time without a zone is UTC. ValueError: it is none of these.
        """
        if isinstance(when, str) and when.strip().isascii() and when.strip().isdigit():
            when = int(when)
        if isinstance(when, bool) or not isinstance(when, (int, str, dt.datetime)):
            raise TypeError(f"a moment is an event's number, ms since 1970, or ISO 8601, not {when!r}")
        if isinstance(when, int):
            if not 0 <= when <= _LAST:
                raise ValueError(f"a moment is 0 to {_LAST}, not {when}")
            return cls(when) if when < _FIRST_MS else cls(None, when)
        if isinstance(when, str):
            try:
                when = dt.datetime.fromisoformat(when.strip())
            except ValueError:
                text = f"{when!r} is not a moment: give an event's number, ms since 1970, or a time such as"
                raise ValueError(f"{text} 2026-01-31T12:00:00Z") from None
        zoned = when if when.tzinfo is not None else when.replace(tzinfo=dt.UTC)
        return cls(None, round(zoned.timestamp() * 1000))


def carried(when: int | str | dt.datetime) -> int | str:
    """Return the same moment as a message can carry it; errors are those of :meth:`Moment.of`."""
    Moment.of(when)
    return when.isoformat() if isinstance(when, dt.datetime) else when
