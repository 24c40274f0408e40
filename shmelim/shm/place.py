"""Where the writer's command channel is found: a short text in the root segment, which the table does not read."""

from __future__ import annotations

from shmelim.shm.layout import PAGE, PLACE, PLACE_SIZE, WORD, check_root
from shmelim.shm.segment import Namespace, Segment

_TEXT = PLACE + WORD


def place_of(namespace: Namespace) -> bytes:
    """Return the place that the root segment of a name has; empty where it has none.

    NotServingError or SegmentError where the root segment cannot be opened. What it returns was written by the
    segment's owner, and may be any bytes: it is to be checked.
    """
    root = namespace.open_root()
    check_root(root.memory[:PAGE], root.label)
    size = root.words[PLACE // WORD]
    return root.memory[_TEXT : _TEXT + size] if size <= PLACE_SIZE else b""


def put_place(root: Segment, place: bytes) -> None:
    """Write a place into a root segment, if it is short enough; who reads meanwhile may find half of it."""
    root.words[PLACE // WORD] = 0
    if len(place) <= PLACE_SIZE:
        root.memory[_TEXT : _TEXT + len(place)] = place
        root.words[PLACE // WORD] = len(place)
