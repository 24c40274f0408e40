"""SPEC 8: a service in every way in which it can be written and started; see also test_8_alone.py."""

import gc
import importlib
import inspect
import multiprocessing
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock, create_autospec

import pytest
from contract_marks import words
from contract_services import WAYS, Clock, FileAlerts, Notes, NotesServer, hang, is_alive, kill, title_of
from contract_validator import Notifier, row
from waiting import PATIENCE, until

import shmelim
from shmelim import EliminationManager, HealthCheckDaemon, NotServingError, RPCServiceBase
from shmelim.errors import ChannelError, ShmelimError, UnknownMethodError

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


# ---------------------------------------------------------------------- starting


def test_what_keeps_the_server_from_being_made_reaches_the_owner(tmp_path):
    for way in ("direct", "default", "spawn"):
        kind, options = WAYS[way]
        with pytest.raises(FileNotFoundError):
            kind(tmp_path / "missing", **options)


class Deaf:
    def __init__(self, directory):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        (directory / "pid").write_text(str(os.getpid()))
        threading.Event().wait(PATIENCE)


class DeafService(Notes):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            Deaf, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


def test_a_server_that_is_not_ready_in_time_is_a_timeout_and_is_ended(start, tmp_path):
    with pytest.raises(TimeoutError, match=r"not ready within 0\.3 s"):
        start(kind=DeafService, ready_timeout=0.3, stop_timeout=0.1)
    assert not (tmp_path / "pid").exists() or not is_alive((tmp_path / "pid").read_text())


class Elsewhere(Notes):
    """Says that it is ready, and listens nowhere."""

    def _start_server_process(self, address, authkey, server_ready):
        def say_ready():
            server_ready.set()
            threading.Event().wait(PATIENCE)

        process = multiprocessing.get_context("fork").Process(target=say_ready, daemon=True)
        process.start()
        return process


def test_connecting_is_tried_as_often_as_the_figures_say(start, tmp_path):
    with pytest.raises(ConnectionError):
        start(kind=Elsewhere, address=tmp_path / "s", connect_tries=2, connect_delay=0.01, connect_wait=0.0)


def test_every_figure_is_a_parameter_and_a_wrong_one_is_named():
    for options, error in (
        ({"stop_timeout": -1}, ValueError),
        ({"connect_tries": 0}, ValueError),
        ({"ready_timeout": "long"}, TypeError),
        ({"redy_timeout": 1}, TypeError),
        ({"start_method": "teleport"}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            Notes(".", **options)


def test_a_service_needs_a_port_or_an_address(tmp_path):
    with pytest.raises(ValueError, match="port or an address"):
        Notes(tmp_path, None)


def test_both_hooks_must_be_written():
    class Half(RPCServiceBase):
        def _create_direct_server(self):
            pass

    with pytest.raises(TypeError, match="_start_server_process"):
        Half("Half", 0)


def test_the_system_chooses_a_port_or_a_unix_socket_serves(start, tmp_path):
    assert start().port > 0
    assert start(address=tmp_path / "s").note("one") == 1
    assert (tmp_path / "s").is_socket()


def run(tmp_path, text, *arguments, by_stdin=False):
    """Run a script in an interpreter of its own."""
    script = tmp_path / "script.py"
    script.write_text(text)
    here = str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, "-" if by_stdin else str(script), str(tmp_path), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])},
        input=text if by_stdin else "",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


WITHOUT_A_GUARD = """
import sys
from contract_services import Notes
print("ran")
service = Notes(sys.argv[1])
print(service.note("one"))
service.shutdown()
"""
FACTORY_IN_THE_SCRIPT = """
import sys
from contract_services import Notes, NotesServer
print("ran")
class OwnServer(NotesServer):
    pass
class Own(Notes):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            OwnServer, self.directory, address=address, authkey=authkey, server_ready=server_ready)
try:
    service = Own(sys.argv[1], start_method=sys.argv[2] if len(sys.argv) > 2 else None, ready_timeout=20)
    print(service.note("one"))
    service.shutdown()
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("by_stdin", [False, True], ids=["script", "standard input"])
def test_a_script_needs_no_guard_and_does_not_run_again(tmp_path, by_stdin):
    done = run(tmp_path, WITHOUT_A_GUARD, by_stdin=by_stdin)
    assert done.stdout.split() == ["ran", "1"], done.stderr


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="multiprocessing does not fork here")
def test_a_factory_in_the_callers_script_is_started_in_multiprocessings_way(tmp_path):
    done = run(tmp_path, FACTORY_IN_THE_SCRIPT)
    assert done.stdout.split() == ["ran", "1"], done.stderr


def test_a_factory_in_a_script_without_a_guard_says_what_it_needs(tmp_path):
    done = run(tmp_path, FACTORY_IN_THE_SCRIPT, "spawn")
    assert "__main__" in done.stdout.splitlines()[-1]


MARK = "not set"


class Marked(NotesServer):
    def mark_rpc(self):
        return [MARK, threading.active_count() > 0, multiprocessing.current_process().name]


class MarkedService(Notes):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            Marked, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


def test_a_server_runs_in_a_fresh_interpreter(start, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MARK", "set by the owner")
    assert start(kind=MarkedService)._server_proxy.mark_rpc()[0] == "not set"


@pytest.mark.parametrize(("method", "seen"), [("fork", "set by the owner"), ("spawn", "not set")])
def test_start_method_chooses_multiprocessings_ways_instead(start, monkeypatch, method, seen):
    monkeypatch.setattr(sys.modules[__name__], "MARK", "set by the owner")
    assert start(kind=MarkedService, start_method=method)._server_proxy.mark_rpc()[0] == seen


class NestedElsewhere(Notes):
    def _start_server_process(self, address, authkey, server_ready):
        def server_main():
            self._serve_rpc(NotesServer(self.directory), address, authkey, server_ready)

        process = multiprocessing.get_context("spawn").Process(target=server_main, daemon=True)
        process.start()
        return process


def test_a_nested_function_where_multiprocessing_does_not_fork_names_both_ways_out(start):
    with pytest.raises(Exception, match="pickle") as caught:
        start(kind=NestedElsewhere)
    assert "_spawn_server" in str(caught.value)
    assert "fork" in str(caught.value)


def test_a_plain_event_will_do_as_in_a_module_that_knows_nothing_of_us(tmp_path):
    context = multiprocessing.get_context("fork")
    event = context.Event()
    arguments = NotesServer(tmp_path), str(tmp_path / "s"), b"k" * 32, event
    process = context.Process(target=RPCServiceBase._serve_rpc, args=arguments, daemon=True)
    process.start()
    assert event.wait(PATIENCE)
    assert title_of(process.pid) == "vali_NotesServer"
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 0


def test_the_key_is_32_random_bytes_and_in_no_argument_or_environment(tmp_path):
    keys = []

    class Seen(Notes):
        def _start_server_process(self, address, authkey, server_ready):
            keys.append(bytes(authkey))
            return super()._start_server_process(address, authkey, server_ready)

    for _ in range(2):
        with Seen(tmp_path) as service:
            shown = b"".join(
                Path(f"/proc/{service.server_pid}/{file}").read_bytes() for file in ("cmdline", "environ")
            )
            assert keys[-1] not in shown
            assert keys[-1].hex().encode() not in shown
    assert [len(key) for key in keys] == [32, 32]
    assert keys[0] != keys[1]


# ---------------------------------------------------------------------- health


@pytest.mark.parametrize("way", ["direct", "default"])
def test_without_health_checks_all_is_well(start, way, tmp_path):
    service = start(way)
    (tmp_path / "status").write_text("sick")
    assert service.health_check() is True
    assert service.health_check(0) is True


@pytest.mark.parametrize("way", ["direct", "default"])
def test_an_error_of_the_check_counts_and_its_traceback_is_logged(start, way, tmp_path, caplog):
    service, clock = start(way, enable_health_check=True, max_consecutive_failures=2), Clock()
    first = service.pid()
    (tmp_path / "status").write_text("raise")
    assert service.health_check(clock.now) is False
    assert any(record.exc_info or "Traceback" in record.getMessage() for record in caplog.records)
    assert service.health_check(clock.later(61)) is False
    assert (service.pid() == first) == (way == "direct")


@pytest.mark.parametrize("way", ["direct", "default"])
def test_degraded_is_not_a_failure(start, way, tmp_path):
    service = start(way, enable_health_check=True)
    (tmp_path / "status").write_text("degraded")
    assert service.health_check(1) is True


def test_an_alert_without_restart(start, tmp_path):
    alerts, clock = Notifier(), Clock()
    service = start(
        enable_health_check=True, enable_auto_restart=False, max_consecutive_failures=2, slack_notifier=alerts
    )
    first = service.pid()
    (tmp_path / "status").write_text("sick")
    for _ in range(4):
        assert service.health_check(clock.later(61)) is False
    assert service.pid() == first
    assert len(alerts.of("error")) == 2, "the failure, and that nobody restarts"
    (tmp_path / "status").unlink()
    assert service.health_check(clock.later(61)) is True
    assert len(alerts.of("success")) == 1


def test_with_auto_restart_off_a_server_that_died_stays_dead(start):
    clock = Clock()
    service = start(enable_health_check=True, enable_auto_restart=False, connect_wait=0.0)
    pid = service.server_pid
    kill(pid)
    for _ in range(5):
        assert service.health_check(clock.later(61)) is False
    with pytest.raises(NotServingError):
        service.pid()
    assert service.server_pid in (pid, None)


@pytest.mark.parametrize("way", ["fork", "forkserver", "spawn", "nested"])
def test_a_server_that_hangs_is_ended_and_replaced(start, way):
    clock = Clock()
    service = start(
        way, enable_health_check=True, health_check_timeout=0.2, max_consecutive_failures=2, stop_timeout=0.1
    )
    first = service.server_pid
    hang(first)
    assert service.health_check(clock.later(61)) is False
    assert service.health_check(clock.later(61)) is False
    until(lambda: service.health_check(clock.later(61)), "the recovery")
    assert service.pid() == service.server_pid != first
    assert not is_alive(first)


@pytest.mark.parametrize("kind", ["thread", "process", "own process"])
def test_a_daemon_checks_and_a_server_that_hangs_is_replaced_and_told_of_once(start, tmp_path, kind):
    alerts = FileAlerts(tmp_path)
    service = start(
        enable_health_check=True,
        health_check_interval_s=0,
        health_check_timeout=0.2,
        max_consecutive_failures=2,
        stop_timeout=0.1,
        slack_notifier=alerts,
    )
    daemon = HealthCheckDaemon(service, interval_s=0.02, slack_notifier=alerts)
    process = None
    if kind == "own process":
        process = multiprocessing.get_context("fork").Process(target=daemon.run, daemon=True)
        process.start()
    else:
        daemon.start(kind)
    first = service.server_pid
    hang(first)
    until(lambda: alerts.of("success"), "the recovery")
    assert service.pid() == service.server_pid != first
    assert len(alerts.of("error")) == len(alerts.of("success")) == 1
    if process is not None:
        assert title_of(process.pid) == "vali_NotesServer_HealthChecker"
    daemon.stop()
    if process is not None:
        process.join(PATIENCE)
        assert process.exitcode == 0


class Failing:
    service_name = "Failing"
    checks = 0

    def health_check(self, current_time_ms=None):
        self.checks += 1
        raise RuntimeError("on purpose")


def test_a_daemon_survives_every_exception_and_tells_its_notifier():
    service, alerts = Failing(), Notifier()
    with HealthCheckDaemon(service, 0.005, alerts).start():
        until(lambda: service.checks > 3)
    assert alerts.about("on purpose")


def test_a_daemon_as_the_requirement_writes_it():
    service, alerts = Failing(), Notifier()
    service.health_check_interval_s = 0.005
    daemon = HealthCheckDaemon(service, alerts)
    assert daemon.slack_notifier is alerts
    with daemon.start():
        until(lambda: alerts.about("on purpose"))


def test_the_interval_in_milliseconds(start, tmp_path):
    service, clock = start("direct", enable_health_check=True, health_check_interval_s=60), Clock()
    assert service.health_check_interval_ms == 60_000
    service.health_check_interval_ms = 1_000
    assert service.health_check(clock.now) is True
    (tmp_path / "status").write_text("sick")
    assert service.health_check(clock.later(0.5)) is True
    assert service.health_check(clock.later(0.6)) is False


# ---------------------------------------------------------------------- stale servers

HOLDER = """
import os, signal, socket, sys
from setproctitle import setproctitle
sock = socket.socket()
sock.bind(("127.0.0.1", 0))
sock.listen(1)
if len(sys.argv) > 2:
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
setproctitle(sys.argv[1])
print(sock.getsockname()[1], flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def hold():
    """Let a process hold a port under a title; return both."""
    holders = []

    def hold(*arguments):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], stdout=subprocess.PIPE, text=True)
        holders.append(process)
        return process, int(process.stdout.readline())

    yield hold
    for process in holders:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_stale_server_of_ours_is_ended(start, hold):
    holder, port = hold("vali_NotesServer")
    service = start(port=port)
    assert holder.wait(PATIENCE) == -signal.SIGTERM
    assert service.pid() == service.server_pid


@pytest.mark.parametrize("title", ["python some_program.py", "vali_OtherServer", "vali_NotesServer2"])
def test_nobody_else_on_the_port_is_touched(start, hold, title):
    holder, port = hold(title)
    with pytest.raises(ChannelError, match=str(holder.pid)):
        start(port=port)
    assert holder.poll() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_nor_is_another_users_process_of_our_title(start, hold):
    holder, port = hold("vali_NotesServer", "65534")
    with pytest.raises(ChannelError):
        start(port=port)
    assert holder.poll() is None


def test_a_process_of_our_title_that_does_not_hold_the_port_is_left_alone(start, hold):
    holder, _ = hold("vali_NotesServer")
    assert start().note("one") == 1
    assert holder.poll() is None


# ---------------------------------------------------------------------- ending


def test_a_server_that_does_not_end_by_sigterm_is_killed(start):
    service = start(stop_timeout=0.1)
    pid = service.server_pid
    hang(pid)
    service.shutdown()
    assert not is_alive(pid)


def test_the_port_is_free_when_shutdown_returns(start):
    service = start()
    port = service.port
    service.shutdown()
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert start(port=port).note("one") == 1


def test_a_forgotten_service_ends_its_server(tmp_path):
    service = Notes(tmp_path, enable_health_check=True)
    pid = service.server_pid
    service.health_check()
    del service
    gc.collect()
    until(lambda: not is_alive(pid), "the end of a server that nobody holds")


OWNER = """
import os, signal, sys
from contract_services import Notes
if __name__ == "__main__":
    service = Notes(sys.argv[1])
    print(service.pid(), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "error":
        raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize("how", ["exit", "error", "killed"])
def test_a_server_ends_with_its_owner(tmp_path, how):
    done = run(tmp_path, OWNER, how)
    pid = int(done.stdout)
    until(lambda: not is_alive(pid), "the end of the server")


@pytest.mark.parametrize("way", ["direct", "default"])
def test_what_stands_for_a_server_that_is_not_there_is_falsy(start, way):
    service = start(way)
    assert service._server_proxy
    service.shutdown()
    assert not service._server_proxy


@pytest.mark.parametrize("way", ["direct", "default"])
def test_a_server_that_is_there_is_truthy(start, way):
    assert start(way)._server_proxy


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
