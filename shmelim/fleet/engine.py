"""What publishers and followers need of an engine: a head, a log, snapshots, reports; nothing in it is the record.

An engine may lose its tail, or all of it: that costs staleness, and never data. :class:`Engine` is small, so that
Redis, and the faulty one that tests use, are both short.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Final, NamedTuple, Protocol

from msgspec import Meta

from shmelim.errors import ShmelimError

HIGHEST: Final = (1 << 63) - 1
"""No number that is counted up may be above this one."""
_LONGEST_REASON: Final = 1000


class EngineError(ShmelimError, ConnectionError):
    """The engine cannot be reached, or refuses; what was asked may or may not have happened."""


class LogAheadError(EngineError):
    """An entry's id is not above all that the log ever had: nothing has happened."""


class Id(NamedTuple):
    """The place of an entry in the log: ids only ever rise, as each publisher has a higher term."""

    term: Annotated[int, Meta(ge=0, le=HIGHEST)]
    number: Annotated[int, Meta(ge=0, le=HIGHEST)]


START = Id(0, 0)
"""Before every entry."""


class Look(NamedTuple):
    """What stands in the engine: its clock in ms since 1970, read first; head and hold; the log.

    ``first`` is the oldest entry that the log still has; ``entries`` those that were asked for, in order.
    """

    time: int
    head: bytes | None
    hold: bytes | None
    first: Id | None
    entries: list[tuple[Id, bytes]]

    @property
    def held(self) -> str | None:
        """Why publishers are to hold, as text of a thousand letters at most; a stranger's, to be escaped."""
        if self.hold is None:
            return None
        text = self.hold[: 4 * _LONGEST_REASON].decode(errors="replace")
        return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"


class Engine(Protocol):
    """One name in an engine. Every method raises :class:`EngineError`, and returns within a deadline."""

    def look(self, after: Id | None = None, limit: int = 0, wait: float = 0.0) -> Look:
        """Read the clock, then everything else; up to ``limit`` entries after an id.

        Where there are none it waits for the first one, ``wait`` seconds at most.
        """

    def commit(
        self, expected: bytes | None, head: bytes, entry: tuple[Id, bytes], keep: Collection[str] | None = None
    ) -> bool:
        """Replace the head and append an entry, in one step, if the head is ``expected``; tell whether it was.

        With ``keep``, snapshots of other ids are dropped in the same step. LogAheadError if the log has had an
        entry that is not below this one.
        """

    def top(self) -> Id:
        """Return the highest id that the log ever had, also where it is empty by now."""

    def trim(self, before: Id) -> None:
        """Drop the entries before this one."""

    def put(self, snapshot: str, number: int, chunk: bytes) -> None:
        """Leave a chunk of a snapshot."""

    def fetch(self, snapshot: str, number: int) -> bytes | None:
        """Return a chunk, or None where it is not there (any more)."""

    def chunks(self, snapshot: str) -> int:
        """Return how many chunks of a snapshot are there."""

    def hold(self, why: bytes | None) -> None:
        """Leave word that publishers are to hold, or with None that they go on."""

    def report(self, who: str, report: bytes | None, ttl: float) -> None:
        """Leave a follower's report for ``ttl`` seconds, or with None take it back."""

    def reports(self) -> Mapping[str, bytes]:
        """Return the reports that are there."""

    def close(self) -> None:
        """Let go of the connection; idempotent."""
