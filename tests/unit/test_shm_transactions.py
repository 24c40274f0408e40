"""What a transaction does, in which order, and what is left of one that fails."""

from __future__ import annotations

import doctest
import random
import sys
from typing import TYPE_CHECKING

import crashing
import pytest

from shmelim.errors import ShmelimError
from shmelim.shm import Namespace, Record, SharedNamespace, TableReader, TableWriter, shared
from shmelim.shm import writer as writer_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType


@pytest.fixture
def writer(namespace: Namespace) -> Iterator[TableWriter]:
    """The smallest table, with three entries."""
    with TableWriter(namespace, capacity=8, arena_size=4096) as writer:
        writer.load([(b"a", 1, b"A", None), (b"b", 2, b"BB", None), (b"c", 3, b"CCC", None)])
        yield writer


@pytest.fixture
def reader(namespace: Namespace, writer: TableWriter) -> TableReader:
    return TableReader(namespace)


def state(reader: TableReader) -> list[tuple[bytes, int, bytes]]:
    """All entries in order, after checking that every way of reading gives the same."""
    entries = reader.snapshot(verify=True).entries
    keys = [*entries, b"absent", b"x" * 100]
    flags = [entry.flags for entry in entries.values()] + [0, 0]
    assert [reader.flags(key) for key in keys] == flags
    assert reader.flags_of(keys).tolist() == flags
    for key, entry in entries.items():
        assert reader.get(key) == Record(entry.flags, entry.ordinal, entry.record)
        assert reader.read(key, bytes) == entry.record
    assert reader.get(b"absent") is None
    assert reader.read(b"absent", bytes) is None
    info = reader.info()
    assert info.entries == len(entries)
    counts = tuple(sum(value >> bit & 1 for value in flags) for bit in range(8))
    assert info.flag_counts == counts
    assert tuple(reader.count_flag(bit) for bit in range(8)) == counts
    return [(key, entry.flags, entry.record) for key, entry in entries.items()]


ABC = [(b"a", 1, b"A"), (b"b", 2, b"BB"), (b"c", 3, b"CCC")]


def test_loaded(reader: TableReader) -> None:
    assert state(reader) == ABC


def test_each_step_becomes_visible_when_it_is_published(writer: TableWriter, reader: TableReader) -> None:
    transaction = writer.transaction()
    transaction.put(b"d", 4, b"D")
    transaction.remove(b"a")
    assert state(reader) == ABC
    transaction.stage()
    assert transaction.staged
    assert state(reader) == ABC
    before = reader.version
    version = transaction.publish()
    assert (reader.version, writer.version) == (version, version)
    assert version == before + 1
    after = [*ABC[1:], (b"d", 4, b"D")]
    assert state(reader) == after
    writer.settle()
    assert state(reader) == after
    with writer.transaction() as again:
        again.put(b"e", 5)
    assert state(reader) == [*after, (b"e", 5, b"")]


def test_not_settled_by_hand(writer: TableWriter, reader: TableReader) -> None:
    expected = list(ABC)
    for number in range(6):
        transaction = writer.transaction()
        transaction.put(b"%d" % number, 1)
        transaction.stage()
        transaction.publish()
        expected.append((b"%d" % number, 1, b""))
        assert state(reader) == expected


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("size", [1, 30])
def test_abort(writer: TableWriter, reader: TableReader, staged: bool, replace: bool, size: int) -> None:
    version = reader.version
    transaction = writer.transaction(replace=replace)
    for number in range(size):
        transaction.put(b"key-%d" % number, 9, bytes(100))
    transaction.remove(b"b")
    if staged:
        transaction.stage()
    transaction.abort()
    transaction.abort()
    assert reader.version == version
    assert state(reader) == ABC
    with writer.transaction() as other:
        other.remove(b"a")
    assert state(reader) == ABC[1:]
    with writer.transaction() as other:
        other.remove(b"c")
    assert state(reader) == ABC[1:2]


def test_exception_in_the_block_aborts(writer: TableWriter, reader: TableReader) -> None:
    def fail() -> None:
        with writer.transaction() as transaction:
            transaction.remove(b"a")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert state(reader) == ABC
    with writer.transaction() as transaction:
        transaction.remove(b"c")
    assert state(reader) == ABC[:2]


def test_remove_and_put_moves_to_the_end(writer: TableWriter, reader: TableReader) -> None:
    with writer.transaction() as transaction:
        transaction.remove(b"a")
        transaction.put(b"a", 1, b"A")
    assert state(reader) == [*ABC[1:], ABC[0]]


def test_put_of_a_known_key_keeps_its_place(writer: TableWriter, reader: TableReader) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"a", 7, b"new")
    assert state(reader) == [(b"a", 7, b"new"), *ABC[1:]]


def test_within_a_transaction_the_last_word_counts(writer: TableWriter, reader: TableReader) -> None:
    for replace in (False, True):
        with writer.transaction(replace=replace) as transaction:
            transaction.put(b"a", 1, b"A")
            transaction.put(b"x", 1, b"1")
            transaction.put(b"a", 2, b"twice")
            transaction.put(b"x", 2, b"2")
            transaction.put(b"y", 1)
            transaction.remove(b"x")
            transaction.put(b"x", 3, b"3")
            transaction.remove(b"y")
            transaction.remove(b"y")
            transaction.remove(b"never there")
        kept = [] if replace else ABC[1:]
        assert state(reader) == [(b"a", 2, b"twice"), *kept, (b"x", 3, b"3")]


def test_empty_transactions(writer: TableWriter, reader: TableReader) -> None:
    with writer.transaction():
        pass
    assert state(reader) == ABC
    with writer.transaction(replace=True):
        pass
    assert state(reader) == []
    with writer.transaction() as transaction:
        transaction.put(b"z", 1)
    assert state(reader) == [(b"z", 1, b"")]


def test_given_ordinals(writer: TableWriter, reader: TableReader) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"late", 1, b"", 100)
        transaction.put(b"early", 1, b"", 50)
        transaction.put(b"last", 1)
    assert [key for key, *_ in state(reader)] == [b"a", b"b", b"c", b"early", b"late", b"last"]
    assert reader.get(b"last").ordinal == 101
    with writer.transaction() as transaction:
        transaction.put(b"a", 1, b"", 99)
    assert [key for key, *_ in state(reader)] == [b"b", b"c", b"early", b"a", b"late", b"last"]
    with writer.transaction() as transaction:
        transaction.put(b"last", 1, b"", 3)
    assert [key for key, *_ in state(reader)] == [b"b", b"c", b"last", b"early", b"a", b"late"]


def test_a_later_ordinal_for_a_known_key_alone(writer: TableWriter, reader: TableReader) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"a", 1, b"A", 3)
    assert state(reader) == [*ABC[1:], ABC[0]]


def test_ordinals_of_a_load(writer: TableWriter, reader: TableReader) -> None:
    writer.load([(b"x", 1, b"", 7), (b"y", 1, b"", 3), (b"z", 1, b"", None)])
    assert [key for key, *_ in state(reader)] == [b"y", b"x", b"z"]
    assert [reader.get(key).ordinal for key in (b"x", b"y", b"z")] == [7, 3, 8]


def test_successor_goes_on_with_given_ordinals(
    namespace: Namespace, writer: TableWriter, reader: TableReader
) -> None:
    entries = [(key, entry.flags, entry.record, entry.ordinal) for key, entry in reader.snapshot().entries.items()]
    writer.close()
    with TableWriter(namespace, capacity=8, arena_size=4096) as successor:
        assert state(reader) == ABC
        successor.load(reversed(entries))
        assert state(reader) == ABC
        with successor.transaction() as transaction:
            transaction.put(b"d", 1)
        assert state(reader) == [*ABC, (b"d", 1, b"")]


@pytest.mark.parametrize("length", [1, 47, 48, 49, 254, 255])
def test_keys_of_every_length(writer: TableWriter, reader: TableReader, length: int) -> None:
    """Long keys that differ in the last byte only; neighbours of the inline limit; zero bytes."""
    stem = b"\0" * (length - 1)
    with writer.transaction() as transaction:
        for byte in range(20):
            transaction.put(stem + bytes([byte]), byte, b"r%d" % byte)
    state(reader)
    for byte in range(20):
        assert reader.get(stem + bytes([byte])).data == b"r%d" % byte
    assert reader.get(stem + b"\xff") is None
    with writer.transaction() as transaction:
        for byte in range(0, 20, 2):
            transaction.remove(stem + bytes([byte]))
    state(reader)
    assert [reader.flags(stem + bytes([byte])) for byte in range(4)] == [0, 1, 0, 3]


def test_a_key_is_not_its_prefix_padded_with_zeros(writer: TableWriter, reader: TableReader) -> None:
    keys = [b"k" + b"\0" * zeros for zeros in (0, 1, 46, 47, 48, 254)]
    with writer.transaction() as transaction:
        for number, key in enumerate(keys):
            transaction.put(key, number + 1)
    assert [reader.flags(key) for key in keys] == [1, 2, 3, 4, 5, 6]
    assert reader.flags_of(keys).tolist() == [1, 2, 3, 4, 5, 6]
    assert reader.flags(b"k" + b"\0" * 2) == 0


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4095, 100_000])
def test_records_of_many_sizes(writer: TableWriter, reader: TableReader, size: int) -> None:
    record = bytes(range(256)) * (size // 256 + 1)
    with writer.transaction() as transaction:
        transaction.put(b"r", 255, record[:size])
    assert reader.get(b"r").data == record[:size]
    assert state(reader) == [*ABC, (b"r", 255, record[:size])]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((b"", 1), ValueError),
        ((b"k" * 256, 1), ValueError),
        (("text", 1), TypeError),
        ((bytearray(b"k"), 1), TypeError),
        ((b"k", -1), ValueError),
        ((b"k", 256), ValueError),
        ((b"k", 1, b"", -1), ValueError),
        ((b"k", 1, b"", 1 << 63), ValueError),
        ((b"k", 1, b"", 1 << 64), ValueError),
    ],
)
def test_bad_arguments(writer: TableWriter, reader: TableReader, arguments: tuple, error: type) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"d", 4, b"D")
        with pytest.raises(error):
            transaction.put(*arguments)
    assert state(reader) == [*ABC, (b"d", 4, b"D")]


@pytest.mark.parametrize("key", [b"", b"k" * 256, "text"])
def test_bad_key_to_remove(writer: TableWriter, key: object) -> None:
    with writer.transaction() as transaction, pytest.raises((ValueError, TypeError)):
        transaction.remove(key)  # type: ignore[arg-type]


def test_the_highest_ordinal(writer: TableWriter, reader: TableReader) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"d", 4, b"", (1 << 63) - 1)
    assert state(reader) == [*ABC, (b"d", 4, b"")]
    with writer.transaction() as transaction:
        transaction.put(b"e", 4)
    assert state(reader)[-1] == (b"e", 4, b"")


# ---------------------------------------------------------------------- used in the wrong order


def test_one_transaction_at_a_time(writer: TableWriter) -> None:
    transaction = writer.transaction()
    with pytest.raises(ShmelimError, match="already open"):
        writer.transaction()
    transaction.abort()
    writer.transaction().abort()


@pytest.mark.parametrize("end", ["publish", "abort"])
def test_an_ended_transaction_does_nothing_more(writer: TableWriter, reader: TableReader, end: str) -> None:
    ended = writer.transaction()
    ended.put(b"z", 1)
    ended.stage()
    getattr(ended, end)()
    expected = state(reader)
    with writer.transaction() as other:
        other.put(b"y", 2)
        for act in (lambda: ended.put(b"w", 3), lambda: ended.remove(b"a"), ended.stage, ended.publish):
            with pytest.raises(ShmelimError):
                act()
        other.stage()
        for act in (ended.stage, ended.publish):
            with pytest.raises(ShmelimError):
                act()
        ended.abort()
    assert state(reader) == [*expected, (b"y", 2, b"")]
    with writer.transaction() as other:
        other.remove(b"y")
    assert state(reader) == expected


def test_publish_before_stage(writer: TableWriter, reader: TableReader) -> None:
    transaction = writer.transaction()
    with pytest.raises(ShmelimError, match="staged before"):
        transaction.publish()
    transaction.put(b"d", 4, b"D")
    transaction.stage()
    with pytest.raises(ShmelimError, match="takes no more"):
        transaction.put(b"e", 1)
    transaction.stage()
    transaction.publish()
    assert state(reader) == [*ABC, (b"d", 4, b"D")]


def test_settle_between_stage_and_publish(writer: TableWriter, reader: TableReader) -> None:
    transaction = writer.transaction()
    transaction.put(b"d", 4, b"D")
    transaction.stage()
    writer.settle()
    transaction.publish()
    expected = [*ABC, (b"d", 4, b"D")]
    assert state(reader) == expected
    with writer.transaction():
        pass
    assert state(reader) == expected


def test_closed(writer: TableWriter, reader: TableReader) -> None:
    open_ = writer.transaction()
    open_.put(b"z", 1)
    open_.stage()
    writer.close()
    writer.close()
    for act in (open_.stage, open_.publish, writer.transaction, lambda: writer.load([])):
        with pytest.raises(ShmelimError):
            act()
    assert state(reader) == ABC
    assert reader.writer().state == "stopped"
    assert not reader.writer().alive


def test_a_forked_child_cannot_write(writer: TableWriter, reader: TableReader) -> None:
    transaction = writer.transaction()
    for number in range(50):
        transaction.put(b"%d" % number, 1)
    transaction.stage()

    def try_all() -> list[str]:
        errors = []
        for act in (transaction.stage, transaction.publish, writer.transaction, lambda: writer.load([])):
            try:
                act()
            except ShmelimError as error:
                errors.append(str(error))
        transaction.abort()
        writer.close()
        return errors

    assert len(crashing.call(try_all)) == 4
    assert state(reader) == ABC
    transaction.publish()
    assert len(state(reader)) == 53
    assert reader.writer().state == "serving"


# ---------------------------------------------------------------------- interrupted


class Interrupt(BaseException):
    """Comes between any two lines, as KeyboardInterrupt does."""


def interrupt() -> None:
    raise Interrupt


def small(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"a", 9, b"changed")
        transaction.remove(b"b")
        transaction.put(b"d" * 60, 5, b"new")


def compacting(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"a", 9, bytes(1600))
        transaction.remove(b"b")


def growing(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        for number in range(9):
            transaction.put(b"%d" % number, 1, b"x" * number)
        # So large that the next load does not do with the grown segment.
        transaction.put(b"large", 1, bytes(100_000))


def replacing(writer: TableWriter) -> None:
    with writer.transaction(replace=True) as transaction:
        transaction.put(b"c", 1, b"only")
        transaction.put(b"n", 2, b"only")


def mirroring(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        for number in range(60):
            transaction.put(b"abc"[number % 3 : number % 3 + 1], 16, b"%d" % number)


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("change", [small, compacting, growing, replacing, mirroring])
def test_an_interrupt_anywhere_leaves_all_or_nothing(
    change: Callable[[TableWriter], None], stride: int, table_name: str
) -> None:
    """The published state stands or the next one does; the writer goes on; no segment is left over."""
    # In a child, so that tracing touches nobody else.
    first = random.randint(1, stride)
    stops = range(first, 1 << 30, stride)
    lines, outcomes = crashing.call(lambda: _interrupted(change, table_name, stops, ()))
    assert False in outcomes
    assert stride > 1 or outcomes == {False, True}
    assert lines > 30


PUBLISHING = ("stage", "publish", "_publish", "remove_data", "__exit__", "_abort", "settle", "mirror_into")


@pytest.mark.parametrize("change", [small, compacting, growing, replacing, mirroring])
def test_an_interrupt_at_every_line_around_publishing(
    change: Callable[[TableWriter], None], table_name: str
) -> None:
    lines, outcomes = crashing.call(lambda: _interrupted(change, table_name, range(1, 1 << 30), PUBLISHING))
    assert outcomes == {False, True}
    assert lines > 20


def test_an_interrupted_publish_by_hand_is_still_to_come_or_over(namespace: Namespace) -> None:
    def run() -> int:
        writer = TableWriter(namespace, capacity=8, arena_size=4096)
        writer.load([])
        reader = TableReader(namespace)
        for stop in range(1, 1000):
            transaction = writer.transaction()
            transaction.put(b"a", stop & 0xFF)
            transaction.stage()
            crashing.at_line(stop, interrupt, ("publish", "_publish"))
            try:
                transaction.publish()
            except Interrupt:
                pass
            else:
                return stop
            finally:
                sys.settrace(None)
            if transaction.staged:
                transaction.publish()
                assert reader.flags(b"a") == stop & 0xFF
            writer.transaction().abort()
        raise AssertionError

    assert crashing.call(run) > 8


def _interrupted(
    change: Callable[[TableWriter], None], name: str, stops: range, functions: tuple[str, ...]
) -> tuple[int, set[bool]]:
    writer = TableWriter(SharedNamespace(name), capacity=8, arena_size=4096)

    def prepare() -> None:
        writer.load([(key, flags, record, None) for key, flags, record in ABC])
        if change is compacting:
            for _ in range(2):
                with writer.transaction() as transaction:
                    transaction.put(b"c", 3, bytes(1200))

    prepare()
    reader = TableReader(SharedNamespace(name))
    before, info = state(reader), reader.info()
    change(writer)
    after = state(reader)
    assert before != after
    assert (reader.info().generation != info.generation) == (change is growing)
    if change is compacting:
        assert reader.info().arena_used < info.arena_used + 1600
    outcomes = set()
    opened = 0
    for stop in stops:
        prepare()
        generation = reader.info().generation
        crashing.at_line(stop, interrupt, functions)
        try:
            change(writer)
        except Interrupt:
            pass
        else:
            sys.settrace(None)
            assert (reader.info().generation != generation) == (change is growing)
            assert opened <= 12
            return stop, outcomes
        finally:
            sys.settrace(None)
        seen = state(reader)
        assert seen in (before, after), (stop, seen)
        outcomes.add(seen == after)
        if writer._open is not None:
            # It came before the block, or in its very first or last line: then its owner must call abort().
            opened += 1
            writer._open.abort()
        for number in range(2):
            with writer.transaction() as transaction:
                transaction.put(b"z%d" % number, number)
            seen.append((b"z%d" % number, number, b""))
            assert state(reader) == seen, stop
        assert len(SharedNamespace(name).generations()) == 1, stop
    raise AssertionError


def test_interrupt_by_a_bad_record_leaves_no_segment(table_name: str) -> None:
    namespace = SharedNamespace(table_name)
    with TableWriter(namespace) as writer:
        writer.load([(b"a", 1, b"A", None)])
        transaction = writer.transaction(replace=True)
        transaction.put(b"a", 1, b"x" * 10_000_000)
        transaction.put(b"b", 1, b"")
        transaction._changes[-1] = (b"b", 1, "not what was checked", None)
        with pytest.raises(TypeError):
            transaction.stage()
        assert namespace.generations() == [1]
        assert state(TableReader(namespace)) == ABC[:1]


@pytest.mark.parametrize("module", [shared, writer_module])
def test_the_examples_in_the_documentation_hold(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0


def test_many_changes_given_at_once_are_made_as_one_by_one(writer: TableWriter, reader: TableReader) -> None:
    given = [(b"d", 1, b"D" * 5000, None), (b"b", 5, b"", 17), (b"a", None, b"", None)]
    with writer.transaction() as transaction:
        transaction.extend(given)
    assert state(reader) == [(b"c", 3, b"CCC"), (b"d", 1, b"D" * 5000), (b"b", 5, b"")]
    transaction = writer.transaction()
    transaction.stage()
    with pytest.raises(ShmelimError, match="is staged"):
        transaction.extend(given)
    transaction.abort()
    with pytest.raises(ShmelimError, match="has ended"):
        transaction.extend(given)
