"""Segments in anonymous memory of one process, for tables that need no name."""

from __future__ import annotations

import mmap

from shmelim.errors import NotServingError
from shmelim.shm.layout import ROOT_SIZE
from shmelim.shm.segment import Namespace, Segment, check_name


class PrivateNamespace(Namespace):
    """The same segments in anonymous memory of this process: no name, nothing in ``/dev/shm``, no lock.

    A forked child sees the table as it was at the fork.
    """

    def __init__(self, name: str = "private") -> None:
        self.name = check_name(name)
        self._root: Segment | None = None
        # Written under the writer's transactions, read by readers attaching; dict operations are atomic.
        self._data: dict[int, Segment] = {}

    def acquire(self) -> None:
        # Whoever holds this object is the only one who can.
        if self._root is None:
            self.create_root()

    def release(self) -> None:
        pass

    def create_root(self) -> Segment:
        self._root = Segment(f"{self.name} (private root)", _anonymous(ROOT_SIZE))
        return self._root

    def open_root(self, *, writable: bool = False) -> Segment:  # noqa: ARG002
        if self._root is None:
            raise NotServingError(f"nothing is served in the private table {self.name!r}")
        return self._root

    def create_data(self, generation: int, size: int) -> Segment:
        self._data[generation] = Segment(f"{self.name} (private {generation})", _anonymous(size))
        return self._data[generation]

    def open_data(self, generation: int) -> Segment:
        try:
            return self._data[generation]
        except KeyError:
            raise NotServingError(f"private table {self.name!r} has no generation {generation}") from None

    def remove_data(self, *, keep: int | None) -> None:
        for generation in list(self._data):
            if generation != keep:
                del self._data[generation]

    def root_replaced(self, root: Segment) -> bool:
        return root is not self._root


def _anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
