"""How old a reader's answers are, what it does about it, and its end."""

from __future__ import annotations

import math
import pickle
import time

import pytest

from shmelim import EliminationReader
from shmelim.eliminations.record import encode
from shmelim.eliminations.rows import Row, Status, row_entry
from shmelim.errors import ShmelimError, StaleError
from shmelim.shm import SharedNamespace, TableWriter
from shmelim.shm.following import Position

SOURCE = "redis://engine/0 shmelim"
RECORD = encode({"hotkey": "a", "reason": "ZOMBIE"})


def boottime() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@pytest.fixture
def name(new_name):
    return new_name()


@pytest.fixture
def writer(name):
    with TableWriter(SharedNamespace(name), source=SOURCE) as writer:
        writer.load([row_entry(Row("a", 1, RECORD, None, None, registered=False))])
        yield writer


def confirm(writer: TableWriter, age: float) -> Position:
    position = Position(2, 3, 4, boottime() - int(age * 1e9), 1_700_000_000_000)
    writer.say_position(position)
    return position


def test_a_local_table_is_current(name):
    with TableWriter(SharedNamespace(name)) as writer:
        writer.load([])
        reader = EliminationReader(name, max_staleness=0, when_stale="raise")
        assert (reader.source, reader.position, reader.as_of, reader.staleness) == (None, None, None, 0.0)
    assert reader.staleness == 0.0
    assert not reader.is_hotkey_eliminated("a")


def test_the_age_is_that_of_what_was_confirmed(name, writer):
    reader = EliminationReader(name)
    assert reader.source == SOURCE
    assert (reader.position, reader.as_of, reader.staleness) == (None, None, math.inf)
    position = confirm(writer, 7)
    assert reader.position == position
    assert reader.as_of == 1_700_000_000_000
    assert 7 <= reader.staleness < 60
    writer.say_position(position._replace(confirmed=0, as_of=0))
    assert (reader.as_of, reader.staleness) == (None, math.inf)


def test_the_default_serves_by_the_class_that_has_no_question(name, writer):
    confirm(writer, 100)
    reader = EliminationReader(name, max_staleness=1)
    assert type(reader) is EliminationReader
    assert reader.is_hotkey_eliminated("a")


READS = [
    lambda reader: reader.is_hotkey_eliminated("a"),
    lambda reader: reader.is_hotkey_re_registered("a"),
    lambda reader: reader.status("a"),
    lambda reader: reader.statuses(["a"]),
    lambda reader: reader.are_eliminated(["a"]).tolist(),
    lambda reader: reader.get_elimination("a"),
    lambda reader: reader.hotkey_in_eliminations("a"),
    lambda reader: reader.get_elimination_local_cache("a"),
    lambda reader: reader["a"],
    lambda reader: reader.get("a"),
    lambda reader: "a" in reader,
    list,
    len,
    lambda reader: list(reader.items()),
    lambda reader: list(reader.values()),
    lambda reader: reader.read("a", bytes),
    lambda reader: reader.snapshot(),
    lambda reader: reader.get_eliminations_dict(),
    lambda reader: reader.get_eliminations_from_memory(),
    lambda reader: reader.get_eliminated_hotkeys(),
    lambda reader: reader.get_departed_hotkeys(),
    lambda reader: reader.get_departed_hotkey_info("a"),
    lambda reader: reader.eliminations,
    lambda reader: reader.departed_hotkeys,
    lambda reader: reader.encoded_elimination("a"),
]


@pytest.mark.parametrize("read", READS)
def test_every_read_raises_where_that_was_said(name, writer, read):
    reader = EliminationReader(name, max_staleness=5, when_stale="raise")
    assert isinstance(reader, EliminationReader)
    confirm(writer, 0)
    assert read(reader) == read(EliminationReader(name))
    confirm(writer, 6)
    with pytest.raises(StaleError, match=r"redis://engine.* 6\.\d s old: more than 5 s"):
        read(reader)


def test_refusing_counts_every_hotkey_as_eliminated(name, writer):
    reader = EliminationReader(name, max_staleness=5, when_stale="refuse")
    confirm(writer, 0)
    assert not reader.is_hotkey_eliminated("b")
    assert reader.are_eliminated(["a", "b"]).tolist() == [True, False]
    confirm(writer, 6)
    assert reader.is_hotkey_eliminated("b")
    assert reader.are_eliminated(["a", "b"]).tolist() == [True, True]
    assert "b" in reader
    assert reader.status("b") == Status.ELIMINATED
    assert reader.statuses(["b"]) == [Status.ELIMINATED]
    assert reader.get_elimination("b") is None
    with pytest.raises(TypeError):
        reader.is_hotkey_eliminated(5)
    confirm(writer, 0)
    assert not reader.is_hotkey_eliminated("b")


def test_a_limit_is_pickled(name, writer):
    confirm(writer, 6)
    again = pickle.loads(pickle.dumps(EliminationReader(name, max_staleness=5, when_stale="raise")))
    with pytest.raises(StaleError):
        again.is_hotkey_eliminated("a")
    assert type(pickle.loads(pickle.dumps(EliminationReader(name)))) is EliminationReader


@pytest.mark.parametrize(
    ("limit", "then"), [(-1, "serve"), (math.nan, "raise"), (1, "ignore"), (None, "sometimes")]
)
def test_limits_that_cannot_be_are_refused(name, writer, limit, then):
    with pytest.raises(ValueError, match="stale"):
        EliminationReader(name, max_staleness=limit, when_stale=then)


@pytest.mark.parametrize("read", [*READS, lambda reader: reader.version, pickle.dumps])
def test_a_closed_reader_says_so(name, writer, read):
    with EliminationReader(name) as reader:
        assert reader.is_hotkey_eliminated("a")
    reader.close()
    with pytest.raises(ShmelimError, match="is closed"):
        read(reader)
    assert name in repr(reader)
