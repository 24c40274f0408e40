"""The extension by itself: its hash, its types when misused, and the methods that it puts into classes."""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import math
import os
import pickle
import random
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import crashing
import msgspec
import numpy as np
import pytest
from both_paths import Native, NativeTableReader, Reference, TableReader, native
from hypothesis import given
from hypothesis import strategies as st

from shmelim import EliminationReader, NotServingError
from shmelim.errors import CorruptSegmentError
from shmelim.shm import READ_PATH, VALUES, PrivateNamespace, SharedNamespace, TableWriter, decoded, flag_test
from shmelim.shm import native as read_path
from shmelim.shm.fast import NativeView
from shmelim.shm.layout import key_hash

HOTKEY = "5" + "h" * 47


def table(**flags: int) -> PrivateNamespace:
    namespace = PrivateNamespace()
    writer = TableWriter(namespace)
    writer.load((key.encode(), value, b"head\xa4body", None) for key, value in flags.items())
    namespace.writer = writer
    return namespace


class TestHash:
    def test_of_every_length(self):
        chance = random.Random(1)
        for length in range(301):
            data = chance.randbytes(length)
            for seed in (0, 1, 1 << 63, (1 << 64) - 1, *(chance.getrandbits(64) for _ in range(4))):
                assert native.key_hash(data, seed) == key_hash(data, seed), (length, seed)

    @given(data=st.binary(max_size=300), seed=st.integers(0, (1 << 64) - 1))
    def test_of_anything(self, data, seed):
        assert native.key_hash(data, seed) == key_hash(data, seed)

    def test_at_every_alignment(self):
        data = random.Random(2).randbytes(120)
        for start, size in itertools.product(range(16), (16, 47, 48, 100)):
            view = memoryview(data)[start : start + size]
            assert native.key_hash(view, 7) == key_hash(bytes(view), 7)


class TestMethods:
    def test_are_c_functions_of_the_very_class(self):
        class Sub(Native):
            pass

        for kind in (Native, Sub):
            for name in ("first", "both", "named", "value"):
                method = vars(kind)[name]
                assert inspect.ismethoddescriptor(method)
                assert method.__objclass__ is kind
                assert method.__name__ == name

    @pytest.mark.skipif(READ_PATH == "pure", reason="SHMELIM_PURE is set")
    def test_of_the_reader_have_its_names_docstrings_and_signatures(self):
        for name in ("is_hotkey_eliminated", "is_hotkey_re_registered", "status", "get_elimination"):
            method = getattr(EliminationReader, name)
            assert method.__qualname__ == f"EliminationReader.{name}"
            assert method.__doc__.startswith(
                ("Tell whether a hotkey", "Return all that the table says of", "Return a hotkey's elimination")
            )
            assert list(inspect.signature(method).parameters) == ["self", "hotkey"]

    def test_take_their_argument_by_its_name_too(self):
        reader = Native(table(a=7))
        assert reader.first("a") is reader.first(hotkey="a") is True
        assert reader.named(hotkey="a") == "flags 7"
        for arguments, names in (((), {}), (("a", "b"), {}), ((), {"key": "a"}), (("a",), {"hotkey": "a"})):
            with pytest.raises(TypeError, match="hotkey"):
                reader.first(*arguments, **names)

    def test_that_a_subclass_has_of_its_own_stay(self):
        class Own(Native):
            def first(self, hotkey):
                return "mine"

        class Later(Own):
            @flag_test(2)
            def second(self, hotkey):
                """Look at another flag."""
                return self._flags(hotkey) & 2 == 2

        class Mixin:
            def both(self, hotkey):
                return "mixed in"

        class Mixed(Mixin, Native):
            pass

        namespace = table(a=3)
        assert Own(namespace).first("a") == "mine"
        later = Later(namespace)
        assert (later.first("a"), later.second("a"), later.both("a")) == ("mine", True, False)
        assert Mixed(namespace).both("a") == "mixed in"
        assert Mixed(namespace).first("a") is True

    def test_without_a_table(self):
        empty = Native.__new__(Native)
        for use in (empty.first, empty.named, empty.value, empty._flags, empty._record, empty.__contains__):
            with pytest.raises(RuntimeError, match="no table"):
                use("a")
        with pytest.raises(RuntimeError, match="no table"):
            empty._read("a", bytes)
        with pytest.raises(RuntimeError, match="no table"):
            empty._fill(["a"], bytearray(1), 0)
        with pytest.raises(AttributeError):
            empty._table  # noqa: B018

    def test_on_the_wrong_object(self):
        with pytest.raises(TypeError):
            Native.first(object(), "a")
        with pytest.raises(TypeError, match="subclass"):
            native.bind(int, "first", "", 0)
        with pytest.raises(TypeError, match="0 to 5"):
            native.bind(Native, "first", "", 6)

    def test_of_texts_of_every_kind(self):
        texts = ["a", "\0", "a\0b", "é", "ß" * 100, "😀", HOTKEY, HOTKEY + "x"]
        namespace = table(**dict.fromkeys(texts, 1))
        reader = Native(namespace)
        for text in texts:
            assert reader.first(text)
            assert text in reader
            assert np.str_(text) in reader
            assert not reader.first(text + "\0")
        for text in ("", "\ud800", "x\udfff", "x" * 256, "x" * 100_000):
            assert not reader.first(text)
            assert text not in reader
            assert reader._record(text) is None
        for other in (1, b"a", ("a",), object()):
            with pytest.raises(TypeError, match="must be text"):
                reader.first(other)
            with pytest.raises(TypeError, match="must be text"):
                assert other in reader

    @pytest.mark.parametrize("kind", [Native, Reference])
    def test_of_none_find_nothing_as_in_a_dict(self, kind):
        reader = kind(table(a=7))
        assert reader.first(None) is reader.both(None) is False
        assert reader.named(None) == "flags 0"
        assert None not in reader
        assert reader._record(None) is reader._read(None, bytes) is None
        answers = np.ones(3, np.uint8)
        assert reader._fill([None, "a", None], answers, 0)
        assert answers.tolist() == [0, 7, 0]

    def test_with_flags_above_those_that_have_a_name(self):
        reader = Native(table(a=255))
        assert reader.named("a") == "flags 255"


class TestDecoded:
    def body(self, body):
        namespace = PrivateNamespace()
        TableWriter(namespace).load([(b"a", 7, b"head" + body, None)])
        return namespace

    @pytest.mark.parametrize("kind", [Native, Reference])
    def test_is_what_the_record_says(self, kind):
        reader = kind(self.body(msgspec.msgpack.encode({"a": [1, None]})))
        assert reader.value("a") == reader.value(hotkey="a") == {"a": [1, None]}
        assert reader.value("b") is reader.value(None) is reader.value("\ud800") is None
        assert kind(self.body(b"")).value("a") is None

    @pytest.mark.parametrize("kind", [Native, Reference])
    def test_that_cannot_be_is_what_the_method_says(self, kind):
        with pytest.raises(LookupError, match="1 bytes: MessagePack data is malformed"):
            kind(self.body(b"\xc1")).value("a")

    def test_is_asked_again_of_the_method_where_the_bytes_are_bad(self):
        class Forgiving(Native):
            @decoded(msgspec.msgpack.decode)
            def value(self, hotkey):
                """Return what is in the record, or what cannot be."""
                return self._record(hotkey)

        assert Forgiving(self.body(b"\xc1")).value("a") == b"\xc1"
        assert Forgiving(self.body(b"\x01")).value("a") == 1

    def test_an_interrupt_is_not_asked_again(self):
        def interrupted(_body):
            raise KeyboardInterrupt

        class Interrupted(Native):
            @decoded(interrupted)
            def value(self, hotkey):
                """Never get here."""
                raise AssertionError

        with pytest.raises(KeyboardInterrupt):
            Interrupted(self.body(b"\x01")).value("a")


class TestMisuse:
    def test_a_view_is_mapped_once_and_from_memory_that_fits(self):
        namespace = table(a=1)
        view = NativeTableReader(namespace)._view
        assert isinstance(view, NativeView)
        with pytest.raises(RuntimeError, match="once"):
            view._map(bytearray(4096), bytearray(4096), "x", 1, 1, 1, 0, 4096)
        with pytest.raises(BufferError):
            namespace.open_data(1).memory.resize(4096)

    def test_memory_that_is_not_aligned(self):
        memory = memoryview(bytearray(1 << 15))
        for root, data in ((memory[1:4097], memory[: 1 << 14]), (memory[:4096], memory[4:])):
            with pytest.raises(ValueError, match="aligned"):
                native.View()._map(root, data, "x", 1, 1, 1, 0, 4096)

    def test_a_table_takes_nothing_but_mapped_views(self):
        class Table(native.Table):
            pass

        empty = Table()
        for value in (None, 1, native.View(), NativeView.__new__(NativeView)):
            with pytest.raises(TypeError, match="View"):
                empty._view = value
        with pytest.raises(RuntimeError, match="no view"):
            empty._view  # noqa: B018
        with pytest.raises(RuntimeError, match="no view"):
            empty.flags(b"a")
        with pytest.raises(RuntimeError, match="no view"):
            empty._collect(0, 0, 0)

    def test_counts_stay_within_their_memory(self):
        reader = NativeTableReader(table(a=1))
        for page, first in ((bytearray(47), 0), (bytearray(64), 3), (bytearray(64), -1), (bytearray(64), 1 << 62)):
            with pytest.raises(ValueError, match="not in the memory"):
                reader._count_in(page, first)
        with pytest.raises(ValueError, match="aligned"):
            reader._count_in(memoryview(bytearray(64))[1:57], 0)
        with pytest.raises((TypeError, BufferError)):
            reader._count_in(bytes(64), 0)
        for which in (6, 1 << 40):
            with pytest.raises(ValueError, match="count"):
                reader._tally(which)
        with pytest.raises(OverflowError):
            reader._tally(-1)
        page = bytearray(64)
        reader.flags(b"a")
        reader._count_in(page, 1)
        reader.flags(b"x")
        reader._tally(5)
        assert memoryview(page).cast("Q").tolist() == [0, 1, 1, 0, 0, 0, 1, 0]
        reader._count_in(None, 0)
        reader.flags(b"a")
        assert memoryview(page).cast("Q").tolist() == [0, 1, 1, 0, 0, 0, 1, 0]

    def test_lookups_have_one_table_for_good(self):
        reader = Native(table(a=1))
        for value in (None, TableReader(table(a=1)), NativeTableReader(table(a=1))):
            with pytest.raises(TypeError, match="once"):
                reader._table = value

    def test_a_batch_of_wrong_things(self):
        reader = Native(table(a=1))
        with pytest.raises(ValueError, match="cannot take"):
            reader._fill(["a"], bytearray(2), 0)
        for keys in (np.zeros(3), np.array([["a"]], "S1"), np.array(["a"]), 5, "a", {"a"}):
            with pytest.raises((TypeError, ValueError, BufferError)):
                reader._fill(keys, bytearray(1), 0)
        with pytest.raises(BufferError):
            reader._fill(["a"], b"x", 0)
        for mask in (256, -1, "x"):
            with pytest.raises((ValueError, OverflowError, TypeError)):
                reader._fill(["a"], bytearray(1), mask)
        with pytest.raises(TypeError, match="must be text"):
            reader._fill(["a", 5], bytearray(2), 0)
        with pytest.raises(TypeError, match="3 arguments"):
            reader._fill(["a"], bytearray(1))

    def test_a_list_that_changes_while_the_table_is_attached(self):
        """Attaching runs Python code, which may do anything with the list."""
        namespace = table(a=1)
        reader = Native(namespace)
        keys = ["a", "b" * 1000, "c"]
        attach = reader._table._attach

        class Table(NativeTableReader):
            def _attach(self):
                del keys[1:]
                keys[0] = "z" * 10
                super()._attach()

        reader = Native.__new__(Native)
        reader._table = Table(namespace)
        namespace.writer._images = None
        namespace.writer.load([(b"a", 1, b"", None)])
        with pytest.raises(RuntimeError, match="changed its size"):
            reader._fill(keys, bytearray(3), 0)
        assert attach() is None

    def test_forms_and_bits_that_are_none(self):
        reader = NativeTableReader(table(a=1))
        with pytest.raises(ValueError, match="form"):
            reader._collect(0, 4, 0)
        for bit in (-1, 8, 1 << 40):
            with pytest.raises(ValueError, match="0 to 7"):
                reader.count_flag(bit)
        with pytest.raises(CorruptSegmentError, match="contradict"):
            reader._collect(0, VALUES, 200)

    def test_an_attach_that_fails_is_what_the_caller_sees(self, table_name):
        with TableWriter(SharedNamespace(table_name)) as writer:
            writer.load([(HOTKEY.encode(), 1, b"head", None)])
            reader = Native(SharedNamespace(table_name))
            assert reader.first(HOTKEY)
            writer._root.words[8] = 9 << 48
            for use in (reader.first, reader._record, reader.__contains__):
                with pytest.raises(NotServingError):
                    use(HOTKEY)
            with pytest.raises(NotServingError):
                reader._fill([HOTKEY], bytearray(1), 0)
            with pytest.raises(NotServingError):
                reader._collect(0, 0)

    def test_a_word_that_is_stored_with_release(self):
        memory = bytearray(32)
        word = native.ReleaseWord(memory, 2)
        word[0] = 0x0102030405060708
        assert memory[16:24] == bytes([8, 7, 6, 5, 4, 3, 2, 1])
        word[0] = (1 << 64) - 1
        for value in (-1, 1 << 64, "x", None):
            with pytest.raises((OverflowError, TypeError)):
                word[0] = value
        with pytest.raises(TypeError):
            del word[0]
        assert memory[16:24] == b"\xff" * 8
        for index in (-1, 4):
            with pytest.raises(ValueError, match="not in the memory"):
                native.ReleaseWord(memory, index)
        with pytest.raises(BufferError):
            native.ReleaseWord(b"12345678", 0)

    def test_a_word_that_is_waited_for(self):
        memory = bytearray(32)
        native.ReleaseWord(memory, 2)[0] = 7
        assert native.wait_word(memory, 2, 6, 1000.0) is True, "it is another already"
        assert native.wait_word(memory, 2, 7, 0.001) is True, "nobody came"
        for index, seconds in ((-1, 1.0), (4, 1.0), (2, -1.0), (2, math.nan), (2, math.inf)):
            with pytest.raises(ValueError, match="not in the memory"):
                native.wait_word(memory, index, 7, seconds)


class TestReading:
    def test_a_decode_that_keeps_its_view(self):
        reader = Native(table(a=1))
        kept = []
        assert reader._read("a", bytes) == b"\xa4body"
        with pytest.raises(BufferError):
            reader._read("a", lambda view: kept.append(pickle.PickleBuffer(view)))
        assert bytes(kept[0]) == b"\xa4body"
        with pytest.raises(ZeroDivisionError):
            reader._read("a", lambda view: kept.append(pickle.PickleBuffer(view)) or 1 / 0)

    def test_an_interrupt_is_no_reason_to_start_over(self):
        namespace = table(a=1)
        reader = Native(namespace)
        calls = []

        def interrupted(view):
            calls.append(1)
            namespace.writer.load([(b"a", 1, b"headx", None)])
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reader._read("a", interrupted)
        assert calls == [1]

    def test_in_a_forked_child(self):
        reader = Native(table(a=1))
        assert crashing.call(lambda: (reader.first("a"), reader._record("a"))) == (True, b"\xa4body")

    def test_segments_are_let_go_when_a_generation_passes(self, table_name):
        def mapped():
            return Path("/proc/self/maps").read_text().count(f"shmelim.{table_name}.")

        with TableWriter(SharedNamespace(table_name)) as writer:
            writer.load([(b"a", 1, b"", None)])
            reader = Native(SharedNamespace(table_name))
            before = mapped()
            for _ in range(5):
                writer._images = None
                writer.load([(b"a", 1, b"", None)])
                gc.collect()
                assert reader.first("a")
            assert mapped() <= before + 1


class TestLeaks:
    def operations(self, reader):
        keys = ["a", HOTKEY, "ä", "absent", "\ud800"]
        answers = np.empty(len(keys), np.uint8)
        array = np.array([b"a", HOTKEY.encode()])
        table = reader._table
        for key in keys:
            yield lambda key=key: (reader.first(key), reader.named(hotkey=key), key in reader, reader._flags(key))
            yield lambda key=key: reader._record(key)
            yield lambda key=key: reader.value(key)
            yield lambda key=key: reader._read(key, bytes)
        for wrong in (None, 1, b"x"):
            yield lambda wrong=wrong: reader.first(wrong)
            yield lambda wrong=wrong: reader.value(hotkey=wrong)
            yield lambda wrong=wrong: reader._fill([HOTKEY, wrong], answers[:2], 0)
            yield lambda wrong=wrong: reader._read(wrong, bytes)
        yield lambda: reader._fill(keys, answers, 1)
        yield lambda: reader._fill(array, answers[:2], 0)
        yield lambda: reader._fill(array, answers, 0)
        yield lambda: reader._fill([HOTKEY] * 1000, bytearray(1000), 0)
        yield lambda: reader._read("a", lambda _view: 1 / 0)
        yield lambda: (table.flags(b"a"), table.get(b"a"), table.read(b"a", bytes), table.count_flag(0))
        yield from (lambda form=form: table._collect(0, form, 2) for form in range(4))
        yield lambda: table._collect(0, 1, 255)
        yield lambda: NativeTableReader(table._namespace).flags(b"a")
        yield lambda: native.ReleaseWord(bytearray(8), 0)
        yield lambda: native.View()._map(bytearray(4096), bytearray(1), "x", 1, 1, 1, 1, 1)

    def test_of_memory_and_of_references(self):
        reader = Native(table(**{"a": 1, HOTKEY: 3, "ä": 7}))
        operations = list(self.operations(reader))

        def run(times):
            for _ in range(times):
                for operation in operations:
                    with contextlib.suppress(
                        TypeError, ValueError, ZeroDivisionError, CorruptSegmentError, LookupError
                    ):
                        operation()

        run(20)
        gc.collect()
        tracemalloc.start()
        run(20)
        gc.collect()
        watched = [None, True, False, HOTKEY, bytes, reader, reader._table, reader._table._view, Native]
        counts = [sys.getrefcount(thing) for thing in watched]
        grown = []
        for _ in range(3):  # a leak grows each time; a cache of the interpreter fills up once
            memory = tracemalloc.get_traced_memory()[0]
            run(200)
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0] - memory)
        tracemalloc.stop()
        assert min(grown) < 4000, grown
        assert all(abs(sys.getrefcount(thing) - count) < 100 for thing, count in zip(watched, counts, strict=True))

    def test_of_readers_and_classes(self):
        namespace = table(a=1)

        def make():
            class Temporary(Native):
                pass

            reader = Temporary(namespace)
            assert reader.first("a")
            reader.itself = reader
            return reader.first

        for _ in range(10):
            make()
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(100):
            make()
        gc.collect()
        assert len(gc.get_objects()) - before < 100


def test_many_threads_share_one_reader() -> None:
    reader = Native(table(**{"a": 1, HOTKEY: 3}))
    problems = []

    def read() -> None:
        good = all(reader.first("a") and HOTKEY in reader and not reader.first("b") for _ in range(2000))
        problems.append(not good)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [False] * 4


def test_an_extension_of_another_build_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SHMELIM_PURE", raising=False)
    assert read_path._load() == (native, "")
    monkeypatch.setattr(read_path, "_INTERFACE", native.INTERFACE + 1)
    assert read_path._load() == (None, f"{native.__file__} was built from another release of shmelim")
    (line,) = caplog.messages
    assert "another release" in line
    assert read_path.HOW_TO_COMPILE in line


@pytest.mark.parametrize(("pure", "expected"), [("", "native"), ("0", "native"), ("1", "pure")])
def test_the_switch_at_run_time(pure: str, expected: str) -> None:
    code = "import shmelim.shm as s; print(s.READ_PATH, s.TableReader.__module__, s.Lookups.__module__)"
    environment = {**os.environ, "SHMELIM_PURE": pure}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert found[0] == expected
    assert all(name.endswith("fast") == (expected == "native") for name in found[1:])


@pytest.mark.parametrize("pure", ["0", "1"])
def test_a_client_can_refuse_what_is_too_old_on_either_path(pure: str) -> None:
    code = """
from shmelim import EliminationClient
from shmelim.eliminations.reader import _refusing

client = EliminationClient.__new__(EliminationClient)
client.__class__ = _refusing(EliminationClient)
client._client = None  # it has none to close
"""
    environment = {**os.environ, "SHMELIM_PURE": pure}
    made = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (made.returncode, made.stderr) == (0, "")
