"""One copy of the table as its writer sees it: placing, replacing and removing entries, and compaction.

An :class:`Image` works on a copy that no reader looks at; publishing is somebody else's business
(``writer.py``). Open addressing with linear probing; removal shifts the rest of the cluster back instead of
leaving tombstones (Knuth, *The Art of Computer Programming* 3, section 6.4, algorithm R), so that probes stay
as short as the load says.

This is the reference, in pure Python. ``fast_image.py`` has the same over the extension.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from shmelim.shm import layout
from shmelim.shm.copy_header import Change, Copy
from shmelim.shm.layout import (
    ARENA_ENTRY,
    COUNT,
    ENTRY_HEADER,
    EPOCH,
    FLAG_BITS,
    FLAG_COUNTS,
    INLINE_KEY,
    KEY_LENGTH_SHIFT,
    KIND_PUT,
    KIND_REMOVE,
    LIVE,
    NEXT_ORDINAL,
    OFFSET_SHIFT,
    PACKED,
    SLOT_WORDS,
    USED,
    WORD,
    DataHeader,
    entry_size,
    pack_entry,
)
from shmelim.shm.segment import Segment

_FILL_CHUNK = 1 << 20


class Image(Copy):
    """One of the two copies in a writable segment.

    Single-threaded: only the writer's thread may use it, and only while the version word names the other copy.
    """

    def __init__(self, segment: Segment, header: DataHeader, copy: int) -> None:
        super().__init__(segment, header, copy)
        self._memory = segment.memory
        self._words = segment.words
        self._slots = header.slots_base(copy) // WORD
        self._arena = header.arena_base(copy)
        self._mask = header.capacity - 1
        count = header.capacity * SLOT_WORDS
        self.rows: NDArray[np.uint64] = np.frombuffer(
            segment.memory, np.uint64, count, header.slots_base(copy)
        ).reshape(-1, SLOT_WORDS)
        self.arena: NDArray[np.uint8] = np.frombuffer(segment.memory, np.uint8, header.arena_size, self._arena)

    # ------------------------------------------------------------------ changes

    def apply(self, changes: Sequence[Change]) -> None:
        """Carry out changes in order. The caller has made sure that slots and arena have room for all."""
        for key, flags, record, ordinal in changes:
            if flags is None:
                self._remove(key)
            else:
                self._put(key, flags, record, ordinal)

    def follow(self, source: Image) -> None:
        """Bring this copy, whose log ``source`` has continued, up to that one."""
        at, end = self.used, source.used
        self._memory[self._arena + at : self._arena + end] = source._memory[
            source._arena + at : source._arena + end
        ]
        while at < end:
            start = self._arena + at
            ordinal, _, length, key_length, flags, kind = ARENA_ENTRY.unpack_from(self._memory, start)
            key = self._memory[start + ENTRY_HEADER : start + ENTRY_HEADER + key_length]
            size = entry_size(key_length, length)
            digest, index, packed = self._find(key)
            if packed:
                self._forget(packed)
            if kind == KIND_PUT:
                self._point(index, digest, key, flags, ordinal, at, size)
            else:
                self._empty(index)
            at += size
            self.head[USED] = at

    def _missing(self, keys: Collection[bytes]) -> int:
        """Return how many of these keys are absent."""
        return sum(not self._find(key)[2] for key in keys)

    def _find(self, key: bytes) -> tuple[int, int, int]:
        """Return hash, slot index and packed word of ``key``; its slot is the empty one where it would go."""
        words, mask = self._words, self._mask
        digest = layout.key_hash(key, self.header.seed)
        length, inline = len(key), key[:INLINE_KEY]
        index = digest & mask
        while True:
            slot = self._slots + index * SLOT_WORDS
            packed = words[slot + PACKED]
            if not packed:
                return digest, index, 0
            if words[slot] == digest and packed >> KEY_LENGTH_SHIFT & 0xFF == length:
                start = (slot + 1) * WORD
                if self._memory[start : start + len(inline)] == inline and (
                    length <= INLINE_KEY or self._key_at(packed) == key
                ):
                    return digest, index, packed
            index = (index + 1) & mask

    def _key_at(self, packed: int) -> bytes:
        start = self._arena + (packed >> OFFSET_SHIFT) + ENTRY_HEADER
        return self._memory[start : start + (packed >> KEY_LENGTH_SHIFT & 0xFF)]

    def _append(self, entry: bytes) -> int:
        offset = self.head[USED]
        start = self._arena + offset
        self._memory[start : start + len(entry)] = entry
        self.head[USED] = offset + len(entry)
        return offset

    def _put(self, key: bytes, flags: int, record: bytes, ordinal: int | None) -> None:
        digest, index, packed = self._find(key)
        if packed:
            old_ordinal = self._forget(packed)
            ordinal = old_ordinal if ordinal is None else ordinal
        elif ordinal is None:
            ordinal = self.next_ordinal
        entry = pack_entry(self.header.seed, KIND_PUT, key, flags, ordinal, record)
        self._point(index, digest, key, flags, ordinal, self._append(entry), len(entry))

    def _point(
        self, index: int, digest: int, key: bytes, flags: int, ordinal: int, offset: int, size: int
    ) -> None:
        """Let a slot lead to an entry of the log."""
        words = self._words
        self.head[NEXT_ORDINAL] = max(self.head[NEXT_ORDINAL], ordinal + 1)
        self._count(flags, size, 1)
        slot = self._slots + index * SLOT_WORDS
        words[slot] = digest
        start = (slot + 1) * WORD
        self._memory[start : start + INLINE_KEY] = key[:INLINE_KEY].ljust(INLINE_KEY, b"\0")
        words[slot + PACKED] = offset << OFFSET_SHIFT | len(key) << KEY_LENGTH_SHIFT | flags

    def _forget(self, packed: int) -> int:
        """Take an entry out of the counts; return its ordinal."""
        at = self._arena + (packed >> OFFSET_SHIFT)
        ordinal, _, length, key_length, _, _ = ARENA_ENTRY.unpack_from(self._memory, at)
        self._count(packed & 0xFF, entry_size(key_length, length), -1)
        return int(ordinal)

    def _count(self, flags: int, size: int, sign: int) -> None:
        head = self.head
        head[COUNT] += sign
        head[LIVE] += sign * size
        for bit in range(FLAG_BITS):
            if flags >> bit & 1:
                head[FLAG_COUNTS + bit] += sign

    def _remove(self, key: bytes) -> None:
        _, index, packed = self._find(key)
        if not packed:
            return
        ordinal = self._forget(packed)
        self._append(pack_entry(self.header.seed, KIND_REMOVE, key, 0, ordinal, b""))
        self._empty(index)

    def _empty(self, hole: int) -> None:
        """Empty a slot, and shift back what follows."""
        rows, mask = self.rows, self._mask
        index = hole
        while True:
            index = (index + 1) & mask
            if not rows[index, PACKED]:
                break
            home = int(rows[index, 0]) & mask
            # An entry may move into the hole only if its probe passes there on the way to where it is.
            if (index - home) & mask >= (index - hole) & mask:
                rows[hole] = rows[index]
                hole = index
        rows[hole] = 0

    # ------------------------------------------------------------------ whole copies

    def clear(self) -> None:
        """Empty this copy."""
        self.begin_overwrite()
        self.rows[:] = 0
        self._set_header(0, 0, 0, [0] * FLAG_BITS)

    def fill(self, changes: Sequence[Change]) -> None:
        """Put entries with distinct keys into this copy, which must be empty; quicker than :meth:`apply`."""
        seed = self.header.seed
        next_ordinal = self.next_ordinal
        offset = self.used
        packed: list[int] = []
        parts: list[bytes] = []
        pending = 0
        for key, flags, record, given in changes:
            assert flags is not None
            ordinal = next_ordinal if given is None else given
            if ordinal >= next_ordinal:
                next_ordinal = ordinal + 1
            entry = pack_entry(seed, KIND_PUT, key, flags, ordinal, record)
            packed.append(offset + pending << OFFSET_SHIFT | len(key) << KEY_LENGTH_SHIFT | flags)
            parts.append(entry)
            pending += len(entry)
            if pending > _FILL_CHUNK:
                self._append(b"".join(parts))
                offset, pending, parts = offset + pending, 0, []
        self._append(b"".join(parts))
        used = offset + pending
        keys = [change[0] for change in changes]
        digest = layout.key_hash
        rows = np.zeros((len(keys), SLOT_WORDS), np.uint64)
        rows[:, 0] = np.fromiter((digest(key, seed) for key in keys), np.uint64, len(keys))
        rows[:, 1:PACKED] = inline_keys(keys)
        rows[:, PACKED] = np.array(packed, np.uint64)
        self.rows[place(rows[:, 0], self.header.capacity)] = rows
        self._set_header(used, len(keys), next_ordinal, counts_of(rows[:, PACKED]))

    def compact_into(self, target: Image) -> None:
        """Write the current entries, without the garbage between them, into another copy or segment.

        Everything that ``target`` held is lost. Its capacity and arena may be of another size.
        """
        live = self.rows[self.rows[:, PACKED] != 0]
        live = live[np.argsort(live[:, PACKED])]
        offsets = (live[:, PACKED] >> np.uint64(OFFSET_SHIFT)).astype(np.int64)
        heads = self.arena.view(np.uint64)[(offsets >> 3) + 2]
        lengths = (heads & np.uint64(0xFFFFFFFF)).astype(np.int64)
        sizes = (lengths + (heads >> np.uint64(32) & np.uint64(0xFF)).astype(np.int64) + ENTRY_HEADER + 7) & -8
        ends = np.cumsum(sizes)
        moved = ends - sizes
        target.begin_overwrite()
        # Entries that stand side by side move together.
        apart = np.diff(offsets, prepend=-1) != np.concatenate(([0], sizes))[: len(sizes)]
        first = np.nonzero(apart)[0]
        last = np.append(first[1:], len(live))[: len(first)] - 1
        for a, b in zip(first.tolist(), last.tolist(), strict=True):
            start, stop = offsets[a], offsets[b] + sizes[b]
            target.arena[moved[a] : moved[a] + stop - start] = self.arena[start:stop]
        live[:, PACKED] &= np.uint64(0xFFFF)
        live[:, PACKED] |= moved.astype(np.uint64) << np.uint64(OFFSET_SHIFT)
        target.rows[:] = 0
        target.rows[place(live[:, 0], target.header.capacity)] = live
        used = int(ends[-1]) if len(live) else 0
        target._set_header(used, len(live), self.next_ordinal, self.flag_counts)

    def mirror_into(self, target: Image, *, arena_from: int) -> None:
        """Make ``target``, of the same size, equal to this copy; the arenas differ from ``arena_from`` on."""
        if arena_from == 0:
            target.begin_overwrite()
        target.arena[arena_from : self.used] = self.arena[arena_from : self.used]
        target.rows[:] = self.rows
        target.head[EPOCH + 1 :] = self.head[EPOCH + 1 :]

    def _set_header(self, used: int, count: int, next_ordinal: int, counts: Sequence[int]) -> None:
        """Describe a copy without garbage."""
        head = self.head
        head[USED] = used
        head[COUNT] = count
        head[NEXT_ORDINAL] = next_ordinal
        head[LIVE] = used
        for bit in range(FLAG_BITS):
            head[FLAG_COUNTS + bit] = counts[bit]


def counts_of(flags: NDArray[np.uint64]) -> list[int]:
    """Return how many of these words have each of the flags."""
    return [int(np.count_nonzero(flags >> np.uint64(bit) & np.uint64(1))) for bit in range(FLAG_BITS)]


def inline_keys(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Return the first 48 bytes of each key, padded with zeros, as rows of words."""
    inline = b"".join([key[:INLINE_KEY].ljust(INLINE_KEY, b"\0") for key in keys])
    return np.frombuffer(inline, np.uint64).reshape(-1, INLINE_KEY // WORD)


def place(hashes: NDArray[np.uint64], capacity: int) -> NDArray[np.int64]:
    """Return where linear probing puts entries with these hashes in an empty table of ``capacity`` slots.

    Sorted by home slot, each entry goes to its home or right behind its predecessor, whichever is later: a
    running maximum. What runs over the end wraps to the first free slots.
    """
    homes = (hashes & np.uint64(capacity - 1)).astype(np.int64)
    order = np.argsort(homes, kind="stable")
    rank = np.arange(len(homes), dtype=np.int64)
    spots = np.maximum.accumulate(homes[order] - rank) + rank
    over = spots >= capacity
    if over.any():
        occupied = np.zeros(capacity, np.bool_)
        occupied[spots[~over]] = True
        spots[over] = np.nonzero(~occupied)[0][: np.count_nonzero(over)]
    placed = np.empty_like(spots)
    placed[order] = spots
    return placed
