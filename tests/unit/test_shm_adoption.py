"""A writer takes the published table where it lies: what it accepts, what it refuses, and who notices."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from shmelim.errors import CorruptSegmentError
from shmelim.shm import Namespace, SharedNamespace, TableReader, TableWriter
from shmelim.shm import writer as writer_module
from shmelim.shm.image import Image
from shmelim.shm.layout import (
    COMMIT,
    COPY_HEADER_SIZE,
    EPOCH,
    NEXT_ORDINAL,
    PAGE,
    ROOT_ID,
    VERSION,
    WORD,
    unpack_data_header,
)

if TYPE_CHECKING:
    from shmelim.shm.segment import Segment

STORE = b"0123456789abcdef"
KEYS = [b"%02d" % number * (number % 30 + 1) for number in range(40)]


def fill(namespace: Namespace, store_id: bytes = STORE) -> None:
    """Publish a table whose copies have garbage, removals, long keys, and have been settled in several ways."""
    with TableWriter(namespace, capacity=8, arena_size=4096, store_id=store_id) as writer:
        writer.load([(key, number, key * 2, None) for number, key in enumerate(KEYS[:30])], commit=1)
        for number, key in enumerate(KEYS):
            with writer.transaction() as transaction:
                transaction.put(key, number, key * 3)
                transaction.remove(KEYS[(number + 3) % 40])
                transaction.commit = number + 2


def entries(namespace: Namespace) -> list[object]:
    return list(TableReader(namespace).snapshot(verify=True).entries.items())


def test_readers_move_nowhere_and_the_next_change_is_the_next_version(namespace: Namespace) -> None:
    fill(namespace)
    reader = TableReader(namespace)
    attached, before, content = reader._view, reader.identity(), entries(namespace)
    with TableWriter(namespace, store_id=STORE) as writer:
        assert writer.adopt()
        assert (writer.loaded, writer.commit, writer.entries) == (True, 41, before.entries)
        assert reader.writer().state == "serving"
        assert reader.identity()[:5] == before[:5]
        with writer.transaction() as transaction:
            transaction.put(b"new", 7, b"record")
            transaction.commit = 50
        assert reader.identity()[2:5] == (before.sequence + 1, 50, before.entries + 1)
        assert entries(namespace)[:-1] == content
        with writer.transaction() as transaction:
            transaction.remove(b"new")
        assert entries(namespace) == content
    assert reader._view is attached


def test_a_copy_that_a_dead_writer_left_half_written_is_made_anew(namespace: Namespace) -> None:
    fill(namespace)
    content = entries(namespace)
    segment, header = opened(namespace)
    version = namespace.open_root().words[VERSION]
    idle = header.copy_base(~version & 1)
    segment.memory[idle : idle + header.stride] = random.Random(1).randbytes(header.stride)
    segment.words[idle // WORD + EPOCH] = (1 << 64) - 1
    with TableWriter(namespace, store_id=STORE) as writer:
        assert writer.adopt()
        with writer.transaction() as transaction:
            transaction.put(b"new", 7)
        assert entries(namespace)[:-1] == content
        assert TableReader(namespace).identity().commit == 41


def test_an_empty_table_is_adopted(namespace: Namespace) -> None:
    with TableWriter(namespace) as writer:
        writer.load([])
    with TableWriter(namespace) as writer:
        assert writer.adopt()
        with writer.transaction() as transaction:
            transaction.put(b"a", 1)
    assert TableReader(namespace).flags(b"a") == 1


def test_what_was_never_published_is_not_adopted(namespace: Namespace) -> None:
    with TableWriter(namespace) as writer:
        assert not writer.adopt()
        writer.load([])
        assert not writer.adopt(), "it is this writer's own already"


def test_the_table_of_another_store_is_not_adopted(namespace: Namespace) -> None:
    fill(namespace)
    with TableWriter(namespace, store_id=STORE[::-1]) as writer:
        assert not writer.adopt()
        assert not writer.loaded


def test_a_removed_segment_is_not_adopted(table_name: str) -> None:
    namespace = SharedNamespace(table_name)
    fill(namespace)
    namespace.tidy(0)
    with TableWriter(namespace, store_id=STORE) as writer:
        assert not writer.adopt()
        writer.load([(b"a", 1, b"", None)])
    assert TableReader(namespace).flags(b"a") == 1


def opened(namespace: Namespace) -> tuple[Segment, object]:
    root = namespace.open_root()
    version = root.words[VERSION]
    segment = namespace.open_data(version >> 48, writable=True)
    header = unpack_data_header(segment.memory[:PAGE], segment.size, root.words[ROOT_ID], version, "data")
    return segment, header


def test_no_bit_of_a_current_copy_can_be_wrong_unnoticed(namespace: Namespace, image: type[Image]) -> None:
    """Header, used slots and log; but epoch, commit, and a larger next ordinal, which nothing contradicts."""
    fill(namespace)
    segment, header = opened(namespace)
    version = namespace.open_root().words[VERSION]
    copy, check = image(segment, header, version & 1), writer_module.check_copy
    check(copy, "data")
    base = header.copy_base(version & 1)
    free = {EPOCH, NEXT_ORDINAL, COMMIT, 6, 7}
    places = [base + at for at in range(COPY_HEADER_SIZE) if at // WORD not in free]
    slots = [header.slots_base(version & 1) + 64 * slot for slot in range(header.capacity)]
    places += [at + byte for at in slots for byte in range(64) if any(segment.memory[at + 56 : at + 64])]
    places += [at + byte for at in slots for byte in range(56, 64) if not any(segment.memory[at + 56 : at + 64])]
    padding = missed(Image(segment, header, version & 1))
    places += [header.arena_base(version & 1) + at for at in range(copy.used) if at not in padding]
    chosen = random.Random(2).sample(places, 400) + places[:COPY_HEADER_SIZE]
    for at in chosen:
        bit = 1 << at % 8
        segment.memory[at : at + 1] = bytes([segment.window[at] ^ bit])
        with pytest.raises(CorruptSegmentError):
            check(copy, "data")
        segment.memory[at : at + 1] = bytes([segment.window[at] ^ bit])
    check(copy, "data")
    segment.words[base // WORD + NEXT_ORDINAL] -= 1
    with pytest.raises(CorruptSegmentError, match="header"):
        check(copy, "data")


def missed(reference: Image) -> set[int]:
    """Return the bytes of a log that mean nothing: padding behind an entry, and one in its header."""
    log, at, found = reference.arena[: reference.used].tobytes(), 0, set()
    while at < len(log):
        end = at + 24 + log[at + 20] + int.from_bytes(log[at + 16 : at + 20], "little")
        found |= set(range(end, (end + 7) & -8))
        at = (end + 7) & -8
    return found
