"""The operations that are compared, and what they are called with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.records import hits, misses, mixed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.peers.base import Place, Reader

__all__ = ["BATCH", "READS", "SYNCED", "TITLES", "calls_of", "prove"]

BATCH = 256
SYNCED = 100
_KEYS = 512
_BATCHES = 8

READS = ("empty", "hit", "miss", "get", "batch", "everything")
TITLES = {
    "empty": "an empty C call",
    "hit": "check, hit",
    "miss": "check, miss",
    "get": "get one record",
    "batch": f"{BATCH} checks at once",
    "everything": "all records",
    "sync": f"sync of {SYNCED}",
}


def calls_of(reader: Reader, place: Place, operation: str) -> tuple[Callable[[Any], Any], Sequence[Any]]:
    """Return what is called, and with what in turn: never the same hotkey over and over.

    An empty call of a function in C is the same for all: it says how quick the machine was at each row.
    """
    if operation == "empty":
        return callable, hits(place.size, _KEYS)
    if operation == "hit":
        return reader.check, hits(place.size, _KEYS)
    if operation == "miss":
        return reader.check, misses(place.size, _KEYS)
    if operation == "get":
        return reader.get, hits(place.size, _KEYS)
    if operation == "batch":
        return reader.check_many, [mixed(place.size, BATCH, seed) for seed in range(_BATCHES)]
    everything = reader.everything
    return lambda _: everything(), [None]


def prove(reader: Reader, place: Place) -> None:
    """Check that a reader answers right: what is wrong is not measured."""
    here, gone = hits(place.size, 64), misses(place.size, 64)
    right = all(reader.check(hotkey) for hotkey in here) and not any(reader.check(hotkey) for hotkey in gone)
    right = right and list(map(bool, reader.check_many(here + gone))) == [True] * 64 + [False] * 64
    for hotkey in here[:8]:
        found = reader.get(hotkey)
        # A writer may have been at work: it changes nothing but the time.
        expected = place.make(int(hotkey[1:]), 0)
        right = right and {**found, "elimination_initiated_time_ms": 0} == {
            **expected,
            "elimination_initiated_time_ms": 0,
        }
    if not right or reader.get(gone[0]) is not None:
        raise AssertionError(f"{type(reader).__name__} gives wrong answers")
    if place.size <= 1000 and hasattr(reader, "everything") and len(reader.everything()) != place.size:
        raise AssertionError(f"{type(reader).__name__} does not list all records")
