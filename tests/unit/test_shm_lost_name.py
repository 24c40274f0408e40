"""A root segment that is removed under a living writer: whoever takes the name next is left alone by the first."""

from __future__ import annotations

import posix_ipc
import pytest

from shmelim.errors import SegmentError
from shmelim.shm import SharedNamespace, TableReader, TableWriter


def test_a_writer_that_lost_its_name_touches_nothing_of_the_next(table_name: str) -> None:
    first = TableWriter(SharedNamespace(table_name), capacity=8, arena_size=4096)
    first.load([(b"first", 1, b"", None)])
    posix_ipc.unlink_shared_memory(f"/shmelim.{table_name}")
    second = TableWriter(SharedNamespace(table_name), capacity=8, arena_size=4096)
    second.load([(b"second", 1, b"", None)])
    generations = SharedNamespace(table_name).generations()

    growing = first.transaction()
    for number in range(100):
        growing.put(b"%d" % number, 1, bytes(100))
    with pytest.raises(SegmentError, match="another writer has the name"):
        growing.stage()
    with first.transaction() as transaction:
        transaction.put(b"small", 1)
    first.close()

    assert SharedNamespace(table_name).generations() == generations
    reader = TableReader(SharedNamespace(table_name))
    assert [reader.flags(key) for key in (b"first", b"second", b"small")] == [0, 1, 0]
    with second.transaction() as transaction:
        transaction.put(b"more", 1)
    assert reader.flags(b"more") == 1
    second.close()
