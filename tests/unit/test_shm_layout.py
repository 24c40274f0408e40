"""The checks that stand between foreign bytes and an offset."""

from __future__ import annotations

import struct

import pytest

from shmelim.errors import CorruptSegmentError, SegmentFormatError, ShmelimError
from shmelim.shm import check_name
from shmelim.shm.layout import (
    DATA_HEADER_SIZE,
    FORMAT,
    PAGE,
    SEQUENCE_BITS,
    DataHeader,
    check_root,
    copy_stride,
    entry_size,
    pack_data_header,
    pack_entry,
    pack_root_header,
    unpack_data_header,
)
from shmelim.shm.writer import next_version

ID, SEQUENCE = 0xFEDC, 1000
HEADER = DataHeader(7, 0x1234, 16, 4096, copy_stride(16, 4096), ID, SEQUENCE)
WORD_OF_7 = 7 << SEQUENCE_BITS | SEQUENCE
ROOT = pack_root_header(ID, b"store".ljust(16), SEQUENCE)


def unpack(data: bytes) -> DataHeader:
    return unpack_data_header(data, HEADER.size, ID, WORD_OF_7, "label")


def changed(data: bytes, offset: int, kind: str, value: int) -> bytes:
    copy = bytearray(data)
    struct.pack_into(kind, copy, offset, value)
    return bytes(copy)


def test_root_header_round_trip() -> None:
    check_root(ROOT, "label")


@pytest.mark.parametrize("byte", range(8))
def test_root_magic(byte: int) -> None:
    data = bytearray(ROOT)
    data[byte] ^= 1
    with pytest.raises(CorruptSegmentError, match="label"):
        check_root(bytes(data), "label")


@pytest.mark.parametrize(("offset", "value"), [(8, 0), (8, FORMAT + 1), (8, 1 << 31), (12, 0x04030201), (12, 0)])
def test_root_of_another_format(offset: int, value: int) -> None:
    with pytest.raises(SegmentFormatError, match="label"):
        check_root(changed(ROOT, offset, "<I", value), "label")


def test_a_root_without_an_id_is_refused() -> None:
    with pytest.raises(CorruptSegmentError, match="label has no root id"):
        check_root(changed(ROOT, 16, "<Q", 0), "label")


@pytest.mark.parametrize(("number", "who"), [(1, "upgrade the server"), (FORMAT + 1, "upgrade this process")])
def test_the_older_side_of_two_formats_is_told_to_upgrade(number: int, who: str) -> None:
    with pytest.raises(SegmentFormatError, match=who):
        check_root(changed(ROOT, 8, "<I", number), "label")
    with pytest.raises(SegmentFormatError, match=who):
        unpack(changed(pack_data_header(HEADER), 8, "<I", number))


@pytest.mark.parametrize("size", [0, 1, 15])
def test_root_too_short(size: int) -> None:
    with pytest.raises(CorruptSegmentError, match="too short"):
        check_root(ROOT[:size], "label")


def test_the_hash_algorithm_that_is_written_and_refused() -> None:
    data = pack_data_header(HEADER)
    assert struct.unpack_from("<Q", data, 24) == (2,)
    with pytest.raises(SegmentFormatError, match="label uses hash algorithm 1, this package knows 2"):
        unpack_data_header(changed(data, 24, "<Q", 1), HEADER.size, ID, WORD_OF_7, "label")


def test_data_header_round_trip() -> None:
    assert unpack_data_header(pack_data_header(HEADER), HEADER.size, ID, WORD_OF_7, "label") == HEADER
    assert unpack_data_header(pack_data_header(HEADER), HEADER.size + 1, ID, WORD_OF_7, "label") == HEADER


@pytest.mark.parametrize("byte", range(8))
def test_data_magic(byte: int) -> None:
    data = bytearray(pack_data_header(HEADER))
    data[byte] ^= 0x80
    with pytest.raises(CorruptSegmentError, match="label"):
        unpack_data_header(bytes(data), HEADER.size, ID, WORD_OF_7, "label")


@pytest.mark.parametrize(
    ("offset", "kind", "value"),
    [(8, "<I", 0), (8, "<I", FORMAT + 1), (12, "<I", 0x04030201), (24, "<Q", 0), (24, "<Q", 1), (24, "<Q", 3)],
)
def test_data_of_another_format(offset: int, kind: str, value: int) -> None:
    with pytest.raises(SegmentFormatError, match="label"):
        unpack(changed(pack_data_header(HEADER), offset, kind, value))


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (16, 6),  # generation
        (16, 8),
        (16, 7 + (1 << 16)),
        (40, 0),  # capacity
        (40, 3),
        (40, 15),
        (40, 17),
        (40, 64),  # that many slots do not fit the stride
        (40, 1 << 32),
        (40, 1 << 33),
        (40, 1 << 63),
        (48, 4095),  # arena
        (48, 4097),
        (48, HEADER.stride - 128 - 16 * 64 + 8),
        (48, 1 << 63),
        (48, (1 << 64) - 8),
        (56, HEADER.stride - PAGE),  # distance of the copies
        (56, HEADER.stride + 8),
        (56, HEADER.stride + PAGE),
        (56, 0),
        (56, 1 << 63),
    ],
)
def test_data_header_field_that_cannot_be(offset: int, value: int) -> None:
    with pytest.raises(CorruptSegmentError, match="label"):
        unpack(changed(pack_data_header(HEADER), offset, "<Q", value))


@pytest.mark.parametrize(("offset", "value"), [(32, 0), (32, HEADER.seed ^ 1), (40, 8), (48, 0), (72, 0)])
def test_a_header_under_which_lookups_would_find_nothing_is_refused(offset: int, value: int) -> None:
    with pytest.raises(CorruptSegmentError, match="label does not match its checksum"):
        unpack(changed(pack_data_header(HEADER), offset, "<Q", value))


def test_a_header_without_a_checksum_is_one_of_an_older_writer() -> None:
    assert unpack(changed(pack_data_header(HEADER), 80, "<Q", 0)) == HEADER


def test_a_segment_of_another_root_is_refused() -> None:
    with pytest.raises(CorruptSegmentError, match="label belongs to the root 0xfedc, not to 0x1"):
        unpack_data_header(pack_data_header(HEADER), HEADER.size, 1, WORD_OF_7, "label")


def test_a_segment_that_was_not_published_yet_is_refused() -> None:
    """A growth that was given up may have left it, under a name that is made again."""
    with pytest.raises(CorruptSegmentError, match="label is of sequence 1000, which nobody has published"):
        unpack_data_header(pack_data_header(HEADER), HEADER.size, ID, WORD_OF_7 - 1, "label")


def test_data_header_larger_than_the_mapping() -> None:
    with pytest.raises(CorruptSegmentError):
        unpack_data_header(pack_data_header(HEADER), HEADER.size - 1, ID, WORD_OF_7, "label")


@pytest.mark.parametrize("size", [0, 1, 63])
def test_data_header_too_short(size: int) -> None:
    with pytest.raises(CorruptSegmentError, match="too short"):
        unpack_data_header(pack_data_header(HEADER)[:size], HEADER.size, ID, WORD_OF_7, "label")


@pytest.mark.parametrize("capacity", [1, 8, 16, 1 << 20])
@pytest.mark.parametrize("arena", [0, 8, 4096, 1 << 20])
def test_copies_lie_apart_and_inside(capacity: int, arena: int) -> None:
    header = DataHeader(1, 0, capacity, arena, copy_stride(capacity, arena), ID, 0)
    assert header.copy_base(0) == DATA_HEADER_SIZE
    assert header.arena_base(0) + arena <= header.copy_base(1)
    assert header.arena_base(1) + arena <= header.size
    assert header.slots_base(1) % 64 == 0


def test_a_version_names_generation_and_sequence() -> None:
    assert next_version(3 << SEQUENCE_BITS | 5, 3) == 3 << SEQUENCE_BITS | 6
    assert next_version(3 << SEQUENCE_BITS | 5, 4) == 4 << SEQUENCE_BITS | 6


def test_a_sequence_that_is_used_up_does_not_start_over() -> None:
    top = (1 << SEQUENCE_BITS) - 1
    assert next_version(top - 1, 1) == 1 << SEQUENCE_BITS | top
    with pytest.raises(ShmelimError, match="is the last one"):
        next_version(top, 1)


@pytest.mark.parametrize("key_length", [1, 7, 8, 9, 255])
@pytest.mark.parametrize("record_length", [0, 1, 7, 8, 9])
def test_entry_size(key_length: int, record_length: int) -> None:
    entry = pack_entry(1, 1, b"k" * key_length, 0xFF, 2**63, b"r" * record_length)
    assert len(entry) == entry_size(key_length, record_length)
    assert len(entry) % 8 == 0


@pytest.mark.parametrize("name", ["a", "0", "a-b_c", "-", "_", "a" * 16])
def test_good_name(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "a" * 17, "A", "a.b", "a/b", "../a", "a b", "a\n", "a\0", "ä", "a*", "٣", b"a", None, 7],
)
def test_bad_name(name: object) -> None:
    with pytest.raises(ValueError, match="must be 1 to 16"):
        check_name(name)  # type: ignore[arg-type]
