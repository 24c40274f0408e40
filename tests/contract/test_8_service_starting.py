"""SPEC 8: what a service is started with and how, and servers of an earlier run that are in its way."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from contract_services import WAYS, Notes, NotesServer, is_alive, run, title_of
from waiting import PATIENCE

from shmelim import RPCServiceBase
from shmelim.errors import ChannelError

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
