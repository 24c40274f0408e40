"""What stands in the engine, as msgpack: head, messages, chunks of snapshots, reports; and its checks.

All of it is a stranger's: whoever may write to the engine can put anything there. What is not of the shape and the
sizes said here is a :class:`~shmelim.errors.FleetDataError`, and nothing of it is applied.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct
from xxhash import xxh3_64_intdigest

from shmelim.eliminations.store.touched import RUN_BITS
from shmelim.errors import FleetDataError
from shmelim.fleet.engine import HIGHEST, Id

T = TypeVar("T")

FORMAT: Final = 1
PART: Final = 1_000_000
"""Bytes of rows and keys in one message, and in one chunk before it is compressed; one row may be larger."""
_EACH: Final = 16  # bytes that an entry takes besides its key and record, about
MAX_BYTES: Final = 128 << 20
"""What a message, or a chunk that was unpacked, may have."""
DIGEST_MASK: Final = (1 << 64) - 1
_Format = Literal[1]
_Number = Annotated[int, Meta(ge=0, le=HIGHEST)]
_Digest = Annotated[int, Meta(ge=0)]
_Identity = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Key = Annotated[bytes, Meta(min_length=1, max_length=255)]
_Host = Annotated[str, Meta(max_length=255)]
_HEAD = struct.Struct("<BBq")


class Row(NamedTuple):
    """An entry of the table, as it stands in shared memory."""

    key: _Key
    flags: Annotated[int, Meta(ge=0, le=255)]
    record: bytes
    ordinal: _Number


class Snapshot(Struct, frozen=True, array_like=True):
    """Where a whole table stands, and which: that of ``seq`` in ``line``; the log goes on after ``after``."""

    id: Annotated[str, Meta(pattern="^[0-9a-f]{1,64}$")]
    line: _Number
    seq: _Number
    run: _Number
    after: Id
    chunks: _Number
    rows: _Number
    size: _Number
    digest: _Digest


class Head(Struct, frozen=True, array_like=True):
    """Who publishes, on which host, from which store, how far: ``last`` is the newest entry of the log."""

    format: _Format
    owner: _Identity
    host: _Host
    store_id: _Identity
    line: _Number
    seq: _Number
    run: _Number
    last: Id
    snapshot: Snapshot | None

    @property
    def term(self) -> int:
        """That of the publisher; each has a higher one than those before it."""
        return self.last.term


class Message(Struct, frozen=True, array_like=True):
    """One entry of the log: what changed in ``(prev, seq]``, or that nothing did.

    Changes that do not fit into one message come in ``parts``. ``as_of`` is not 0 in a beat: at that moment of the
    engine's clock the source had nothing newer than ``seq``. ``digest`` is that of the whole table at ``seq``.
    """

    format: _Format
    term: _Number
    line: _Number
    prev: _Number
    seq: _Number
    run: _Number
    as_of: _Number = 0
    part: _Number = 0
    parts: Annotated[int, Meta(ge=1, lt=1 << 20)] = 1
    rows: list[Row] = []
    gone: list[_Key] = []
    digest: _Digest | None = None


class Report(Struct, frozen=True, array_like=True):
    """What a follower says of itself; ``lost`` where its table cannot come from what its line says.

    ``age`` is in ms, -1 where it is not known.
    """

    format: _Format
    host: _Host
    pid: _Number
    term: _Number
    line: _Number
    seq: _Number
    lost: bool
    age: Annotated[int, Meta(ge=-1, le=HIGHEST)]
    rows: _Number
    digest: _Digest


pack = msgspec.msgpack.Encoder().encode
_head = msgspec.msgpack.Decoder(Head)
_message = msgspec.msgpack.Decoder(Message)
_report = msgspec.msgpack.Decoder(Report)
_rows = msgspec.msgpack.Decoder(list[Row])


def unpack_head(raw: bytes) -> Head:
    """Read a head; FleetDataError."""
    return _unpack(_head, raw, "the head")


def unpack_message(raw: bytes) -> Message:
    """Read a message; FleetDataError."""
    message = _unpack(_message, raw, "a message")
    if message.part >= message.parts or message.prev > message.seq:
        raise FleetDataError(
            f"a message says part {message.part} of {message.parts}, and changes {message.prev} to {message.seq}"
        )
    _need_text([row.key for row in message.rows] + message.gone)
    return message


def unpack_report(raw: bytes) -> Report:
    """Read a follower's report; FleetDataError."""
    return _unpack(_report, raw, "a follower's report")


def pack_chunk(rows: list[Row]) -> bytes:
    """Return the compressed bytes of a part of a snapshot."""
    return zlib.compress(pack(rows), 1)


def unpack_chunk(raw: bytes) -> list[Row]:
    """Read a part of a snapshot; FleetDataError."""
    try:
        unpacking = zlib.decompressobj()
        plain = unpacking.decompress(raw, MAX_BYTES)
        if not unpacking.eof or unpacking.unused_data:
            raise FleetDataError(
                f"a chunk of {len(raw)} bytes is cut off, or larger than {MAX_BYTES:,} bytes unpacked"
            )
    except zlib.error as error:
        raise FleetDataError(f"a chunk of {len(raw)} bytes cannot be unpacked: {error}") from None
    rows = _unpack(_rows, plain, "a chunk")
    _need_text([row.key for row in rows])
    return rows


def _need_text(keys: list[bytes]) -> None:
    """Refuse keys that are no hotkey's: readers take them for texts, and one that is none is the table's own."""
    try:
        b"".join([key + b"\n" for key in keys]).decode()
    except UnicodeDecodeError as error:
        raise FleetDataError(f"a key in the engine is no text: {error}") from None


def _unpack(decoder: msgspec.msgpack.Decoder[T], raw: bytes, what: str) -> T:
    if len(raw) > MAX_BYTES:
        raise FleetDataError(f"{what} has {len(raw):,} bytes, and may have {MAX_BYTES:,}")
    try:
        return decoder.decode(raw)
    except (ValueError, RecursionError) as error:
        raise FleetDataError(
            f"{what} in the engine cannot be read: {error}",
            hint="another release, or another program, writes under this name",
        ) from None


class Part(NamedTuple):
    """What one message says of a change: rows, and keys that are gone."""

    rows: list[Row]
    gone: list[bytes]


def parts_of(rows: Iterable[Row], gone: Iterable[bytes] = ()) -> Iterator[Part]:
    """Split rows, and then the keys that are gone, into parts of about :data:`PART` bytes."""
    part, size = Part([], []), 0
    listed: Iterator[Row | bytes] = chain(rows, gone)
    for each in listed:
        length = _EACH + (len(each) if isinstance(each, bytes) else len(each.key) + len(each.record))
        if size and size + length > PART:
            yield part
            part, size = Part([], []), 0
        if isinstance(each, bytes):
            part.gone.append(each)
        else:
            part.rows.append(each)
        size += length
    if size:
        yield part


def row_digest(key: bytes, flags: int, record: bytes, ordinal: int) -> int:
    """Return the digest of one entry; that of a table is the sum of its entries', and so knows no order."""
    return xxh3_64_intdigest(_HEAD.pack(flags, len(key), ordinal) + key + record)


def first_of(run: int) -> int:
    """Return the id of the first change that a run can have made."""
    return run >> RUN_BITS


def message_of(head: Head, **fields: Any) -> Message:
    """Return a message of a head's publisher."""
    return Message(FORMAT, head.term, head.line, **fields)
