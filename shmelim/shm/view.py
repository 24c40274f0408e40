"""An attached data segment: where its two copies are, and how a key is found in one of them.

Everything read from shared memory is checked against the reader's own mapping before it is used as an offset or
a length: bad bytes give :class:`CorruptSegmentError`, never a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from shmelim.errors import CorruptSegmentError
from shmelim.shm import layout
from shmelim.shm.layout import (
    ARENA_ENTRY,
    COPY_HEADER_SIZE,
    ENTRY_HEADER,
    INLINE_KEY,
    KEY_LENGTH_SHIFT,
    OFFSET_SHIFT,
    PACKED,
    PAGE,
    ROOT_ID,
    SLOT_WORDS,
    WORD,
    unpack_data_header,
)
from shmelim.shm.segment import Segment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NO_END: Final = "has no empty slot: a lookup cannot end"


class Batch:
    """Keys of a batch lookup, prepared for probing before any version is looked at."""

    def __init__(self, keys: Sequence[bytes], seed: int) -> None:
        import numpy as np  # noqa: PLC0415  # loaded by whoever has a batch: see LOADING_NUMPY

        self.keys = keys
        self.lengths = np.fromiter(map(len, keys), np.uint64, len(keys))
        self.inline: NDArray[np.uint64] = (
            np.array(keys, f"S{INLINE_KEY}").view(np.uint64).reshape(-1, INLINE_KEY // WORD)
        )
        self.hash_for(seed)

    def hash_for(self, seed: int) -> None:
        """Hash all keys with ``seed``."""
        import numpy as np  # noqa: PLC0415

        digest = layout.key_hash
        self.hashes = np.fromiter((digest(key, seed) for key in self.keys), np.uint64, len(self.keys))
        self.seed = seed


class View:
    """A data segment as a reader sees it: immutable once made, so that one reference read is a consistent set.

    It is of use only together with ``root``, the root segment whose version word ``version`` named it: another
    root of the same name may name the same generation and mean another segment, which the ids of both tell.
    """

    def __init__(self, segment: Segment, version: int, root: Segment) -> None:
        self.header = header = unpack_data_header(
            segment.memory[:PAGE], segment.size, root.words[ROOT_ID], version, segment.label
        )
        self.generation, self.seed, self.capacity, self.arena_size, *_ = header
        self.segment = segment
        self.root = root
        self.root_words = root.words
        self.memory = segment.memory
        self.words = segment.words
        self.mask = header.capacity - 1
        self.header_word = [header.copy_base(copy) // WORD for copy in (0, 1)]
        self.slot_word = [header.slots_base(copy) // WORD for copy in (0, 1)]
        self.arena = [header.arena_base(copy) for copy in (0, 1)]

    def head(self, copy: int) -> list[int]:
        """Return the words of a copy's header."""
        at = self.header_word[copy]
        return self.words[at : at + COPY_HEADER_SIZE // WORD].tolist()

    def probe(self, copy: int, key: bytes) -> int:
        """Return the packed word of ``key``'s slot, 0 if it is absent.

        Linear probing from the home slot to the first empty one. A slot's hash is compared first: it
        differs in all but one of 2**64 strangers.
        """
        words = self.words
        digest = layout.key_hash(key, self.seed)
        base = self.slot_word[copy]
        home = slot = base + (digest & self.mask) * SLOT_WORDS
        while True:
            if words[slot] == digest:
                packed = words[slot + PACKED]
                length = len(key)
                start = (slot + 1) * WORD
                if packed >> KEY_LENGTH_SHIFT & 0xFF == length and (
                    self.memory[start : start + length] == key
                    if length <= INLINE_KEY
                    else self._same_long_key(copy, packed, key)
                ):
                    return packed
                if not packed:
                    return 0
            elif not words[slot + PACKED]:
                return 0
            slot += SLOT_WORDS
            if slot == base + self.capacity * SLOT_WORDS:
                slot = base
            if slot == home:
                raise self.corrupt(_NO_END)

    def _same_long_key(self, copy: int, packed: int, key: bytes) -> bool:
        length = len(key)
        start = (packed >> OFFSET_SHIFT) + ENTRY_HEADER
        if start + length > self.arena_size:
            return False
        start += self.arena[copy]
        return self.memory[start : start + length] == key

    def probe_many(self, copy: int, batch: Batch) -> NDArray[np.uint64]:
        """Return the packed words of many keys.

        Each round looks at one slot of every key not settled yet, and compares hashes only. What was found is
        compared in full afterwards; a key that is not the one found there, or is longer than a slot, is probed
        for on its own.
        """
        import numpy as np  # noqa: PLC0415

        hashes = batch.hashes
        rows: NDArray[np.uint64] = np.frombuffer(
            self.memory, np.uint64, self.capacity * SLOT_WORDS, self.slot_word[copy] * WORD
        ).reshape(-1, SLOT_WORDS)
        slot_hashes, slot_packed = rows[:, 0], rows[:, PACKED]
        packed_of = np.zeros(len(batch.keys), np.uint64)
        slot_of = np.zeros(len(batch.keys), np.uint64)
        mask = np.uint64(self.mask)
        index = hashes & mask
        unsettled = np.arange(len(batch.keys))
        for _ in range(self.capacity):
            packed = slot_packed[index]
            occupied = packed != 0
            same = (slot_hashes[index] == hashes[unsettled]) & occupied
            settled = unsettled[same]
            packed_of[settled], slot_of[settled] = packed[same], index[same]
            left = np.flatnonzero(occupied & ~same)
            if not len(left):
                break
            unsettled = unsettled[left]
            index = (index[left] + np.uint64(1)) & mask
        else:
            raise self.corrupt(_NO_END)
        hits = np.flatnonzero(packed_of)
        lengths = batch.lengths[hits]
        doubtful = (
            (packed_of[hits] >> np.uint64(KEY_LENGTH_SHIFT) & np.uint64(0xFF) != lengths)
            | (lengths > INLINE_KEY)
            | (rows[slot_of[hits], 1:PACKED] != batch.inline[hits]).any(axis=1)
        )
        for position in hits[doubtful]:
            packed_of[position] = self.probe(copy, batch.keys[position])
        return packed_of

    def record_span(self, copy: int, packed: int) -> tuple[int, int, int]:
        """Return first byte, end and ordinal of a record, after checking that it lies in the arena."""
        offset = packed >> OFFSET_SHIFT
        if offset + ENTRY_HEADER > self.arena_size:
            raise self.corrupt(f"has a record at {offset} that does not fit into its arena")
        at = self.arena[copy] + offset
        ordinal, _, length, key_length, _, _ = ARENA_ENTRY.unpack_from(self.memory, at)
        start = at + ENTRY_HEADER + key_length
        end = start + length
        if end > self.arena[copy] + self.arena_size or key_length != packed >> KEY_LENGTH_SHIFT & 0xFF:
            raise self.corrupt(f"has a record at {offset} that does not fit into its arena")
        return start, end, ordinal

    def corrupt(self, what: str) -> CorruptSegmentError:
        """Return the error that says what is wrong with this segment."""
        return CorruptSegmentError(f"segment {self.segment.label} {what}")
