"""Turning an arena, which is a log of puts and removes, back into the entries it leaves."""

from __future__ import annotations

from typing import NamedTuple

from shmelim.errors import CorruptSegmentError
from shmelim.shm.layout import (
    ARENA_ENTRY,
    ENTRY_CHECKED,
    ENTRY_HEADER,
    KIND_PUT,
    KIND_REMOVE,
    align,
    entry_checksum,
)


class Entry(NamedTuple):
    """What the table holds under one key."""

    flags: int
    record: bytes
    ordinal: int


def replay(log: bytes, label: str, *, seed: int | None = None) -> dict[bytes, Entry]:
    """Return the entries that a log leaves, in the order of their ordinals.

    CorruptSegmentError if an entry does not fit, is of no known kind, or fails its checksum, which is checked
    where the segment's ``seed`` is given; ``label`` is the segment's name, for messages.
    """
    entries: dict[bytes, Entry] = {}
    position, end = 0, len(log)
    unpack = ARENA_ENTRY.unpack_from
    highest = -1
    in_order = True
    while position < end:
        if position + ENTRY_HEADER > end:
            raise _corrupt(label, position, "is cut off")
        ordinal, checksum, length, key_length, flags, kind = unpack(log, position)
        start = position + ENTRY_HEADER
        middle = start + key_length
        stop = middle + length
        if stop > end or key_length == 0:
            raise _corrupt(label, position, f"of {length} bytes does not fit")
        if seed is not None and entry_checksum(seed, ordinal, log[position + ENTRY_CHECKED : stop]) != checksum:
            raise _corrupt(label, position, "fails its checksum")
        key = log[start:middle]
        if kind == KIND_PUT:
            known = entries.get(key)
            entries[key] = Entry(flags, log[middle:stop], ordinal)
            # Replacing a dict's item leaves it where it is.
            if ordinal < highest if known is None else ordinal != known.ordinal:
                in_order = False
            highest = max(highest, ordinal)
        elif kind == KIND_REMOVE:
            entries.pop(key, None)
        else:
            raise _corrupt(label, position, f"is of unknown kind {kind}")
        position = align(stop)
    if in_order:
        return entries
    return dict(sorted(entries.items(), key=lambda item: item[1].ordinal))


def _corrupt(label: str, position: int, what: str) -> CorruptSegmentError:
    return CorruptSegmentError(f"segment {label}: the entry at {position} of its arena {what}")
