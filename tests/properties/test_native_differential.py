"""The compiled read path against its reference: two readers of one table, whatever happens to it, answer alike."""

from __future__ import annotations

import secrets
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import crashing
import msgspec
import numpy as np
import pytest
from both_paths import (
    HEAD,
    MASK,
    SECRET,
    Native,
    NativeTableReader,
    Reference,
    TableReader,
    colliding,
    native,
    outcome,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import copies_of

from shmelim.shm import HEADS, ITEMS, KEYS, VALUES, PrivateNamespace, SharedNamespace, TableWriter
from shmelim.shm import writer as writer_module
from shmelim.shm.adoption import check_copy
from shmelim.shm.fast_image import NativeImage
from shmelim.shm.image import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmelim.shm import Transaction

# One with which colliding keys of 48 bytes and more can be text.
SEED = (int.from_bytes(b"collide:", "little") - int.from_bytes(SECRET, "little")) & MASK
PREFIXES = (b"", b"c" * 32, b"d" * 40, b"e" * 128)
COLLIDING = [key for prefix in PREFIXES for key in colliding(prefix, 4, SEED)]
POOL = [
    b"a",
    b"\0",
    b"\0\0",
    "schlüssel-ß-😀".encode(),
    b"\xff" * 7,
    b"h" * 47,
    b"h" * 48,
    b"h" * 49,
    b"h" * 47 + b"\0",
    b"h" * 48 + b"i",
    b"h" * 48 + b"\0",
    b"z" * 254 + b"1",
    b"z" * 254 + b"2",
    *COLLIDING,
    *[b"%048d" % number for number in range(20)],
]
ABSENT = [
    b"",
    b"never there",
    b"n" * 48,
    b"n" * 49,
    b"n" * 256,
    COLLIDING[0] + b"\0",
    colliding(b"c" * 32, 5, SEED)[4],
]
TEXTS = ["", "a", "\0", "a\0", "schlüssel-ß-😀", "\ud800", "n" * 256, "ä" * 200, np.str_("a"), *"bcd"]


class Put(NamedTuple):
    """Put a key."""

    key: bytes
    flags: int
    size: int


class Remove(NamedTuple):
    """Remove a key."""

    key: bytes


class Commit(NamedTuple):
    """A transaction, and how it ends."""

    changes: list[Put | Remove]
    replace: bool
    end: str


changes = st.lists(
    st.one_of(
        st.builds(Put, st.sampled_from(POOL), st.integers(0, 255), st.integers(0, 900)),
        st.builds(Remove, st.sampled_from(POOL)),
    ),
    max_size=15,
)
ends = st.sampled_from(["block", "block", "publish", "stage", "abort"])
sequences = st.lists(st.builds(Commit, changes, st.sampled_from([False, False, False, True]), ends), max_size=10)


@pytest.fixture(autouse=True)
def _known_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module.secrets, "randbits", lambda _bits: SEED)


def record_of(key: bytes, size: int) -> bytes:
    """Return a head, and one msgpack value."""
    return (len(key) + size).to_bytes(HEAD, "little") + msgspec.msgpack.encode(key.hex() + "r" * size)


def carry_out(writer: TableWriter, commit: Commit) -> Iterator[None]:
    """Run a transaction; yield wherever somebody could look."""
    transaction = writer.transaction(replace=commit.replace)
    for change in commit.changes:
        if isinstance(change, Put):
            transaction.put(change.key, change.flags, record_of(change.key, change.size))
        else:
            transaction.remove(change.key)
    yield
    yield from end(writer, transaction, commit.end)


@settings(max_examples=60)
@given(sequence=sequences, removed=st.lists(st.sampled_from(POOL), max_size=10))
def test_both_images_are_written_alike(sequence: list[Commit], removed: list[bytes]) -> None:
    """Header, log and lookups, after every transaction; which of two neighbours comes first is left open."""
    writers = []
    for kind in (NativeImage, Image):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer_module, "Image", kind)
            writer = TableWriter(PrivateNamespace(), capacity=16, arena_size=8192, first_sequence=1 << 44)
            writers.append(writer)
            writer.load((key, number, record_of(key, number), None) for number, key in enumerate(POOL[:6]))
            for number, commit in enumerate(
                [*sequence, Commit(list(map(Remove, removed)), replace=False, end="block")]
            ):
                for _ in carry_out(writer, commit._replace(replace=commit.replace and number % 2 == 0)):
                    pass
            writer.settle()
            assert all(type(image) is kind for image in writer._images)
    native_copy, copy = (copies_of(writer)[writer.version & 1] for writer in writers)
    for image in copies_of(writers[0]):
        check_copy(image, "native")
    assert writers[0].version == writers[1].version
    assert native_copy.header[:5] == copy.header[:5]
    heads = [image.head[1:].tolist() for image in (native_copy, copy)]
    assert heads[0] == heads[1]
    assert native_copy.arena[: copy.used].tobytes() == copy.arena[: copy.used].tobytes()
    assert sorted(map(tuple, native_copy.rows.tolist())) == sorted(map(tuple, copy.rows.tolist()))


def end(writer: TableWriter, transaction: Transaction, how: str) -> Iterator[None]:
    if how == "block":
        with transaction:
            pass
        return
    if how != "abort":
        transaction.stage()
        yield
    if how == "publish":
        transaction.publish()
        yield
        writer.settle()
    else:
        transaction.abort()


class Pair:
    """Two readers of one table by bytes, and two by text."""

    def __init__(self, namespace: PrivateNamespace) -> None:
        self.fast, self.slow = NativeTableReader(namespace), TableReader(namespace)
        self.compiled, self.reference = Native(namespace), Reference(namespace)

    def check(self) -> None:
        self.check_bytes([*POOL, *ABSENT])
        texts = [key.decode() for key in POOL if b"\xff" not in key and key.isascii()] + TEXTS
        self.check_texts(texts)
        self.check_collected()

    def check_bytes(self, keys: list[bytes]) -> None:
        fast, slow = self.fast, self.slow
        assert [fast.flags(key) for key in keys] == [slow.flags(key) for key in keys]
        assert [fast.get(key) for key in keys] == [slow.get(key) for key in keys]
        assert [fast.read(key, bytes) for key in keys] == [slow.read(key, bytes) for key in keys]
        assert fast.flags_of(keys).tolist() == slow.flags_of(keys).tolist()
        assert fast.flags_of(tuple(keys)).tolist() == fast.flags_of(keys).tolist()
        assert fast.version == slow.version
        assert fast.snapshot(verify=True) == slow.snapshot(verify=True)
        assert [fast.count_flag(bit) for bit in range(8)] == [slow.count_flag(bit) for bit in range(8)]

    def check_texts(self, texts: list[str]) -> None:
        fast, slow = self.compiled, self.reference
        for name in ("first", "both", "named", "__contains__", "_flags", "_record"):
            one, other = getattr(fast, name), getattr(slow, name)
            assert [one(text) for text in texts] == [other(text) for text in texts]
            wrong = [outcome(one, value) for value in (None, 1, b"a", ["a"])]
            assert wrong == [outcome(other, value) for value in (None, 1, b"a", ["a"])]
        assert [fast._read(text, bytes) for text in texts] == [slow._read(text, bytes) for text in texts]
        array = np.array([text.encode("utf-8", "replace") for text in texts])
        for keys in (texts, tuple(texts), array):
            for mask in (0, 1, 6):
                answers = np.zeros(len(keys), np.uint8), np.zeros(len(keys), np.uint8)
                assert fast._fill(keys, answers[0], mask)
                assert slow._fill(keys, answers[1], mask)
                assert answers[0].tolist() == answers[1].tolist()

    def check_collected(self) -> None:
        entries = self.slow.snapshot().entries
        for mask in (0, 1, 6):
            wanted = {key: entry for key, entry in entries.items() if entry.flags & mask == mask}
            bodies = [entry.record[HEAD:] for entry in wanted.values()]
            version, keys = self.compiled._collect(mask, KEYS)
            assert version == self.slow.version
            # Keys need not be UTF-8: to look at them, they are made the raw bytes that they are.
            assert _raw(keys) == list(wanted)
            values = self.compiled._collect(mask, VALUES)[1]
            assert values[5:] == b"".join(bodies)
            assert values[:5] == b"\xdd" + len(wanted).to_bytes(4, "big")
            items = self.compiled._collect(mask, ITEMS)[1]
            assert len(items) == len(keys) + len(values) - 5
            heads = self.compiled._collect(mask, HEADS)[1]
            assert heads[0] == 0xDF
            assert all(b"\xc4\x04" + entry.record[:HEAD] in heads for entry in wanted.values())
            if all(_is_text(key) for key in wanted):
                decoded = msgspec.msgpack.decode(items)
                assert list(decoded) == [key.decode() for key in wanted]
                assert list(decoded.values()) == [msgspec.msgpack.decode(body) for body in bodies]
                assert list(msgspec.msgpack.decode(heads).values()) == [e.record[:HEAD] for e in wanted.values()]


def _is_text(key: bytes) -> bool:
    try:
        key.decode()
    except UnicodeDecodeError:
        return False
    return True


def _raw(array: bytes) -> list[bytes]:
    """Read a msgpack array of texts that need not be UTF-8."""
    found, at = [], 5
    while at < len(array):
        if array[at] == 0xD9:
            size, at = array[at + 1], at + 2
        else:
            size, at = array[at] & 0x1F, at + 1
        found.append(array[at : at + size])
        at += size
    assert len(found) == int.from_bytes(array[1:5], "big")
    return found


@settings(max_examples=60)
@given(sequence=sequences)
def test_both_paths_answer_alike(sequence: list[Commit]) -> None:
    compare(sequence)


@pytest.mark.long
@settings(max_examples=2000)
@given(sequence=sequences)
def test_both_paths_answer_alike_for_long(sequence: list[Commit]) -> None:
    compare(sequence)


def compare(sequence: list[Commit]) -> None:
    namespace = PrivateNamespace()
    writer = TableWriter(namespace, capacity=8, arena_size=4096)
    writer.load([])
    pair = Pair(namespace)
    for commit in sequence:
        for _ in carry_out(writer, commit):
            pair.check()
        pair.check()


def test_a_table_full_of_collisions() -> None:
    namespace = PrivateNamespace()
    writer = TableWriter(namespace, capacity=8, arena_size=4096)
    keys = [key for prefix in PREFIXES for key in colliding(prefix, 60, SEED)]
    writer.load((key, n % 256, record_of(key, n), None) for n, key in enumerate(keys))
    pair = Pair(namespace)
    for n in range(0, len(keys), 7):
        with writer.transaction() as transaction:
            transaction.remove(keys[n])
        pair.check_bytes(keys)
        pair.check_texts([key.decode() for key in keys if key.isascii()])
    assert sum(pair.fast.flags_of(keys).astype(bool)) == sum(n % 256 != 0 for n in range(len(keys)) if n % 7)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 5000])
def test_the_order_of_ordinals(size: int) -> None:
    """A radix sort with one digit, with several, and with gaps between them."""
    namespace = PrivateNamespace()
    writer = TableWriter(namespace)
    ordinals = [secrets.randbelow(1 << secrets.choice((4, 12, 20, 63))) for _ in range(size)]
    writer.load((b"%d" % n, 1, bytes(HEAD), ordinal) for n, ordinal in enumerate(ordinals))
    keys = msgspec.msgpack.decode(Native(namespace)._collect(1, KEYS)[1])
    assert [ordinals[int(key)] for key in keys] == sorted(ordinals)


def stamp_for_ever(name: str, keys: list[bytes], stop: crashing.Counter, ready: crashing.Counter) -> int:
    """Publish one state after another, in which all records are the same; now and then in a new segment."""
    writer = TableWriter(SharedNamespace(name), capacity=64, arena_size=1 << 16)
    writer.load((key, 1, record_of(b"", 1), None) for key in keys)
    ready.value = 1
    count = 0
    while not stop.value:
        count += 1
        stamp = 1 + count % 250
        with writer.transaction(replace=count % 50 == 0) as transaction:
            for key in keys:
                transaction.put(key, stamp | 1, record_of(b"", stamp))
    return count


def test_answers_of_one_version_while_another_process_mutates(table_name: str) -> None:
    stop, ready = crashing.Counter(), crashing.Counter()
    keys = [b"%048d" % number for number in range(200)]
    texts = [key.decode() for key in keys]
    with crashing.Child(lambda: stamp_for_ever(table_name, keys, stop, ready)) as writer:
        writer.until(lambda: ready.value)
        reader = Native(SharedNamespace(table_name))
        # Long enough to be overtaken now and then, short enough to come to an end.
        many = texts * 20
        answers = np.empty(len(many), np.uint8)
        collected = filled = 0
        until = time.monotonic() + 2
        while time.monotonic() < until:
            found = reader._collect(1, VALUES)
            if found is not None:
                values = msgspec.msgpack.decode(found[1])
                assert (len(values), len(set(values))) == (len(keys), 1)
                collected += 1
            for _ in range(10):
                if reader._fill(many, answers, 0):
                    assert len(set(answers.tolist())) == 1
                    filled += 1
            assert reader.first(texts[0])
            assert set(msgspec.msgpack.decode(reader._record(texts[0]))) == {"r"}
        stop.value = 1
        assert writer.result() > 0
    print(f"{collected} collected, {filled} filled, {reader._table.retries} overtaken")
    assert collected
    assert filled
    assert reader._table.retries > 0


def test_threads_that_attach_and_read_at_once() -> None:
    """Generations change under many threads that share one reader."""
    namespace = PrivateNamespace()
    writer = TableWriter(namespace)
    keys = [b"%048d" % number for number in range(50)]
    writer.load((key, 1, record_of(key, 1), None) for key in keys)
    reader, problems, rounds = Native(namespace), [], [0]
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                assert all(reader.first(key.decode()) for key in keys)
                assert len(reader._collect(1, VALUES)[1]) > 50
                rounds[0] += 1
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        writer._images = None
        writer.load((key, 1, record_of(key, 1), None) for key in keys)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert rounds[0] > 0
    assert reader._table.info().generation > 50


def known(value: Any) -> Any:
    return native.key_hash(value, SEED)


def test_the_collisions_collide_in_the_extension_too() -> None:
    assert [len({known(key) for key in COLLIDING[at : at + 4]}) for at in (0, 4, 8, 12)] == [1, 1, 1, 1]
    assert all(key.isascii() for key in COLLIDING[4:12])
