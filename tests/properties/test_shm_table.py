"""The table against a dict, over random sequences of everything a writer can do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from segments import copies_of

from shmelim.shm import (
    Entry,
    Namespace,
    PrivateNamespace,
    Record,
    SharedNamespace,
    TableReader,
    TableWriter,
    layout,
)
from shmelim.shm import writer as writer_module
from shmelim.shm.image import Image
from shmelim.shm.layout import EPOCH
from shmelim.shm.reader import TableReader as Reference

POOL = [
    b"a",
    b"b",
    b"\0",
    b"\0\0",
    "schlüssel-ß".encode(),
    b"\xff" * 7,
    b"h" * 47,
    b"h" * 48,
    b"h" * 49,
    b"h" * 48 + b"i",
    b"h" * 48 + b"\0",
    b"z" * 254 + b"1",
    b"z" * 254 + b"2",
    *[b"key-%d" % number for number in range(12)],
]
keys = st.one_of(st.sampled_from(POOL), st.binary(min_size=1, max_size=255))
records = st.one_of(st.binary(max_size=20), st.integers(0, 1500).map(lambda size: b"r" * size))
flags = st.integers(0, 255)


class Put(NamedTuple):
    """Put; ``place`` chooses among ordinals that no other entry has, None leaves it to the table."""

    key: bytes
    flags: int
    record: bytes
    place: int | None


class Remove(NamedTuple):
    """Remove."""

    key: bytes


class Commit(NamedTuple):
    """A transaction: ``end`` is publish, block (which also settles) or abort, before or after staging."""

    changes: list[Put | Remove]
    replace: bool
    end: str


class Successor(NamedTuple):
    """Another writer takes over, orderly or not."""

    orderly: bool


changes = st.lists(
    st.one_of(
        st.builds(Put, keys, flags, records, st.one_of(st.none(), st.none(), st.integers(0, 40))),
        st.builds(Remove, st.sampled_from(POOL)),
    ),
    max_size=12,
)
commits = st.builds(
    Commit,
    changes,
    st.sampled_from([False, False, False, True]),
    st.sampled_from(["block", "block", "publish", "publish", "abort", "abort staged"]),
)
steps = st.lists(st.one_of(commits, commits, commits, st.builds(Successor, st.booleans())), max_size=15)


class Model:
    """What the table must hold."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.next_ordinal = 0

    def copy(self, *, empty: bool) -> Model:
        model = Model()
        if not empty:
            model.entries = dict(self.entries)
            model.next_ordinal = self.next_ordinal
        return model

    def ordinal_at(self, key: bytes, place: int | None) -> int | None:
        """Return an ordinal that no other entry has."""
        if place is None:
            return None
        taken = {entry.ordinal for other, entry in self.entries.items() if other != key}
        while place in taken:
            place += 1
        return place

    def put(self, key: bytes, flags_: int, record: bytes, ordinal: int | None) -> None:
        if ordinal is None:
            known = self.entries.get(key)
            ordinal = self.next_ordinal if known is None else known.ordinal
        self.next_ordinal = max(self.next_ordinal, ordinal + 1)
        self.entries[key] = Entry(flags_, record, ordinal)

    def in_order(self) -> list[tuple[bytes, Entry]]:
        return sorted(self.entries.items(), key=lambda item: item[1].ordinal)


def carry_out(writer: TableWriter, model: Model, commit: Commit) -> Model:
    """Run one transaction on the table and return the model of what must be there afterwards."""
    after = model.copy(empty=commit.replace)
    transaction = writer.transaction(replace=commit.replace)
    for change in commit.changes:
        if isinstance(change, Remove):
            transaction.remove(change.key)
            after.entries.pop(change.key, None)
        else:
            ordinal = after.ordinal_at(change.key, change.place)
            if commit.replace and ordinal is None and change.key not in after.entries:
                # In a fresh table ordinals are dealt out at the end: name them here to keep the model simple.
                ordinal = after.ordinal_at(change.key, after.next_ordinal)
            transaction.put(change.key, change.flags, change.record, ordinal)
            after.put(change.key, change.flags, change.record, ordinal)
    if commit.replace:
        after.next_ordinal = max((entry.ordinal + 1 for entry in after.entries.values()), default=0)
    if commit.end == "block":
        with transaction:
            pass
        return after
    if commit.end != "abort":
        transaction.stage()
    if commit.end == "publish":
        transaction.publish()
        return after
    transaction.abort()
    return model


def check(reader: TableReader, model: Model) -> None:
    """Check every way of reading against the model."""
    assert list(reader.snapshot(verify=True).entries.items()) == model.in_order()
    wanted = [*POOL, *model.entries, b"never there"]
    expected = [model.entries[key].flags if key in model.entries else 0 for key in wanted]
    assert [reader.flags(key) for key in wanted] == expected
    assert reader.flags_of(wanted).tolist() == expected
    for key in wanted:
        entry = model.entries.get(key)
        if entry is None:
            assert reader.get(key) is None
            assert reader.read(key, bytes) is None
        else:
            assert reader.get(key) == Record(entry.flags, entry.ordinal, entry.record)
            assert reader.read(key, bytes) == entry.record
    info = reader.info()
    assert info.entries == len(model.entries)
    assert 2 * info.entries <= info.capacity
    assert info.arena_live <= info.arena_used <= info.arena_size
    held = [entry.flags for entry in model.entries.values()]
    assert info.flag_counts == tuple(sum(value >> bit & 1 for value in held) for bit in range(8))
    assert info.flag_counts == tuple(reader.count_flag(bit) for bit in range(8))


def check_copies(writer: TableWriter) -> None:
    """Check that both copies are the same once settled, but for the epoch and what lies beyond the log."""
    writer.settle()
    first, second = copies_of(writer)
    assert first.head[EPOCH + 1 :] == second.head[EPOCH + 1 :]
    assert (first.rows == second.rows).all()
    assert np.array_equal(first.arena[: first.used], second.arena[: second.used])


def run(namespace: Namespace, sequence: list[Commit | Successor], kind: type[TableReader] = TableReader) -> None:
    def serve() -> TableWriter:
        return TableWriter(namespace, capacity=8, arena_size=4096)

    writer, model = serve(), Model()
    writer.load([])
    reader = kind(namespace)
    try:
        for step in sequence:
            if isinstance(step, Successor):
                if not step.orderly:
                    writer.transaction().put(b"lost", 1)
                writer.close()
                writer = serve()
                check(reader, model)
                writer.load((key, *entry) for key, entry in model.entries.items())
                model.next_ordinal = max((entry.ordinal + 1 for entry in model.entries.values()), default=0)
            else:
                model = carry_out(writer, model, step)
            check(reader, model)
            if not isinstance(step, Commit) or step.end != "publish":
                check_copies(writer)
                check(reader, model)
    finally:
        writer.close()


@pytest.fixture(params=["strong", "colliding", "one"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[TableReader]:
    """Weaken the hash, and return who reads: the compiled path has a hash of its own, which stays as it is."""
    strong = layout.key_hash
    if request.param != "strong":
        monkeypatch.setattr(writer_module, "Image", Image)
    if request.param == "colliding":
        monkeypatch.setattr(layout, "key_hash", lambda key, seed: strong(key, seed) & 3 | 1 << 63)
    elif request.param == "one":
        monkeypatch.setattr(layout, "key_hash", lambda key, seed: 7)
    return TableReader if request.param == "strong" else Reference


def examples(number: int) -> settings:
    return settings(max_examples=number, suppress_health_check=[HealthCheck.function_scoped_fixture])


@examples(100)
@given(sequence=steps)
def test_like_a_dict(kind: type[TableReader], sequence: list[Commit | Successor]) -> None:
    run(PrivateNamespace(), sequence, kind)


@pytest.mark.long
@examples(3000)
@given(sequence=steps)
def test_like_a_dict_for_long(kind: type[TableReader], sequence: list[Commit | Successor]) -> None:
    run(PrivateNamespace(), sequence, kind)


@examples(40)
@given(sequence=steps)
@pytest.mark.usefixtures("image")
def test_like_a_dict_whoever_writes(sequence: list[Commit | Successor]) -> None:
    run(PrivateNamespace(), sequence)


@examples(40)
@given(sequence=steps)
def test_like_a_dict_in_shared_memory(table_name: str, sequence: list[Commit | Successor]) -> None:
    namespace = SharedNamespace(table_name)
    run(namespace, sequence)
    assert len(namespace.generations()) == 1


@pytest.mark.usefixtures("image")
@examples(30)
@given(
    entries=st.dictionaries(keys, st.tuples(flags, records), max_size=200),
    absent=st.lists(keys, max_size=50),
)
def test_load_of_many(entries: dict[bytes, tuple[int, bytes]], absent: list[bytes]) -> None:
    namespace = PrivateNamespace()
    writer = TableWriter(namespace, capacity=8, arena_size=4096)
    writer.load((key, *value, None) for key, value in entries.items())
    reader = TableReader(namespace)
    model = Model()
    for key, value in entries.items():
        model.put(key, *value, None)
    check(reader, model)
    check_copies(writer)
    wanted = [*absent, *entries, *absent]
    assert reader.flags_of(wanted).tolist() == [entries.get(key, (0,))[0] for key in wanted]
