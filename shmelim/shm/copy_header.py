"""What both images of a copy of the table share: its header, as its writer sees it, and what a change is."""

from __future__ import annotations

from typing import TypeAlias

from shmelim.shm.layout import (
    COPY_HEADER_SIZE,
    COUNT,
    EPOCH,
    FLAG_BITS,
    FLAG_COUNTS,
    LIVE,
    MAX_WORD,
    NEXT_ORDINAL,
    USED,
    WORD,
    DataHeader,
)
from shmelim.shm.native import fence
from shmelim.shm.segment import Segment

Change: TypeAlias = tuple[bytes, int | None, bytes, int | None]
"""What a transaction does to one key: (key, flags, record, ordinal), all of them checked.

Flags None remove it; ordinal None keeps the one that it has, or gives it the next."""


class Copy:
    """One of the two copies in a writable segment; ``head`` are the words of its header."""

    def __init__(self, segment: Segment, header: DataHeader, copy: int) -> None:
        self.header = header
        at = header.copy_base(copy) // WORD
        self.head = segment.words[at : at + COPY_HEADER_SIZE // WORD]

    @property
    def used(self) -> int:
        """Bytes of the arena that are written."""
        return self.head[USED]

    @property
    def count(self) -> int:
        """Entries."""
        return self.head[COUNT]

    @property
    def live(self) -> int:
        """Bytes of the arena that current entries take."""
        return self.head[LIVE]

    @property
    def next_ordinal(self) -> int:
        """The ordinal of the next new key."""
        return self.head[NEXT_ORDINAL]

    @property
    def flag_counts(self) -> list[int]:
        """How many entries have each of the flags."""
        return self.head[FLAG_COUNTS : FLAG_COUNTS + FLAG_BITS].tolist()

    def begin_overwrite(self) -> None:
        """Move the epoch: what readers took for an append-only log is about to be written over.

        Must be seen before the first such store.
        """
        self.head[EPOCH] = self.head[EPOCH] + 1 & MAX_WORD  # it may be what a stranger left
        fence()
