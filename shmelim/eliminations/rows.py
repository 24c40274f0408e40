"""How a row of the store stands in the shared table: its key, its flags, and the bytes of its record.

::

    flags    ELIMINATED | DEPARTED | REGISTERED
    ordinal  of the elimination, else of the departure: the order in which results come
    record   detected_ms i64 | departed ordinal i64 | the elimination record, msgpack (may be empty)

A table is a pure function of the store: what is published for a hotkey follows from its row alone.
"""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntFlag
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeAlias, TypeVar

import msgspec

from shmelim.errors import CorruptSegmentError
from shmelim.shm import HEADS, ITEMS, VALUES

if TYPE_CHECKING:
    from shmelim.shm import Entry

T = TypeVar("T")

_LARGE: Final = 200_000  # bytes

# Whether a thread of this process keeps the garbage collector switched off; written by that thread alone.
_collector_rests = False
PREFIX: Final = struct.Struct("<qq")
_HEAD: Final = PREFIX.size
_NO_DEPARTURE: Final = bytes(_HEAD)
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


_row: Final = Row._make  # half as long as a call of the class
RowFields: TypeAlias = tuple[str, int | None, bytes | None, int | None, int | None, bool]


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


_ELIMINATED: Final = int(Status.ELIMINATED)
_DEPARTED: Final = int(Status.DEPARTED)
_REGISTERED: Final = int(Status.REGISTERED)


def row_entry(row: RowFields) -> tuple[bytes, int, bytes, int]:
    """Return key, flags, record and ordinal under which a row is published."""
    hotkey, eliminated_ordinal, record, departed_ordinal, detected_ms, registered = row
    flags = (
        (0 if eliminated_ordinal is None else _ELIMINATED)
        | (0 if departed_ordinal is None else _DEPARTED)
        | (_REGISTERED if registered else 0)
    )
    prefix = _NO_DEPARTURE if departed_ordinal is None else PREFIX.pack(detected_ms or 0, departed_ordinal)
    return hotkey.encode(), flags, prefix + (record or b""), eliminated_ordinal or departed_ordinal or 0


def entry_row(hotkey: str, flags: int, ordinal: int, record: bytes) -> Row:
    """Return the row that is published so."""
    detected_ms, departed_ordinal = PREFIX.unpack_from(record) if flags & _DEPARTED else (None, None)
    place, body = (ordinal, record[_HEAD:]) if flags & _ELIMINATED else (None, None)
    return _row((hotkey, place, body, departed_ordinal, detected_ms, flags & _REGISTERED != 0))


def pack(entries: Mapping[bytes, Entry], flag: int, form: int) -> bytes:
    """Return what the compiled read path collects (as ``Lookups._collect``) of a snapshot's entries."""
    size = PREFIX.size
    try:
        chosen = {key.decode(): entry.record for key, entry in entries.items() if entry.flags & flag}
    except UnicodeDecodeError as error:
        raise CorruptSegmentError(f"a key in shared memory cannot be decoded: {error}") from error
    packed: Any = list(chosen)
    if form == HEADS:
        packed = {hotkey: record[:size] for hotkey, record in chosen.items()}
    elif form == ITEMS:
        packed = {hotkey: msgspec.Raw(record[size:]) for hotkey, record in chosen.items()}
    elif form == VALUES:
        packed = [msgspec.Raw(record[size:]) for record in chosen.values()]
    return msgspec.msgpack.encode(packed)


def _wake_collector_in_child() -> None:
    # The thread that would have switched it on again does not exist in the child.
    global _collector_rests  # noqa: PLW0603
    if _collector_rests:
        gc.enable()
        _collector_rests = False


os.register_at_fork(after_in_child=_wake_collector_in_child)


@contextmanager
def collector_at_rest(size: int) -> Iterator[None]:
    """Keep the cyclic garbage collector from walking many records, of so many bytes, again and again as they grow.

    They hold no cycles, and the walks take up to half of the time from some thousand records on.
    """
    global _collector_rests  # noqa: PLW0603
    rests = size >= _LARGE and gc.isenabled()
    if rests:
        _collector_rests = True
        gc.disable()
    try:
        yield
    finally:
        if rests:
            gc.enable()
            _collector_rests = False


def _decode_all(decoder: msgspec.msgpack.Decoder[T], found: bytes | memoryview) -> T:
    with collector_at_rest(len(found)):
        try:
            return decoder.decode(found)
        except ValueError as error:
            raise CorruptSegmentError(f"the records in shared memory cannot be decoded: {error}") from error


# What the read paths collect: all records, in an array or by hotkey, decoded or as they stand; hotkeys; the heads
# of records by hotkey.
decode_rows = partial(_decode_all, msgspec.msgpack.Decoder(list[dict[str, Any]]))
decode_eliminations = partial(_decode_all, msgspec.msgpack.Decoder(dict[str, dict[str, Any]]))
decode_encoded = partial(_decode_all, msgspec.msgpack.Decoder(dict[str, msgspec.Raw]))
decode_hotkeys = partial(_decode_all, msgspec.msgpack.Decoder(list[str]))
_Head = Annotated[bytes, msgspec.Meta(min_length=PREFIX.size, max_length=PREFIX.size)]
_decode_heads = partial(_decode_all, msgspec.msgpack.Decoder(dict[str, _Head]))


def decode_departures(found: bytes) -> dict[str, dict[str, int]]:
    """Return ``{hotkey: {"detected_ms": …}}``, in the order of departure, of a msgpack map of hotkey to prefix."""
    heads = [(*PREFIX.unpack(head), hotkey) for hotkey, head in _decode_heads(found).items()]
    heads.sort(key=lambda head: head[1])
    return {hotkey: {"detected_ms": detected_ms} for detected_ms, _, hotkey in heads}


def departed_in(entries: Mapping[bytes, Entry]) -> dict[str, dict[str, int]]:
    """Return the same of a snapshot's entries."""
    return decode_departures(pack(entries, Status.DEPARTED, HEADS))
