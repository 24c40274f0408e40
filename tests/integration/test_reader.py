"""A reader in any process: when it attaches, what it follows, and that it needs nobody."""

import itertools
import math
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Mapping

import numpy as np
import pytest
from crashing import Child, call
from serving import Served, row, stamp_of

from shmelim import EliminationClient, EliminationManagerServer, EliminationReader, NotServingError, Status
from shmelim.eliminations import reading as reading_module
from shmelim.eliminations import rows as entry
from shmelim.eliminations.record import decode
from shmelim.shm import SharedNamespace, TableWriter
from shmelim.table import Reader

try:
    from test import mapping_tests
except ImportError:  # some distributions ship Python without its tests
    mapping_tests = None


@pytest.fixture
def server(table_name):
    with EliminationManagerServer(SharedNamespace(table_name)) as server:
        yield server


@pytest.fixture
def reader(server, table_name):
    return EliminationReader(table_name)


class TestAttaching:
    def test_where_nothing_is_served_names_the_name_and_the_command(self, table_name):
        with pytest.raises(NotServingError) as caught:
            EliminationReader(table_name)
        assert repr(table_name) in str(caught.value)
        assert f"shmelim serve --name {table_name}" in str(caught.value)
        assert isinstance(caught.value, ConnectionError)

    @pytest.mark.parametrize("name", ["", "x" * 17, "Upper", "a/b", "../x", "a b"])
    def test_to_an_illegal_name(self, name):
        with pytest.raises(ValueError, match="name"):
            EliminationReader(name)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_waits_for_a_writer_that_another_process_starts_later(self, serve, new_name, method):
        name = new_name()
        waiting = threading.Event()
        found = []

        def attach():
            waiting.set()
            found.append(EliminationReader(name, wait=60.0))

        thread = threading.Thread(target=attach)
        thread.start()
        waiting.wait()
        server = serve(name, method=method)
        thread.join()
        assert isinstance(server, Served)
        server.client().add_elimination("a", row("a"))
        assert found[0].get_elimination("a") == row("a")

    def test_waits_no_longer_than_it_is_told(self, table_name):
        with pytest.raises(NotServingError):
            EliminationReader(table_name, wait=0.05)

    @pytest.mark.parametrize("kind", [EliminationReader, EliminationClient, Reader])
    def test_waits_no_longer_where_a_test_stops_the_time_and_for_no_time_that_is_none(self, table_name, kind):
        freezegun = pytest.importorskip("freezegun")
        with freezegun.freeze_time("2030-01-01"), pytest.raises(NotServingError):
            kind(table_name, wait=0.05)
        with pytest.raises(ValueError, match="must be 0 or more, not nan"):
            kind(table_name, wait=math.nan)

    def test_waits_for_no_change_for_a_time_that_is_none(self, serve):
        with pytest.raises(ValueError, match=r"timeout must be .* not nan"):
            EliminationReader(serve().name).wait_for_change(math.nan)

    def test_to_a_writer_that_has_not_published_yet(self, table_name):
        with TableWriter(SharedNamespace(table_name)), pytest.raises(NotServingError, match="starting"):
            EliminationReader(table_name)

    def test_does_not_need_the_runtime_directory(self, serve):
        server = serve()
        server.client().add_elimination("a", row("a"))
        (server.runtime / server.name / "key").unlink()
        assert server.reader().get_elimination("a") == row("a")

    def test_by_its_repr(self, server, reader):
        server.add_elimination_rpc("a", row("a"))
        assert reader.name in repr(reader)
        assert "1" in repr(reader)


class TestFollowing:
    def test_growth(self, server, reader):
        generations = set()
        for n in range(3000):
            server.add_elimination_rpc(f"h{n}", row(f"h{n}", n))
            assert stamp_of(f"h{n}", reader.get_elimination(f"h{n}")) == n
            generations.add(reader.table.generation)
        assert len(generations) >= 3
        assert len(reader) == 3000
        assert list(reader) == [f"h{n}" for n in range(3000)]

    def test_restarts(self, serve):
        server = serve()
        reader = server.reader()
        versions = [reader.version]
        for n in range(4):
            server.client().add_elimination(f"h{n}", row(f"h{n}"))
            (server.kill if n % 2 else server.stop)()
            assert list(reader) == [f"h{m}" for m in range(n + 1)]
            server.start()
            assert list(reader) == [f"h{m}" for m in range(n + 1)]
            versions.append(reader.version)
        assert versions == sorted(set(versions))

    @pytest.mark.long  # a dead writer counts as alive for some seconds
    def test_a_root_that_was_removed_and_made_again(self, serve):
        server = serve()
        reader = server.reader()
        server.client().add_elimination("a", row("a"))
        server.kill()
        SharedNamespace(server.name).remove()
        assert reader.get_elimination("a") == row("a")
        server.start()
        server.client().add_elimination("b", row("b"))
        # Once the old writer counts as dead, a look at it follows the name to where it leads now.
        deadline = time.monotonic() + 60
        while reader.writer.pid != server.pid:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sorted(reader) == ["a", "b"]

    def test_a_dead_writer_is_told_from_a_live_one(self, serve):
        server = serve()
        reader = server.reader()
        assert reader.writer.alive
        assert reader.writer.pid == server.pid
        assert reader.writer.state == "serving"
        assert reader.writer.started_ms > 1_700_000_000_000
        server.kill()
        deadline = time.monotonic() + 60
        while reader.writer.alive:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert reader.writer.heartbeat_age > 1
        server.start()
        assert reader.writer.alive
        assert reader.writer.pid == server.pid
        server.stop()
        assert (reader.writer.alive, reader.writer.state) == (False, "stopped")

    def test_a_live_writer_keeps_its_heart_beating(self, server, reader):
        first = reader._table._view.root.words[152 // 8]
        deadline = time.monotonic() + 60
        while reader._table._view.root.words[152 // 8] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert reader.writer.alive


class TestWaiting:
    def test_for_a_change_that_another_thread_makes(self, server, reader):
        since = reader.version
        thread = threading.Thread(target=server.add_elimination_rpc, args=("a", row("a")))
        thread.start()
        assert reader.wait_for_change(60, since) is True
        thread.join()
        assert "a" in reader

    def test_for_a_change_that_came_already(self, server, reader):
        since = reader.version
        server.add_elimination_rpc("a", row("a"))
        assert reader.wait_for_change(None, since) is True

    def test_in_vain(self, reader):
        assert reader.wait_for_change(0) is False
        assert reader.wait_for_change(0.02) is False

    def test_over_a_growth_and_a_restart(self, serve):
        server = serve()
        reader = server.reader()
        since = reader.version
        server.client().sync_eliminations([row(f"h{n}") for n in range(1500)])
        assert reader.wait_for_change(60, since) is True
        since = reader.version
        server.kill()
        server.start()
        assert reader.version == since, "the table is adopted where it lies"
        server.client().remove_elimination("h0")
        assert reader.wait_for_change(60, since) is True


class TestProcesses:
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_pickles_as_its_name(self, serve, method):
        server = serve()
        server.client().add_elimination("a", row("a"))
        reader = server.reader()
        again = pickle.loads(pickle.dumps(reader))
        assert (again.name, again.get_elimination("a")) == (reader.name, row("a"))
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        process = context.Process(target=_read_in_process, args=(reader, queue))
        process.start()
        assert queue.get() == row("a")
        process.join()
        assert process.exitcode == 0

    def test_pickled_where_nothing_is_served(self, table_name):
        with EliminationManagerServer(SharedNamespace(table_name)):
            data = pickle.dumps(EliminationReader(table_name))
        SharedNamespace(table_name).remove()
        with pytest.raises(NotServingError):
            pickle.loads(data)

    def test_in_the_middle_of_a_fork_while_threads_read_and_the_table_grows(self, server, reader):  # noqa: C901
        stop = threading.Event()
        problems = []

        def read(times=None):
            while not stop.is_set() and times != 0:
                for hotkey, record in reader.items():
                    stamp_of(hotkey, record)
                times = None if times is None else times - 1
            return True

        def write():
            n = 0
            while not stop.is_set():
                n += 1
                server.add_elimination_rpc(f"h{n % 3000}", row(f"h{n % 3000}", n))
                if n % 5000 == 0:
                    server.clear_eliminations_rpc()

        def guarded(work):
            try:
                work()
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=guarded, args=(work,)) for work in (read, read, write)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                assert call(lambda: read(20))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert problems == []

    def test_a_child_follows_what_its_parent_does_later(self, server, reader):
        server.add_elimination_rpc("a", row("a"))
        reading, writing = os.pipe()

        def child():
            assert "a" in reader
            os.read(reading, 1)
            return reader.get_eliminations_from_memory()

        with Child(child) as process:
            rows = [row(f"h{n}", n) for n in range(3000)]
            server.sync_eliminations_rpc(rows)
            os.write(writing, b"x")
            assert process.result() == rows

    def test_many_threads_share_one_reader(self, server, reader):
        hotkeys = [f"h{n}" for n in range(30)]
        server.sync_eliminations_rpc([row(hotkey) for hotkey in hotkeys])
        stop = threading.Event()
        reads, problems = [0] * 3, []

        def read(number):
            try:
                while not stop.is_set():
                    found = reader.snapshot().eliminations
                    stamps = {stamp_of(hotkey, record) for hotkey, record in found.items()}
                    assert len(stamps) == 1
                    assert len(found) == len(hotkeys)
                    assert reader.are_eliminated(hotkeys).all()
                    reads[number] += 1
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(len(reads))]
        for thread in threads:
            thread.start()
        for stamp in itertools.count():
            server.sync_eliminations_rpc([row(hotkey, stamp) for hotkey in hotkeys])
            if problems or (stamp >= 5 and all(reads)):
                break
        stop.set()
        for thread in threads:
            thread.join()
        assert problems == []


def _read_in_process(reader, queue):
    queue.put(reader.get_elimination("a"))


class TestBatches:
    def test_of_any_iterable(self, server, reader):
        server.sync_eliminations_rpc([row("a"), row("c")])
        for hotkeys in (
            ["a", "b", "c"],
            ("a", "b", "c"),
            iter("abc"),
            dict.fromkeys("abc"),
            np.array(["a", "b", "c"]),
        ):
            found = reader.are_eliminated(hotkeys)
            assert found.dtype == np.bool_
            assert found.tolist() == [True, False, True]
        assert reader.are_eliminated([]).shape == (0,)

    def test_of_many_more_than_there_are(self, server, reader):
        server.sync_eliminations_rpc([row(f"h{n}") for n in range(0, 5000, 2)])
        assert reader.are_eliminated([f"h{n}" for n in range(5000)]).tolist() == [n % 2 == 0 for n in range(5000)]

    def test_zero_copy(self, server, reader):
        server.add_elimination_rpc("a", row("a"))
        views = []
        assert reader.read("a", lambda view: views.append(view) or bytes(view)) is not None
        with pytest.raises(ValueError, match="released"):
            bytes(views[0])
        assert reader.read("absent", lambda _view: 1 / 0) is None
        with pytest.raises(ZeroDivisionError):
            reader.read("a", lambda _view: 1 / 0)

    def test_a_read_that_a_publish_overtakes_is_done_again(self, server, reader):
        """Also where what was read in the meantime cannot be decoded."""
        server.add_elimination_rpc("a", row("a", 0))
        stamps = []

        def overtaken(view):
            record = decode(bytes(view))
            stamps.append(record["return_info"]["stamp"])
            if len(stamps) < 4:
                server.add_elimination_rpc("a", row("a", len(stamps)))
                # Into the copy from which this read came, too.
                server.add_elimination_rpc("b", row("b", len(stamps)))
                if len(stamps) == 2:
                    raise ValueError("torn")
            return record

        before = reader.retries
        assert reader.read("a", overtaken) == row("a", 3)
        assert stamps == [0, 1, 2, 3]
        assert reader.retries == before + 3

    def test_a_read_that_a_removal_overtakes_finds_nothing(self, server, reader):
        server.add_elimination_rpc("a", row("a"))
        assert reader.read("a", lambda _view: server.remove_elimination_rpc("a")) is None


class TestWhatIsNotAHotkey:
    """None is in no table, as it is in no dict; bytes must not read as "not eliminated"."""

    ANSWERS = {  # noqa: RUF012 - read only
        "is_hotkey_eliminated": False,
        "is_hotkey_re_registered": False,
        "get_elimination": None,
        "get_departed_hotkey_info": None,
        "hotkey_in_eliminations": None,
        "is_zombie_hotkey": False,
    }
    OTHERS = (b"a", 5, (), ("a",), ("a", "b"), bytearray(b"a"), object())

    @pytest.fixture(params=["reader", "server", "manager"])
    def methods(self, request, server, reader, managers):
        """The read methods of each class that has them: {name: bound method}."""
        server.add_elimination_rpc("a", row("a"))
        holder = managers(running_unit_tests=True) if request.param == "manager" else locals()[request.param]
        suffix = "_rpc" if request.param == "server" else ""
        found = {name: getattr(holder, name + suffix, None) for name in self.ANSWERS}
        zombie = getattr(holder, f"is_zombie_hotkey{suffix}", None)
        if zombie is not None:
            found["is_zombie_hotkey"] = lambda hotkey: zombie(hotkey, set())
        return {name: method for name, method in found.items() if method is not None}

    def test_none_is_answered_as_a_dict_would(self, methods):
        assert len(methods) >= len(self.ANSWERS) - 2
        for name, method in methods.items():
            assert method(None) is self.ANSWERS[name], name

    def test_anything_else_is_a_type_error(self, methods):
        for method in methods.values():
            for other in self.OTHERS:
                with pytest.raises(TypeError, match=f"hotkey must be text, not {type(other).__name__}"):
                    method(other)

    def test_no_history_is_that_of_what_is_not_text(self, server):
        server.add_elimination_rpc("a", row("a"))
        assert server.get_history_rpc(None) == server.get_history_rpc("a")
        for other in self.OTHERS:
            for method in (server.get_history_rpc, server.get_debts_rpc, server.get_slashes_rpc):
                with pytest.raises(TypeError, match=f"hotkey must be text, not {type(other).__name__}"):
                    method(other)

    def test_in_the_reads_that_a_reader_has_alone(self, server, reader):
        server.add_elimination_rpc("a", row("a"))
        assert reader.status(None) is Status(0)
        assert reader.read(None, bytes) is None
        assert reader.are_eliminated([None, "a", None]).tolist() == [False, True, False]
        assert reader.statuses([None, "a"]) == [Status(0), Status.ELIMINATED]
        for other in self.OTHERS:
            for use in (reader.status, reader.get, reader.__getitem__, reader.__contains__):
                with pytest.raises(TypeError, match="hotkey must be text"):
                    use(other)
            for use in (reader.are_eliminated, reader.statuses):
                with pytest.raises(TypeError, match="hotkey must be text"):
                    use(["a", other])
            with pytest.raises(TypeError, match="hotkey must be text"):
                reader.read(other, bytes)
        for use in (reader.are_eliminated, reader.statuses):
            with pytest.raises(TypeError, match="not one str"):
                use("a")


class TestMapping:
    """The assertions of the standard library's own tests of read-only mappings, which are not everywhere."""

    FULL = {f"key{n}": row(f"key{n}", n) for n in range(3)}  # noqa: RUF012 - read only

    @pytest.fixture
    def full(self, server, reader):
        server.sync_eliminations_rpc(self.FULL.values())
        return reader

    def test_full(self, full):
        reference = self.FULL
        assert isinstance(full, Mapping)
        assert len(full) == len(reference)
        assert bool(full) is True
        assert list(full) == list(full.keys()) == list(reference)
        assert list(full.values()) == list(reference.values())
        assert list(full.items()) == list(reference.items())
        assert dict(full) == {**full} == reference
        assert full == reference
        assert not full != reference  # noqa: SIM202 - both operators are meant
        assert full != {}
        for key, value in reference.items():
            assert key in full
            assert full[key] == full.get(key) == value
        for key in ("other", "", None):
            assert key not in full
            assert full.get(key, 17) == 17
            with pytest.raises(KeyError):
                full[key]
        assert full.get("other") is None
        assert next(iter(full)) in reference
        iterator = iter(full)
        assert sorted(iterator) == sorted(reference)
        with pytest.raises(StopIteration):
            next(iterator)

    def test_empty(self, reader):
        assert len(reader) == 0
        assert bool(reader) is False
        assert list(reader) == list(reader.keys()) == list(reader.values()) == list(reader.items()) == []
        assert reader == {}
        assert reader.get("a") is None
        with pytest.raises(StopIteration):
            next(iter(reader))

    def test_cannot_be_changed(self, full):
        with pytest.raises(TypeError):
            full["a"] = row("a")
        with pytest.raises(TypeError):
            del full["key0"]
        for name in ("pop", "popitem", "clear", "update", "setdefault"):
            assert not hasattr(full, name)

    def test_iteration_stands_while_the_table_changes(self, server, full):
        seen = []
        for hotkey in full:
            server.remove_elimination_rpc(hotkey)
            seen.append(hotkey)
        assert seen == list(self.FULL)
        assert len(full) == 0

    @pytest.mark.skipif(mapping_tests is None, reason="this Python comes without its own tests")
    def test_by_the_tests_of_the_standard_library(self, server, reader, monkeypatch):
        """Those put values into sets: so here, records are dicts with a hash."""
        monkeypatch.setattr(reading_module, "decode_record", lambda data: _Record(decode(data)))
        monkeypatch.setattr(reading_module, "decode_eliminations", _decode_into_records)
        records = {key: _Record(value) for key, value in self.FULL.items()}

        class Tests(mapping_tests.BasicTestMappingProtocol):
            def __init__(self):
                super().__init__("test_read")
                self.reference = records
                self.inmapping = {"key0": records["key0"]}
                self.other = {"other": _Record(row("other"))}

            def _reference(self):
                return dict(records, other=None)

            def _full_mapping(self, data):
                server.sync_eliminations_rpc(data.values())
                return reader

            def _empty_mapping(self):
                return empty.reader

        with EliminationManagerServer() as empty:
            Tests().test_read()


def _decode_into_records(found):
    return {hotkey: _Record(record) for hotkey, record in entry.decode_eliminations(found).items()}


class _Record(dict):
    def __hash__(self):
        return hash(self["hotkey"])
