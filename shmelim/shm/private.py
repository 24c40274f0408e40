"""Segments in anonymous memory of one process, for tables that need no name."""

from __future__ import annotations

import logging
import mmap

from shmelim.errors import NotServingError
from shmelim.shm.layout import ROOT_SIZE, SEQUENCE_BITS, SEQUENCE_MASK, VERSION, next_generation
from shmelim.shm.segment import Namespace, Segment, check_name
from shmelim.system import forks

_ROOT = 0  # no data segment's generation
_GENERATION = 2  # the word of a data segment's header

_log = logging.getLogger("shmelim.shm")


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
        data, number = self._segments[generation], next_generation(generation)
        data.words[_GENERATION] = number
        self._segments = {_ROOT: root, number: data}
        self._copied = True
        root.words[VERSION] = number << SEQUENCE_BITS | root.words[VERSION] & SEQUENCE_MASK

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
        if self._copied:
            self._copied = False
            _log.warning(
                "the table %r is read in a forked child: it stands here as it was at the fork, and stays so;"
                " serve the name, and read it with EliminationReader, for what is current in every process",
                self.name,
            )
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
