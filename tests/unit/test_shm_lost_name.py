"""Names that vanish or are taken: by the beat, by readers, by a second writer, by strangers; ids that decide."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from segments import segments_of
from waiting import until

from shmelim.errors import AlreadyServingError, NotServingError, SegmentError
from shmelim.shm import SharedNamespace, TableReader, TableWriter
from shmelim.shm.facts import HEARTBEAT_LIMIT, WriterState
from shmelim.shm.layout import (
    HEARTBEAT,
    MAX_GENERATION,
    ROOT_ID,
    SEQUENCE_BITS,
    SEQUENCE_MASK,
    VERSION,
    WRITER_CLOCK,
    WRITER_LOCK,
    WRITER_STATE,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def serve(name: str, **entries: int) -> TableWriter:
    writer = TableWriter(SharedNamespace(name), capacity=8, arena_size=4096)
    writer.load([(key.encode(), flags, b"", None) for key, flags in entries.items()])
    return writer


def put(writer: TableWriter, key: str, flags: int, size: int = 0) -> None:
    with writer.transaction() as transaction:
        transaction.put(key.encode(), flags, bytes(size))


def path(name: str, rest: str = "") -> Path:
    return Path("/dev/shm") / f"shmelim.{name}{rest}"


def unlink_all(name: str) -> None:
    for each in Path("/dev/shm").glob(f"shmelim.{name}*"):
        each.unlink()


def die(writer: TableWriter) -> None:
    """Leave everything as a writer does that is killed, long ago."""
    writer._root.words[HEARTBEAT] -= int(10 * HEARTBEAT_LIMIT * 1e9)
    writer._lock.release()
    writer._pid = -1


# ---------------------------------------------------------------------- a name and a number are not an identity


def test_a_reader_does_not_take_another_roots_segment_for_its_own(table_name: str) -> None:
    """Writer A moves to generation 2 while a reader idles, its names go, B takes them and gets to generation 2."""
    first = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    put(first, "a", 2, 10_000)
    unlink_all(table_name)
    die(first)
    second = serve(table_name, a=3)
    assert reader.flags(b"a") in (2, 3)
    put(second, "a", 4, 10_000)
    staged = second.transaction()
    staged.put(b"a", 255)
    staged.put(b"torn", 255)
    staged.stage()
    for _ in range(20):
        assert (reader.flags(b"a"), reader.flags(b"torn")) in ((2, 0), (4, 0))
    staged.abort()
    until(lambda: reader.flags(b"a") == 4)
    second.close()


def test_without_another_root_a_segment_that_is_gone_is_an_error(table_name: str) -> None:
    first = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    put(first, "a", 2, 10_000)
    path(table_name, ".2").unlink()
    with pytest.raises(NotServingError):
        reader.flags(b"a")
    first.close()


def test_a_data_segment_of_another_root_under_the_right_name_is_refused(table_name: str, new_name: object) -> None:
    other = new_name()  # type: ignore[operator]
    serve(other, b=1).close()
    serve(table_name, a=1).close()
    path(other, ".1").rename(path(table_name, ".1"))
    with pytest.raises(SegmentError, match="belongs to the root"):
        TableReader(SharedNamespace(table_name))


@pytest.mark.parametrize("page", [b"", bytes(4096)], ids=["truncated", "emptied"])
def test_a_root_that_was_emptied_is_not_continued(table_name: str, page: bytes) -> None:
    serve(table_name, a=1).close()
    reader = TableReader(SharedNamespace(table_name))
    root = reader._view.root.identity
    path(table_name).write_bytes(page)
    second = serve(table_name, a=2)
    assert SharedNamespace(table_name).open_root().identity != root
    assert reader.flags(b"a") == 2
    assert reader.info().generation == 1
    second.close()


def test_a_damaged_root_answers_the_old_state_until_there_is_a_new_one(table_name: str) -> None:
    serve(table_name, a=1).close()
    reader = TableReader(SharedNamespace(table_name))
    before = reader.version
    with path(table_name).open("r+b") as file:
        file.write(b"damaged!")
    second = TableWriter(SharedNamespace(table_name))
    for _ in range(20):
        assert reader.flags(b"a") == 1
    second.load([(b"a", 2, b"", None)])
    assert reader.flags(b"a") == 2
    assert reader.version > before
    second.close()


@pytest.mark.parametrize("when", ["at the start", "in the middle"])
def test_a_root_whose_generations_are_used_up_is_replaced(table_name: str, when: str) -> None:
    writer = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    content = reader.snapshot().entries
    words = writer._root.words
    path(table_name, ".1").rename(path(table_name, f".{MAX_GENERATION}"))
    words[VERSION] = MAX_GENERATION << SEQUENCE_BITS | words[VERSION] & SEQUENCE_MASK
    segment = SharedNamespace(table_name).open_data(MAX_GENERATION, writable=True)
    segment.words[2] = writer._generation = MAX_GENERATION
    writer._segment.label = segment.label
    before, root = reader.identity(), writer._root
    if when == "at the start":
        writer.close()
        writer = serve(table_name, a=1)
    else:
        put(writer, "b", 2, 10_000)
        with writer.transaction() as transaction:
            transaction.remove(b"b")
    assert root.words[VERSION] >> SEQUENCE_BITS == 0, "withdrawn"
    after = reader.identity()
    assert before.root_id != after.root_id
    assert before.sequence < after.sequence
    assert reader.info().generation < 4
    assert reader.snapshot(verify=True).entries == content
    assert len(segments_of(table_name)) == 2
    writer.close()


# ---------------------------------------------------------------------- the beat


NAMES = {
    "root": [""],
    "data": [".1"],
    "lock": [".lock"],
    "root and data": ["", ".1"],
    "all": ["", ".1", ".lock"],
}


@pytest.mark.parametrize("lost", NAMES.values(), ids=NAMES)
def test_lost_names_are_made_again_and_every_reader_moves(table_name: str, lost: list[str]) -> None:
    writer = serve(table_name, a=1)
    attached = TableReader(SharedNamespace(table_name))
    before = attached.identity()
    assert writer.beat()
    assert not writer.renew()
    for rest in lost:
        path(table_name, rest).unlink()
    assert not writer.beat()
    assert writer.renew()
    assert writer.beat()
    put(writer, "b", 2)
    for reader in (attached, TableReader(SharedNamespace(table_name))):
        assert (reader.flags(b"a"), reader.flags(b"b"), reader.writer().alive) == (1, 2, True)
    after = attached.identity()
    assert after.sequence > before.sequence
    assert (after.root_id == before.root_id) == ("" not in lost)
    with pytest.raises(AlreadyServingError):
        TableWriter(SharedNamespace(table_name))
    assert len(segments_of(table_name)) == 2
    writer.close()


def test_names_that_are_lost_before_anything_was_published_are_made_again(table_name: str) -> None:
    writer = TableWriter(SharedNamespace(table_name))
    unlink_all(table_name)
    assert not writer.beat()
    assert writer.renew()
    assert writer.beat()
    writer.load([(b"a", 1, b"", None)])
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
    writer.close()


def test_a_root_that_was_replaced_by_a_file_is_replaced(table_name: str) -> None:
    writer = serve(table_name, a=1)
    path(table_name).unlink()
    path(table_name).write_bytes(b"something else")
    path(table_name).chmod(0o600)
    assert not writer.beat()
    assert writer.renew()
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
    writer.close()


def test_a_writer_whose_name_another_has_withdraws_and_fails_its_calls(table_name: str) -> None:
    first = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    unlink_all(table_name)
    second = serve(table_name, b=2)
    left = segments_of(table_name)
    pending = first.transaction()
    assert not first.beat()
    with pytest.raises(AlreadyServingError):
        first.renew()
    assert (reader.flags(b"a"), reader.flags(b"b")) == (0, 2), "the old root was withdrawn"
    for call in (first.transaction, first.renew, pending.stage, lambda: first.load([])):
        with pytest.raises(AlreadyServingError, match="another writer has taken the name"):
            call()
    assert not first.beat()
    first.close()
    assert segments_of(table_name) == left
    put(second, "b", 3)
    assert reader.flags(b"b") == 3
    second.close()


def test_a_withdrawal_waits_until_the_other_writer_has_published(table_name: str) -> None:
    first = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    unlink_all(table_name)
    second = TableWriter(SharedNamespace(table_name))
    with pytest.raises(AlreadyServingError):
        first.renew()
    for _ in range(20):
        assert reader.flags(b"a") == 1
    second.load([(b"b", 2, b"", None)])
    first.beat()
    assert (reader.flags(b"a"), reader.flags(b"b")) == (0, 2)
    second.close()


def test_growth_without_the_name_touches_nothing_of_the_next_writer(table_name: str) -> None:
    first = serve(table_name, a=1)
    unlink_all(table_name)
    second = serve(table_name, b=2)
    left = segments_of(table_name)
    with pytest.raises(AlreadyServingError):
        put(first, "a", 2, 10_000)
    first.close()
    assert segments_of(table_name) == left
    assert TableReader(SharedNamespace(table_name)).flags(b"b") == 2
    second.close()


@pytest.mark.parametrize("state", [WriterState.STARTING, WriterState.SERVING])
def test_a_second_writer_is_refused_though_the_lock_file_was_removed(table_name: str, state: int) -> None:
    first = serve(table_name, a=1)
    first._root.words[WRITER_STATE] = state
    path(table_name, ".lock").unlink()
    beats = iter(range(1, 1000))

    class Beating(SharedNamespace):
        def open_root(self, *, writable: bool = False) -> object:
            root = super().open_root(writable=writable)
            # The first one lives: its heart beats between two looks.
            words = root.words

            class Words:
                def __getitem__(self, index: int) -> int:
                    return words[index] + (next(beats) if index == HEARTBEAT else 0)

            root.words = Words()  # type: ignore[assignment]
            return root

    with pytest.raises(AlreadyServingError, match=f"served by process {os.getpid()}, whose lock file was removed"):
        TableWriter(Beating(table_name))
    assert first.renew()
    with pytest.raises(AlreadyServingError):
        TableWriter(SharedNamespace(table_name))
    first.close()


def test_a_dead_writer_whose_lock_file_was_removed_blocks_nobody(table_name: str) -> None:
    first = serve(table_name, a=1)
    die(first)
    path(table_name, ".lock").unlink()
    second = serve(table_name, a=2)
    assert second._root.words[WRITER_LOCK] == path(table_name, ".lock").stat().st_ino
    second.close()


# ---------------------------------------------------------------------- readers find out by themselves


def replaced(name: str) -> tuple[TableReader, TableReader, TableWriter]:
    """Return two readers of a dead writer, and another that has the names since."""
    first = serve(name, a=1)
    readers = TableReader(SharedNamespace(name)), TableReader(SharedNamespace(name))
    die(first)
    unlink_all(name)
    return *readers, serve(name, a=2)


READS: dict[str, Callable[[TableReader], object]] = {
    "flags": lambda reader: reader.flags(b"a"),
    "flags of 48": lambda reader: reader.flags(b"a".ljust(48)),
    "get": lambda reader: reader.get(b"a"),
    "read": lambda reader: reader.read(b"a", bytes),
    "batch": lambda reader: reader.flags_of([b"a"]),
    "snapshot": lambda reader: reader.snapshot(),
    "info": lambda reader: reader.info(),
    "version": lambda reader: reader.version,
    "count": lambda reader: reader.count_flag(0),
    "wait": lambda reader: reader.wait_for_change(0),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_within_eight_reads_of_any_kind_a_reader_of_a_dead_writer_follows(
    table_name: str, read: Callable[[TableReader], object]
) -> None:
    reader, _, second = replaced(table_name)
    for _ in range(8):
        read(reader)
    assert reader._view.root.words[ROOT_ID] == second._root.words[ROOT_ID]
    second.close()


def test_the_name_is_looked_at_once_a_second_at_most(table_name: str) -> None:
    class Counted(SharedNamespace):
        looks = 0

        def open_root(self, *, writable: bool = False) -> object:
            Counted.looks += 1
            return super().open_root(writable=writable)

    first = serve(table_name, a=1)
    reader = TableReader(Counted(table_name))
    die(first)
    begun, Counted.looks, reads = time.monotonic(), 0, 0
    while Counted.looks < 3:
        reader.flags(b"a")
        reads += 1
        time.sleep(0.001)  # between two reads, which wait for nothing
    assert time.monotonic() - begun > 1.9
    assert reads > 100


def test_a_living_writer_is_not_looked_behind(table_name: str) -> None:
    class Untouched(SharedNamespace):
        def open_root(self, *, writable: bool = False) -> object:
            assert not hasattr(self, "attached")
            return super().open_root(writable=writable)

    first = serve(table_name, a=1)
    namespace = Untouched(table_name)
    reader = TableReader(namespace)
    namespace.attached = True  # type: ignore[attr-defined]
    for _ in range(100):
        assert reader.flags(b"a") == 1
    first.close()


def test_a_name_that_leads_nowhere_leaves_a_reader_where_it_is(table_name: str) -> None:
    first = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    die(first)
    unlink_all(table_name)
    for _ in range(20):
        assert reader.flags(b"a") == 1
    assert not reader.reattach()
    path(table_name).write_bytes(b"no root at all")
    path(table_name).chmod(0o600)
    with pytest.raises(SegmentError):
        reader.reattach()
    assert reader.flags(b"a") == 1


def test_a_copy_of_the_same_root_under_another_inode_is_the_same_root(table_name: str) -> None:
    """Ids decide: in a container, an inode says nothing."""
    first = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    page = path(table_name).read_bytes()
    path(table_name).unlink()
    path(table_name).write_bytes(page)
    path(table_name).chmod(0o600)
    assert not reader.reattach()
    put(first, "a", 2)
    assert reader.flags(b"a") == 2
    first.close()


# ---------------------------------------------------------------------- time


def test_a_heartbeat_of_another_clock_says_nothing_of_life(table_name: str) -> None:
    """In another time namespace the same word is any age at all."""
    writer = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    assert reader.writer()[1:4] == (True, pytest.approx(0, abs=60), "serving")
    writer._root.words[WRITER_CLOCK] += 1
    assert reader.writer()[1:4] == (None, None, "serving")
    assert reader.identity().heartbeat_age is None
    writer.close()
    assert reader.writer()[1:4] == (False, None, "stopped")


def test_a_heartbeat_of_the_future_is_unknown(table_name: str) -> None:
    writer = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    writer._root.words[HEARTBEAT] += 10**12
    assert reader.writer()[1:3] == (None, None)
    writer.beat()
    assert reader.writer().alive
    writer.close()


def test_a_reader_whose_clock_is_another_follows_the_name_all_the_same(table_name: str) -> None:
    first = serve(table_name, a=1)
    reader = TableReader(SharedNamespace(table_name))
    die(first)
    first._root.words[HEARTBEAT] = (1 << 63) - 1
    unlink_all(table_name)
    second = serve(table_name, a=2)
    until(lambda: reader.flags(b"a") == 2)
    second.close()
