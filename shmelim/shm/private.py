"""Segments in anonymous memory of one process, for tables that need no name."""

from __future__ import annotations

import mmap

from shmelim.errors import NotServingError
from shmelim.shm.layout import ROOT_SIZE
from shmelim.shm.segment import Namespace, Segment, check_name

_ROOT = 0  # no data segment's generation


class PrivateNamespace(Namespace):
    """The same segments in anonymous memory of this process: no name, nothing in ``/dev/shm``, no lock.

    A forked child sees the table as it was at the fork.
    """

    def __init__(self, name: str = "private") -> None:
        self.name = check_name(name)
        # By generation. Written under transactions, read by readers attaching; dict operations are atomic.
        self._segments: dict[int, Segment] = {}

    def acquire(self) -> None:
        # Whoever holds this object is the only one who can.
        if _ROOT not in self._segments:
            self.create_root()

    def release(self) -> None:
        pass

    def create_root(self) -> Segment:
        return self.create_data(_ROOT, ROOT_SIZE)

    def open_root(self, *, writable: bool = False) -> Segment:  # noqa: ARG002
        return self._segment(_ROOT)

    def create_data(self, generation: int, size: int) -> Segment:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._segments[generation] = Segment(f"{self.name} (private {generation or 'root'})", memory)
        return self._segments[generation]

    def open_data(self, generation: int, *, writable: bool = False) -> Segment:  # noqa: ARG002
        return self._segment(generation)

    def remove_data(self, *, keep: int | None) -> None:
        for generation in list(self._segments):
            if generation not in {_ROOT, keep}:
                del self._segments[generation]

    def root_replaced(self, root: Segment) -> bool:
        return root is not self._segments.get(_ROOT)

    def _segment(self, generation: int) -> Segment:
        try:
            return self._segments[generation]
        except KeyError:
            what = f"has no generation {generation}" if generation else "has no writer yet"
            raise NotServingError(f"private table {self.name!r} {what}") from None
