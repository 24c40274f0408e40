"""How a reader finds its segments: the root withdrawn, removed, replaced; forks; other processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from shmelim.errors import NotServingError
from shmelim.shm import Namespace, SharedNamespace, TableReader, TableWriter

if TYPE_CHECKING:
    from shmelim.shm.segment import Segment


def serve(name: str, **entries: int) -> TableWriter:
    writer = TableWriter(SharedNamespace(name))
    writer.load([(key.encode(), flags, key.encode() * 3, None) for key, flags in entries.items()])
    return writer


def test_nothing_there(table_name: str) -> None:
    with pytest.raises(NotServingError, match="nothing is served"):
        TableReader(SharedNamespace(table_name))


def test_nothing_published_yet(namespace: Namespace) -> None:
    writer = TableWriter(namespace)
    with pytest.raises(NotServingError, match="not published"):
        TableReader(namespace)
    writer.load([])
    assert TableReader(namespace).flags(b"a") == 0
    writer.close()


def test_empty_root_left_by_a_writer_that_died_at_once(table_name: str) -> None:
    namespace = SharedNamespace(table_name)
    namespace.acquire()
    namespace.release()
    with pytest.raises(NotServingError):
        TableReader(namespace)
    serve(table_name, a=1).close()
    assert TableReader(namespace).flags(b"a") == 1


def test_reattach_to_a_root_of_the_same_generation(table_name: str) -> None:
    serve(table_name, old=1).close()
    reader = TableReader(SharedNamespace(table_name))
    SharedNamespace(table_name).remove()
    assert not reader.reattach()
    assert reader.flags(b"old") == 1
    successor = serve(table_name, new=2)
    assert reader.reattach()
    assert reader.info().generation == 1
    assert (reader.flags(b"old"), reader.flags(b"new")) == (0, 2)
    assert reader.get(b"new").data == b"newnewnew"
    assert not reader.reattach()
    successor.close()


def test_reattach_waits_until_the_other_root_has_something(table_name: str) -> None:
    serve(table_name, old=1).close()
    reader = TableReader(SharedNamespace(table_name))
    SharedNamespace(table_name).remove()
    successor = TableWriter(SharedNamespace(table_name))
    assert not reader.reattach()
    assert reader.writer().state == "stopped"
    assert reader.flags(b"old") == 1
    successor.load([(b"new", 2, b"", None)])
    assert reader.writer().state == "serving"
    assert (reader.flags(b"old"), reader.flags(b"new")) == (0, 2)
    successor.close()


def test_withdrawn_root_sends_readers_to_the_name(table_name: str) -> None:
    """A root of another format is withdrawn by the writer that replaces it; its generation may come again."""
    serve(table_name, old=1).close()
    namespace = SharedNamespace(table_name)
    reader = TableReader(namespace)
    namespace.open_root(writable=True).memory[8:12] = (99).to_bytes(4, "little")
    successor = TableWriter(namespace)
    with pytest.raises(NotServingError):
        reader.flags(b"old")
    successor.load([(b"new", 2, b"", None)])
    assert reader.info().generation == 1
    assert (reader.flags(b"old"), reader.flags(b"new")) == (0, 2)
    assert list(reader.flags_of([b"old", b"new"])) == [0, 2]
    assert list(reader.snapshot().entries) == [b"new"]
    successor.close()
