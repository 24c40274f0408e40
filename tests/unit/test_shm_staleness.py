"""How old what is read may be: what readers say of it, and what they do when it is older."""

from __future__ import annotations

import os
import pickle
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from serving import row

from shmelim import EliminationReader, Status
from shmelim.eliminations.record import encode
from shmelim.eliminations.rows import Row, row_entry
from shmelim.errors import StaleError
from shmelim.shm import Position, PrivateNamespace, SharedNamespace, TableReader, TableWriter
from shmelim.shm.facts import WriterState
from shmelim.shm.following import put_position, put_source
from shmelim.shm.layout import HEARTBEAT, WRITER_CLOCK, WRITER_STATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = "redis://engine.example/validators"
LIMIT = 20.0
LONG_AGO = 60.0  # a machine that has just started has no longer past
ALL = Status.ELIMINATED | Status.DEPARTED | Status.REGISTERED

# Whoever asks one of these learns of hotkeys or records.
READS: dict[str, Callable[[EliminationReader], Any]] = {
    "is_hotkey_eliminated": lambda reader: reader.is_hotkey_eliminated("a"),
    "of another": lambda reader: reader.is_hotkey_eliminated("x" * 48),
    "of None": lambda reader: reader.is_hotkey_eliminated(None),
    "is_hotkey_re_registered": lambda reader: reader.is_hotkey_re_registered("a"),
    "status": lambda reader: reader.status("a"),
    "in": lambda reader: "a" in reader,
    "are_eliminated": lambda reader: reader.are_eliminated(["a", "b"]),
    "statuses": lambda reader: reader.statuses(["a", "b"]),
    "len": len,
    "iteration": list,
    "get_elimination": lambda reader: reader.get_elimination("a"),
    "item": lambda reader: reader["a"],
    "get": lambda reader: reader.get("a"),
    "read": lambda reader: reader.read("a", bytes),
    "get_departed_hotkey_info": lambda reader: reader.get_departed_hotkey_info("a"),
    "get_eliminated_hotkeys": lambda reader: reader.get_eliminated_hotkeys(),
    "get_eliminations_from_memory": lambda reader: reader.get_eliminations_from_memory(),
    "eliminations": lambda reader: reader.eliminations,
    "departed_hotkeys": lambda reader: reader.departed_hotkeys,
    "snapshot": lambda reader: reader.snapshot(),
    "verify": lambda reader: reader.verify(),
    "num_departed_hotkeys": lambda reader: reader.num_departed_hotkeys,
}
CHECKS = ("is_hotkey_eliminated", "of another", "of None", "is_hotkey_re_registered", "status", "in")
BATCHES = ("are_eliminated", "statuses")


@pytest.fixture
def writer(table_name: str) -> Iterator[TableWriter]:
    """The writer of a table in which ``a`` is eliminated; it lives."""
    with TableWriter(SharedNamespace(table_name)) as writer:
        writer.load([row_entry(Row("a", 1, encode(row("a")), None, None, registered=False))])
        writer.beat()
        yield writer


def follow(writer: TableWriter, age: float) -> None:
    """Have the table be one that a follower confirmed so many seconds ago."""
    put_source(writer._root, SOURCE)
    confirm(writer, age)


def confirm(writer: TableWriter, age: float) -> None:
    confirmed = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(age * 1e9)
    put_position(writer._root, Position(1, 2, 3, confirmed, 1_700_000_000_000))


# ---------------------------------------------------------------------- what a reader says


def test_a_local_table_is_as_old_as_its_writers_death(writer: TableWriter, table_name: str) -> None:
    reader = EliminationReader(table_name)
    assert (reader.source, reader.position, reader.as_of, reader.staleness) == (None, None, None, 0.0)
    writer._root.words[HEARTBEAT] -= int(LONG_AGO * 1e9)
    age = reader.staleness
    assert age is not None
    assert LONG_AGO <= age < LONG_AGO + LIMIT
    writer._root.words[WRITER_STATE] = WriterState.STOPPED
    assert reader.staleness >= LONG_AGO
    writer._root.words[WRITER_CLOCK] += 1  # another time namespace
    assert reader.staleness is None


def test_a_followers_table_is_as_old_as_what_it_confirmed(writer: TableWriter, table_name: str) -> None:
    reader = EliminationReader(table_name)
    put_source(writer._root, SOURCE)
    assert (reader.source, reader.position, reader.as_of, reader.staleness) == (SOURCE, None, None, None)
    put_position(writer._root, Position(1, 2, 3, 0, 0))
    assert (reader.position, reader.as_of, reader.staleness) == (Position(1, 2, 3, 0, 0), None, None)
    confirm(writer, LONG_AGO)
    assert reader.as_of == 1_700_000_000_000
    age = reader.staleness
    assert age is not None
    assert LONG_AGO <= age < LONG_AGO + LIMIT
    confirm(writer, -LONG_AGO)  # which cannot be
    assert reader.staleness is None
    confirm(writer, 0.0)
    assert 0.0 <= reader.staleness < LIMIT
    writer._root.words[WRITER_CLOCK] += 1
    assert reader.staleness is None


def test_a_position_makes_a_table_a_followers_whatever_its_source_reads(
    writer: TableWriter, table_name: str
) -> None:
    """A source that is being written reads as none for a moment, and must not make the table look fresh."""
    confirm(writer, LONG_AGO)
    reader = EliminationReader(table_name)
    assert reader.source is None
    assert reader.staleness >= LONG_AGO


# ---------------------------------------------------------------------- what it does


@pytest.mark.parametrize("when", ["raise", "refuse"])
def test_within_the_limit_every_read_answers_as_ever(writer: TableWriter, table_name: str, when: Any) -> None:
    follow(writer, 0.0)
    plain = EliminationReader(table_name)
    guarded = EliminationReader(table_name, max_staleness=LIMIT, when_stale=when)
    for name, read in READS.items():
        found, expected = read(guarded), read(plain)
        assert np.array_equal(found, expected), name


@pytest.mark.parametrize("age", [LONG_AGO, -LONG_AGO, None], ids=["old", "unknown", "confirmed nothing"])
def test_raise_refuses_every_read_of_what_is_too_old(
    writer: TableWriter, table_name: str, age: float | None
) -> None:
    follow(writer, 0.0)
    reader = EliminationReader(table_name, max_staleness=LIMIT, when_stale="raise")
    for round_ in range(3):
        for name, read in READS.items():
            confirm(writer, 0.0)
            read(reader)
            if age is None:
                put_position(writer._root, Position(1, 2, 3, 0, 0))
            else:
                confirm(writer, age)
            with pytest.raises(StaleError) as caught:
                pytest.fail(f"{name}, round {round_}: {read(reader)!r}")
            words = str(caught.value)
            assert table_name in words
            assert "20 s" in words
            assert SOURCE in words
            assert ("60." in words) is (age == LONG_AGO)
            assert "follower" in caught.value.hint


def test_refuse_accepts_no_order_and_makes_nothing_up(writer: TableWriter, table_name: str) -> None:
    follow(writer, LONG_AGO)
    reader = EliminationReader(table_name, max_staleness=LIMIT, when_stale="refuse")
    for name, read in READS.items():
        if name in CHECKS:
            assert read(reader) == (ALL if name == "status" else True), name
        elif name not in BATCHES:
            with pytest.raises(StaleError):
                pytest.fail(f"{name}: {read(reader)!r}")
    assert reader.are_eliminated(iter(["a", "b"])).tolist() == [True, True]
    assert reader.are_eliminated(np.array([b"a"])).dtype == np.bool_
    assert reader.statuses(iter(["a", "b"])) == [ALL, ALL]
    confirm(writer, 0.0)
    assert reader.are_eliminated(iter(["a", "b"])).tolist() == [True, False]
    assert reader.is_hotkey_eliminated("b") is False
    assert reader.statuses(iter(["a", "b"])) == [Status.ELIMINATED, Status(0)]


def test_serve_answers_and_tells(writer: TableWriter, table_name: str) -> None:
    follow(writer, LONG_AGO)
    reader = EliminationReader(table_name, max_staleness=LIMIT)
    assert reader.when_stale == "serve"
    for read in READS.values():
        read(reader)
    assert reader.stale is True
    confirm(writer, 0.0)
    assert reader.stale is False
    assert EliminationReader(table_name).stale is False
    assert reader._table._guarded is False


@pytest.mark.parametrize("when", ["raise", "refuse"])
def test_what_is_not_about_hotkeys_answers_at_any_age(writer: TableWriter, table_name: str, when: Any) -> None:
    follow(writer, LONG_AGO)
    reader = EliminationReader(table_name, max_staleness=LIMIT, when_stale=when)
    assert reader.version == EliminationReader(table_name).version
    assert reader.writer.pid == os.getpid()
    assert reader.table.entries == 1
    assert reader.source == SOURCE
    assert reader.stale is True
    assert reader.root_id
    assert reader.wait_for_change(0.0) is False
    assert repr(reader) == f"<EliminationReader {table_name!r}: 1 eliminated>"


def test_a_dead_local_writer_makes_a_table_stale_and_the_error_says_how_to_start_one(
    writer: TableWriter, table_name: str
) -> None:
    reader = EliminationReader(table_name, max_staleness=LIMIT, when_stale="raise")
    assert reader.is_hotkey_eliminated("a")
    writer._root.words[HEARTBEAT] -= int(LONG_AGO * 1e9)
    with pytest.raises(StaleError, match=f"shmelim serve --name {table_name}"):
        reader.is_hotkey_eliminated("a")
    writer.beat()
    assert reader.is_hotkey_eliminated("a")


def test_a_source_of_a_strangers_is_shown_escaped(writer: TableWriter, table_name: str) -> None:
    put_source(writer._root, "redis://\x1b[31m")
    reader = EliminationReader(table_name, max_staleness=LIMIT, when_stale="raise")
    with pytest.raises(StaleError, match=r"redis://\\x1b\[31m"):
        len(reader)


# ---------------------------------------------------------------------- arguments, copies, children


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"when_stale": "raise"}, ValueError, "needs max_staleness"),
        ({"when_stale": "refuse"}, ValueError, "needs max_staleness"),
        ({"when_stale": "Raise", "max_staleness": 1}, ValueError, "'serve', 'raise', 'refuse'"),
        ({"max_staleness": -1}, ValueError, "-1"),
        ({"max_staleness": float("nan")}, ValueError, "nan"),
        ({"max_staleness": float("inf")}, ValueError, "inf"),
        ({"max_staleness": "5"}, TypeError, "'5'"),
        ({"max_staleness": True}, TypeError, "True"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    writer: TableWriter, table_name: str, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        EliminationReader(table_name, **arguments)
    assert writer.entries == 1


class Own(EliminationReader):
    """A caller's own reader."""


@pytest.mark.parametrize("kind", [EliminationReader, Own])
@pytest.mark.parametrize("when", ["serve", "raise", "refuse"])
def test_copies_keep_limit_and_ways(
    writer: TableWriter, table_name: str, kind: type[EliminationReader], when: Any
) -> None:
    follow(writer, LONG_AGO)
    reader = kind(table_name, max_staleness=LIMIT, when_stale=when)
    copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(reader))))
    assert isinstance(copy, kind)
    assert (copy.max_staleness, copy.when_stale) == (LIMIT, when)
    assert type(copy) is type(reader)
    assert (type(copy) is kind) is (when != "refuse")
    for one in (reader, copy):
        if when == "raise":
            with pytest.raises(StaleError):
                one.is_hotkey_eliminated("b")
        else:
            assert one.is_hotkey_eliminated("b") is (when == "refuse")


def test_a_forked_child_is_guarded_too(writer: TableWriter, table_name: str) -> None:
    follow(writer, 0.0)
    reader = EliminationReader(table_name, max_staleness=LIMIT, when_stale="raise")
    assert reader.is_hotkey_eliminated("a")
    pid = os.fork()
    if pid == 0:
        try:
            fresh = reader.is_hotkey_eliminated("a")
            confirm(writer, LONG_AGO)
            reader.is_hotkey_eliminated("a")
        except StaleError:
            os._exit(0 if fresh else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_private_memory_has_an_age_as_well() -> None:
    namespace = PrivateNamespace()
    with TableWriter(namespace) as writer:
        writer.load([(b"a", 1, b"", None)])
        writer.beat()
        reader = TableReader(namespace, max_staleness=LIMIT)
        assert reader.flags(b"a") == 1
        follow(writer, LONG_AGO)
        for read in (lambda: reader.flags(b"a"), lambda: reader.get(b"a"), lambda: reader.flags_of([b"a"])):
            with pytest.raises(StaleError, match="private"):
                read()
