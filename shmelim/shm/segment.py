"""What a table's memory is made of: mapped segments, and the namespace that makes, opens and removes them.

:class:`~shmelim.shm.shared.SharedNamespace` is the real one; :class:`~shmelim.shm.private.PrivateNamespace` has
the same face over anonymous memory, so that a table without a name in ``/dev/shm`` runs through the same code.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from typing import Final, Protocol

from shmelim.shm.layout import WORD

_NAME: Final = re.compile(r"[a-z0-9_-]{1,16}")


def check_name(name: str) -> str:
    """Return a name that can name a table: 1 to 16 of ``a-z 0-9 _ -``, as macOS allows; ValueError for others."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r} must be 1 to 16 of the characters a-z, 0-9, '_' and '-'")
    return name


class Segment:
    """One mapped segment, read-only for readers.

    Slicing ``memory`` copies bytes out and never leaves the mapping. ``words`` is the same as aligned 8-byte
    words; one item read or written is one load or store. ``identity`` (device and inode) tells it from another of
    its name.
    """

    __slots__ = ("identity", "label", "memory", "words")

    def __init__(self, label: str, memory: mmap.mmap, identity: tuple[int, int] = (0, 0)) -> None:
        self.label = label
        self.memory = memory
        self.identity = identity
        self.words = memoryview(memory)[: len(memory) & -WORD].cast("Q")

    @property
    def size(self) -> int:
        """Bytes of the mapping."""
        return len(self.memory)

    def close(self) -> None:
        """Unmap, or leave that to the last user of a view into it."""
        self.words.release()
        with contextlib.suppress(BufferError):
            self.memory.close()


class Namespace(Protocol):
    """The root and data segments of one table, and the lock that makes a writer the only one."""

    name: str

    def acquire(self) -> None:
        """Become the writer, and make the root segment (one page of zeros) if there is none.

        AlreadyServingError at once if a live process is the writer; SegmentFullError if shared memory is full;
        UntrustedSegmentError if another user owns the root segment or may write to it.
        """

    def release(self) -> None:
        """Stop being the writer; nothing happens to who is not."""

    def create_root(self) -> Segment:
        """Make an empty, writable root segment, replacing any of that name; errors as in :meth:`acquire`."""

    def open_root(self, *, writable: bool = False) -> Segment:
        """Map the root segment.

        NotServingError if there is none; UntrustedSegmentError if another user owns it or may write to it.
        """

    def create_data(self, generation: int, size: int) -> Segment:
        """Make a data segment of ``size`` bytes, zeroed and all reserved, replacing any of that name.

        SegmentFullError if shared memory is full, and nothing is left behind; UntrustedSegmentError if another
        user made it; SegmentError if the root segment was removed behind the writer's back, so that the name may
        be another writer's by now.
        """

    def open_data(self, generation: int, *, writable: bool = False) -> Segment:
        """Map a data segment; errors as in :meth:`open_root`."""

    def remove_data(self, *, keep: int | None) -> None:
        """Remove the names of all data segments but generation ``keep``; whoever has them mapped keeps them."""

    def root_replaced(self, root: Segment) -> bool:
        """Tell whether the name no longer leads to ``root``: it was removed, or another made."""
