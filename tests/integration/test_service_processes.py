"""The service base among processes: copies that are clients, forks that end in every way, owners that die."""

import contextlib
import errno
import faulthandler
import gc
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ledger import EntryPointLedger, Ledger, LedgerServer, core_of, is_alive, pid_after
from waiting import PATIENCE, until

from shmelim.errors import AuthenticationFailedError, ChannelError, NotServingError
from shmelim.service import RPCServiceBase, ServerReady, report_progress
from shmelim.service.process import Ending, ServerOptions
from shmelim.system import processes

TESTS = str(Path(__file__).parents[1])


SPAWN_LONG = ["fork", pytest.param("spawn", marks=pytest.mark.long)]


@pytest.fixture(params=["fork", "spawn"])
def method(request):
    return request.param


@pytest.fixture
def service(make_ledger, method):
    return make_ledger(start_method=method, enable_health_check=True)


def in_fork(function):
    """Run `function` in a forked child, which then leaves as `function` leaves; return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ------------------------------------------------------------------ copies are clients


def use_copy(service, results):
    first = service.pid()
    service.enter("from a copy")
    facts = [first, service.server_pid, service.health_check()]
    with contextlib.suppress(ChannelError):
        service.restart_server()
        facts.append("restarted")
    service.shutdown()
    service.__del__()
    results.send(facts)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_copy_in_a_child_is_a_client_and_nothing_more(service, how):
    service.enter("from the owner")
    context = multiprocessing.get_context(how)
    results, sending = context.Pipe(duplex=False)
    process = context.Process(target=use_copy, args=(service, sending))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert results.recv() == [service.server_pid, None, True]
    assert service.entries() == ["from the owner", "from a copy"]
    assert service.pid() == service.server_pid


@pytest.mark.parametrize("method", SPAWN_LONG)
@pytest.mark.parametrize("how", ["_exit", "sys.exit", "return", "gc", "exception"])
def test_a_fork_that_ends_in_any_way_ends_nothing(tmp_path, method, how):
    """In an interpreter of its own, so that the child runs all of an interpreter's exit functions."""
    program = tmp_path / "program.py"
    program.write_text(FORKING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, *sys.path])}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), method, how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout.split() == ["child", "parent"], done.stderr
    if how != "exception":
        assert "Error" not in done.stderr


FORKING = """
import gc, multiprocessing, os, sys, time
from ledger import Ledger
from shmelim.service import HealthCheckDaemon

def main():
    directory, method, how = sys.argv[1:]
    service = Ledger(directory, start_method=method, enable_health_check=True, health_check_interval_s=3600)
    daemon = HealthCheckDaemon(service, 3600).start("process")
    pid, checker = service.pid(), daemon._runner
    child = os.fork()
    if child == 0:
        assert service.pid() == pid
        print("child", flush=True)
        if how == "_exit":
            os._exit(0)
        if how == "sys.exit":
            sys.exit(0)
        if how == "exception":
            raise RuntimeError("on purpose")
        if how == "gc":
            del service, daemon
            gc.collect()
        return
    os.waitpid(child, 0)
    # A signal that the child had sent would have arrived by now.
    assert service.pid() == pid
    assert service._server_process.is_alive()
    assert checker.is_alive()
    print("parent", flush=True)
    daemon.stop()

if __name__ == "__main__":
    main()
"""


def test_a_fork_while_other_threads_restart_and_check(make_ledger, monkeypatch):
    """Whatever locks they hold, the child's calls, checks and ending work."""
    service = make_ledger(enable_health_check=True, health_check_interval_s=0)
    stop = threading.Event()
    # A log stream's lock, held by another thread at the fork, is stuck in the child: no matter of the service.
    monkeypatch.setattr(logging.getLogger("shmelim"), "disabled", True)
    monkeypatch.setattr(logging.getLogger("shmelim.service"), "disabled", True)

    def disturb():
        while not stop.is_set():
            service.restart_server()
            service.health_check()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:

        def child():
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            for _ in range(100):  # a call may meet a server that is being killed
                with contextlib.suppress(ConnectionError):
                    service.pid()
                    break
            service.health_check()
            service.shutdown()

        assert [in_fork(child) for _ in range(10)] == [0] * 10
    finally:
        stop.set()
        thread.join(PATIENCE)
    assert service.pid() == service.server_pid


@pytest.mark.parametrize("method", SPAWN_LONG, indirect=True)
def test_a_copy_may_go_to_a_starting_process_only(service):
    with pytest.raises(RuntimeError, match=r"Ledger objects should only be shared .* through inheritance"):
        pickle.dumps(service)
    for part in (core_of(service).key, core_of(service), core_of(service).page, ServerReady(ServerOptions("S"))):
        with pytest.raises(RuntimeError, match="inheritance"):
            pickle.dumps(part)


def test_a_direct_service_stays_where_it_is(make_ledger):
    service = make_ledger(running_unit_tests=True)
    process = multiprocessing.get_context("spawn").Process(target=print, args=(service,))
    with pytest.raises(TypeError, match="in this process only"):
        process.start()


def call_until_changed(service, first, ready):
    ready.set()
    while service.pid() == first:
        time.sleep(0.001)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_every_client_in_every_process_finds_the_next_server(make_ledger, how):
    service = make_ledger(connect_wait=PATIENCE, idempotent=["pid_rpc"])
    first = service.pid()
    context = multiprocessing.get_context(how)
    processes = []
    for _ in range(2):
        ready = context.Event()
        process = context.Process(target=call_until_changed, args=(service, first, ready))
        process.start()
        assert ready.wait(PATIENCE)
        processes.append(process)
    threads = [
        threading.Thread(target=call_until_changed, args=(service, first, threading.Event())) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    os.kill(first, signal.SIGKILL)
    pid_after(service, first)
    for one in (*threads, *processes):
        one.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    assert not any(thread.is_alive() for thread in threads)


# ------------------------------------------------------------------ starting


@pytest.mark.parametrize("method", SPAWN_LONG, indirect=True)
def test_whatever_keeps_the_server_from_being_made_reaches_the_owner(make_ledger, tmp_path, method):
    with pytest.raises(FileNotFoundError) as caught:
        make_ledger(directory=tmp_path / "missing", start_method=method)
    assert caught.value.filename == str(tmp_path / "missing")


@pytest.mark.parametrize("method", SPAWN_LONG, indirect=True)
def test_a_server_that_dies_before_it_is_ready_is_not_waited_for(make_ledger, tmp_path, method):
    with pytest.raises(NotServingError, match="ended with exit code 1 before it was ready"):
        make_ledger(EntryPointLedger, directory=tmp_path / "missing", start_method=method)


class Sluggish:
    def __init__(self, directory):
        (directory / "pid").write_text(str(os.getpid()))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Event().wait(PATIENCE)


class SluggishService(Ledger):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            Sluggish, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


def test_a_server_that_is_not_ready_in_time_is_ended(make_ledger, tmp_path):
    """One that does not even react to SIGTERM."""
    with pytest.raises(TimeoutError, match=r"was not ready within 0\.2 s"):
        make_ledger(SluggishService, ready_timeout=0.2, stop_timeout=0.1)
    pid = tmp_path / "pid"
    assert not pid.exists() or not is_alive(pid.read_text())


def test_a_restart_that_is_not_ready_in_time_leaves_no_process(make_ledger):
    service = make_ledger(ready_timeout=PATIENCE, stop_timeout=0.1)
    started = []

    def start(address, authkey, server_ready):
        process = service._spawn_server(
            Sluggish, service.directory, address=address, authkey=authkey, server_ready=server_ready
        )
        started.append(process)
        until((service.directory / "pid").exists)
        server_ready.outcome = lambda server, _, *more: type(server_ready).outcome(
            server_ready, server, 0.0, *more
        )
        return process

    service._start_server_process = start
    with pytest.raises(TimeoutError):
        service.restart_server()
    assert not started[0].is_alive()


def test_a_fork_of_a_direct_service_closes_nothing(make_ledger, tmp_path):
    service = make_ledger(running_unit_tests=True)
    assert in_fork(service.shutdown) == 0
    assert not (tmp_path / "closed").exists()
    assert service.enter("still here") == "still here"


@pytest.mark.parametrize(
    "what", [None, multiprocessing.Process(target=print), SimpleNamespace(pid=2**22 + 1, returncode=None)]
)
def test_what_is_not_a_started_process_is_refused(make_ledger, what):
    """A Popen of subprocess was an AttributeError at its end."""

    class Wrong(Ledger):
        def _start_server_process(self, address, authkey, server_ready):
            return what

    with pytest.raises(TypeError, match="must return a started Process"):
        make_ledger(Wrong)


class Unreachable(Ledger):
    """Says that it is ready, and listens elsewhere."""

    def _start_server_process(self, address, authkey, server_ready):
        process = multiprocessing.get_context("fork").Process(
            target=say_ready, args=(address, server_ready), daemon=True
        )
        process.start()
        return process


def say_ready(address, server_ready):
    server_ready.set(address)
    threading.Event().wait(PATIENCE)


def test_connecting_is_tried_as_often_as_said(make_ledger, tmp_path, caplog):
    with pytest.raises(NotServingError):
        make_ledger(Unreachable, address=tmp_path / "s", connect_tries=3, connect_delay=0.01, connect_wait=0.0)
    assert [record.getMessage() for record in caplog.records if "tries left" in record.getMessage()] == [
        f"LedgerServer: cannot connect, {left} tries left: nobody serves at {tmp_path / 's'}" for left in (2, 1, 0)
    ]
    assert not [child for child in psutil.Process().children() if "LedgerServer" in " ".join(child.cmdline())]


class OtherKey(Ledger):
    def _start_server_process(self, address, authkey, server_ready):
        return super()._start_server_process(address, bytes(reversed(authkey)), server_ready)


def test_connecting_to_a_server_with_another_key_is_not_tried_again(make_ledger, caplog):
    with pytest.raises(AuthenticationFailedError):
        make_ledger(OtherKey)
    assert "tries left" not in caplog.text


def test_a_plain_event_will_do(tmp_path):
    """As in a server module that knows nothing of the service base."""
    context = multiprocessing.get_context("fork")
    event = context.Event()
    address, key = str(tmp_path / "s"), b"k" * 32
    process = context.Process(
        target=RPCServiceBase._serve_rpc, args=(LedgerServer(tmp_path), address, key, event), daemon=True
    )
    process.start()
    assert event.wait(PATIENCE)
    assert " ".join(psutil.Process(process.pid).cmdline()).rstrip() == "vali_LedgerServer"
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == 0


class GettingOn(LedgerServer):
    """Is made in steps, which together take longer than a start may."""

    def __init__(self, directory):
        super().__init__(directory)
        for step in range(8):
            time.sleep(0.1)
            report_progress("recovering", step, 8)


class GettingOnLedger(Ledger):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            GettingOn, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


def test_a_server_that_reports_progress_is_given_more_than_the_limit(make_ledger):
    service = make_ledger(GettingOnLedger, ready_timeout=0.5, start_method="fork")
    assert service.pid() == service.server_pid


def sockets_of(pid):
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the directory itself
            found.add(str(link.readlink()))
    return {name for name in found if name.startswith("socket:")}


def test_a_fresh_server_inherits_no_descriptor_and_no_thread(make_ledger):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        service = make_ledger(start_method=None)
        assert sockets_of(service.server_pid)
        assert not sockets_of(service.server_pid) & sockets_of(os.getpid())


def test_a_fresh_server_is_not_interrupted_by_its_owners_terminal_while_it_starts(make_ledger):
    class Interrupted(Ledger):
        def _start_server_process(self, address, authkey, server_ready):
            process = super()._start_server_process(address, authkey, server_ready)
            for _ in range(3):
                os.kill(process.pid, signal.SIGINT)
            return process

    service = make_ledger(Interrupted, start_method=None)
    os.kill(service.server_pid, signal.SIGINT)
    assert service.pid() == service.server_pid


MODULE_LEVEL = """
import sys
from ledger import Ledger
print("ran", flush=True)
service = Ledger(sys.argv[1], start_method=None)
print(service.enter("one"), service.pid() == service.server_pid, flush=True)
"""


@pytest.mark.parametrize("by", ["script", "standard input", "-c"])
def test_a_module_level_service_needs_no_guard(tmp_path, by):
    """And ends with the script, which does not shut it down."""
    script = tmp_path / "script.py"
    script.write_text(MODULE_LEVEL)
    arguments = {"script": [str(script)], "standard input": ["-"], "-c": ["-c", MODULE_LEVEL]}[by]
    done = subprocess.run(
        [sys.executable, *arguments, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
        input=MODULE_LEVEL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout.splitlines() == ["ran", "one True"], done.stderr
    assert (tmp_path / "closed").exists()


def test_a_copy_without_descriptors_left_blames_itself(make_ledger):
    """It cannot even ask; the server is well."""
    alerts = []
    service = make_ledger(enable_health_check=True, max_consecutive_failures=1)
    pid = service.pid()
    here, there = multiprocessing.get_context("fork").Pipe()

    def check():
        service.slack_notifier = Notes()
        limit = max(int(link.name) for link in Path("/proc/self/fd").iterdir()) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        outcomes = [service.health_check(60_000.0 * number) for number in range(1, 4)]
        there.send((outcomes, service.slack_notifier.messages))

    class Notes:
        messages = alerts

        def send_message(self, text, level="info"):
            self.messages.append((level, text))

    process = multiprocessing.get_context("fork").Process(target=check)
    process.start()
    assert here.poll(PATIENCE)
    outcomes, told = here.recv()
    process.join(PATIENCE)
    assert outcomes == [False] * 3
    ((level, text),) = told
    assert level == "warning"
    assert "cannot check the server, which may be well" in text
    assert service.pid() == service.server_pid == pid


# ------------------------------------------------------------------ ending


def test_shutdown_is_clean(make_ledger, tmp_path, method):
    service = make_ledger(start_method=method)
    process = service._server_process
    service.shutdown()
    assert process.exitcode == 0
    assert (tmp_path / "closed").exists()


def test_a_server_that_does_not_end_is_killed(make_ledger):
    service = make_ledger(stop_timeout=0.05)
    process = service._server_process
    os.kill(process.pid, signal.SIGSTOP)
    service.shutdown()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("method", SPAWN_LONG, indirect=True)
def test_a_server_that_a_thread_started_which_blocks_signals_ends_by_sigterm(make_ledger, method):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        service = make_ledger(start_method=method)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process = service._server_process
    service.shutdown()
    assert process.exitcode == 0


def test_a_call_under_way_may_finish(make_ledger, tmp_path):
    """The server ends as soon as the call does, and the caller gets its answer."""
    service = make_ledger(SlowLedger)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(service._server_proxy.slow_rpc()))
    thread.start()
    until((tmp_path / "entered").exists)
    os.kill(service.server_pid, signal.SIGTERM)
    thread.join(PATIENCE)
    assert answers == ["finished"]
    service._server_process.join(PATIENCE)
    assert service._server_process.exitcode == 0


class SlowServer(LedgerServer):
    def slow_rpc(self):
        (self.directory / "entered").touch()
        until(lambda: any(thread.name == "MainThread" and closing() for thread in threading.enumerate()))
        return "finished"


def closing():
    """Whether the main thread is past its wait."""
    frame = sys._current_frames()[threading.main_thread().ident]
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return "drain" in names


class SlowLedger(Ledger):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            SlowServer, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


@pytest.mark.parametrize("method", SPAWN_LONG, indirect=True)
def test_a_terminals_interrupt_ends_the_owner_and_not_the_server(make_ledger, method):
    service = make_ledger(start_method=method)
    os.kill(service.server_pid, signal.SIGINT)
    assert service.pid() == service.server_pid


def test_a_forgotten_service_ends_its_server(tmp_path):
    service = Ledger(tmp_path, enable_health_check=True)
    process, gone = service._server_process, weakref.ref(service)
    service.health_check()
    del service
    gc.collect()
    assert gone() is None
    assert not process.is_alive()
    until(lambda: not any(thread.name == "LedgerServer-owner" for thread in threading.enumerate()))


def test_an_object_that_was_never_made_can_be_forgotten():
    Ledger.__new__(Ledger).__del__()


OWNING = """
import os, signal, sys, threading
from ledger import Ledger
from waiting import PATIENCE

if __name__ == "__main__":
    directory, method, how = sys.argv[1:]
    service = Ledger(directory, start_method=method, enable_health_check=True, outlive_owner=how == "outlive")
    print(service.pid(), *service.address, flush=True)
    if how == "exit":
        sys.exit(0)
    threading.Event().wait(PATIENCE)
"""


@pytest.fixture
def owner(tmp_path, method):
    """Start an owner in an interpreter of its own; return it with its server's id."""
    with contextlib.ExitStack() as stack:

        def start(how):
            program = tmp_path / "program.py"
            program.write_text(OWNING)
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(program), str(tmp_path), method, how],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process, int(process.stdout.readline().split()[0])

        yield start


@pytest.mark.parametrize("method", SPAWN_LONG, indirect=True)
def test_an_owner_that_exits_ends_its_server(owner, tmp_path):
    process, server = owner("exit")
    assert process.wait(PATIENCE) == 0
    assert not is_alive(server)
    assert (tmp_path / "closed").exists()


def test_an_owner_that_is_killed_takes_its_server_along(owner, tmp_path):
    process, server = owner("wait")
    process.kill()
    process.wait()
    until(lambda: not is_alive(server))
    until((tmp_path / "closed").exists)


@pytest.mark.parametrize("method", SPAWN_LONG, indirect=True)
def test_a_server_outlives_its_owner_if_it_is_told_to(owner, make_ledger, tmp_path):
    process, server = owner("outlive")
    port = psutil.Process(server).net_connections("tcp")[0].laddr.port
    process.kill()
    process.wait()
    assert is_alive(server)
    # The next owner finds it there, as a stale one.
    service = make_ledger(port=port)
    assert service.pid() != server
    assert not is_alive(server)


@pytest.mark.parametrize("method", ["fork"], indirect=True)
def test_the_end_of_an_owner_is_seen_without_the_kernels_help(owner, monkeypatch):
    """As on systems that have no descriptors of processes."""
    monkeypatch.setattr(processes, "_pidfd_open", None)
    monkeypatch.setattr(processes, "_LOOK_AGAIN", 0.01)
    process, _ = owner("wait")
    with Ending(processes.ProcessIdentity.of(process.pid)) as end:
        end.defer()
        threading.Thread(target=lambda: (process.kill(), process.wait())).start()
        assert end.wait() == f"the end of its owner, process {process.pid}"
        assert end.wait() == f"the end of its owner, process {process.pid}"  # and when it is over already


def test_a_start_without_descriptors_left_says_what_to_do(make_ledger, monkeypatch):
    def none_left(*_args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", none_left)
    with pytest.raises(ChannelError, match=r"cannot be served: .*Too many open files.*ulimit -n"):
        make_ledger(start_method=None)
