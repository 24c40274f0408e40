"""How a reader finds its segments: the root withdrawn, removed, replaced; forks; other processes."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import crashing
import pytest

from shmelim.errors import NotServingError
from shmelim.shm import Namespace, PrivateNamespace, SharedNamespace, TableReader, TableWriter

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
    with pytest.raises(NotServingError, match=f"process {os.getpid()}, is still starting"):
        TableReader(namespace)
    writer.close()
    with pytest.raises(NotServingError, match="ended before it published"):
        TableReader(namespace)
    writer = TableWriter(namespace)
    writer.load([])
    assert TableReader(namespace).flags(b"a") == 0
    writer.close()


def test_empty_root_left_by_a_writer_that_died_at_once(table_name: str) -> None:
    namespace = SharedNamespace(table_name)
    namespace.name_root(namespace.make_root())
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
    assert reader.flags(b"old") == 1
    successor.load([(b"new", 2, b"", None)])
    assert (reader.flags(b"old"), reader.flags(b"new")) == (0, 2)
    assert list(reader.flags_of([b"old", b"new"])) == [0, 2]
    assert list(reader.snapshot().entries) == [b"new"]
    successor.close()


def test_two_threads_on_both_sides_of_a_reattach(table_name: str) -> None:
    """A read that began on the old root must not look at the new root's data segment of the same generation."""
    serve(table_name, old=1).close()
    reader = TableReader(SharedNamespace(table_name))
    seen = []

    def decode(window: memoryview) -> bytes:
        if not seen:
            SharedNamespace(table_name).remove()
            serve(table_name, new=2).close()
            other = threading.Thread(target=reader.reattach)
            other.start()
            other.join()
        seen.append(bytes(window))
        return seen[-1]

    assert reader.read(b"old", decode) == b"oldoldold"
    assert reader.read(b"old", decode) is None
    assert reader.flags(b"new") == 2


def test_forked_child_reads_on(namespace: Namespace) -> None:
    writer = TableWriter(namespace)
    writer.load([(b"a", 1, b"", None)])
    reader = TableReader(namespace)
    assert crashing.call(lambda: (reader.flags(b"a"), len(reader.snapshot(verify=True).entries))) == (1, 1)
    writer.close()


def test_forked_child_follows_the_parents_writer(table_name: str) -> None:
    writer = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))

    def follow() -> int:
        while reader.flags(b"a") == 1:
            reader.wait_for_change(0.1)
        return reader.info().generation

    with crashing.Child(follow) as child:
        writer.load([(b"%d" % number, 3, b"", None) for number in range(2000)])
        assert child.result() == reader.info().generation
    writer.close()


def test_fork_of_a_private_table_is_a_copy_of_that_moment() -> None:
    namespace = PrivateNamespace()
    writer = TableWriter(namespace)
    writer.load([(b"a", 1, b"", None)])
    reader = TableReader(namespace)
    go = crashing.Counter()

    def look() -> int:
        while not go.value:
            os.sched_yield()
        return reader.flags(b"a")

    with crashing.Child(look) as child:
        with writer.transaction() as transaction:
            transaction.put(b"a", 2)
        go.value = 1
        assert child.result() == 1
    assert reader.flags(b"a") == 2


class SlowToOpen(SharedNamespace):
    """Opening a data segment takes until it is allowed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.opening = threading.Event()
        self.allowed = threading.Event()
        self.allowed.set()

    def open_data(self, generation: int) -> Segment:
        self.opening.set()
        assert self.allowed.wait(60)
        return super().open_data(generation)


def test_fork_while_a_thread_attaches(table_name: str) -> None:
    """The child has no such thread: nobody would ever release the lock that it held."""
    writer = serve(table_name, a=1)
    namespace = SlowToOpen(table_name)
    reader = TableReader(namespace)
    writer.load([(b"%d" % number, 7, b"", None) for number in range(2000)])
    namespace.opening.clear()
    namespace.allowed.clear()
    thread = threading.Thread(target=reader.flags, args=(b"a",))
    thread.start()
    assert namespace.opening.wait(60)

    def look() -> int:
        namespace.allowed = threading.Event()
        namespace.opening = threading.Event()
        namespace.allowed.set()
        return reader.flags(b"7")

    try:
        with crashing.Child(look) as child:
            assert child.result() == 7
    finally:
        namespace.allowed.set()
        thread.join()
    writer.close()


def test_attaching_while_generations_come_and_go(table_name: str) -> None:
    """The segment that the version word named is gone when it is opened: the word is read again."""
    writer = serve(table_name, a=1)

    class Overtaken(SharedNamespace):
        left = 3

        def open_data(self, generation: int) -> Segment:
            if self.left:
                self.left -= 1
                writer.load([(b"a", self.left + 10, bytes(300_000 << 2 * (3 - self.left)), None)])
            return super().open_data(generation)

    reader = TableReader(Overtaken(table_name))
    assert reader.flags(b"a") == 10
    assert reader.info().generation == 4
    writer.close()
