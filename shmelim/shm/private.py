"""Segments in anonymous memory of one process, for tables that need no name."""

from __future__ import annotations

import mmap

from shmelim.errors import NotServingError
from shmelim.shm.layout import MAX_GENERATION, ROOT_SIZE, SEQUENCE_BITS, SEQUENCE_MASK, VERSION
from shmelim.shm.segment import Lock, Namespace, Segment, check_name
from shmelim.system import forks
from shmelim.system.text import get_logger

_ROOT = 0  # no data segment's generation
_GENERATION = 2  # the word of a data segment's header

_log = get_logger("shmelim.shm")


class _NoLock(Lock):
    """Whoever holds the namespace is the only one who can write."""

    number = 0

    def release(self) -> None:
        pass


class PrivateNamespace(Namespace):
    """The same segments in anonymous memory of this process: no name, nothing in ``/dev/shm``, no lock.

    A forked child sees the table as it was at the fork; the first read there logs a warning that says so.
    """

    def __init__(self, name: str = "private") -> None:
        self.name = check_name(name)
        # By generation. Written under transactions, read by readers attaching; dict operations are atomic.
        self._segments: dict[int, Segment] = {}
        self._copied = False  # whether this is a child's copy, of which nobody was told yet
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Give the child's copy another generation: its readers attach again, and come by here."""
        root = self._segments.get(_ROOT)
        generation = 0 if root is None else root.words[VERSION] >> SEQUENCE_BITS
        if root is None or generation not in self._segments:
            return
        data, number = self._segments[generation], generation % MAX_GENERATION + 1
        data.words[_GENERATION] = number
        self._segments = {_ROOT: root, number: data}
        self._copied = True
        root.words[VERSION] = number << SEQUENCE_BITS | root.words[VERSION] & SEQUENCE_MASK

    def acquire(self) -> Lock:
        return _NoLock()

    def holds(self, lock: Lock) -> bool:  # noqa: ARG002
        return True

    def open_root(self, *, writable: bool = False) -> Segment:  # noqa: ARG002
        return self._segment(_ROOT)

    def make_root(self) -> Segment:
        return self._make(_ROOT, ROOT_SIZE)

    def name_root(self, root: Segment) -> None:
        self._segments[_ROOT] = root

    def create_data(self, generation: int, size: int) -> Segment:
        self._segments[generation] = self._make(generation, size)
        return self._segments[generation]

    def open_data(self, generation: int, *, writable: bool = False) -> Segment:  # noqa: ARG002
        if self._copied:
            self._copied = False
            _log.warning(
                "the table %r is read in a forked child: it stands here as it was at the fork, and stays so;"
                " serve the name, and read it with EliminationReader, for what is current in every process",
                self.name,
            )
        return self._segment(generation)

    def remove_data(self, generation: int) -> None:
        self._segments.pop(generation, None)

    def leads_to(self, segment: Segment) -> bool:
        return any(known is segment for known in self._segments.values())

    def unlink(self, segment: Segment) -> None:
        for generation, known in list(self._segments.items()):
            if known is segment:
                del self._segments[generation]

    def tidy(self, keep: int) -> None:
        for generation in list(self._segments):
            if generation not in {_ROOT, keep}:
                del self._segments[generation]

    def _make(self, generation: int, size: int) -> Segment:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return Segment(f"{self.name} (private {generation or 'root'})", memory)

    def _segment(self, generation: int) -> Segment:
        try:
            return self._segments[generation]
        except KeyError:
            what = f"has no generation {generation}" if generation else "has no writer yet"
            raise NotServingError(f"private table {self.name!r} {what}") from None
