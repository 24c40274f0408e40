"""Changing the state from other processes: seen at once in every process; restarts; large lists."""

import multiprocessing
import os
import pickle
import threading
from types import MappingProxyType

import msgspec
import pytest
from crashing import Child, call
from serving import row

from shmelim import EliminationClient, EliminationReader, NotServingError, OutcomeUnknownError
from shmelim.eliminations import calls
from shmelim.errors import KeyFileError, MessageTooLargeError, UploadLostError

decode_list = msgspec.msgpack.Decoder(list[dict]).decode


def _tell(pipe, text):
    os.write(pipe, text.ljust(40).encode())


def _told(pipe):
    return os.read(pipe, 40).decode().strip()


class TestReadYourWrites:
    @pytest.mark.parametrize("times", [1000, pytest.param(10_000, marks=pytest.mark.long)])
    def test_what_one_process_changed_is_seen_by_another_that_is_told_so(self, serve, times):
        server = serve(durability="process", files="off")
        to_reader, to_writer = os.pipe(), os.pipe()

        def write():
            client = server.client()
            for n in range(times):
                client.add_elimination(f"h{n % 50}", row(f"h{n % 50}", n))
                _tell(to_reader[1], f"{n} here")
                _told(to_writer[0])
                if n % 3 == 0:
                    client.remove_elimination(f"h{n % 50}")
                    _tell(to_reader[1], f"{n} gone")
                    _told(to_writer[0])
            _tell(to_reader[1], "end end")
            return True

        def read():
            reader = EliminationReader(server.name)
            looks = 0
            while True:
                n, where = _told(to_reader[0]).split()
                if where == "end":
                    return looks
                hotkey = f"h{int(n) % 50}"
                if where == "here":
                    assert reader.get_elimination(hotkey) == row(hotkey, int(n)), n
                    assert reader.is_hotkey_eliminated(hotkey), n
                else:
                    assert reader.get_elimination(hotkey) is None, n
                    assert not reader.is_hotkey_eliminated(hotkey), n
                looks += 1
                _tell(to_writer[1], "ok")

        with Child(read) as reading, Child(write) as writing:
            writing.until(lambda: writing._status is not None)
            assert writing.result() is True
            assert reading.result() == times + len(range(0, times, 3))

    def test_a_sync_and_a_departure_are_seen_too(self, serve):
        server = serve()
        client, reader = server.client(), server.reader()
        for n in range(20):
            client.sync_eliminations([row(f"h{m}", n) for m in range(n % 5, 40)])
            assert reader.get_eliminated_hotkeys() == {f"h{m}" for m in range(n % 5, 40)}
            assert {record["return_info"]["stamp"] for record in reader.values()} == {n}
            client.update_metagraph(["a", "b"])
            client.update_metagraph(["a"])
            assert not reader.is_hotkey_re_registered("b")
            client.update_metagraph(["a", "b"])
            assert reader.is_hotkey_re_registered("b")

    def test_threads_of_one_client_see_their_own(self, serve):
        server = serve(durability="process")
        client = server.client()
        wrong = []

        def work(number):
            for n in range(30):
                hotkey = f"h{number}-{n}"
                client.add_elimination(hotkey, row(hotkey, n))
                if client.get_elimination(hotkey) != row(hotkey, n):
                    wrong.append(hotkey)
                client.remove_elimination(hotkey)
                if hotkey in client:
                    wrong.append(hotkey)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        health = client.health_check()
        assert health["changes"] >= 8 * 60


class TestProcesses:
    def test_a_forked_child_goes_on_with_connections_of_its_own(self, serve):
        client = serve().client()
        client.add_elimination("a", row("a"))

        def child():
            assert client.get_elimination("a") == row("a")
            client.add_elimination("b", row("b"))
            (event,) = client.get_history("b")
            assert event["pid"] == os.getpid()
            return sorted(client)

        assert call(child) == ["a", "b"]
        assert client.add_elimination("c", row("c")) is True
        assert sorted(client) == ["a", "b", "c"]

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_pickles_as_its_name(self, serve, method):
        client = serve().client(timeout=7.0)
        client.add_elimination("a", row("a"))
        again = pickle.loads(pickle.dumps(client))
        assert again.get_elimination("a") == row("a")
        context = multiprocessing.get_context(method)
        process = context.Process(target=_add_in_process, args=(client, "b"))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert client.get_elimination("b") == row("b")

    def test_the_history_names_the_process_that_asked(self, serve):
        server = serve()

        def child():
            server.client().add_elimination("a", row("a"))
            return os.getpid()

        pid = call(child)
        (event,) = server.client().get_history("a")
        assert (event["pid"], event["uid"]) == (pid, os.getuid())


def _add_in_process(client, hotkey):
    client.add_elimination(hotkey, row(hotkey))


class TestRestarts:
    @pytest.mark.parametrize("ended_by", ["kill", "stop"])
    def test_a_client_finds_the_next_server_by_itself(self, serve, ended_by):
        server = serve()
        client = server.client()
        for n in range(3):
            assert client.add_elimination(f"h{n}", row(f"h{n}")) is True
            getattr(server, ended_by)()
            with pytest.raises((NotServingError, OutcomeUnknownError)):
                client.add_elimination("never", row("never"))
            server.start()
        assert client.add_elimination("last", row("last")) is True
        assert sorted(client) == ["h0", "h1", "h2", "last"]

    def test_a_call_waits_for_a_server_that_restarts(self, serve):
        server = serve()
        client = server.client(connect_wait=30.0, timeout=30.0)
        client.add_elimination("a", row("a"))
        server.stop()
        calling = threading.Event()
        added = []

        def work():
            calling.set()
            added.append(client.add_elimination("b", row("b")))

        thread = threading.Thread(target=work)
        thread.start()
        calling.wait()
        server.start()
        thread.join()
        assert added == [True]

    def test_reads_work_on_without_a_server(self, serve):
        server = serve()
        client = server.client()
        client.sync_eliminations([row("a"), row("b")])
        server.kill()
        assert client.get_eliminations_from_memory() == [row("a"), row("b")]
        with pytest.raises((NotServingError, OutcomeUnknownError)):
            client.health_check()

    def test_without_a_server_that_ever_ran(self, table_name, tmp_path):
        with pytest.raises(NotServingError) as caught:
            EliminationClient(table_name, runtime_base=tmp_path)
        assert table_name in str(caught.value)
        assert f"shmelim serve --name {table_name}" in str(caught.value)

    def test_in_another_runtime_directory(self, serve, tmp_path):
        server = serve()
        with pytest.raises(NotServingError) as caught:
            EliminationClient(server.name, runtime_base=tmp_path)
        assert f"process {server.pid} serves '{server.name}'" in str(caught.value)
        assert "--runtime-dir" in str(caught.value)

    def test_without_the_key(self, serve):
        server = serve()
        client = server.client()
        (server.runtime / server.name / "key").unlink()
        with pytest.raises((KeyFileError, NotServingError)):
            client.add_elimination("a", row("a"))


class TestLargeLists:
    def test_a_sync_of_more_than_one_message_holds(self, serve):
        """A message is at most 64 MiB; a list is as long as it is."""
        client = serve(durability="process", files="off").client()
        rows = [row(f"h{n}", n, pad=1_000_000) for n in range(80)]
        assert client.sync_eliminations(rows) == []
        assert client.are_eliminated([f"h{n}" for n in range(80)]).all()
        assert client.get_elimination("h79") == rows[79]
        client.write_eliminations_to_disk(rows[:70])
        assert len(client) == 70

    def test_progress_is_told(self, serve):
        client = serve(durability="process").client()
        told = []
        client.sync_eliminations([row(f"h{n}") for n in range(4500)], on_progress=told.append)
        assert told[-1] == 4500
        assert told == sorted(told)
        told.clear()
        client.sync_eliminations([row("a")], on_progress=told.append)
        assert told == [1]

    def test_an_upload_that_is_abandoned_changes_nothing_and_others_go_on(self, serve):
        server = serve(durability="process")
        client = server.client()
        client.sync_eliminations([row("x")])

        def rows():
            for n in range(5000):
                if n == 4500:
                    raise LookupError("the source broke off")
                yield row(f"h{n}")

        with pytest.raises(LookupError):
            client.sync_eliminations(rows())
        assert list(client) == ["x"]

        def dies_in_the_middle():
            mine = server.client()
            token = mine._call("begin_upload_rpc")
            mine._call("upload_rpc", (token, [row("a")]))
            os._exit(0)

        with Child(dies_in_the_middle) as child:
            child.wait()
        assert list(client) == ["x"]
        client.sync_eliminations([row(f"h{n}") for n in range(2500)])
        assert len(client) == 2500

    @pytest.mark.parametrize("lost_after", [2500, 4999])
    def test_an_upload_that_a_restart_lost_is_an_error_of_its_own(self, serve, lost_after):
        server = serve(durability="process")
        client = server.client(connect_wait=30.0, timeout=30.0)
        client.sync_eliminations([row("x")])

        def rows():
            for n in range(5000):
                yield row(f"h{n}")
                if n == lost_after:
                    server.kill()
                    server.start()

        with pytest.raises((UploadLostError, OutcomeUnknownError)):
            client.sync_eliminations(rows())
        assert list(client) == ["x"]
        client.sync_eliminations(row(f"h{n}") for n in range(5000))
        assert len(client) == 5000

    def test_two_syncs_at_once_end_as_one_of_them(self, serve):
        server = serve(durability="process", files="off")
        start = threading.Barrier(3)

        def work(stamp):
            client = server.client()
            start.wait()
            client.sync_eliminations([row(f"h{n}", stamp) for n in range(3000)])

        threads = [threading.Thread(target=work, args=(stamp,)) for stamp in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reader = server.reader()
        assert len(reader) == 3000
        assert len({record["return_info"]["stamp"] for record in reader.values()}) == 1


class TestDifferences:
    """A client has the table mapped: it sends what a list changes, and the whole list where there is any doubt."""

    @pytest.fixture
    def client(self, serve):
        return serve(durability="process", files="off").client()

    @pytest.fixture
    def sent(self, client, monkeypatch):
        sent, call = [], client._client.call

        def noting(method, args=(), *rest, **options):
            sent.append((method, args))
            return call(method, args, *rest, **options)

        monkeypatch.setattr(client._client, "call", noting)
        return sent

    def test_only_what_differs_is_sent(self, client, sent):
        client.sync_eliminations([row(f"h{n}") for n in range(50)])
        sent.clear()
        rows = [row(f"h{n}", int(n == 7)) for n in range(49)] + [row("new")]
        assert client.sync_eliminations(rows) == ["h49"]
        ((method, (_, _, changed, gone)),) = sent
        assert decode_list(changed) == [row("h7", 1), row("new")]
        assert (method, gone) == ("sync_difference_rpc", ["h49"])
        assert client.get_eliminations_from_memory() == rows
        version, commits = client.version, client.health_check()["commits"]
        assert client.sync_eliminations(rows) == []
        assert (client.version, client.health_check()["commits"]) == (version, commits)

    def test_what_means_the_same_changes_nothing_at_the_server(self, client, sent):
        client.sync_eliminations([row("a"), row("b")])
        version = client.version
        turned = dict(reversed(row("a").items()))
        assert client.sync_eliminations([turned, row("b")]) == []
        assert decode_list(sent[-1][1][2]) == [turned]
        assert client.version == version

    @pytest.mark.parametrize("part", [1, 2000])
    @pytest.mark.parametrize("known", [True, False])
    def test_others_that_overtake_it_change_nothing_of_it(self, client, sent, monkeypatch, part, known):
        monkeypatch.setattr(calls, "_PART", part)
        client.sync_eliminations([row("a"), row("b"), row("d"), row("e")])
        found = calls.difference

        def overtaken(published, given):
            seen = found(published, given)
            client.add_elimination("c", row("c"))
            client.add_elimination("d", row("d", 5))
            client.remove_elimination("e")
            sent.clear()
            return seen if known else seen._replace(version=1)

        monkeypatch.setattr(calls, "difference", overtaken)
        listed = [row("a"), row("b", 1), row("d"), row("e"), row("f")]
        assert client.sync_eliminations(listed) == ["c"]
        assert client.get_eliminations_dict() == {each["hotkey"]: each for each in listed}
        parts = [method for method, _ in sent if method == "upload_rpc"]
        if part == 1:
            assert len(parts) == (2 if known else 2 + len(listed))
        else:
            whole = [] if known else ["sync_eliminations_rpc"]
            assert [method for method, _ in sent] == ["sync_difference_rpc", *whole]

    def test_many_that_differ_are_sent_in_parts_and_no_other(self, client, sent, monkeypatch):
        monkeypatch.setattr(calls, "_PART", 10)
        client.sync_eliminations([row(f"h{n}") for n in range(100)])
        sent.clear()
        told = []
        rows = [row(f"h{n}", int(n % 4 == 0)) for n in range(99)]
        assert client.sync_eliminations(rows, on_progress=told.append) == ["h99"]
        assert client.get_eliminations_from_memory() == rows
        parts = [decode_list(part) for method, (_, part) in sent[1:-1]]
        assert [method for method, _ in sent] == ["begin_upload_rpc", *["upload_rpc"] * 3, "sync_uploaded_rpc"]
        assert [each["hotkey"] for part in parts for each in part] == [f"h{n}" for n in range(0, 99, 4)]
        assert told == [10, 20, 25, 99]

    def test_a_difference_that_is_too_large_for_a_message_goes_in_several(self, client, sent, monkeypatch):
        client.sync_eliminations([row(f"h{n}") for n in range(9)])
        call = client._client.call

        def narrow(method, args=(), *rest, **options):
            if len(msgspec.msgpack.encode(args)) > 700:
                raise MessageTooLargeError(method)
            return call(method, args, *rest, **options)

        monkeypatch.setattr(client._client, "call", narrow)
        rows = [row(f"h{n}", 1) for n in range(9)]
        sent.clear()
        assert client.sync_eliminations(rows) == []
        assert client.get_eliminations_from_memory() == rows
        assert [method for method, _ in sent].count("upload_rpc") > 1
        assert sent[-1][0] == "sync_uploaded_rpc"

    def test_a_version_of_another_root_is_not_believed(self, client, monkeypatch):
        client.sync_eliminations([row("a")])
        found = calls.difference
        monkeypatch.setattr(
            calls, "difference", lambda *args: found(*args)._replace(root_id=1, gone=[], changed=[])
        )
        assert client.sync_eliminations([row("b")]) == ["a"]
        assert client.get_eliminated_hotkeys() == {"b"}

    @pytest.mark.parametrize(
        "rows",
        [[row("a"), row("a", 1)], [row("b"), MappingProxyType(row("a"))], iter([row("a", 3)])],
        ids=["twice", "a mapping", "an iterator"],
    )
    def test_odd_lists_are_the_servers_business(self, client, sent, rows):
        client.sync_eliminations([row("a"), row("c")])
        sent.clear()
        assert client.sync_eliminations(rows) == ["c"]
        assert [method for method, _ in sent] == ["sync_eliminations_rpc"]

    def test_an_error_names_the_place_in_the_whole_list(self, client):
        rows = [row(f"h{n}") for n in range(9)]
        client.sync_eliminations(rows)
        with pytest.raises(TypeError, match="elimination 9 of the list"):
            client.sync_eliminations([*rows, {**row("bad"), "dd": "text"}])
        assert len(client) == 9
