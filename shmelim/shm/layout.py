"""The bytes of the two kinds of segment: offsets, sizes, and the checks made before any of them is believed.

Everything is little-endian and addressed in 8-byte words, so that every field that more than one process
touches is a single aligned load or store. ``docs/memory-format.md`` is the same in prose.

::

    root segment, one page
      byte    0  magic "SHMELIM" and a zero byte
              8  format u32        12  byte-order mark u32
             16  root id u64       32  store id, 16 bytes       never change
             64  version u64       alone on its cache line: generation << 48 | sequence
            128  writer pid        136  its start time, ms since 1970
            144  writer state      152  heartbeat, CLOCK_MONOTONIC ns
            160  its clock: the inode of its time namespace; 0 where it has none
            168  its lock: the inode of its lock file; 0 where it has none
            176  1 where its publishes wake who waits for the version
            184  the branch of the store's commits, random; 0 where nothing is known of it
            256  whom a follower follows: length u64, and text of at most 136 bytes; see following.py
            400  how far it is: two copies of stamp, term, line, seq, confirmed, as of, checksum
            512  where the writer's channel is found: length u64, and text of at most 504 bytes
           1024  reserved: counters, 1024 bytes

    data segment, one per generation
      byte    0  magic "SHMELDAT"
              8  format u32        12  byte-order mark u32
             16  generation        24  hash algorithm     32  hash seed
             40  capacity, slots   48  arena size, bytes  56  bytes from copy 0 to copy 1
             64  root id           72  birth: the sequence that it was published with first
             80  checksum of 24 to 79; 0: none
           4096  copy 0, then copy 1:  header (128 bytes), slots (64 bytes each), arena

    copy header:  epoch, used, count, next ordinal, live bytes, commit | second line: entries per flag bit
    slot:         hash u64 | key, first 48 bytes | flags u8, key length u8, arena offset u48
    arena entry:  ordinal u64 | checksum u64 | length u32, key length u8, flags u8, kind u8, 0 | key | record
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest, xxh64_intdigest

from shmelim.errors import CorruptSegmentError, SegmentFormatError

FORMAT: Final = 2
ALGORITHM: Final = 2  # of the hash, as docs/memory-format.md counts them
BYTE_ORDER_MARK: Final = 0x01020304
PAGE: Final = 4096
WORD: Final = 8
MAX_WORD: Final = (1 << 64) - 1

# Root segment, as word indices.
ROOT_MAGIC: Final = b"SHMELIM\0"
ROOT_SIZE: Final = PAGE
ROOT_ID: Final = 16 // WORD
STORE_ID: Final = 32  # bytes
STORE_ID_SIZE: Final = 16
VERSION: Final = 64 // WORD
WRITER_PID: Final = 128 // WORD
WRITER_STARTED: Final = 136 // WORD
WRITER_STATE: Final = 144 // WORD
HEARTBEAT: Final = 152 // WORD
WRITER_CLOCK: Final = 160 // WORD
WRITER_LOCK: Final = 168 // WORD
WRITER_WAKES: Final = 176 // WORD
BRANCH: Final = 184 // WORD
PLACE: Final = 512  # bytes
PLACE_SIZE: Final = 504
FLEET: Final = 256  # bytes
SOURCE_SIZE: Final = 136
COUNTERS: Final = 1024  # bytes; written by later releases, and zero

SEQUENCE_BITS: Final = 48
SEQUENCE_MASK: Final = (1 << SEQUENCE_BITS) - 1
MAX_GENERATION: Final = (1 << 16) - 1

# Data segment.
DATA_MAGIC: Final = b"SHMELDAT"
DATA_HEADER_SIZE: Final = PAGE
SLOT_SIZE: Final = 64
SLOT_WORDS: Final = SLOT_SIZE // WORD
INLINE_KEY: Final = 48
MAX_KEY: Final = 255
MAX_CAPACITY: Final = 1 << 32

# Copy header, as word indices from the start of the copy.
COPY_HEADER_SIZE: Final = 128
EPOCH: Final = 0
USED: Final = 1
COUNT: Final = 2
NEXT_ORDINAL: Final = 3
LIVE: Final = 4
COMMIT: Final = 5
FLAG_COUNTS: Final = 8
FLAG_BITS: Final = 8

# The last word of a slot.
PACKED: Final = SLOT_WORDS - 1
OFFSET_SHIFT: Final = 16
KEY_LENGTH_SHIFT: Final = 8

ARENA_ENTRY: Final = struct.Struct("<QQIBBBx")
ENTRY_HEADER: Final = ARENA_ENTRY.size
ENTRY_CHECKED: Final = 16
KIND_PUT: Final = 1
KIND_REMOVE: Final = 2
MAX_RECORD: Final = (1 << 32) - 1
MAX_ORDINAL: Final = (1 << 63) - 1

_XXH3_FROM, _XXH3_TO = 17, 128
_ENTRY_HEAD = struct.Struct("<QQ")
_ENTRY_TAIL = struct.Struct("<IBBBx")
_PADDING = [bytes(size) for size in range(WORD)]
_HEADER = struct.Struct("<8sII")
_ROOT_HEADER = struct.Struct("<8sIIQQ16s")
_DATA_HEADER = struct.Struct("<8sIIQQQQQQQQ")
_DATA_CHECKED: Final = 24  # the first byte that its checksum is of
_DATA_SEED: Final = 0x44415441


class DataHeader(NamedTuple):
    """What a reader must know of a data segment; ``stride`` is the distance between the two copies.

    ``root_id`` and ``birth`` say whose it is: a name and a number may come again.
    """

    generation: int
    seed: int
    capacity: int
    arena_size: int
    stride: int
    root_id: int
    birth: int

    @property
    def size(self) -> int:
        """Bytes of the whole segment."""
        return DATA_HEADER_SIZE + 2 * self.stride

    def copy_base(self, copy: int) -> int:
        """Byte offset of a copy's header."""
        return DATA_HEADER_SIZE + copy * self.stride

    def slots_base(self, copy: int) -> int:
        """Byte offset of a copy's first slot."""
        return self.copy_base(copy) + COPY_HEADER_SIZE

    def arena_base(self, copy: int) -> int:
        """Byte offset of a copy's arena."""
        return self.slots_base(copy) + self.capacity * SLOT_SIZE


def align(size: int, to: int = WORD) -> int:
    """Round ``size`` up to a multiple of ``to``, a power of two."""
    return (size + to - 1) & -to


def copy_stride(capacity: int, arena_size: int) -> int:
    """Bytes of one copy, rounded up to whole pages."""
    return align(COPY_HEADER_SIZE + capacity * SLOT_SIZE + arena_size, PAGE)


def key_hash(key: bytes, seed: int) -> int:
    """Return the hash that gives ``key`` its place in a table with this seed.

    XXH3 is the quicker one for the keys that matter, of 48 bytes: its multiplications do not wait for one another.
    Outside of 17 to 128 bytes it is another algorithm for every few lengths, and so XXH64 stands in for it there.
    """
    if _XXH3_FROM <= len(key) <= _XXH3_TO:
        return xxh3_64_intdigest(key, seed)
    return xxh64_intdigest(key, seed)


def pack_root_header(root_id: int, store_id: bytes, sequence: int) -> bytes:
    """Return a root segment's first bytes, up to a version word that says that nothing is published yet."""
    header = _ROOT_HEADER.pack(ROOT_MAGIC, FORMAT, BYTE_ORDER_MARK, root_id, 0, store_id)
    return header.ljust(VERSION * WORD, b"\0") + sequence.to_bytes(WORD, "little")


def check_root(data: bytes, label: str) -> None:
    """Check the header of a root segment; SegmentFormatError or CorruptSegmentError if it is wrong."""
    _unpack(_HEADER, data, ROOT_MAGIC, label)
    if not data[ROOT_ID * WORD : (ROOT_ID + 1) * WORD].strip(b"\0"):
        raise CorruptSegmentError(f"segment {label} has no root id")


def pack_data_header(header: DataHeader) -> bytes:
    """Return the header of a data segment."""
    generation, *rest = header
    packed = _DATA_HEADER.pack(DATA_MAGIC, FORMAT, BYTE_ORDER_MARK, generation, ALGORITHM, *rest)
    return packed + _header_checksum(packed)


def _header_checksum(data: bytes) -> bytes:
    checked = bytes(data[_DATA_CHECKED : _DATA_HEADER.size])
    return xxh64_intdigest(checked, _DATA_SEED).to_bytes(WORD, "little")


def unpack_data_header(data: bytes, size: int, root_id: int, version: int, label: str) -> DataHeader:
    """Read the header of a data segment, and check it against the ``size`` of the mapping it will be read through.

    It must be the one that the version word ``version`` of the root ``root_id`` names. SegmentFormatError or
    CorruptSegmentError; no offset computed from a header that passes leaves the mapping.
    """
    found, algorithm, *rest = _unpack(_DATA_HEADER, data, DATA_MAGIC, label)
    if algorithm != ALGORITHM:
        raise SegmentFormatError(
            f"segment {label} uses hash algorithm {algorithm}, this package knows {ALGORITHM}"
        )
    header = DataHeader(found, *rest)
    _, _, capacity, arena, stride, owner, birth = header
    if found != version >> SEQUENCE_BITS:
        raise CorruptSegmentError(f"segment {label} says generation {found}")
    if owner != root_id:
        raise CorruptSegmentError(f"segment {label} belongs to the root {owner:#x}, not to {root_id:#x}")
    if birth > version & SEQUENCE_MASK:
        raise CorruptSegmentError(f"segment {label} is of sequence {birth}, which nobody has published yet")
    if capacity < 1 or capacity > MAX_CAPACITY or capacity & (capacity - 1):
        raise CorruptSegmentError(f"segment {label} says capacity {capacity}, not a power of two")
    if arena % WORD or stride % PAGE or stride < copy_stride(capacity, arena) or header.size > size:
        raise CorruptSegmentError(
            f"segment {label} of {size} bytes says {capacity} slots and an arena of {arena} bytes "
            f"in copies of {stride} bytes"
        )
    # With another seed or capacity lookups would find nothing, without a word. Older segments have no checksum.
    end = _DATA_HEADER.size
    if data[end : end + WORD] not in (_header_checksum(data), bytes(WORD)):
        raise CorruptSegmentError(f"the header of segment {label} does not match its checksum")
    return header


def _unpack(form: struct.Struct, data: bytes, expected: bytes, label: str) -> tuple[int, ...]:
    """Return what follows magic, format and byte order in a header, after checking these."""
    if len(data) < form.size:
        raise CorruptSegmentError(f"segment {label} is {len(data)} bytes long, too short for its header")
    magic, version, mark, *rest = form.unpack_from(data)
    if magic != expected:
        raise CorruptSegmentError(f"segment {label} does not start with {expected!r} but with {magic!r}")
    if mark != BYTE_ORDER_MARK:
        raise SegmentFormatError(f"segment {label} was written on a machine of the other byte order")
    if version != FORMAT:
        raise SegmentFormatError(
            f"segment {label} has format {version}, this package reads format {FORMAT}",
            hint=f"upgrade {'this process' if version > FORMAT else 'the server'}: both need the same release",
        )
    return tuple(rest)


def pack_entry(seed: int, kind: int, key: bytes, flags: int, ordinal: int, record: bytes) -> bytes:
    """Return one arena entry, padded to whole words."""
    tail = _ENTRY_TAIL.pack(len(record), len(key), flags, kind) + key + record
    entry = _ENTRY_HEAD.pack(ordinal, entry_checksum(seed, ordinal, tail)) + tail
    return entry + _PADDING[-len(entry) % WORD]


def entry_checksum(seed: int, ordinal: int, tail: bytes) -> int:
    """Return an entry's checksum: XXH64 of all that follows it, seeded with the table's seed and the ordinal."""
    return xxh64_intdigest(tail, seed ^ ordinal)


def sealed(fields: bytes, seed: int) -> bytes:
    """Return fields with their checksum, for one of two copies of which the newer whole one counts."""
    return fields + xxh64_intdigest(fields, seed).to_bytes(WORD, "little")


def unsealed(raw: bytes, form: struct.Struct, seed: int) -> tuple[int, ...] | None:
    """Return the fields of what :func:`sealed` made; None where it is torn, damaged, or cut off."""
    fields = raw[: form.size]
    return form.unpack(fields) if raw[: form.size + WORD] == sealed(fields, seed) else None


def entry_size(key_length: int, record_length: int) -> int:
    """Bytes that an arena entry takes."""
    return (ENTRY_HEADER + key_length + record_length + WORD - 1) & -WORD
