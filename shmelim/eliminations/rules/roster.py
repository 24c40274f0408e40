"""Who is eliminated, since when, and who is registered: kept between ticks, since reading it all costs most."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from shmelim.eliminations.reader import EliminationReader


class Listed(NamedTuple):
    """What the table says, as of one version; not to be changed."""

    version: int
    eliminated: Mapping[str, int]  # when each hotkey was, in milliseconds since 1970, UTC
    registered: AbstractSet[str]  # also those whose loss the server did not believe


class Roster:
    """The table in few words, read anew when anything changed in it. Thread-safe."""

    def __init__(self, reader: EliminationReader) -> None:
        self._reader = reader
        self._listed = Listed(-1, {}, frozenset())  # replaced as one reference

    def now(self) -> Listed:
        """Return what the table says."""
        listed = self._listed
        if listed.version != self._reader.version:
            version, eliminations, _, registered = self._reader.snapshot()
            times = {hotkey: row["elimination_initiated_time_ms"] for hotkey, row in eliminations.items()}
            self._listed = listed = Listed(version, times, registered)
        return listed
