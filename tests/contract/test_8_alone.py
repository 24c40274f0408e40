"""SPEC 8: what a service does by itself when its server dies, its places vanish, or its peers are strange."""

import contextlib
import functools
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.managers import BaseManager
from pathlib import Path

import psutil
import pytest
from contract_services import Clock, FileAlerts, Notes, NotesServer, hang, is_alive, kill
from contract_validator import row
from waiting import PATIENCE, until

from shmelim import EliminationClient, EliminationReader, ShmelimError


@pytest.fixture
def alerts(tmp_path):
    return FileAlerts(tmp_path)


@pytest.fixture
def start(start, alerts):
    """Start services that tell `alerts`."""
    return functools.partial(start, slack_notifier=alerts)


def next_server(service, dead):
    """Wait for the server after `dead`, asking nothing but the property that says who it is."""
    return until(
        lambda: service.server_pid not in (dead, None) and is_alive(service.server_pid) and service.server_pid,
        "a server after the one that died",
    )


# ---------------------------------------------------------------------- a server that died


@pytest.mark.parametrize("way", ["default", "fork", "forkserver", "spawn", "nested", "process"])
def test_a_killed_server_is_back_with_nobody_calling_anything(start, alerts, way):
    service = start(way, restart_on_exit=True)
    service.note("in memory")
    address = service.address
    for round_number in (1, 2):
        dead = service.server_pid
        kill(dead)
        pid = next_server(service, dead)
        until(lambda: len(alerts.lines()) == 2 * round_number, "an alert when it went and one when it was back")  # noqa: B023
        assert service.pid() == pid
        assert service.address == address
        assert service.notes() == [], "a state that is in memory only comes back empty"
    assert [level == "success" for level in alerts.levels()] == [False, True, False, True]


def test_that_is_so_by_default(start):
    service = start()
    dead = service.server_pid
    kill(dead)
    until(lambda: service.server_pid != dead and is_alive(service.server_pid), "the next server", within=8)


def test_a_manager_s_server_is_back_with_its_state_and_readers_saw_nothing(make, alerts):
    manager = make("rpc", restart_on_exit=True, slack_notifier=alerts)
    manager.add_elimination("a", row("a"))
    reader, dead, answers = EliminationReader(manager.name), manager.server_pid, []
    kill(dead)

    def back():
        answers.append(reader.is_hotkey_eliminated("a"))
        return manager.server_pid not in (dead, None) and is_alive(manager.server_pid)

    until(back, "the next server")
    assert all(answers)
    manager.add_elimination("b", row("b"))
    assert list(reader) == ["a", "b"]
    until(lambda: len(alerts.lines()) == 2, "two alerts")


def check_until(service, stop):
    clock = itertools.count(1, 61_000)
    while not stop.is_set():
        service.health_check(next(clock))
        service.server_pid  # noqa: B018
        stop.wait(0.01)


def test_ten_processes_that_watch_cause_one_restart_and_two_alerts(start, alerts):
    service = start(restart_on_exit=True, enable_health_check=True, max_consecutive_failures=1)
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    watchers = [context.Process(target=check_until, args=(service, stop), daemon=True) for _ in range(10)]
    for watcher in watchers:
        watcher.start()
    dead = service.server_pid
    kill(dead)
    pid = next_server(service, dead)
    until(lambda: alerts.of("success"), "the recovery")
    clock = Clock()
    for _ in range(5):
        assert service.health_check(clock.later(61)) is True
    stop.set()
    for watcher in watchers:
        watcher.join(PATIENCE)
        assert watcher.exitcode == 0
    assert service.server_pid == service.pid() == pid
    assert len(alerts.of("success")) == 1
    assert len(alerts.lines()) == 2


class ShortLived(NotesServer):
    """Dies as soon as it serves, while the file `die` is there."""

    def __init__(self, directory):
        super().__init__(directory)
        with (self.directory / "starts").open("a") as starts:
            starts.write(f"{time.monotonic()}\n")
        if (self.directory / "die").exists():
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()


class ShortLivedNotes(Notes):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            ShortLived, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


def test_one_that_dies_again_and_again_is_restarted_with_growing_pauses(start, tmp_path):
    service = start(kind=ShortLivedNotes, restart_on_exit=True, restart_pause=0.1)
    (tmp_path / "die").touch()
    kill(service.server_pid)
    starts = tmp_path / "starts"
    until(lambda: len(starts.read_text().splitlines()) >= 6, "five restarts")
    (tmp_path / "die").unlink()
    times = [float(line) for line in starts.read_text().splitlines()[1:]]
    pauses = [after - before for before, after in itertools.pairwise(times)]
    # Never less, however busy the machine: nothing after the first two deaths, then twice as much each time.
    assert all(pause >= least for pause, least in zip(pauses[1:], (0.1, 0.2, 0.4), strict=True)), pauses
    until(lambda: answers(service), "a server that lives")


def answers(service):
    with contextlib.suppress(ConnectionError, TimeoutError):
        return service.pid()


def test_a_check_that_finds_no_server_counts_and_never_starts_a_second_one(start, alerts, tmp_path):
    service = start(
        kind=ShortLivedNotes,
        restart_on_exit=True,
        enable_health_check=True,
        max_consecutive_failures=2,
        connect_wait=0.0,
    )
    clock, dead = Clock(), service.server_pid
    service.directory = tmp_path / "missing"  # so that a replacement cannot be made yet
    kill(dead)
    for _ in range(5):
        assert service.health_check(clock.later(61)) is False
    service.directory = tmp_path
    until(lambda: service.health_check(clock.later(61)), "the recovery")
    assert service.pid() == service.server_pid != dead
    until(lambda: len(alerts.of("success")) == 1, "the recovery being told")
    assert service.health_check(clock.later(61)) is True
    assert len(alerts.of("success")) == 1
    assert len((tmp_path / "starts").read_text().splitlines()) == 2, "the first, and one in its place"


def test_without_restart_on_exit_the_threshold_restarts_in_the_owner(start, alerts):
    service = start(restart_on_exit=False, enable_health_check=True, max_consecutive_failures=3, connect_wait=0.0)
    clock, dead = Clock(), service.server_pid
    kill(dead)
    assert service.health_check(clock.later(61)) is False
    assert service.health_check(clock.later(61)) is False
    assert service.server_pid in (dead, None)
    assert service.health_check(clock.later(61)) is False
    until(lambda: service.health_check(clock.later(61)), "the recovery")
    assert service.pid() == service.server_pid != dead
    assert len(alerts.of("success")) == 1


def test_without_restart_on_exit_a_copy_counts_and_tells_and_restarts_nothing(start, alerts):
    service = start(restart_on_exit=False, enable_health_check=True, max_consecutive_failures=2, connect_wait=0.0)
    dead = service.server_pid
    kill(dead)

    def check(pipe):
        clock = Clock()
        pipe.send([service.health_check(clock.later(61)) for _ in range(5)])

    here, there = multiprocessing.Pipe()
    copy = multiprocessing.get_context("fork").Process(target=check, args=(there,), daemon=True)
    copy.start()
    assert here.poll(PATIENCE)
    assert here.recv() == [False] * 5
    copy.join(PATIENCE)
    until(lambda: alerts.of("error"), "an alert")
    assert service.server_pid in (dead, None)


def test_a_dying_forkserver_is_not_a_dying_server(start):
    """`Process.sentinel` becomes ready then, while the server lives."""
    service = start("forkserver", restart_on_exit=True, enable_health_check=True)
    pid, clock = service.pid(), Clock()
    service.note("kept")
    forkserver = psutil.Process(pid).ppid()
    assert forkserver not in (os.getpid(), 1)
    kill(forkserver)
    for _ in range(20):
        assert service.health_check(clock.later(61)) is True
        assert service.pid() == service.server_pid == pid
    assert service.notes() == ["kept"]
    multiprocessing.forkserver.ensure_running()  # which also waits for the dead one


def test_after_shutdown_nothing_is_restarted(start, tmp_path):
    service = start(kind=ShortLivedNotes, restart_on_exit=True)
    service.shutdown()
    assert len((tmp_path / "starts").read_text().splitlines()) == 1
    with pytest.raises(ShmelimError):
        service.pid()


# ---------------------------------------------------------------------- whose fault it is


@pytest.fixture
def served(make):
    """A manager in RPC mode, with checks, and the runtime directory of its name."""
    manager = make(
        "rpc",
        enable_health_check=True,
        max_consecutive_failures=2,
        health_check_timeout=1,
        connect_wait=0.0,
        ready_timeout=3,
    )
    manager.add_elimination("a", row("a"))
    (found,) = Path(os.environ["XDG_RUNTIME_DIR"]).rglob(f"{manager.name}/key")
    return manager, found.parent


def test_a_working_server_is_not_ended_where_another_could_not_be_started(start, tmp_path):
    place = tmp_path / "p"
    place.mkdir()
    service, clock = start(address=place / "s", enable_health_check=True, max_consecutive_failures=1), Clock()
    pid = service.pid()
    place.rename(tmp_path / "away")
    place.touch()  # nobody can make a socket in it any more
    for _ in range(3):
        service.health_check(clock.later(61))
    assert is_alive(pid)


@pytest.mark.parametrize("lost", ["socket", "server.json", "directory"])
def test_a_managers_server_is_not_ended_where_something_else_stands_in_the_place_of(served, tmp_path, lost):
    manager, runtime = served
    pid = manager.server_pid
    if lost == "directory":  # behind a link, which is anybody's
        runtime.rename(tmp_path / "away")
        runtime.symlink_to(tmp_path / "away")
    else:
        (runtime / lost).unlink()
        (runtime / lost).mkdir()
    with pytest.raises(ShmelimError, match="goes on with its server"):
        manager.restart_server()
    assert is_alive(pid)
    assert manager.add_elimination("b", row("b")) is True


@pytest.mark.parametrize("lost", ["key", "directory"])
def test_a_check_does_not_blame_the_server_for_a_missing_key(served, lost):
    manager, runtime = served
    pid = manager.server_pid
    assert manager.health_check(1) is True

    def check(pipe=None):
        if lost == "key":
            (runtime / "key").unlink(missing_ok=True)
        else:
            shutil.rmtree(runtime, ignore_errors=True)
        clock = Clock()
        for _ in range(2):
            manager.health_check(clock.later(61))
        if pipe is not None:
            pipe.send("checked")

    here, there = multiprocessing.Pipe()
    copy = multiprocessing.get_context("fork").Process(target=check, args=(there,), daemon=True)
    copy.start()
    assert here.poll(PATIENCE)
    copy.join(PATIENCE)
    check()
    assert is_alive(pid)
    assert manager.server_pid == pid


@pytest.mark.parametrize("lost", ["key", "socket", "directory"])
def test_a_runtime_directory_that_was_cleaned_away_is_put_back(served, lost):
    manager, runtime = served
    pid = manager.server_pid
    if lost == "directory":
        shutil.rmtree(runtime)
    else:
        (runtime / lost).unlink()

    def reached():
        with contextlib.suppress(ShmelimError):
            client = EliminationClient(manager.name)
            client.add_elimination("b", row("b"))
            return True
        return False

    until(reached, "a client that reaches the server", within=6)
    assert manager.server_pid == pid
    assert manager.is_hotkey_eliminated("b")


# ---------------------------------------------------------------------- deadlines


@contextlib.contextmanager
def stopped_under_signals(pid, every=0.05):
    """Stop a server and let SIGALRM come all the time; nothing may wait for the server."""
    woken = []

    def handler(*_):
        if time.monotonic() > began + 4:  # four times the deadline; else a wait without one would not end at all
            woken.append(pid)
            os.kill(pid, signal.SIGCONT)

    hang(pid)
    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, every, every)
    try:
        yield
        assert not woken, "it waited until the server went on"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.kill(pid, signal.SIGCONT)


def test_the_deadline_of_a_call_holds_whatever_signals_arrive(start):
    service = start(call_timeout=1)
    service.note("connected")
    with stopped_under_signals(service.server_pid), pytest.raises(TimeoutError):
        service.note("never answered in time")


def test_the_deadline_of_a_health_check_holds_whatever_signals_arrive(start):
    service = start(health_check_timeout=1, enable_health_check=True)
    service.note("connected")
    with stopped_under_signals(service.server_pid):
        assert service.health_check(1) is False


def test_the_deadline_of_a_call_holds_where_no_signal_arrives(start):
    service = start(call_timeout=0.2)
    with pytest.raises(TimeoutError):
        service._server_proxy.hang_rpc()
    assert service.note("the service goes on") == 1


GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
import os, signal, subprocess, sys, time
from contract_services import Notes, hang
if __name__ == "__main__":
    service = Notes(sys.argv[1], start_method="spawn", call_timeout=1)
    service.note("connected")
    pid = service.server_pid
    hang(pid)
    wake = subprocess.Popen(f"sleep 4; kill -CONT {pid}", shell=True)
    began = time.monotonic()
    try:
        service.note("never answered in time")
    except TimeoutError:
        print("in time" if time.monotonic() - began < 3.5 else "late")
    wake.wait()
    service.shutdown()
"""


def test_the_deadline_of_a_call_holds_under_gevent(tmp_path):
    pytest.importorskip("gevent")
    script = tmp_path / "script.py"
    script.write_text(GEVENT)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, str(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["in", "time"], done.stderr


# ---------------------------------------------------------------------- many connections, strange peers


def test_more_clients_than_connections_are_all_served(served):
    manager, _ = served
    clients = [EliminationClient(manager.name, timeout=3) for _ in range(600)]
    try:
        for client in clients:
            assert client.health_check()["status"] == "ok"
        for client in clients[:20]:  # whose connections made room: they reconnect by themselves
            assert client.add_elimination("a", row("a")) is False
        assert manager.add_elimination("b", row("b")) is True
    finally:
        for client in clients:
            client.close()


def test_a_silent_peer_delays_nobody(start):
    service = start()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(service.address))
        assert service.note("one") == 1


class Foreign(Notes):
    """Serves by a manager of multiprocessing, as services of the field still do."""

    def _start_server_process(self, address, authkey, server_ready):
        def server_main():
            server = BaseManager(tuple(address), bytes(authkey)).get_server()
            server_ready.set()
            server.serve_forever()

        process = multiprocessing.get_context("fork").Process(target=server_main, daemon=True)
        process.start()
        return process


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def test_a_server_of_another_protocol_is_named_by_the_error(start):
    with pytest.raises(ShmelimError, match="multiprocessing"):
        start(kind=Foreign, port=free_port(), call_timeout=3, connect_tries=1)


def test_a_client_of_another_protocol_is_told_so(start):
    keys = []

    class Seen(Notes):
        def _start_server_process(self, address, authkey, server_ready):
            keys.append(bytes(authkey))
            return super()._start_server_process(address, authkey, server_ready)

    service = start(kind=Seen)
    with pytest.raises(Exception, match="shmelim"):
        BaseManager(service.address, keys[0]).connect()
    assert service.note("the service goes on") == 1
