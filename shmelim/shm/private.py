"""Segments in anonymous memory of one process, for tables that need no name."""

from __future__ import annotations

import mmap

from shmelim.errors import NotServingError
from shmelim.shm.layout import ROOT_SIZE
from shmelim.shm.segment import Lock, Namespace, Segment, check_name

_ROOT = 0  # no data segment's generation


class _NoLock(Lock):
    """Whoever holds the namespace is the only one who can write."""

    number = 0

    def release(self) -> None:
        pass


class PrivateNamespace(Namespace):
    """The same segments in anonymous memory of this process: no name, nothing in ``/dev/shm``, no lock.

    A forked child sees the table as it was at the fork.
    """

    def __init__(self, name: str = "private") -> None:
        self.name = check_name(name)
        # By generation. Written under transactions, read by readers attaching; dict operations are atomic.
        self._segments: dict[int, Segment] = {}

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
