"""A log read back: order, and what it refuses."""

from __future__ import annotations

import pytest

from shmelim.errors import CorruptSegmentError
from shmelim.shm import Entry
from shmelim.shm.layout import KIND_PUT, KIND_REMOVE, pack_entry
from shmelim.shm.replay import replay

SEED = 99


def put(key: bytes, ordinal: int, record: bytes = b"", flags: int = 1) -> bytes:
    return pack_entry(SEED, KIND_PUT, key, flags, ordinal, record)


def gone(key: bytes, ordinal: int = 0) -> bytes:
    return pack_entry(SEED, KIND_REMOVE, key, 0, ordinal, b"")


def test_nothing() -> None:
    assert replay(b"", "label", seed=SEED) == {}


def test_last_put_counts() -> None:
    log = put(b"a", 0, b"first") + put(b"b", 1, b"other", 3) + put(b"a", 0, b"second", 2)
    assert list(replay(log, "label", seed=SEED).items()) == [
        (b"a", Entry(2, b"second", 0)),
        (b"b", Entry(3, b"other", 1)),
    ]


@pytest.mark.parametrize(
    ("log", "order"),
    [
        (put(b"a", 0) + put(b"b", 1) + put(b"a", 5), b"ba"),
        (put(b"a", 0) + put(b"b", 1) + put(b"b", 1) + put(b"a", 0), b"ab"),
        (put(b"a", 1) + put(b"b", 2) + put(b"b", 0), b"ba"),
        (put(b"b", 4) + put(b"a", 3), b"ab"),
        (put(b"a", 0) + put(b"b", 1) + gone(b"a") + put(b"a", 2), b"ba"),
        (put(b"a", 0) + put(b"b", 1) + gone(b"a") + put(b"a", 0), b"ab"),
        (put(b"a", 0) + put(b"b", 9) + gone(b"b") + put(b"c", 4), b"ac"),
        (put(b"a", 0) + gone(b"a") + gone(b"a") + gone(b"b"), b""),
    ],
)
def test_order_is_that_of_the_ordinals(log: bytes, order: bytes) -> None:
    assert b"".join(replay(log, "label")) == order


@pytest.mark.parametrize("cut", [1, 23, 24, 25, 31])
def test_cut_off(cut: int) -> None:
    with pytest.raises(CorruptSegmentError, match="label"):
        replay(put(b"a", 0) + put(b"key", 1, b"record")[:cut], "label")


@pytest.mark.parametrize("kind", [0, 3, 255])
def test_unknown_kind(kind: int) -> None:
    with pytest.raises(CorruptSegmentError, match="unknown kind"):
        replay(pack_entry(SEED, kind, b"a", 0, 0, b""), "label")


def test_key_of_no_bytes() -> None:
    with pytest.raises(CorruptSegmentError):
        replay(put(b"", 0), "label")


def test_checksum_covers_every_byte_that_counts() -> None:
    entry = put(b"key", 3, b"record!", 5)
    replay(entry, "label", seed=SEED)
    padding = {23, *range(24 + 3 + 7, len(entry))}
    for at in range(len(entry)):
        bad = bytearray(entry)
        bad[at] ^= 0x10
        if at not in padding:
            with pytest.raises(CorruptSegmentError):
                replay(bytes(bad), "label", seed=SEED)


def test_checksum_of_another_seed() -> None:
    with pytest.raises(CorruptSegmentError, match="checksum"):
        replay(put(b"a", 0), "label", seed=SEED + 1)
