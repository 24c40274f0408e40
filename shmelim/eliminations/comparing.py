"""What a list of records would change: compared with what is published, before anything else is done with it.

Equal bytes are equal records. Of the others, what they mean decides: the order of keys does not matter, a tuple is
a list, NaN is None, and True is not 1. Only what differs is checked and stored.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from math import isnan
from operator import add, length_hint
from struct import Struct
from typing import Any, Final, NamedTuple, Self

import msgspec

from shmelim.eliminations.reading import Reading
from shmelim.eliminations.record import (
    SINCE_2020_MS,
    check_listed,
    check_record,
    complete,
    decode,
    plausible_times,
    usual_hotkey,
)
from shmelim.eliminations.rows import Row, Status, collector_at_rest, decode_encoded, decode_hotkeys
from shmelim.shm import ITEMS, KEYS, is_plain, may_mean_the_same

_TURN: Final = 1024
"""Records after which others may have the interpreter: about 1 ms where nothing differs, 3 ms where all do."""

_USUAL_SIZE: Final = 512  # bytes of a record
_AT_ONCE: Final = 64  # records that a client compares at once

_encode = msgspec.msgpack.Encoder().encode
_encode_into = msgspec.msgpack.Encoder().encode_into
_decode_records = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode
_decode_packed = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_HEADER: Final = Struct(">BI")
_ARRAY_32: Final = 0xDD
_MAP_32: Final = 0xDF
_TEXT: Final = frozenset({str})
_DICTS: Final = frozenset({dict})


class Comparison:
    """A list of records that are to be all there are, compared as it comes with what has stood since ``version``.

    ``changed`` are the records that are new or differ, in the order of the list; ``gone``, once it is finished,
    the hotkeys that it lacks. Who uses them looks again at what has changed after ``version``. For one thread at a
    time.
    """

    def __init__(self, published: Reading, since_ms: int = SINCE_2020_MS) -> None:
        self._published = published
        self._since_ms = since_ms
        self.version = published.version
        self.changed: dict[str, bytes] = {}
        self.rows: dict[str, Row] = {}  # what stands there of those, if nothing changed since
        self.notes: dict[str, str] = {}  # what is odd about those, or was filled in
        self.gone: list[str] = []
        self.size = 0  # bytes of what was ever in it
        self._same: dict[str, bytes] = {}  # what is listed as it stood there

    def __len__(self) -> int:
        return len(self._same) + len(self.changed)

    def finish(self) -> Self:
        """Look for the hotkeys that the list lacks, in their order."""
        _, found = self._published.packed_with_version(Status.ELIMINATED, KEYS)
        same, changed = self._same, self.changed
        self.gone = [hotkey for hotkey in decode_hotkeys(found) if hotkey not in same and hotkey not in changed]
        return self

    def extend(self, records: Iterable[Mapping[str, Any] | msgspec.Raw], first: int = 0) -> int:
        """Add records, the first of which has this place in the list; returns how many were given.

        Of a hotkey that is listed twice the last record counts. ValueError and TypeError name the place of one
        that cannot be stored.
        """
        records = check_listed(records)
        with collector_at_rest(length_hint(records) * _USUAL_SIZE):
            return self._extend(records, first)

    def _extend(self, records: Iterable[Mapping[str, Any] | msgspec.Raw], first: int) -> int:
        same, changed, rows = self._same, self.changed, self.rows
        buffer, count, plausible = bytearray(), 0, plausible_times(self._since_ms)
        for record in records:
            count += 1
            if count % _TURN == 0:
                time.sleep(0)
            try:
                hotkey, encoded, row, note = self._looked_at(record, plausible, buffer)
            except (ValueError, TypeError) as error:
                raise type(error)(f"elimination {first + count - 1} of the list: {error}") from None
            stored = None if row is None else row[2]
            if stored is not None and means_the_same(encoded, stored):
                same[hotkey] = stored
                changed.pop(hotkey, None)
            else:
                changed[hotkey] = encoded
                if row is not None:
                    rows[hotkey] = row
                self.size += len(encoded)
                same.pop(hotkey, None)
                if note is not None:
                    self.notes[hotkey] = note
        return count

    def _looked_at(
        self, record: Any, plausible: tuple[int, int], buffer: bytearray
    ) -> tuple[str, bytes, Row | None, str | None]:
        """Return whose a record is, what is stored of it, what stands there now, and a note."""
        look_up = self._published.row
        if type(record) is msgspec.Raw:
            encoded = bytes(record)
            if (hotkey := usual_hotkey(encoded, plausible)) is not None:
                return hotkey, encoded, look_up(hotkey), None
            record = decode(encoded)
        elif type(record) is dict and type(hotkey := record.get("hotkey")) is str and hotkey.isascii():
            row = look_up(hotkey)
            if row is not None and row.record is not None and _is_encoded(record, row.record, buffer):
                return hotkey, row.record, row, None
        checked = check_record(record, plausible=plausible)
        row = look_up(checked.hotkey)
        encoded, note = complete(checked, None if row is None else row.record)
        return checked.hotkey, encoded, row, note

    def wanted(self, hotkey: str) -> bytes | None:
        """Return the record that is listed for a hotkey; None where there is none."""
        return self._same.get(hotkey) or self.changed.get(hotkey)

    def renew(self) -> None:
        """Compare the same list with what is published by now."""
        listed = self._same | self.changed
        self.version, self.changed, self._same = self._published.version, {}, {}
        for hotkey, record in listed.items():
            stored = self._published.encoded_elimination(hotkey)
            is_same = stored is not None and means_the_same(record, stored)
            (self._same if is_same else self.changed)[hotkey] = record
        self.finish()


class Difference(NamedTuple):
    """What a list changes in a version of the table of this root; records as :func:`encoded` returns them."""

    root_id: int
    version: int
    changed: list[Any]
    gone: list[str]


def difference(published: Reading, records: Sequence[Mapping[str, Any]]) -> Difference | None:
    """Compare a list by its bytes alone; None where that is for the server.

    Which is so of odd records, and of a hotkey that is listed twice. About 1 µs a record, and 1 µs more where
    something differs near it; most where records follow each other as in the table.
    """
    root_id = published.root_id
    version, found = published.packed_with_version(Status.ELIMINATED, ITEMS)
    table = _Packed(found)
    listed: set[str] = set()
    changed: list[Any] = []
    for first in range(0, len(records), _AT_ONCE):
        part = records[first : first + _AT_ONCE]
        differing = table.differing(part, listed)
        if differing is None:
            return None
        changed += differing
    gone = [] if table.is_passed else [hotkey for hotkey in table.records if hotkey not in listed]
    return Difference(root_id, version, changed, gone)


class _Packed:
    """The records of a table as one map of msgpack, most of which is never looked into."""

    def __init__(self, packed_items: bytes) -> None:
        self._items = memoryview(packed_items)
        self._place = _header_size(packed_items)  # where the next records are expected
        self._starts: dict[str, int] | None = None  # where each hotkey stands, once they do not follow each other
        self._run = bytearray()  # records as they would stand here

    @property
    def is_passed(self) -> bool:
        """Whether the same hotkeys were listed, from the first to the last."""
        return self._starts is None and self._place == len(self._items)

    @cached_property
    def records(self) -> dict[str, msgspec.Raw]:
        """The records by hotkey."""
        return decode_encoded(self._items)

    def differing(self, part: Sequence[Any], listed: set[str]) -> list[Any] | None:
        """Return the records that do not stand here so, as :func:`encoded` does; None for odd ones.

        ``listed`` are the hotkeys before these, to which they are added.
        """
        try:
            by_hotkey = {record["hotkey"]: record for record in part}
            _encode_into(by_hotkey, self._run)
            del self._run[: _header_size(self._run)]
        except Exception:  # an object's own code may raise anything
            if len(part) > 1:
                each = [self.differing([record], listed) for record in part]
                return None if None in each else [record for found in each for record in found or ()]
            plain = (record for record in part if type(record) is dict)
            by_hotkey = {record["hotkey"]: record for record in plain if type(record.get("hotkey")) is str}
            self._run.clear()
        is_odd = len(by_hotkey) < len(part) or not _TEXT.issuperset(map(type, by_hotkey))
        if is_odd or not listed.isdisjoint(by_hotkey):
            return None
        listed.update(by_hotkey)
        if not self._run:
            return list(part)
        if self._passes(by_hotkey):
            return []
        if not _DICTS.issuperset(map(type, part)):
            return None
        given, stored = _records_in(self._run, len(by_hotkey)), self._stored(by_hotkey)
        return [
            one if is_plain(by_hotkey[hotkey]) else by_hotkey[hotkey]
            for hotkey, one in given.items()
            if stored.get(hotkey) != one
        ]

    def _passes(self, hotkeys: Iterable[str]) -> bool:
        """Tell whether what was encoded of these hotkeys is what stands here; goes on behind it then."""
        if self._starts is not None:
            self._place = self._starts.get(next(iter(hotkeys)), len(self._items))
        end = self._place + len(self._run)
        is_same = self._run == self._items[self._place : end]
        if is_same:
            self._place = end
        return is_same

    def _stored(self, hotkeys: Mapping[str, Any]) -> Mapping[str, msgspec.Raw]:
        """Return what stands here of these hotkeys, and perhaps of others."""
        if self._starts is None:
            end = self._place + len(self._run)
            with suppress(ValueError):
                found = _records_in(self._items[self._place : end], len(hotkeys))
                if found.keys() == hotkeys.keys():
                    self._place = end
                    return found
            self._starts = self._find_starts()
        return self.records

    def _find_starts(self) -> dict[str, int]:
        sizes = map(
            add,
            map(len, map(_encode, self.records)),
            (len(memoryview(record)) for record in self.records.values()),
        )
        starts = list(accumulate(sizes, initial=_header_size(self._items)))
        # Only where keys are written as they are here does it add up.
        return dict(zip(self.records, starts, strict=False)) if starts[-1] == len(self._items) else {}


def _records_in(run: bytearray | memoryview, count: int) -> dict[str, msgspec.Raw]:
    """Return so many records by their hotkeys, of a map without its header."""
    return _decode_records(_HEADER.pack(_MAP_32, count) + bytes(run))


def _header_size(items: bytes | bytearray | memoryview) -> int:
    """Return how long the header of a msgpack map is."""
    return {0xDE: 3, 0xDF: 5}.get(items[0], 1)


def encoded(record: Any) -> Any:
    """Return a record ready to be sent: encoded, where it is plain, or as it is."""
    with suppress(ValueError, TypeError, OverflowError):
        return msgspec.Raw(_encode(record)) if is_plain(record) else record
    return record  # what is wrong with it is named where it is sent


def packed(records: list[Any]) -> Any:
    """Return what :func:`encoded` made of records as one text of bytes, where all are encoded; or as they are."""
    if all(type(record) is msgspec.Raw for record in records):
        return _HEADER.pack(_ARRAY_32, len(records)) + b"".join(records)
    return records


def unpacked(records: Iterable[Any] | bytes) -> Iterable[Any]:
    """Return the records of what :func:`packed` returned; ValueError for other bytes."""
    if type(records) is not bytes:
        return records
    try:
        return _decode_packed(records)
    except ValueError as error:
        raise ValueError(f"{len(records)} bytes are no list of records: {error}") from None


def _is_encoded(record: dict[str, Any], stored: bytes | msgspec.Raw, buffer: bytearray) -> bool:
    """Tell whether these bytes are the record's as it stands; what cannot be encoded is not."""
    try:
        _encode_into(record, buffer)
    except Exception:  # an object's own code may raise anything
        return False
    return buffer == memoryview(stored)


def means_the_same(one: bytes, other: bytes) -> bool:
    """Tell whether two encoded records are the same record."""
    return one == other or (may_mean_the_same(one, other) and _are_same(decode(one), decode(other)))


def _are_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return _is_nothing(one) and _is_nothing(other)
    if type(one) is dict:
        return one.keys() == other.keys() and all(_are_same(value, other[key]) for key, value in one.items())
    if type(one) is list:
        return len(one) == len(other) and all(map(_are_same, one, other))
    return bool(one == other) or (_is_nothing(one) and _is_nothing(other))


def _is_nothing(value: Any) -> bool:
    return value is None or (type(value) is float and isnan(value))
