"""How a row of the store stands in the shared table: its key, its flags, and the bytes of its record.

::

    flags    ELIMINATED | DEPARTED | REGISTERED
    ordinal  of the elimination, else of the departure: the order in which results come
    record   detected_ms i64 | departed ordinal i64 | the elimination record, msgpack (may be empty)

A table is a pure function of the store: what is published for a hotkey follows from its row alone.
"""

from __future__ import annotations

import contextlib
import gc
import os
import struct
from enum import IntFlag
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import msgspec

from shmelim.eliminations.record import decode
from shmelim.errors import CorruptSegmentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from shmelim.shm import Entry

T = TypeVar("T")

_MANY: Final = 1000
_rows: Final = msgspec.msgpack.Decoder(list[dict[str, Any]])
_eliminations: Final = msgspec.msgpack.Decoder(dict[str, dict[str, Any]])
_hotkeys: Final = msgspec.msgpack.Decoder(list[str])
_prefixes: Final = msgspec.msgpack.Decoder(dict[str, bytes])

# Whether a thread of this process keeps the garbage collector switched off; written by that thread alone.
_collector_rests = False
PREFIX: Final = struct.Struct("<qq")
ORIGIN_KEY: Final = b"\xff:origin"
"""Key of the one entry that is not a hotkey's (it is not UTF-8): which state directory the table was made from."""


class Row(NamedTuple):
    """What the store knows of one hotkey, which is what is published about it."""

    hotkey: str
    eliminated_ordinal: int | None
    record: bytes | None
    departed_ordinal: int | None
    detected_ms: int | None
    registered: bool


class Status(IntFlag):
    """What is known of a hotkey: it is eliminated, it once left the metagraph, it is in the metagraph now.

    Examples
    --------
    >>> status = Status.DEPARTED | Status.REGISTERED  # re-registered
    >>> Status.DEPARTED in status, Status.ELIMINATED in status
    (True, False)

    """

    ELIMINATED = 1
    DEPARTED = 2
    REGISTERED = 4


def eliminations_in(entries: Mapping[bytes, Entry]) -> dict[str, dict[str, Any]]:
    """Return the elimination records in a snapshot's entries, in the order of first elimination."""
    size = PREFIX.size
    with _collector_at_rest(len(entries)):
        return {
            key.decode(): decode(record[size:])
            for key, (flags, record, _) in entries.items()
            if flags & Status.ELIMINATED
        }


@contextlib.contextmanager
def _collector_at_rest(size: int) -> Iterator[None]:
    """Keep the cyclic garbage collector from walking a large result again and again while it grows.

    Decoded records hold no cycles, and the walks double the time from some thousand records on.
    """
    global _collector_rests  # noqa: PLW0603
    if size < _MANY or not gc.isenabled():
        yield
        return
    _collector_rests = True
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        _collector_rests = False


def _wake_collector_in_child() -> None:
    # The thread that would have switched it on again does not exist in the child.
    global _collector_rests  # noqa: PLW0603
    if _collector_rests:
        gc.enable()
        _collector_rests = False


os.register_at_fork(after_in_child=_wake_collector_in_child)


def decode_rows(found: bytes) -> list[dict[str, Any]]:
    """Return the elimination records in a msgpack array of them."""
    return _decode_all(_rows, found)


def decode_eliminations(found: bytes) -> dict[str, dict[str, Any]]:
    """Return the elimination records in a msgpack map of hotkey to record."""
    return _decode_all(_eliminations, found)


def decode_hotkeys(found: bytes) -> list[str]:
    """Return the hotkeys in a msgpack array of them."""
    return _decode_all(_hotkeys, found)


def decode_departures(found: bytes) -> dict[str, dict[str, int]]:
    """Return ``{hotkey: {"detected_ms": …}}``, in the order of departure, of a msgpack map of hotkey to prefix."""
    prefixes = [(PREFIX.unpack(prefix), hotkey) for hotkey, prefix in _decode_all(_prefixes, found).items()]
    prefixes.sort(key=_departed_ordinal)
    return {hotkey: {"detected_ms": detected_ms} for (detected_ms, _), hotkey in prefixes}


def _decode_all(decoder: msgspec.msgpack.Decoder[T], found: bytes) -> T:
    # The number of items stands in the four bytes behind the first.
    with _collector_at_rest(int.from_bytes(found[1:5], "big")):
        try:
            return decoder.decode(found)
        except msgspec.DecodeError as error:
            raise CorruptSegmentError(f"the records in shared memory cannot be decoded: {error}") from error


def _departed_ordinal(item: tuple[tuple[int, int], Any]) -> int:
    return item[0][1]


def departed_in(entries: Mapping[bytes, Entry]) -> dict[str, dict[str, int]]:
    """Return ``{hotkey: {"detected_ms": …}}`` of a snapshot's entries, in the order of departure."""
    found = [
        (PREFIX.unpack_from(record), key) for key, (flags, record, _) in entries.items() if flags & Status.DEPARTED
    ]
    found.sort(key=_departed_ordinal)
    return {key.decode(): {"detected_ms": detected_ms} for (detected_ms, _), key in found}
