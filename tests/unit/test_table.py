"""The table for other state, through its public names: what it holds, refuses, keeps, and leaves behind."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import pickle
import re
import threading
from pathlib import Path

import crashing
import msgspec
import pytest
from segments import published_segments_of, segments_of
from waiting import until

import shmelim.table
from shmelim import EliminationReader
from shmelim.errors import (
    AlreadyServingError,
    CorruptSegmentError,
    NotServingError,
    SegmentFormatError,
    ShmelimError,
)
from shmelim.shm import SharedNamespace, TableWriter
from shmelim.table import Reader, Snapshot, Writer

ROOT = Path(__file__).parents[2]


class Price(msgspec.Struct):
    pair: str
    price: float


@pytest.fixture
def table(table_name):
    with Writer(table_name) as writer:
        yield writer


# ---------------------------------------------------------------------- values


def test_values_come_back_as_they_were_put_in_the_order_their_keys_came(table):
    reader = Reader(table.name)
    values = {
        "a": 1,
        "ü" * 100: [1.5, None, "text"],
        "none": None,
        "false": False,
        "bytes": b"\0",
        "map": {"a": {}},
    }
    for key, value in values.items():
        assert table.put(key, value) == reader.version == table.version
    table.put("a", 2)
    assert list(reader.items()) == list((values | {"a": 2}).items())
    assert list(reader) == list(values)
    assert next(iter(reader.values())) == 2
    assert len(reader) == len(values)
    assert all(key in reader for key in values)
    assert (reader.get("a"), reader.get("b"), reader.get("b", 7), reader.get("none", 7)) == (2, None, 7, None)
    with pytest.raises(KeyError, match="'b'"):
        reader["b"]
    table.remove("a")
    table.remove("a")
    assert "a" not in reader
    assert table.replace_all([("x", 1), ("y", 2), ("x", 3)]) == reader.version
    assert dict(reader) == {"x": 3, "y": 2}


def test_a_value_is_the_callers_own(table):
    reader = Reader(table.name)
    table.put("a", [1])
    snapshot = reader.snapshot()
    reader["a"].append(2)
    snapshot["a"].append(2)
    assert reader["a"] == snapshot["a"] == [1]


@pytest.mark.parametrize("keys", [str, bytes])
def test_raw_bytes_and_keys_of_either_type(table_name, keys):
    def key(text):
        return text if keys is str else text.encode() + b"\xff"

    with Writer(table_name, keys=keys, encode=bytes) as writer:
        writer.put(key("a"), b"")
        writer.put(key("b"), bytearray(b"B"))
        writer.put(key("c"), b"C")
        writer.remove(key("c"))
        with pytest.raises(TypeError, match="must be encoded as bytes, not int"):
            writer.put(key("a"), 5)
        reader = Reader(table_name, keys=keys, decode=bytes)
        assert dict(reader) == dict(writer.reader()) == dict(reader.snapshot()) == {key("a"): b"", key("b"): b"B"}
        assert reader[key("a")] == b""
        assert key("c") not in reader
        assert reader.many([key("b"), key("c")]) == [b"B", None]
        assert reader.contains_many([key("b"), key("c")]).tolist() == [True, False]
        assert reader.read(key("b"), bytes) == b"B"
        assert reader.read(key("c"), bytes) is None


def test_values_of_a_type_of_ones_own(table_name):
    with Writer(table_name) as writer:
        writer.put("a", Price("BTC/USD", 1.5))
        reader = Reader(table_name, decode=msgspec.msgpack.Decoder(Price).decode)
        assert reader["a"] == reader.snapshot()["a"] == Price("BTC/USD", 1.5)
        writer.put("a", "not one")
        with pytest.raises(msgspec.ValidationError, match="Expected `object`"):
            reader["a"]
    with Writer(table_name, encode=pickle.dumps) as writer:
        writer.put("a", {1, 2})
        assert Reader(table_name, decode=pickle.loads)["a"] == writer.reader(pickle.loads)["a"] == {1, 2}


@pytest.mark.parametrize("key", [None, 7, b"a", ("a",)])
def test_a_key_of_another_type_is_refused_by_name(table, key):
    reader = Reader(table.name)
    with pytest.raises(TypeError, match=r"keys of the table .* must be str, not"):
        table.put(key, 1)
    with pytest.raises(TypeError, match="must be str"), table.transaction() as transaction:
        transaction.remove(key)
    if key is not None:  # which is in no table, as it is in no dict of texts
        for ask in (
            reader.get,
            reader.__contains__,
            lambda key: reader.many([key]),
            lambda key: reader.numbers([key]),
        ):
            with pytest.raises(TypeError, match="a key must be text"):
                ask(key)


def test_a_text_is_not_a_key_of_bytes():
    writer = Writer(None, keys=bytes)
    with pytest.raises(TypeError, match="must be bytes, not 'a'"):
        writer.put("a", 1)
    for ask in (writer.reader().get, writer.reader().__contains__):
        with pytest.raises(TypeError, match="key must be bytes, not str"):
            ask("a")


@pytest.mark.parametrize("key", ["", "a" * 256, "ü" * 128])
def test_a_key_has_1_to_255_bytes(table, key):
    with pytest.raises(ValueError, match="must be 1 to 255 bytes long"):
        table.put(key, 1)
    assert key not in Reader(table.name)


def test_what_cannot_be_encoded_leaves_all_as_it_was(table):
    version = table.version
    with pytest.raises(TypeError, match="unsupported"):
        table.put("a", object())
    with pytest.raises(UnicodeEncodeError):
        table.put("\ud800", 1)
    with pytest.raises(TypeError):
        table.replace_all({"a": 1, "b": object()})
    assert table.version == version


def test_a_table_grows_is_compacted_and_shrinks_under_its_reader(table_name):
    with Writer(table_name, capacity=4) as writer:
        reader = Reader(table_name)
        for number in range(3000):
            writer.put(f"key {number}", number)
        grown = reader.usage
        assert (grown.entries, len(reader), reader["key 2999"]) == (3000, 3000, 2999)
        assert grown.capacity >= 6000
        for number in range(3000):
            writer.put("key 1", [number] * 100)  # more than the arena has, again and again
        assert reader.usage.arena_size == grown.arena_size
        writer.replace_all({"one": 1})
        assert reader.usage.capacity < grown.capacity
        assert dict(reader) == {"one": 1}
    assert len(published_segments_of(table_name)) == 2


# ---------------------------------------------------------------------- transactions


def test_readers_see_a_transaction_whole_or_not_at_all(table):
    reader = Reader(table.name)
    with table.transaction() as transaction:
        transaction.put("a", 1)
        transaction.put("b", 2)
        transaction.remove("a")
        transaction.put("c", 3)
        table.put("meanwhile", 0)
        assert dict(reader) == {"meanwhile": 0}
    assert transaction.version == table.version
    assert dict(reader) == {"meanwhile": 0, "b": 2, "c": 3}


def test_nothing_of_a_failed_block_is_published(table):
    reader = Reader(table.name)
    version = reader.version
    with pytest.raises(ZeroDivisionError), table.transaction() as transaction:  # noqa: PT012  # the whole block fails
        transaction.put("a", 1)
        _ = 1 / 0
    assert (reader.version, len(reader)) == (version, 0)
    for use in (lambda: transaction.put("a", 1), lambda: transaction.remove("a"), transaction.__enter__):
        with pytest.raises(ShmelimError, match="this transaction has ended"):
            use()
    with table.transaction() as transaction, contextlib.suppress(TypeError):
        transaction.put("b", 2)
        transaction.put("c", object())
    assert dict(reader) == {"b": 2}


def test_threads_may_share_a_writer(table):
    reader = Reader(table.name)

    def work(which):
        for number in range(200):
            with table.transaction() as transaction:
                transaction.put(f"{which} left", number)
                transaction.put(f"{which} right", number)
            left, right = reader.many([f"{which} left", f"{which} right"])
            assert left == right == number

    failures = []
    threads = [threading.Thread(target=lambda which=which: _noting(failures, work, which)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(reader) == 8


def _noting(failures, work, which):
    try:
        work(which)
    except BaseException as error:
        failures.append(error)


def test_a_publish_that_interrupts_another_is_an_error_and_does_not_hang(table, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(table._table, "apply", lambda *_, **__: table.put("b", 2))  # as a signal handler would
        with pytest.raises(ShmelimError, match="was interrupted by this one"):
            table.put("a", 1)
    table.put("a", 1)
    assert dict(Reader(table.name)) == {"a": 1}


# ---------------------------------------------------------------------- many, snapshots, changes


def test_batches(table):
    table.replace_all({"one": 1, "half": 0.5, "nan": math.nan, "text": "1.5", "true": True})
    reader = Reader(table.name)
    assert reader.many(["half", "gone", "text"], "none") == [0.5, "none", "1.5"]
    numbers = reader.numbers(iter(["one", "half", "nan", "gone"]))
    assert numbers.dtype == "float64"
    assert numbers.tolist()[:2] == [1.0, 0.5]
    assert all(map(math.isnan, numbers[2:]))
    with pytest.raises(TypeError, match=r"the value of 'text' .* is not a number: '1.5'"):
        reader.numbers(["one", "text"])
    assert reader.numbers([]).shape == (0,)
    assert reader.contains_many(("one", "gone", "\ud800")).tolist() == [True, False, False]
    for ask in (reader.many, reader.numbers, reader.contains_many):
        with pytest.raises(TypeError, match="keys must be a list of keys, not one str"):
            ask("one")


def test_many_values_are_of_one_version_however_fast_publishes_come(table, monkeypatch):
    reader = Reader(table.name)
    record, numbers = reader._record, iter(range(1, 1000))

    def overtaken(key):
        table.replace_all(dict.fromkeys("ab", next(numbers)))
        return record(key)

    monkeypatch.setattr(reader, "_record", overtaken)
    left, right, gone = reader.many(["a", "b", "c"])
    assert left == right > 16
    assert gone is None


def test_a_read_whose_table_is_gone_says_so(table_name):
    with Writer(table_name) as writer:
        writer.put("a", 1)
        reader = Reader(table_name)
        root = Path(f"/dev/shm/shmelim-table.{table_name}")
        root.unlink()
        until(root.exists, "the name")
        writer.close(unlink=True)
    with pytest.raises(NotServingError, match=f"no table '{table_name}'") as caught:
        _ = reader["a"]
    assert "writer" in caught.value.hint
    assert "serve" not in str(caught.value)


def test_a_decoder_of_ones_own_is_given_bytes_wherever_values_come_from(table):
    table.replace_all({"a": 1, "b": "two"})
    reader = Reader(table.name, decode=lambda data: (type(data), bytes.hex(data)))
    one_by_one = {key: reader[key] for key in "ab"}
    assert {kind for kind, _ in one_by_one.values()} == {bytes}
    assert dict(reader.items()) == dict(reader.snapshot()) == one_by_one
    assert list(reader.values()) == list(one_by_one.values()) == reader.many(["a", "b"])


def test_a_snapshot_that_publishes_overtook_differs_in_nothing_that_is_the_same(table, monkeypatch):
    table.replace_all({"a": 1, "b": "two"})
    reader = Reader(table.name)
    quick = reader.snapshot()
    monkeypatch.setattr(type(reader._keys), "collect", lambda _: None)
    overtaken = reader.snapshot()
    assert overtaken.differences(quick)[1:] == quick.differences(overtaken)[1:] == ({}, [])


def test_a_snapshot_stays_and_changes_are_told_from_it(table):
    reader = Reader(table.name)
    table.replace_all({"same": 1, "other": 1, "gone": 1, "again": 1})
    before = reader.snapshot()
    assert reader.changes(before) == (before, {}, [])
    with table.transaction() as transaction:
        transaction.put("other", 2)
        transaction.put("same", 1)
        transaction.remove("gone")
        transaction.remove("again")
        transaction.put("again", 1)
        transaction.put("new", [])
    after, put, removed = reader.changes(before)
    assert (put, removed) == ({"other": 2, "new": []}, ["gone"])
    assert (after.version, after) == (table.version, reader.snapshot())
    assert reader.changes(after) == (after, {}, [])
    assert dict(before) == {"same": 1, "other": 1, "gone": 1, "again": 1}
    assert isinstance(before, Snapshot)
    with pytest.raises(TypeError, match="a table keeps no history"):
        reader.changes(before.version)


def test_a_reader_waits_for_a_change(table):
    reader = Reader(table.name)
    assert not reader.wait_for_change(0)
    seen = reader.version
    table.put("a", 1)
    assert reader.wait_for_change(since=seen)
    thread = threading.Timer(0.01, table.put, ("a", 2))
    thread.start()
    assert reader.wait_for_change(60)
    assert reader["a"] == 2
    thread.join()


# ---------------------------------------------------------------------- writers


def test_the_values_outlive_their_writer_and_readers_see_that_it_ended(table_name):
    writer = Writer(table_name)
    writer.put("a", 1)
    reader = Reader(table_name)
    assert reader.writer.alive
    assert reader.writer.pid == os.getpid()
    assert 0 <= reader.writer.heartbeat_age < 60
    writer.close()
    writer.close()
    assert reader.writer.alive is False
    assert reader["a"] == Reader(table_name)["a"] == 1
    with pytest.raises(ShmelimError, match="closed"):
        writer.put("a", 2)


@pytest.mark.parametrize("keep", [False, True])
def test_a_successor_starts_empty_or_with_what_is_there_and_readers_stay(table_name, keep):
    with Writer(table_name) as writer:
        writer.replace_all({"a": 1, "b": 2})
        reader = Reader(table_name)
    with Writer(table_name, keep=keep) as writer:
        assert dict(reader) == ({"a": 1, "b": 2} if keep else {})
        version = reader.version
        assert writer.put("c", 3) == reader.version > version
        assert list(reader) == (["a", "b", "c"] if keep else ["c"])


def test_keeping_what_is_not_there_is_starting_empty(table_name):
    with Writer(table_name, keep=True):
        assert len(Reader(table_name)) == 0


def test_what_is_of_another_kind_or_damaged_is_not_kept(table_name):
    with Writer(table_name) as writer:
        writer.put("a", 1)
        reader = Reader(table_name)
    for options in ({"keys": bytes}, {"encode": bytes}, {"encode": pickle.dumps}):
        with pytest.raises(SegmentFormatError, match=r"it is a 'table:text:msgpk', this would be"):
            Writer(table_name, keep=True, **options)
    assert dict(reader) == dict(Reader(table_name)) == {"a": 1}
    path = Path("/dev/shm") / published_segments_of(table_name)[1]
    raw = bytearray(path.read_bytes())
    for at in range(4096, len(raw), 8):
        if raw[at : at + 8].strip(b"\0"):
            raw[at] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(CorruptSegmentError, match="damaged"):
        Writer(table_name, keep=True)
    with Writer(table_name) as writer:
        writer.put("b", 1)
        assert dict(Reader(table_name)) == {"b": 1}


def test_a_successor_of_another_kind_takes_readers_to_an_error_that_says_so(table_name):
    with Writer(table_name) as writer:
        writer.put("a", 1)
        reader = Reader(table_name)
    with Writer(table_name, encode=bytes) as writer:
        writer.put("a", b"\xc1")  # nothing in msgpack
        with pytest.raises(SegmentFormatError, match="not the msgpack that a writer makes"):
            reader.get("a")
        with pytest.raises(SegmentFormatError, match="not the msgpack"):
            reader.snapshot()


@pytest.mark.parametrize(("keys", "other"), [(str, bytes), (bytes, str)])
def test_a_successor_with_other_keys_is_an_error_to_lookups_and_not_a_table_without_theirs(
    table_name, keys, other
):
    with Writer(table_name, keys=keys) as writer:
        reader = Reader(table_name, keys=keys)
        key = "a" if keys is str else b"a"
        writer.put(key, 1)
        assert reader[key] == 1
    with Writer(table_name, keys=other):
        reads = [reader.get, reader.__getitem__, reader.__contains__, lambda key: reader.many([key])]
        for read in [*reads, lambda key: reader.read(key, bytes), lambda _: len(reader), lambda _: list(reader)]:
            with pytest.raises(SegmentFormatError, match=rf"are not {keys.__name__} .attach with keys"):
                read(key)
    with Writer(table_name, keys=keys) as writer:
        writer.put(key, 2)
        assert reader[key] == 2


def test_there_is_one_writer(table):
    with pytest.raises(AlreadyServingError, match=rf"{table.name}' has a writer already, process {os.getpid()}"):
        Writer(table.name)

    def elsewhere():
        with pytest.raises(AlreadyServingError, match="has a writer already"):
            Writer(table.name, keep=True)

    crashing.call(elsewhere)
    table.put("a", 1)


def test_a_dropped_writer_is_a_closed_one(table_name):
    Writer(table_name).put("a", 1)
    gc.collect()
    with Writer(table_name, keep=True):
        assert Reader(table_name)["a"] == 1


def test_a_forked_child_reads_and_does_not_write(table):
    table.put("a", 1)
    reader = Reader(table.name)

    def child():
        with pytest.raises(ShmelimError, match="belongs to the process that forked"):
            table.put("a", 2)
        table.close()
        return reader["a"]

    taken, forked = threading.Event(), threading.Event()

    def changes():
        taken.set()
        forked.wait()
        return iter([])

    class Changes(list):
        def __iter__(self):
            return changes()

    thread = threading.Thread(target=table._publish, args=(Changes(),))
    thread.start()
    taken.wait()
    with crashing.Child(child) as forked_child:
        forked.set()
        assert forked_child.result() == 1
    thread.join()
    table.put("a", 2)
    assert reader["a"] == 2
    assert reader.writer.alive


def test_names_that_vanish_are_made_again_and_readers_follow(table, caplog):
    caplog.set_level(logging.ERROR)
    table.put("a", 1)
    reader = Reader(table.name)
    for name in published_segments_of(table.name):
        (Path("/dev/shm") / name).unlink()
    until(lambda: len(published_segments_of(table.name)) == 2)
    table.put("a", 2)
    assert until(lambda: reader["a"] == 2)
    assert Reader(table.name)["a"] == 2
    assert caplog.records == []


def test_closing_can_take_the_table_away(table_name):
    writer = Writer(table_name)
    writer.put("a", 1)
    reader = Reader(table_name)
    writer.close(unlink=True)
    assert published_segments_of(table_name) == []
    assert not list(Path("/dev/shm").glob(f"shmelim-table.{table_name}*"))
    assert reader["a"] == 1


def test_an_empty_table_whose_seed_is_damaged_is_not_gone_on_with(table_name):
    Writer(table_name).close()
    reader = Reader(table_name)
    segment = reader._table._namespace.open_data(1, writable=True)
    segment.words[32 // 8] ^= 1
    with pytest.raises(CorruptSegmentError, match=r"is damaged: the header .*start with keep=False"):
        Writer(table_name, keep=True)
    segment.words[80 // 8] = 0  # as older writers left it
    with Writer(table_name, keep=True) as writer:
        writer.put("a", 1)
        assert (reader.get("a"), Reader(table_name).get("a")) == (1, 1)


def test_a_version_does_not_go_back_where_the_table_was_taken_away(table_name):
    with Writer(table_name) as writer:
        for number in range(5_000):
            last = writer.put("a", number)
        writer.close(unlink=True)
    with Writer(table_name) as writer:
        assert writer.put("a", 0) > last


def test_a_writer_takes_away_no_names_but_its_own(table_name):
    first = Writer(table_name)
    for path in Path("/dev/shm").glob(f"shmelim-table.{table_name}*"):
        path.unlink()
    with Writer(table_name) as second:
        second.put("a", 1)
        first.close(unlink=True)
        crashing.call(lambda: second.close(unlink=True))
        assert Reader(table_name)["a"] == 1
        second.close(unlink=True)
    assert published_segments_of(table_name) == []


# ---------------------------------------------------------------------- readers


def test_a_reader_without_a_table_is_told_so(table_name):
    with pytest.raises(NotServingError, match=f"there is no table '{table_name}'.*start its writer"):
        Reader(table_name)
    with pytest.raises(ValueError, match="must be 1 to 16"):
        Reader("No Name")
    with pytest.raises(TypeError, match="keys must be str or bytes"):
        Reader(table_name, keys=int)
    with pytest.raises(TypeError, match="keys must be str or bytes"):
        Writer(table_name, keys="str")


def test_a_reader_waits_for_its_table(table_name):
    made = []
    thread = threading.Timer(0.05, lambda: made.append(Writer(table_name)))
    thread.start()
    assert len(Reader(table_name, wait=60)) == 0
    thread.join()
    made[0].close()


def test_a_table_and_an_elimination_server_of_one_name_are_two_things(table_name):
    with Writer(table_name) as writer:
        writer.put("a", 1)
        with pytest.raises(
            NotServingError, match=rf"there is a table of that name: shmelim.table.Reader\('{table_name}'"
        ):
            EliminationReader(table_name)
        with TableWriter(SharedNamespace(table_name)) as server:
            server.load([(b"a", 1, b"", None)])
            assert "a" in EliminationReader(table_name)
            assert Reader(table_name)["a"] == 1
            writer.close(unlink=True)
            assert len(segments_of(table_name)) == 2
            with pytest.raises(
                NotServingError, match=rf"elimination server .* EliminationReader\('{table_name}'\)"
            ):
                Reader(table_name)


def test_a_reader_says_what_its_table_wants(table_name):
    with Writer(table_name, keys=bytes):
        with pytest.raises(SegmentFormatError, match=r"are not str .attach with keys=bytes"):
            Reader(table_name)
        assert len(Reader(table_name, keys=bytes)) == 0
    with Writer(table_name):
        with pytest.raises(SegmentFormatError, match=r"are not bytes .attach with keys=str"):
            Reader(table_name, keys=bytes)
        assert len(Reader(table_name, decode=bytes)) == 0
    for encode in (bytes, pickle.dumps):
        with Writer(table_name, encode=encode), pytest.raises(SegmentFormatError, match="attach with the decode="):
            Reader(table_name)


def test_a_reader_is_pickled_as_its_name(table):
    table.put("a", [1])
    again = pickle.loads(pickle.dumps(Reader(table.name)))
    assert again["a"] == [1]
    assert pickle.loads(pickle.dumps(Reader(table.name, decode=bytes)))["a"] == b"\x91\x01"
    with pytest.raises(TypeError, match="private memory cannot be pickled"):
        pickle.dumps(Writer(None).reader())


def test_a_closed_reader_says_so(table):
    with Reader(table.name) as reader:
        table.put("a", 1)
    reader.close()
    for ask in (
        lambda: reader["a"],
        lambda: reader.get("a"),
        lambda: "a" in reader,
        lambda: len(reader),
        lambda: list(reader),
        lambda: reader.version,
        lambda: reader.numbers(["a"]),
        lambda: reader.writer,
    ):
        with pytest.raises(ShmelimError, match=f"this reader of '{table.name}' is closed"):
            ask()


def test_the_face_has_its_names_and_no_others():
    assert {getattr(shmelim.table, name).__name__ for name in shmelim.table.__all__} == set(shmelim.table.__all__)
    assert set(shmelim.table.__all__) <= set(dir(shmelim.table))
    with pytest.raises(AttributeError, match=r"'shmelim\.table' has no attribute 'Raeder'"):
        shmelim.table.Raeder  # noqa: B018


def test_python_in_the_document_runs(new_name):
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "table.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 4
    names, prices, quotes = {}, new_name(), new_name()
    for block in blocks:
        code = block.replace('"prices"', repr(prices)).replace('"quotes"', repr(quotes)).replace("=1.0", "=0")
        exec(code, names)
        names.setdefault("writer", names["prices"])
    assert dict(names["prices"]) == {"BTC/USD": 97_250.5, "ETH/USD": 3_400.0}
    names["writer"].close()
