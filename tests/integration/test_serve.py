"""Who may serve a name and a state directory, and what remains when a server ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from crashing import Child, call
from serving import Served, row

from shmelim import (
    AlreadyServingError,
    EliminationClient,
    EliminationManagerServer,
    EliminationReader,
    NotServingError,
)
from shmelim.eliminations.serve import ServeOptions, Service
from shmelim.errors import AddressError, ChannelError, KeyFileError, OutcomeUnknownError, ShmelimError, StoreError

both_ways = pytest.mark.parametrize("method", ["fork", "spawn"])


class TestOneWriter:
    @both_ways
    def test_a_second_serve_of_a_live_name_fails_at_once(self, serve, tmp_path, method):
        first = serve()
        first.client().add_elimination("a", row("a"))
        for state_dir in (first.state_dir, tmp_path / "another"):
            with pytest.raises(AlreadyServingError) as caught:
                Served(first.name, state_dir, method=method, runtime_base=first.runtime).start()
            assert caught.value.hint
        # It did the first no harm.
        client = first.client()
        assert client.add_elimination("b", row("b")) is True
        assert client.get_eliminated_hotkeys() == {"a", "b"}
        assert client.writer.alive
        assert client.writer.pid == first.pid

    def test_two_names_cannot_share_a_state_directory(self, serve, new_name):
        first = serve()
        with pytest.raises(AlreadyServingError, match="state directory"):
            Served(new_name(), first.state_dir).start()
        assert first.client().add_elimination("a", row("a")) is True

    def test_nor_can_a_server_object_of_another_process(self, serve):
        first = serve()
        first.client().add_elimination("a", row("a"))
        with pytest.raises(AlreadyServingError, match="state directory"):
            EliminationManagerServer(state_dir=first.state_dir)

    def test_nor_can_two_server_objects_of_one_process(self, tmp_path):
        server = EliminationManagerServer(state_dir=tmp_path)
        with pytest.raises(AlreadyServingError, match="state directory"):
            EliminationManagerServer(state_dir=tmp_path)
        server.close()
        EliminationManagerServer(state_dir=tmp_path).close()

    @both_ways
    def test_after_sigkill_the_next_succeeds_at_once(self, serve, method):
        server = serve(method=method)
        for n in range(3):
            client = server.client()
            client.add_elimination(f"h{n}", row(f"h{n}"))
            server.kill()
            server.start()
            assert server.client().get_eliminated_hotkeys() == {f"h{m}" for m in range(n + 1)}

    def test_after_sigkill_another_name_may_have_the_state_directory(self, serve):
        first = serve()
        first.client().add_elimination("a", row("a"))
        first.kill()
        assert serve(state_dir=first.state_dir).reader().get_eliminated_hotkeys() == {"a"}

    def test_a_child_of_a_dead_server_does_not_keep_the_locks(self, table_name, tmp_path):
        """A forked child has copies of all descriptors of its parent, and may outlive it."""
        runtime = tmp_path / "r"
        options = ServeOptions(table_name, tmp_path / "state", runtime_base=runtime, port=0)
        reading, writing = os.pipe()

        def serve_and_fork():
            service = Service(options)
            service.__enter__()
            if os.fork() == 0:
                os.write(writing, b"%d" % os.getpid())
                signal.pause()
            signal.pause()

        with Child(serve_and_fork) as child:
            grandchild = int(os.read(reading, 20))
            child.kill()
        try:
            with Service(options) as service:
                assert service.server.add_elimination_rpc("a", row("a")) is True
        finally:
            os.kill(grandchild, signal.SIGKILL)
            os.close(reading)
            os.close(writing)

    def test_many_at_once_leave_one(self, new_name, tmp_path):
        name = new_name()
        contenders = [Served(name, tmp_path / f"{n}") for n in range(6)]
        started, refused = [], []

        def contend(served):
            try:
                started.append(served.start())
            except AlreadyServingError:
                refused.append(served)

        threads = [threading.Thread(target=contend, args=(served,)) for served in contenders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            assert len(started) == 1
            assert len(refused) == 5
            assert EliminationReader(name).writer.pid == started[0].pid
        finally:
            for served in contenders:
                served.__exit__()


class TestEnd:
    @both_ways
    def test_sigterm_leaves_current_files_and_a_readable_table(self, serve, method):
        server = serve(method=method)
        client = server.client()
        client.add_elimination("a", row("a"))
        server.stop()
        assert json.loads((server.state_dir / "eliminations.json").read_text()) == {"eliminations": [row("a")]}
        assert client.get_elimination("a") == row("a")
        assert (client.writer.alive, client.writer.state) == (False, "stopped")
        assert not (server.runtime / server.name / "socket").exists()
        with pytest.raises(NotServingError):
            client.add_elimination("b", row("b"))

    def test_sigint_ends_it_as_well(self, serve):
        server = serve()
        os.kill(server.pid, signal.SIGINT)
        assert server._wait() == 0
        assert server.start().reader().get_eliminated_hotkeys() == set()

    def test_calls_under_way_at_sigterm_are_answered_or_refused(self, serve):
        server = serve()
        acknowledged, failed = [], []

        def work(number):
            client = server.client()
            for n in range(10_000):
                hotkey = f"h{number}-{n}"
                try:
                    client.add_elimination(hotkey, row(hotkey))
                except ShmelimError as error:
                    failed.append((hotkey, error))
                    return
                acknowledged.append(hotkey)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 20:
            os.sched_yield()
        server.stop()
        for thread in threads:
            thread.join()
        server.start()
        found = server.reader().get_eliminated_hotkeys()
        unknown = {hotkey for hotkey, error in failed if isinstance(error, OutcomeUnknownError)}
        assert set(acknowledged) <= found <= set(acknowledged) | unknown

    def test_sigkill_leaves_a_readable_table(self, serve):
        server = serve()
        client = server.client()
        client.add_elimination("a", row("a"))
        server.kill()
        assert client.get_elimination("a") == row("a")
        assert EliminationReader(server.name).get_elimination("a") == row("a")
        with pytest.raises((NotServingError, OutcomeUnknownError)):
            client.add_elimination("b", row("b"))


def until_called(client, *arguments):
    """Call until the server can be found again."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return client().add_elimination(*arguments)
        except (NotServingError, KeyFileError):
            assert time.monotonic() < deadline
            time.sleep(0.01)


class TestCleaningUp:
    @pytest.mark.parametrize("port", [None, 0])
    @pytest.mark.parametrize("lost", [".", "key", "socket", "server.json"])
    def test_what_a_cleaner_removes_comes_back_and_clients_notice_nothing(self, serve, port, lost):
        server = serve(port=port)
        client = server.client()
        client.add_elimination("a", row("a"))
        runtime = server.runtime / server.name
        key = (runtime / "key").read_bytes()
        if lost == ".":
            shutil.rmtree(runtime)
        elif (runtime / lost).exists():
            (runtime / lost).unlink()
        client.add_elimination("b", row("b"))  # on the connection that it has
        until_called(server.client, "c", row("c"))
        deadline = time.monotonic() + 30
        while {path.name for path in runtime.iterdir()} < {"key", "server.json"}:
            assert time.monotonic() < deadline
        assert (runtime / "key").read_bytes() == key
        assert runtime.stat().st_mode & 0o777 == 0o700
        assert client.writer.pid == server.pid
        assert server.reader().get_eliminated_hotkeys() == {"a", "b", "c"}

    def test_of_a_managers_server_costs_nothing(self, managers, tmp_path):
        manager = managers(runtime_base=tmp_path)
        manager.add_elimination("a", row("a"))
        pid = manager.server_pid
        name = manager._options.name
        shutil.rmtree(tmp_path / name)
        manager.add_elimination("b", row("b"))
        until_called(lambda: EliminationClient(name, runtime_base=tmp_path), "c", row("c"))
        assert manager.get_eliminated_hotkeys() == {"a", "b", "c"}
        assert manager.server_pid == pid


class TestNothingIsPublishedBefore:
    """What a start needs is looked at before a table of that name appears."""

    @pytest.fixture
    def refused(self, new_name, tmp_path):
        name = new_name()

        def refuse(error, match, **options):
            options = {"runtime_base": tmp_path / "r", "state_dir": tmp_path / "state"} | options
            with pytest.raises(error, match=match), Service(ServeOptions(name, **options)):
                pass
            assert not list(Path("/dev/shm").glob(f"shmelim.{name}*"))
            with pytest.raises(NotServingError):
                EliminationReader(name)
            return name

        return refuse

    def test_an_address_that_is_too_long(self, refused, tmp_path):
        refused(AddressError, "XDG_RUNTIME_DIR", runtime_base=tmp_path / ("x" * 100))
        assert list(tmp_path.iterdir()) == []

    def test_a_port_that_is_taken(self, refused):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            refused(ChannelError, "uses this address", port=other.getsockname()[1])

    def test_a_port_that_is_not_one(self, refused):
        refused(ValueError, "65535", port=70_000)

    def test_a_key_that_is_not_to_be_trusted(self, refused, tmp_path):
        (tmp_path / "r").mkdir()
        name = refused(StoreError, "does not exist", imports=(tmp_path / "none",))
        key = tmp_path / "r" / name / "key"
        key.chmod(0o666)
        refused(KeyFileError, "others may")

    def test_a_file_to_import_that_is_missing(self, refused, tmp_path):
        refused(StoreError, "does not exist", imports=(tmp_path / "none",))
        refused(StoreError, "does not exist", default_departed=tmp_path / "none")

    @pytest.mark.parametrize("option", ["durability", "files"])
    def test_an_option_that_there_is_not(self, refused, option):
        refused(ValueError, f"{option} must be one of", **{option: "some"})

    def test_by_a_manager_either(self, managers, new_name, tmp_path):
        name = new_name()
        with pytest.raises(AddressError, match="XDG_RUNTIME_DIR"):
            managers(name=name, runtime_base=tmp_path / ("x" * 100))
        assert list(tmp_path.iterdir()) == []
        assert not list(Path("/dev/shm").glob(f"shmelim.{name}*"))


class TestStart:
    def test_that_fails_leaves_nothing_locked(self, new_name, tmp_path):
        name, state_dir = new_name(), tmp_path / "state"
        state_dir.mkdir()
        (state_dir / "eliminations.json").write_text("{")
        server = Served(name, state_dir)
        with pytest.raises(StoreError):
            server.start()
        (state_dir / "eliminations.json").unlink()
        with server:
            assert server.client().add_elimination("a", row("a")) is True

    def test_at_a_taken_port_is_a_channel_error_and_leaves_nothing_locked(self, serve, new_name, tmp_path):
        first = serve(port=0)
        port = first.client()._client.address[1]
        name = new_name()
        with pytest.raises(ChannelError, match=str(port)):
            Served(name, tmp_path / "other", port=port).start()
        with Served(name, tmp_path / "other", port=0) as second:
            assert second.client().add_elimination("a", row("a")) is True

    @pytest.mark.parametrize("name", ["", "x" * 17, "Upper", "a/b", "ä"])
    def test_with_an_illegal_name(self, name, tmp_path):
        with pytest.raises(ValueError, match="name"), Service(ServeOptions(name, tmp_path)):
            pass

    def test_removes_a_socket_that_a_dead_server_left(self, serve):
        server = serve()
        server.kill()
        assert (server.runtime / server.name / "socket").exists()
        assert server.start().client().add_elimination("a", row("a")) is True

    def test_files_and_segments_are_private(self, serve):
        server = serve()
        server.client().append_elimination_row("a", 1.0, "ZOMBIE")
        runtime = server.runtime / server.name
        assert runtime.stat().st_mode & 0o777 == 0o700
        for path in [*runtime.iterdir(), *server.state_dir.iterdir()]:
            assert path.stat().st_mode & 0o077 == 0, path
        for path in Path("/dev/shm").glob(f"shmelim.{server.name}*"):
            assert path.stat().st_mode & 0o777 == 0o600

    def test_a_group_may_read_the_segments_on_request(self, serve):
        server = serve(group_readable=True)
        for path in Path("/dev/shm").glob(f"shmelim.{server.name}*"):
            # Readers never open the lock: one of them could keep the next writer out.
            assert path.stat().st_mode & 0o777 == (0o600 if path.suffix == ".lock" else 0o640)

    def test_another_user_can_neither_read_nor_call(self, serve):
        if os.geteuid() != 0:
            pytest.skip("needs root, to become somebody else")
        server = serve()
        server.runtime.chmod(0o755)
        (server.runtime / server.name).chmod(0o755)

        def as_nobody():
            os.setgid(65534)
            os.setuid(65534)
            with pytest.raises(PermissionError):
                EliminationReader(server.name)
            with pytest.raises((PermissionError, KeyFileError, NotServingError)):
                server.client()
            return True

        assert call(as_nobody)

    def test_a_signal_during_recovery_breaks_it_off(self, new_name, tmp_path):
        name, state_dir = new_name(), tmp_path / "state"
        state_dir.mkdir()
        os.mkfifo(state_dir / "default.json")  # reading it blocks
        code = f"""
import pathlib
from shmelim.eliminations.serve import ServeOptions, run
run(ServeOptions({name!r}, pathlib.Path({str(state_dir)!r}), runtime_base=pathlib.Path({str(tmp_path)!r}),
                 port=0, default_departed=pathlib.Path({str(state_dir)!r}) / "default.json"))
"""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        # Opening the other end waits until the server is in the middle of its start.
        writing = os.open(state_dir / "default.json", os.O_WRONLY)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        os.close(writing)
        with Served(name, state_dir) as server:
            assert server.client().add_elimination("a", row("a")) is True
