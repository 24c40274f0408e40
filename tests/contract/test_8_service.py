"""SPEC 8: the life of a service in every way in which it can be written and started; see also test_8_alone.py."""

import gc
import importlib
import inspect
import multiprocessing
import os
import pkgutil
import signal
import threading
from unittest.mock import MagicMock, create_autospec

import pytest
from contract_marks import words
from contract_services import WAYS, Clock, Notes, is_alive, title_of
from contract_validator import Notifier, row
from waiting import PATIENCE, until

import shmelim
from shmelim import EliminationManager, RPCServiceBase
from shmelim.errors import ShmelimError, UnknownMethodError

METHODS = ("fork", "forkserver", "spawn")


def in_fork(function):
    """Run a function in a forked child that then leaves at once; return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.alarm(int(PATIENCE))
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------------- the life of a service, in every way


@pytest.mark.parametrize("way", WAYS)
def test_calls_health_restart_and_end(start, way, tmp_path):
    """All that a caller sees, from the first call to the last, in one go."""
    alerts, clock, direct = Notifier(), Clock(), way == "direct"
    service = start(
        way,
        enable_health_check=True,
        health_check_interval_s=60,
        max_consecutive_failures=3,
        slack_notifier=alerts,
    )
    # Calls, and errors of the type that the server raised.
    assert service.note("one") == 1
    assert service.notes() == ["one"]
    with pytest.raises(TypeError, match="a note is text, not 5"):
        service.note(5)
    with pytest.raises(ZeroDivisionError):
        service._server_proxy.divide_rpc()
    assert (service.pid() == os.getpid()) == direct
    assert service.server_pid == (None if direct else service.pid())
    first, process = service.pid(), service.server_pid
    if not direct:
        assert title_of(process) == "vali_NotesServer"
        with pytest.raises((AttributeError, UnknownMethodError)):
            service._server_proxy.local()
        with pytest.raises((AttributeError, UnknownMethodError)):
            service._server_proxy.never_rpc()

    # Health: at most once in an interval, a bad status counts, and is told once.
    assert service.health_check(clock.now) is True
    (tmp_path / "status").write_text("sick")
    assert service.health_check(clock.later(30)) is True, "it is not yet time for another check"
    assert service.health_check(clock.later(31)) is False
    assert service.health_check(clock.later(1)) is False, "what the last check found"
    assert service.health_check(clock.later(61)) is False
    assert len(alerts.of("error")) == len(alerts.messages) == 1
    assert service.pid() == first
    # The third failure in a row restarts.
    assert service.health_check(clock.later(61)) is False
    (tmp_path / "status").unlink()
    assert service.health_check(clock.later(61)) is True
    assert len(alerts.messages) == 3
    assert len(alerts.of("success")) == 1
    assert service.health_check(clock.later(61)) is True
    assert len(alerts.messages) == 3, "recovery is told once"
    if direct:
        assert service.notes() == ["one"], "an object of this process is never replaced"
    else:
        assert alerts.about("restart")
        assert service.pid() == service.server_pid != first
        assert not is_alive(process)
        assert title_of(service.server_pid) == "vali_NotesServer"
        assert service.notes() == [], "what was in memory only is gone"
    assert service.note("two") == len(service.notes())

    # The end.
    process = service.server_pid
    service.shutdown()
    service.shutdown()
    assert process is None or not is_alive(process)
    assert service.health_check(clock.later(61)) is False
    with pytest.raises(ShmelimError):
        service.note("never")
    assert len(alerts.messages) == 3


def call_until_restarted(service, first, pipe):
    pipe.send(service.pid())
    until(lambda: service.pid() != first, "the next server")
    pipe.send([service.pid(), service.note("from a copy"), service.server_pid])
    service.shutdown()
    service.__del__()


@pytest.mark.parametrize("method", METHODS)
def test_every_client_in_every_process_finds_the_next_server(start, method, tmp_path):
    service = start(
        start_method=method,
        enable_health_check=True,
        max_consecutive_failures=1,
        connect_wait=PATIENCE,
        call_timeout=PATIENCE,
        idempotent=["pid_rpc"],
    )
    first, clients = service.pid(), []
    for how in (method, "thread"):
        context = multiprocessing.get_context("fork" if how == "thread" else how)
        here, there = context.Pipe()
        kind = threading.Thread if how == "thread" else context.Process
        use = watch if how == "thread" else call_until_restarted
        client = kind(target=use, args=(service, first, there), daemon=True)
        client.start()
        assert here.poll(PATIENCE)
        assert here.recv() == first
        clients.append((client, here))
    (tmp_path / "status").write_text("sick")
    assert service.health_check(1) is False
    (tmp_path / "status").unlink()
    for client, pipe in clients:
        assert pipe.poll(PATIENCE), "a client that never found the next server"
        found = pipe.recv()
        client.join(PATIENCE)
        if isinstance(client, threading.Thread):
            assert found == service.server_pid
        else:
            assert found == [service.server_pid, 1, None], "a copy is a client: it owns no server"
            assert client.exitcode == 0
    assert service.pid() == service.server_pid != first
    assert service.notes() == ["from a copy"]


def watch(service, first, pipe):
    pipe.send(service.pid())
    until(lambda: service.pid() != first, "the next server")
    pipe.send(service.pid())


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_copy_that_ends_in_any_way_ends_nothing(start, how):
    service = start()

    def forget():
        nonlocal service
        service.note("forgotten")
        service.__del__()
        del service
        gc.collect()

    if how == "fork":
        assert in_fork(forget) == 0
        assert in_fork(service.shutdown) == 0
    else:
        child = multiprocessing.get_context("spawn").Process(target=end_copy, args=(service,), daemon=True)
        child.start()
        child.join(PATIENCE)
        assert child.exitcode == 0
    assert service.pid() == service.server_pid
    assert service.notes()[:1] == ["forgotten"]


def end_copy(service):
    service.note("forgotten")
    service.shutdown()


def test_a_fork_of_direct_mode_closes_nothing(start, tmp_path):
    service = start("direct")
    assert in_fork(service.shutdown) == 0
    assert not (tmp_path / "closed").exists()
    assert service.note("here") == 1


# ---------------------------------------------------------------------- names


class Busy(Notes):
    """A subclass that has attributes and methods of the names that come to mind first."""

    NAMES = words("""
    _client _client_manager _rpc_client _settings _monitor _supervisor _lock _process _timeout _location
    _address _health _owner _owner_pid _core _key _authkey _state _pid _closed _closing _reader _failures
    _desk _outages _service_key _thread _restarts _why_ended
""")

    def __init__(self, *arguments, **options):
        for name in self.NAMES:
            setattr(self, name, name)
        super().__init__(*arguments, **options)

    def _initialize_service(self):
        for name in self.NAMES:
            setattr(self, name, name)
        super()._initialize_service()
        for name in self.NAMES:
            setattr(self, name, name)

    def _check(self):
        raise AssertionError("the base called a subclass's own method")

    _restart = _tell = _report = _probe = _end = _start = _stop = _call = _run = _watch = _check


@pytest.mark.parametrize("way", ["direct", "default"])
def test_names_of_the_base_do_not_collide_with_a_subclasss(start, way, tmp_path):
    service = start(way, kind=Busy, enable_health_check=True, max_consecutive_failures=1)
    assert service.note("one") == 1
    (tmp_path / "status").write_text("sick")
    assert service.health_check(1) is False
    (tmp_path / "status").unlink()
    assert service.health_check(10**9) is True
    assert [getattr(service, name) for name in Busy.NAMES] == Busy.NAMES
    service.shutdown()


class Listing(Notes):
    served_methods = ("local",)


def test_methods_that_the_subclass_lists_are_served(start):
    service = start(kind=Listing)
    assert service._server_proxy.local() == "not remote"
    with pytest.raises((AttributeError, UnknownMethodError)):
        service._server_proxy.close()


def test_the_eliminations_are_such_a_service(make, mode):
    manager = make(mode)
    assert isinstance(manager, RPCServiceBase)
    assert manager.service_name == "EliminationManagerServer"
    if mode == "rpc":
        assert title_of(manager.server_pid) == "vali_EliminationManagerServer"


def test_start_elimination_manager_server_is_somewhere():
    """As a target for a `Process`, which the requirement names."""
    names = [module.name for module in pkgutil.walk_packages(shmelim.__path__, "shmelim.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    name = "start_elimination_manager_server"
    (entry, *_) = [getattr(module, name) for module in modules if hasattr(module, name)]
    assert list(inspect.signature(entry).parameters)[:3] == ["address", "authkey", "server_ready"]


def test_managers_start_their_server_by_the_hooks(make, monkeypatch):
    calls = []
    spawn = EliminationManager._spawn_server

    def seen(self, factory, *arguments, **options):
        calls.append(sorted({"address", "authkey", "server_ready"} & options.keys()))
        return spawn(self, factory, *arguments, **options)

    monkeypatch.setattr(EliminationManager, "_spawn_server", seen)
    manager = make("rpc")
    manager.add_elimination("a", row("a"))
    assert manager.is_hotkey_eliminated("a")
    assert calls == [["address", "authkey", "server_ready"]]


def test_a_running_service_can_be_the_pattern_of_a_mock(start):
    service = start()
    for mock in (MagicMock(spec=service), create_autospec(service, instance=True)):
        assert isinstance(mock, Notes)
        mock.note.return_value = 7
        assert mock.note("a") == 7
    assert dict(inspect.getmembers(service))["server_pid"] == service.server_pid
