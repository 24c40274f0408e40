"""What the store says to a publisher: what it is, what changed, all of it; each from one read transaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from shmelim.fleet.messages import Row, first_of


class Facts(NamedTuple):
    """What a store is at one moment.

    ``runs`` are those of its server, the newest last; ``top`` is the id of its newest change, ``oldest`` the first
    that it still knows of (``top + 1`` where it knows of none), ``notice`` a change that the guard has noticed and
    nobody has acknowledged.
    """

    store_id: bytes
    runs: tuple[int, ...]
    top: int
    oldest: int
    notice: str | None = None

    def continues(self, run: int, seq: int) -> bool:
        """Tell whether change ``seq`` of that run is one of this store's.

        One that was restored from a backup has counted on from there, in another run: numbers alone look right.
        """
        if run not in self.runs:
            return False
        place = self.runs.index(run)
        last = first_of(self.runs[place + 1]) - 1 if place + 1 < len(self.runs) else self.top
        return first_of(run) - 1 <= seq <= last


class Cut(NamedTuple):
    """The store as of ``facts.top``: whole rows of all that was changed since, and the keys that are gone.

    A cut reaches to the newest change, as rows are read as they are now: it is a state that the store really had.
    """

    facts: Facts
    rows: list[Row]
    gone: list[bytes]
    digest: int | None = None


class Whole(NamedTuple):
    """All rows of the store as of ``facts.top``; the iterator is good while the transaction is open."""

    facts: Facts
    rows: Iterator[Row]


class Outbox(Protocol):
    """What a publisher asks the store."""

    def facts(self) -> Facts:
        """Return what the store is now."""

    def cut(self, after: int, *, digest_rows: int = 0) -> Cut:
        """Return what was changed after that change; with a table's digest, if it has at most so many rows."""

    def whole(self) -> AbstractContextManager[Whole]:
        """Read everything in one transaction."""
