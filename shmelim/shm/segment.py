"""What a table's memory is made of: mapped segments, and the namespace that makes, opens and removes them.

:class:`~shmelim.shm.shared.SharedNamespace` is the real one; :class:`~shmelim.shm.private.PrivateNamespace` has
the same face over anonymous memory, so that a table without a name in ``/dev/shm`` runs through the same code.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Protocol

from shmelim.shm.layout import WORD

if TYPE_CHECKING:
    import mmap

_NAME: Final = re.compile(r"[a-z0-9_-]{1,16}")


def check_name(name: str) -> str:
    """Return a name that can name a table: 1 to 16 of ``a-z 0-9 _ -``, as macOS allows; ValueError for others."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name {name!r} must be 1 to 16 of the characters a-z, 0-9, '_' and '-'")
    return name


class Segment:
    """One mapped segment, read-only for readers; it is unmapped with the last reference to its memory.

    Slicing ``memory`` copies bytes out and never leaves the mapping; ``window`` is the same as a read-only view.
    ``words`` is the same as aligned 8-byte words; one item read or written is one load or store. ``identity``
    (device and inode) tells it from another of its name.
    """

    __slots__ = ("identity", "label", "memory", "window", "words")

    memory: mmap.mmap  # or what slices like one

    def __init__(self, label: str, memory: Any, identity: tuple[int, int] = (0, 0)) -> None:
        self.label = label
        self.memory = memory
        self.identity = identity
        whole = memory.plain() if hasattr(memory, "plain") else memoryview(memory)
        self.window = whole.toreadonly()
        self.words = whole[: len(memory) & -WORD].cast("Q")

    @property
    def size(self) -> int:
        """Bytes of the mapping."""
        return len(self.memory)


class Lock(Protocol):
    """What makes a writer the only one; held until it is released, or nobody refers to it any more."""

    number: int
    """Tells it from other locks of the name; 0 where there are none."""

    def release(self) -> None:
        """Give it back; idempotent."""


class Namespace(Protocol):
    """The root and data segments of one table, and the lock that makes a writer the only one."""

    name: str
    readers_prefix: str | None = None
    """How the paths of its readers' pages begin; None where readers are not counted."""

    def acquire(self) -> Lock:
        """Become the writer.

        AlreadyServingError at once if a live process is the writer; UntrustedSegmentError if another user has the
        lock's name.
        """

    def holds(self, lock: Lock) -> bool:
        """Tell whether the lock's name still leads to it, so that it keeps other writers out."""

    def open_root(self, *, writable: bool = False) -> Segment:
        """Map the root segment; a writable one is at least a page, and zeroed if it was not.

        NotServingError if there is none; UntrustedSegmentError if another user owns it or may write to it;
        AlreadyServingError if it is to be writable, and a writer of format 1 has it.
        """

    def make_root(self) -> Segment:
        """Make an empty root segment, a page of zeros that :meth:`name_root` gives its name.

        SegmentFullError if shared memory is full.
        """

    def name_root(self, root: Segment) -> None:
        """Let the name lead to this root segment, in one step."""

    def create_data(self, generation: int, size: int) -> Segment:
        """Make a data segment of ``size`` bytes, zeroed and all reserved, replacing one of that name.

        SegmentFullError if shared memory is full, and nothing is left behind; UntrustedSegmentError if the name is
        another user's, or not that of a segment.
        """

    def open_data(self, generation: int, *, writable: bool = False) -> Segment:
        """Map a data segment; errors as in :meth:`open_root`."""

    def remove_data(self, generation: int) -> None:
        """Remove the name of a data segment, unless it is another user's."""

    def leads_to(self, segment: Segment) -> bool:
        """Tell whether the segment's name leads to it."""

    def unlink(self, segment: Segment) -> None:
        """Remove the segment's name, if it leads to it; whoever has it mapped keeps it."""

    def tidy(self, keep: int) -> None:
        """Remove what dead writers left: the names of all data segments but generation ``keep``."""
