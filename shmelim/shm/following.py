"""How far a follower of another host's table is, and how old that makes it: a line of the root segment's own.

Two copies, each with a stamp and a checksum, written in turn: a reader takes the newest one that is whole, so it
waits for nobody, and a follower that dies half-way leaves the one before, which is older and so never too young.
As the checksum tells a torn copy, no order of stores or loads is relied on.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from shmelim.errors import NotServingError, SegmentError
from shmelim.shm.layout import FLEET, PAGE, SOURCE_SIZE, WORD, check_root, sealed, unsealed
from shmelim.shm.segment import Namespace, Segment

OLD: Final = 10.0
"""Seconds of age from which a table that follows another host's is not well."""

_TEXT: Final = FLEET + WORD
_COPIES: Final = _TEXT + SOURCE_SIZE
_FIELDS: Final = struct.Struct("<6Q")  # stamp, and the five of Position
_SIZE: Final = _FIELDS.size + WORD
_SEED: Final = 0x464F4C4C4F57  # a line of zeros is not a whole one


class Position(NamedTuple):
    """How far a follower is: its table is the source's as of ``seq`` in ``line``, published under ``term``.

    ``confirmed`` is when it was known last that the source had nothing newer, in ns of this host's
    CLOCK_BOOTTIME, and ``as_of`` the same moment by the engine's clock, in ms since 1970; both 0 where that is not
    known yet.
    """

    term: int
    line: int
    seq: int
    confirmed: int
    as_of: int


def put_source(root: Segment, source: str) -> None:
    """Say in a root segment that a follower of ``source`` writes it, or with "" that none does.

    What exceeds 136 bytes of UTF-8 is cut off.

    The one writer of the table calls it, before the first :func:`put_position`.
    """
    text = source.encode()[:SOURCE_SIZE].decode(errors="ignore").encode()
    root.words[FLEET // WORD] = 0
    if not text:  # whoever wrote here before followed, and this writer does not
        root.memory[_COPIES : _COPIES + 2 * _SIZE] = bytes(2 * _SIZE)
    root.memory[_TEXT : _TEXT + len(text)] = text
    root.words[FLEET // WORD] = len(text)


def put_position(root: Segment, position: Position) -> None:
    """Leave a position in the older of the two copies; only the one writer of the table may."""
    stamps = [(_copy(root, copy) or (0,))[0] for copy in (0, 1)]
    start = _COPIES + _SIZE * (stamps[0] > stamps[1])
    fields = _FIELDS.pack(max(stamps) + 1, *position)
    root.memory[start : start + _SIZE] = sealed(fields, _SEED)


def source_of(root: Segment) -> str:
    """Return whom the table follows, or "" where its writer is the source; a stranger's text, to be escaped."""
    size = root.words[FLEET // WORD]
    return root.memory[_TEXT : _TEXT + size].decode(errors="replace") if size <= SOURCE_SIZE else ""


def followed_by(namespace: Namespace) -> str:
    """Return whom the table of a name follows; "" where it follows nobody, or cannot be read."""
    try:
        root = namespace.open_root()
        check_root(root.memory[:PAGE], root.label)
    except (NotServingError, SegmentError):
        return ""
    return source_of(root)


def position_of(root: Segment) -> Position | None:
    """Return the newest whole position, or None where there is none; about 2 µs, and never waits.

    >>> from shmelim.shm import PrivateNamespace
    >>> root = PrivateNamespace().make_root()
    >>> position_of(root), source_of(root)
    (None, '')
    >>> put_source(root, "redis://engine.example/shmelim")
    >>> put_position(root, Position(term=1, line=1, seq=7, confirmed=0, as_of=0))
    >>> position_of(root), source_of(root)
    (Position(term=1, line=1, seq=7, confirmed=0, as_of=0), 'redis://engine.example/shmelim')
    """
    found = [fields for copy in (0, 1) if (fields := _copy(root, copy)) is not None]
    return Position(*max(found)[1:]) if found else None


def _copy(root: Segment, copy: int) -> tuple[int, ...] | None:
    start = _COPIES + _SIZE * copy
    return unsealed(root.memory[start : start + _SIZE], _FIELDS, _SEED)
