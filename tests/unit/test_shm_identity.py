"""Whose state a table is: root and store ids, commit numbers, versions that never go back, older formats."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

import pytest

from shmelim.errors import SegmentFormatError
from shmelim.shm import Namespace, PrivateNamespace, SharedNamespace, TableReader, TableWriter
from shmelim.shm.layout import PAGE, VERSION

STORE = b"the store's name"
OTHER = b"of another store"


def serve(namespace: Namespace, flags: int = 1, *, commit: int = 0, **options: object) -> TableWriter:
    writer = TableWriter(namespace, capacity=8, arena_size=4096, **options)  # type: ignore[arg-type]
    writer.load([(b"a", flags, b"record", None)], commit)
    return writer


def path(name: str, generation: int | None = None) -> Path:
    return Path("/dev/shm") / (f"shmelim.{name}" if generation is None else f"shmelim.{name}.{generation}")


# ---------------------------------------------------------------------- identity


def test_a_table_says_whose_state_it_is(namespace: Namespace) -> None:
    writer = serve(namespace, commit=17, store_id=STORE)
    reader = TableReader(namespace)
    found = reader.identity()
    assert found[1:5] == (STORE, reader.version, 17, 1)
    assert found.root_id != 0
    assert 0 <= found.heartbeat_age < 60
    assert writer.store_id == STORE
    writer.close()


def test_without_a_store_id_and_commit_are_zero(namespace: Namespace) -> None:
    serve(namespace).close()
    assert TableReader(namespace).identity()[1:4:2] == (bytes(16), 0)


@pytest.mark.parametrize("size", [0, 15, 17])
def test_a_store_id_is_16_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=f"store_id of {size} bytes must be 16"):
        TableWriter(PrivateNamespace(), store_id=bytes(size))


def test_every_way_to_publish_carries_its_commit(namespace: Namespace) -> None:
    """Small changes in both copies, a mirrored one, a growth, a compaction, a load."""
    writer = serve(namespace, commit=1)
    reader = TableReader(namespace)
    for commit in range(2, 60):
        with writer.transaction() as transaction:
            transaction.put(b"b" * (commit % 5 + 1), 1, bytes(300 * (commit % 7)))
            transaction.commit = commit
        assert (reader.identity().commit, writer.commit) == (commit, commit)
    assert reader.info().generation > 1
    with writer.transaction() as transaction:
        transaction.put(b"c", 1)
    assert reader.identity().commit == 59
    writer.load([], commit=100)
    assert reader.identity().commit == 100
    writer.close()


def test_a_commit_that_is_given_up_is_not_seen_later(namespace: Namespace) -> None:
    writer = serve(namespace, commit=1)
    given_up = writer.transaction()
    given_up.commit = 2
    given_up.put(b"b", 1)
    given_up.stage()
    given_up.abort()
    with writer.transaction() as transaction:
        transaction.put(b"c", 1)
    assert TableReader(namespace).identity()[3:5] == (1, 2)
    writer.close()


def test_a_table_of_another_store_is_replaced_when_there_is_a_new_one(table_name: str) -> None:
    serve(SharedNamespace(table_name), 1, store_id=STORE).close()
    reader = TableReader(SharedNamespace(table_name))
    before = reader.identity()
    serve(SharedNamespace(table_name), 2, store_id=OTHER).close()
    assert reader.flags(b"a") == 2
    after = reader.identity()
    assert (before.store_id, after.store_id) == (STORE, OTHER)
    assert before.root_id != after.root_id
    assert before.sequence < after.sequence


def test_the_same_store_goes_on_with_its_root(table_name: str) -> None:
    serve(SharedNamespace(table_name), 1, store_id=STORE).close()
    reader = TableReader(SharedNamespace(table_name))
    before = reader.identity()
    serve(SharedNamespace(table_name), 2, store_id=STORE).close()
    after = reader.identity()
    assert (after.root_id, after.sequence) == (before.root_id, before.sequence + 1)


# ---------------------------------------------------------------------- versions


def test_a_version_is_a_sequence_that_begins_with_the_clock(namespace: Namespace) -> None:
    before = time.time_ns() // 1_000_000
    writer = serve(namespace)
    reader = TableReader(namespace)
    first = reader.version
    assert before < first <= time.time_ns() // 1_000_000 + 2
    assert writer.version == first
    with writer.transaction() as transaction:
        transaction.put(b"grow", 1, bytes(10_000))
    assert reader.info().generation == 2
    assert reader.version == reader.info().version == reader.snapshot().version == writer.version == first + 1
    writer.close()


def test_a_version_begins_above_what_the_store_has_seen(namespace: Namespace) -> None:
    seen = 1 << 45
    serve(namespace, first_sequence=seen).close()
    assert TableReader(namespace).version == seen + 1


def test_a_version_does_not_go_back_when_a_root_is_replaced(table_name: str) -> None:
    serve(SharedNamespace(table_name), first_sequence=1 << 45, store_id=STORE).close()
    reader = TableReader(SharedNamespace(table_name))
    before = reader.version
    serve(SharedNamespace(table_name), store_id=OTHER).close()
    assert reader.version > before
    assert reader.wait_for_change(0, since=before)


# ---------------------------------------------------------------------- the format before


def write_format_1(name: str) -> None:
    """Write root and data segment as release 0.1.0 left them: generation 3, an empty table of 8 slots."""
    root = struct.pack("<8sII", b"SHMELIM\0", 1, 0x01020304).ljust(64, b"\0")
    root += struct.pack("<Q", 3 << 48 | 12).ljust(64, b"\0")
    root += struct.pack("<QQQQ", os.getpid(), 1_700_000_000_000, 2, time.monotonic_ns())
    data = struct.pack("<8sIIQQQQQQ", b"SHMELDAT", 1, 0x01020304, 3, 2, 4711, 8, 4096, 8192)
    for where, content, size in [(path(name), root, PAGE), (path(name, 3), data, PAGE + 2 * 8192)]:
        where.touch(0o600)
        where.write_bytes(content.ljust(size, b"\0"))


def test_a_reader_of_a_root_of_format_1_is_told_to_upgrade_the_server(table_name: str) -> None:
    write_format_1(table_name)
    with pytest.raises(SegmentFormatError, match=r"has format 1, this package reads format 2.*upgrade the server"):
        TableReader(SharedNamespace(table_name))


def test_a_server_withdraws_a_root_of_format_1(table_name: str) -> None:
    write_format_1(table_name)
    with path(table_name).open("rb") as file, mmap.mmap(file.fileno(), PAGE, prot=mmap.PROT_READ) as attached:
        writer = serve(SharedNamespace(table_name), 5)
        assert attached[VERSION * 8 : VERSION * 8 + 8] == bytes(8), "generation 0 sends old readers to the name"
        assert path(table_name).read_bytes()[8:12] == struct.pack("<I", 2)
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 5
    assert not path(table_name, 3).exists()
    writer.close()
