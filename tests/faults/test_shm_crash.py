"""``kill -9`` of the writer at every step, with a reader that was attached before and is never opened again.

A child takes the table over from a predecessor, loads it, and runs transactions of every kind; it kills itself at
the n-th line of the package's code that it runs. What a reader sees then must be the state before or after the
transaction that was running; a successor must take over at once; and no segment may be left.
"""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING

import crashing
import pytest
from segments import segments_of

from shmelim.shm import SharedNamespace, TableReader, TableWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Entries = dict[bytes, tuple[int, bytes]]
LONG = b"x" * 100

START: Entries = {b"a": (1, b"A"), b"b": (2, b"B" * 100), LONG: (3, b"")}


def put_and_remove(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"c", 4, b"C")
        transaction.remove(b"a")
        transaction.put(b"b", 5, b"BB")


def move_to_the_end(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        transaction.remove(b"b")
        transaction.put(b"b", 6, b"again")


def fill_the_arena(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"c", 7, bytes(1400))


def compact(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"c", 8, bytes(1100))


def grow(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        for number in range(36):
            transaction.put(b"new-%d" % number, number, b"n" * number)


def replace_in_place(writer: TableWriter) -> None:
    with writer.transaction(replace=True) as transaction:
        for number in range(6):
            transaction.put(b"other-%d" % number, number + 10, LONG)


def by_hand(writer: TableWriter) -> None:
    """Stage, publish, and leave settling to the next transaction."""
    transaction = writer.transaction()
    transaction.put(b"by hand", 77, b"")
    transaction.remove(b"other-3")
    transaction.stage()
    transaction.publish()


def abort(writer: TableWriter) -> None:
    transaction = writer.transaction()
    transaction.put(b"by hand", 88, b"never seen" * 10)
    transaction.remove(b"other-1")
    transaction.stage()
    transaction.abort()


def shrink(writer: TableWriter) -> None:
    with writer.transaction(replace=True) as transaction:
        transaction.put(b"last", 1, b"small again")


def mirror(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        for number in range(40):
            transaction.put(b"last", number, b"%d" % number)


STEPS: list[Callable[[TableWriter], None]] = [
    put_and_remove,
    move_to_the_end,
    fill_the_arena,
    fill_the_arena,
    compact,
    grow,
    put_and_remove,
    replace_in_place,
    by_hand,
    abort,
    by_hand,
    shrink,
    mirror,
    put_and_remove,
]


def serve(name: str) -> TableWriter:
    return TableWriter(SharedNamespace(name), capacity=8, arena_size=4096)


def load(writer: TableWriter, entries: Entries) -> None:
    writer.load((key, *value, None) for key, value in entries.items())


def seen_by(reader: TableReader) -> list[tuple[bytes, tuple[int, bytes]]]:
    """Return all entries in order, after checking that every way of reading gives the same."""
    entries = reader.snapshot(verify=True).entries
    keys = [*entries, b"absent", b"a", b"other-1"]
    flags = [entries[key].flags if key in entries else 0 for key in keys]
    assert reader.flags_of(keys).tolist() == flags
    assert [reader.flags(key) for key in keys] == flags
    for key, entry in entries.items():
        assert reader.get(key).data == entry.record
    assert reader.info().entries == len(entries)
    return [(key, (entry.flags, entry.record)) for key, entry in entries.items()]


def run(name: str, done: crashing.Counter) -> None:
    """Take over, load, and run all steps; ``done`` counts what has returned."""
    writer = serve(name)
    load(writer, START)
    done.value = 1
    for step in STEPS:
        step(writer)
        done.value += 1
    writer.close()


def states(name: str) -> list[list[tuple[bytes, tuple[int, bytes]]]]:
    """Return the states between the steps: before the load, after it, and after each step."""
    writer = serve(name)
    load(writer, START)
    reader = TableReader(SharedNamespace(name))
    found = [seen_by(reader)] * 2
    infos = [reader.info()]
    for step in STEPS:
        step(writer)
        found.append(seen_by(reader))
        infos.append(reader.info())
    writer.close()
    generations = [info.generation for info in infos]
    # The steps must be what they are named after.
    compacting = STEPS.index(compact) + 1
    assert generations[compacting] == generations[compacting - 1]
    assert infos[compacting].arena_used < infos[compacting - 1].arena_used + 1100
    assert len(set(generations)) >= 3
    return found


def crash_everywhere(name: str, stops: Iterator[int]) -> int:
    expected = states(name)
    with serve(name) as writer:
        load(writer, START)
    reader = TableReader(SharedNamespace(name))
    for stop in stops:
        done = crashing.Counter()

        def die(stop: int = stop, done: crashing.Counter = done) -> None:
            crashing.at_line(stop, crashing.kill_self)
            run(name, done)

        with crashing.Child(die) as child:
            status = child.wait()
        assert status in (0, -signal.SIGKILL)
        seen = seen_by(reader)
        assert seen in expected[done.value : done.value + 2], (stop, done.value, seen)
        assert seen_by(TableReader(SharedNamespace(name))) == seen
        with serve(name) as successor:
            assert seen_by(reader) == seen
            load(successor, START)
            assert seen_by(reader) == expected[0], stop
            assert len(segments_of(name)) == 2, stop
            assert reader.writer().alive
        if status == 0:
            return stop
    raise AssertionError


def test_killed_at_steps_chosen_by_chance(table_name: str) -> None:
    """As many as make some seconds; a failure names its step."""
    stride = 41
    first = random.randint(1, stride)
    print(f"every {stride}th step from {first}")
    assert crash_everywhere(table_name, iter(range(first, 1 << 30, stride))) > 1000


@pytest.mark.long
def test_killed_at_every_step(table_name: str) -> None:
    assert crash_everywhere(table_name, iter(range(1, 1 << 30))) > 1000


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.long)])
def test_killed_before_anything_was_published(new_name: Callable[[], str], stride: int) -> None:
    """The very first writer of a name dies; the next one begins."""

    def first(name: str, stop: int) -> None:
        crashing.at_line(stop, crashing.kill_self)
        load(serve(name), START)

    name = new_name()
    for stop in range(random.randint(1, stride), 1 << 30, stride):
        SharedNamespace(name).remove()
        with crashing.Child(lambda stop=stop: first(name, stop)) as child:
            status = child.wait()
        with serve(name) as successor:
            load(successor, START)
            assert [key for key, _ in seen_by(TableReader(SharedNamespace(name)))] == list(START)
        assert len(segments_of(name)) == 2, stop
        if status == 0:
            break


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.long)])
def test_killed_while_a_foreign_root_is_replaced(table_name: str, stride: int) -> None:
    def replace(stop: int) -> None:
        crashing.at_line(stop, crashing.kill_self)
        load(serve(table_name), START)

    for stop in range(random.randint(1, stride), 1 << 30, stride):
        serve(table_name).close()
        SharedNamespace(table_name).open_root(writable=True).memory[:8] = b"foreign!"
        with crashing.Child(lambda stop=stop: replace(stop)) as child:
            status = child.wait()
        with serve(table_name) as successor:
            load(successor, START)
            assert [key for key, _ in seen_by(TableReader(SharedNamespace(table_name)))] == list(START)
        assert len(segments_of(table_name)) == 2, stop
        if status == 0:
            break


def test_killed_at_any_moment_from_outside(table_name: str) -> None:
    """Killed when a reader has seen some publishes: in the middle of a copy, a system call, anything."""
    with serve(table_name) as writer:
        load(writer, START)
    reader = TableReader(SharedNamespace(table_name))
    for _ in range(25):

        def work() -> None:
            writer = serve(table_name)
            writer.load((b"%d" % number, 1, b"\1" * 300, None) for number in range(300))
            stamp = 1
            while True:
                stamp = stamp % 250 + 1
                with writer.transaction(replace=stamp % 16 == 0) as transaction:
                    for number in range(300):
                        transaction.put(b"%d" % number, stamp, bytes([stamp]) * 300)

        with crashing.Child(work) as child:
            target = reader.version + random.randint(1, 8)
            child.until(lambda target=target: reader.version >= target)
            child.kill()
        entries = reader.snapshot(verify=True).entries
        assert len({entry.flags for entry in entries.values()} if len(entries) == 300 else [0]) == 1
        assert all(entry.record == bytes([entry.flags]) * 300 for entry in entries.values() if len(entries) == 300)
        assert reader.flags_of(list(entries)).tolist() == [entry.flags for entry in entries.values()]
        with serve(table_name) as successor:
            load(successor, START)
        assert [key for key, _ in seen_by(reader)] == list(START)
        assert len(segments_of(table_name)) == 2
