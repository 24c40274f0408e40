"""What a read does with hostile keys and decodes, and that it ends: alike on both paths and in either memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crashing
import numpy as np
import pytest
from both_paths import Native, NativeTableReader, Reference, outcome

from shmelim import EliminationReader
from shmelim.eliminations.rows import PREFIX
from shmelim.errors import CorruptSegmentError, SegmentError
from shmelim.shm import Namespace, PrivateNamespace, TableWriter, reader
from shmelim.shm.reader import TableReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOTKEY = "5" + "h" * 47
PATHS = pytest.mark.parametrize("path", [Native, Reference])
# Not a text, nor None; of a tuple, C's calls make arguments.
OTHERS = (b"a", bytearray(b"a"), 5, 1.5, (), ("a",), ("a", "b"), ["a"], {"a"}, object(), str)


class NoEndError(BaseException):
    """A read went on and on; no Exception, which a read that is overtaken drops."""


@pytest.fixture
def writer(namespace: Namespace) -> Iterator[TableWriter]:
    with TableWriter(namespace, capacity=16, arena_size=1 << 14) as made:
        made.load([(b"a", 7, b"head" + b"0" * 100, None), (HOTKEY.encode(), 1, b"headbody", None)])
        yield made


def stamp(writer: TableWriter, number: int) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"a", 7, b"head" + b"%d" % (number % 10) * 100)


def grow(writer: TableWriter, number: int) -> None:
    """Publish the next generation."""
    writer._images = None
    writer.load([(b"a", 7, b"head" + b"%d" % (number % 10) * 100, None)])


def compact(writer: TableWriter, number: int) -> None:
    """Publish so much that the arena is written over."""
    for _ in range(300):
        stamp(writer, number)


# ---------------------------------------------------------------------- an end


@PATHS
@pytest.mark.parametrize("publish", [stamp, grow, compact])
def test_a_decode_that_publishes_ends(
    path: Any, publish: Callable[[TableWriter, int], None], writer: TableWriter, namespace: Namespace
) -> None:
    lookups = path(namespace)
    calls = 0

    def decode(window: memoryview) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise NoEndError
        found = bytes(window)
        publish(writer, calls)
        return found if calls < 4 else bytes(window)  # the last window is a copy: it stays as it was

    for read, key, head in ((lookups._read, "a", b""), (lookups._table.read, b"a", b"head")):
        calls = 0
        found = read(key, decode)
        assert found == head + found[-1:] * 100
        assert calls == 4


@PATHS
def test_what_a_decode_of_a_copy_raises_counts(path: Any, writer: TableWriter, namespace: Namespace) -> None:
    calls = 0

    def decode(_window: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise NoEndError
        stamp(writer, calls)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        path(namespace)._read("a", decode)
    assert calls == 4


@PATHS
def test_a_decode_may_remove_what_it_decodes(path: Any, writer: TableWriter, namespace: Namespace) -> None:
    calls = 0

    def decode(window: memoryview) -> int:
        nonlocal calls
        calls += 1
        with writer.transaction() as transaction:
            transaction.remove(b"a")
        return len(window)

    assert path(namespace)._read("a", decode) is None
    assert calls == 1


@pytest.mark.parametrize("path", [NativeTableReader, TableReader])
def test_a_snapshot_of_what_is_written_anew_without_a_pause_says_so(
    path: Any, writer: TableWriter, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtaken = path(namespace)
    consistently = path._consistently

    def then_compact(self: TableReader, look: Any, *attempts: int) -> Any:
        found = consistently(self, look, *attempts)
        compact(writer, 1)
        return found

    monkeypatch.setattr(reader, "_SNAPSHOT_ATTEMPTS", 5)
    monkeypatch.setattr(path, "_consistently", then_compact)
    with pytest.raises(SegmentError, match="written anew 5 times"):
        overtaken.snapshot()
    assert overtaken.retries == 5


def test_a_copy_that_is_compacted_meanwhile_is_made_again(writer: TableWriter, namespace: Namespace) -> None:
    """In the reference, whose steps can be told apart."""
    overtaken = TableReader(namespace)
    consistently = overtaken._consistently
    left = 3

    def then_compact(look: Any, *attempts: int) -> Any:
        nonlocal left
        found = consistently(look, *attempts)
        if left:
            left -= 1
            compact(writer, left)
        return found

    overtaken._consistently = then_compact
    assert overtaken._copied(b"a") == b"head" + b"0" * 100
    assert overtaken.retries == 3


# ---------------------------------------------------------------------- decodes


@PATHS
def test_a_decode_gets_a_window_that_it_cannot_write_to(
    path: Any, writer: TableWriter, namespace: Namespace
) -> None:
    lookups = path(namespace)
    calls = 0

    def read_only(window: memoryview) -> bool:
        nonlocal calls
        calls += 1
        if calls < 4:
            stamp(writer, 0)
        with pytest.raises(TypeError, match="read-only"):
            window[0] = 0
        return window.readonly

    assert lookups._read("a", read_only)
    assert calls == 4
    assert lookups._table.read(b"a", read_only)


@PATHS
def test_a_decode_may_read_and_release_its_window(path: Any, writer: TableWriter, namespace: Namespace) -> None:
    lookups = path(namespace)

    def decode(window: memoryview) -> tuple[Any, ...]:
        inner = lookups._read(HOTKEY, bytes), lookups.first("a"), lookups._record("a")
        window.release()
        return inner

    assert lookups._read("a", decode) == (b"body", True, b"0" * 100)


@PATHS
def test_a_decode_that_reads_without_end_is_a_recursion_error(
    path: Any, writer: TableWriter, namespace: Namespace
) -> None:
    lookups = path(namespace)

    def decode(_window: memoryview) -> Any:
        return lookups._read("a", decode)

    with pytest.raises(RecursionError):
        lookups._read("a", decode)
    assert lookups._read("a", bytes) == b"0" * 100


# ---------------------------------------------------------------------- keys


class Hostile(str):
    """A text whose methods lie, and do harm."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise NoEndError

    def __hash__(self) -> int:
        raise NoEndError

    def encode(self, *_: Any, **__: Any) -> bytes:
        raise NoEndError


class Encoding:
    """Not a text."""

    def encode(self) -> bytes:
        return b"a"


@PATHS
def test_texts_of_a_subclass_are_the_texts_that_they_are(
    path: Any, writer: TableWriter, namespace: Namespace
) -> None:
    lookups = path(namespace)
    for text, flags in ((Hostile("a"), 7), (Hostile(HOTKEY), 1), (Hostile("b"), 0), (Hostile("\ud800"), 0)):
        assert lookups._flags(text) == flags
        assert lookups.first(text) is (text in lookups) is bool(flags)
        assert (lookups._record(text) is None) is (flags == 0)
        answers = np.zeros(1, np.uint8)
        assert lookups._fill([text], answers, 0)
        assert answers[0] == flags
    with pytest.raises(TypeError, match="must be text, not Encoding"):
        lookups._flags(Encoding())


@PATHS
def test_the_name_of_an_argument_may_be_hostile(path: Any, writer: TableWriter, namespace: Namespace) -> None:
    lookups = path(namespace)
    with pytest.raises((TypeError, NoEndError)):
        lookups.first(**{Hostile("key"): "a"})
    assert lookups.first(hotkey="a")


@PATHS
def test_a_text_without_utf_8_is_in_no_table(path: Any, writer: TableWriter, namespace: Namespace) -> None:
    surrogate = b"\xed\xa0\x80"  # of a decoder that lets surrogates pass
    with writer.transaction() as transaction:
        transaction.put(surrogate, 7, b"headbody")
    lookups = path(namespace)
    for text in ("\ud800", "\ud800" * 300, "😀\udfff", "é" * 256, "é" * 128, "", None):
        assert lookups._flags(text) == 0
        assert text not in lookups
        assert lookups._record(text) is lookups._read(text, bytes) is None


@PATHS
def test_what_is_not_text_is_refused_by_the_name_of_its_type(
    path: Any, writer: TableWriter, namespace: Namespace
) -> None:
    lookups = path(namespace)
    for other in OTHERS:
        message = f"must be text, not {type(other).__name__}"
        for use in (
            lookups._flags,
            lookups.first,
            lookups.named,
            lookups.value,
            lookups.__contains__,
            lookups._record,
        ):
            with pytest.raises(TypeError, match=message):
                use(other)
        with pytest.raises(TypeError, match=message):
            lookups._read(other, bytes)
        with pytest.raises(TypeError, match=message):
            lookups._fill(["a", other], np.zeros(2, np.uint8), 0)


@pytest.mark.parametrize("path", [NativeTableReader, TableReader])
def test_what_is_not_bytes_is_refused_by_a_table(path: Any, writer: TableWriter, namespace: Namespace) -> None:
    table = path(namespace)
    for other in ("a", bytearray(b"a"), memoryview(b"a"), None, 5, ("a",)):
        message = f"key must be bytes, not {type(other).__name__}"
        for use in (table.flags, table.get, lambda key: table.read(key, bytes), lambda key: table.flags_of([key])):
            with pytest.raises(TypeError, match=message):
                use(other)


def test_a_list_that_loses_keys_while_it_is_read_is_told(writer: TableWriter, namespace: Namespace) -> None:
    """In the reference, where a signal handler may come between any two keys; for the other, see test_native."""
    keys = ["a", "b", "c"]

    class Clearing(Reference):
        def _key(self, key: str | None) -> bytes:
            del keys[1:]
            return super()._key(key)

    with pytest.raises(RuntimeError, match="changed its size"):
        Clearing(namespace)._fill(keys, np.zeros(3, np.uint8), 0)


# The list is emptied by a finalizer, which the collector runs when the next object is made that it counts.
FREED = """
import gc, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from both_paths import Native
from shmelim.shm import PrivateNamespace, TableWriter

namespace = PrivateNamespace()
writer = TableWriter(namespace)  # which lives on: of a dead one more would be asked, in Python
writer.load([(b"last", 7, b"headbody", None)])
lookups = Native(namespace)
answers = np.zeros(2000, np.uint8)

class Emptying:
    def __del__(self):
        keys.clear()

class Telling(Native):
    @staticmethod
    def _refuse(key):
        del key
        keys.clear()

gc.collect()
gc.disable()
keys = [chr(0xD800) * (2 + n % 5) + str(n) for n in range(1999)] + ["".join(["la", "st"])]
garbage = Emptying()
garbage.itself = garbage
del garbage
gc.set_threshold(1)
gc.enable()
whole = lookups._fill(keys, answers, 0)
gc.disable()
assert whole and answers.tolist() == [0] * 1999 + [7], answers
gc.collect()
assert keys == []

telling = Telling.__new__(Telling)
telling._table = lookups._table
keys = [type("Wrong" * 20, (), {})() for n in range(3)]
try:
    telling._fill(keys, answers[:3], 0)
except (TypeError, RuntimeError) as error:
    assert "WrongWrong" in str(error) or "changed its size" in str(error), error
else:
    raise SystemExit("taken")
print("whole")
"""


def test_a_list_that_a_finalizer_empties_is_answered_whole() -> None:
    """With an allocator that overwrites what is freed."""
    done = subprocess.run(
        [sys.executable, "-c", FREED, str(Path(crashing.__file__).parent)],
        env={**os.environ, "PYTHONMALLOC": "debug"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "whole"), done.stderr[-2000:]


# ---------------------------------------------------------------------- one table, however it is held and read


def answers(namespace: Namespace, path: Any) -> list[Any]:
    """Return what a table says of everything that may depend on its memory or on the read path."""
    said = []
    with TableWriter(namespace, capacity=16, arena_size=1 << 14, first_sequence=1 << 44) as writer:
        mine = bytearray(b"headmine")
        transaction = writer.transaction()
        for key, flags, record, ordinal in (
            (b"a", 1, mine, None),
            (b"b", True, memoryview(b"headbody"), None),
            (np.bytes_(b"c"), np.uint8(3), np.bytes_(b"head"), np.int64(9)),
            (b"d" * 255, 255, b"", 0),
            ("e", 1, b"", None),
            (b"", 1, b"", None),
            (b"e" * 256, 1, b"", None),
            (bytearray(b"e"), 1, b"", None),
            (b"e", 256, b"", None),
            (b"e", -1, b"", None),
            (b"e", 1.0, b"", None),
            (b"e", None, b"", None),
            (b"e", 1, "text", None),
            (b"e", 1, 5, None),
            (b"e", 1, None, None),
            (b"e", 1, b"", -1),
            (b"e", 1, b"", 1 << 63),
            (b"e", 1, b"", 1.0),
        ):
            said.append(outcome(transaction.put, key, flags, record, ordinal))
        said.append(outcome(transaction.remove, "a"))
        with transaction:
            mine[:] = b"yours..."
        lookups = path(namespace)
        table = lookups._table
        for text in ("a", "b", "c", "d" * 255, "absent", "\ud800", None, b"a", 5):
            said += [outcome(use, text) for use in (lookups._flags, lookups._record, lookups.named, lookups.value)]
            said.append(outcome(lookups._read, text, lambda window: (bytes(window), window.readonly)))
            said.append(outcome(lookups._fill, [text], np.zeros(1, np.uint8), 0))
        for key in (b"a", b"c", b"d" * 255, b"absent", b"", b"x" * 300, "a"):
            said += [outcome(use, key) for use in (table.flags, table.get)]
            said.append(outcome(table.read, key, bytes))
            said.append(outcome(lambda key=key: table.flags_of([key]).tolist()))
        for array in (np.array([b"a", b"c"]), np.array([], "S1"), np.array([b"absent"])):
            filled = np.zeros(len(array), np.uint8)
            said.append((outcome(lookups._fill, array, filled, 0), filled.tolist()))
        said.append(outcome(lookups._read, "a", lambda _window: 1 / 0))
        said.append(outcome(lookups._read, "a", None)[0])
        said += [outcome(table.count_flag, bit) for bit in (0, 7, 8, -1)]
        said.append(outcome(table.snapshot)[1])
        said.append(outcome(table.info)._replace(arena_live=0))
        said.append(outcome(table.wait_for_change, 0))
    return said


@PATHS
def test_what_a_table_says_depends_neither_on_its_memory_nor_on_the_path(
    path: Any, namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbits", lambda _bits: 1)
    expected = answers(PrivateNamespace(), Reference)
    for number, (found, wanted) in enumerate(zip(answers(namespace, path), expected, strict=True)):
        assert found == wanted, number
    assert len({repr(each) for each in expected}) > 40
    assert (1, 0, b"headmine") in expected


def test_a_record_that_cannot_be_decoded_is_said_to_be_corrupt(namespace: Namespace) -> None:
    with TableWriter(namespace) as writer:
        writer.load([(HOTKEY.encode(), 1, PREFIX.pack(0, 0) + b"\xc1", None)])
        eliminations = EliminationReader.over(namespace)
        for read in (eliminations.get_elimination, eliminations.get, eliminations.__getitem__):
            with pytest.raises(CorruptSegmentError, match="1 bytes are not an elimination record"):
                read(HOTKEY)
        assert eliminations.get_elimination("absent") is eliminations.get_elimination(None) is None
