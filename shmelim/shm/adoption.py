"""Whether a copy that somebody else wrote is whole: what a writer checks before it takes it for its own."""

from __future__ import annotations

import numpy as np

from shmelim.errors import CorruptSegmentError
from shmelim.shm.image import Image, counts_of, inline_keys
from shmelim.shm.layout import (
    ARENA_ENTRY,
    ENTRY_CHECKED,
    ENTRY_HEADER,
    KIND_PUT,
    KIND_REMOVE,
    OFFSET_SHIFT,
    PACKED,
    WORD,
    align,
    entry_checksum,
    key_hash,
)


def check_copy(image: Image, label: str) -> None:
    """Raise CorruptSegmentError unless log, slots and header of a copy agree, and lookups find every entry.

    About 2 µs an entry. ``label`` is the segment's name, for the message.
    """
    header, mask = image.header, np.uint64(image.header.capacity - 1)
    used = image.used
    if used % WORD or used > header.arena_size:
        raise _corrupt(label, f"says {used} bytes used of an arena of {header.arena_size}")
    place_of = _last_places(image.arena[:used].tobytes(), header.seed, label)
    keys = sorted(place_of, key=place_of.__getitem__)
    places = np.fromiter(map(place_of.__getitem__, keys), np.uint64, len(keys))

    occupied = image.rows[:, PACKED] != 0
    found = np.flatnonzero(occupied)
    found = found[np.argsort(image.rows[found, PACKED] >> np.uint64(OFFSET_SHIFT))]
    rows = image.rows[found]
    if not np.array_equal(rows[:, PACKED] >> np.uint64(OFFSET_SHIFT), places):
        raise _corrupt(label, f"has {len(found)} slots that are not those of the {len(keys)} entries of its log")
    ordinals, _, heads = (image.arena[: used or 0].view(np.uint64)[(places >> np.uint64(3)) + n] for n in range(3))
    key_sizes, flags = heads >> np.uint64(32) & np.uint64(0xFF), heads >> np.uint64(40) & np.uint64(0xFF)
    hashes = np.fromiter((key_hash(key, header.seed) for key in keys), np.uint64, len(keys))
    if (
        not np.array_equal(rows[:, PACKED] & np.uint64(0xFFFF), key_sizes << np.uint64(8) | flags)
        or not np.array_equal(rows[:, 0], hashes)
        or not np.array_equal(rows[:, 1:PACKED], inline_keys(keys))
    ):
        raise _corrupt(label, "has a slot that contradicts its entry")

    # A lookup goes from home to the first empty slot: there must be none before the slot itself.
    empty = np.concatenate(([0], np.cumsum(np.tile(~occupied, 2))))
    homes = (hashes & mask).astype(np.int64)
    if np.any(empty[homes + ((found - homes) & int(mask))] != empty[homes]) or 2 * len(keys) > header.capacity:
        raise _corrupt(label, "has entries that lookups do not find")

    sizes = (heads & np.uint64(0xFFFFFFFF)) + key_sizes + np.uint64(ENTRY_HEADER + WORD - 1) & ~np.uint64(WORD - 1)
    said, counted = (image.count, image.live, image.flag_counts), (len(keys), int(sizes.sum()), counts_of(flags))
    if said != counted or np.any(ordinals >= np.uint64(image.next_ordinal)):
        raise _corrupt(label, "has a header that contradicts its entries")


def _last_places(log: bytes, seed: int, label: str) -> dict[bytes, int]:
    """Return where in a log the entry of each key stands that it leaves."""
    places: dict[bytes, int] = {}
    position, end = 0, len(log)
    unpack = ARENA_ENTRY.unpack_from
    while position < end:
        start = position + ENTRY_HEADER
        if start > end:
            raise _corrupt(label, f"has a log that is cut off at {position}")
        ordinal, checksum, length, key_length, _, kind = unpack(log, position)
        stop = start + key_length + length
        if (
            stop > end
            or key_length == 0
            or kind not in {KIND_PUT, KIND_REMOVE}
            or entry_checksum(seed, ordinal, log[position + ENTRY_CHECKED : stop]) != checksum
        ):
            raise _corrupt(label, f"has a damaged entry at {position} of its log")
        key = log[start : start + key_length]
        if kind == KIND_PUT:
            places[key] = position
        else:
            places.pop(key, None)
        position = align(stop)
    return places


def _corrupt(label: str, what: str) -> CorruptSegmentError:
    return CorruptSegmentError(f"segment {label} {what}")
