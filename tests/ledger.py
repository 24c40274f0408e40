"""A service for tests, in every way in which one can be written, and a place where alerts can be read."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
from pathlib import Path

from setproctitle import setproctitle
from waiting import PATIENCE, until

from shmelim.service import RPCServiceBase


@contextlib.contextmanager
def held_elsewhere(lock):
    """Hold a lock in another thread, of which a child that is forked meanwhile knows nothing."""
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            go_on.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(PATIENCE)
    try:
        yield
    finally:
        go_on.set()
        thread.join()


def is_alive(pid):
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pid_after(service, dead):
    """Wait for the server after one that died; return its id."""
    until(lambda: service.server_pid != dead, "a server after the one that died")
    return service.server_pid


def kill(service):
    """Kill the server process, and wait until it is dead, with all its threads; return its id."""
    pid = service.server_pid
    descriptor = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([descriptor], [], [], PATIENCE)[0], "the server did not die"
    finally:
        os.close(descriptor)
    return pid


def hang(pid):
    """Stop a process, and wait until all its threads stand still."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    until(lambda: {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()} == {"T"})


def core_of(service):
    """What the base has of its own, for tests that must look into it."""
    return service._RPCServiceBase__core


class LedgerServer:
    """Writes entries into a file, each by one system call; a line there is an entry that was carried out."""

    def __init__(self, directory):
        if not Path(directory).is_dir():
            raise FileNotFoundError(2, "No such directory", str(directory))
        self.directory = Path(directory)
        self.journal = os.open(self.directory / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.never = threading.Event()
        self.closed = False

    def health_check_rpc(self):
        with contextlib.suppress(FileNotFoundError):
            return {"status": (self.directory / "status").read_text()}
        return {"status": "ok", "timestamp_ms": 0, "pid": os.getpid()}

    def enter_rpc(self, entry):
        if not isinstance(entry, str):
            raise TypeError(f"an entry is text, not {entry!r}")
        os.write(self.journal, f"{entry}\n".encode())
        return entry

    def entries_rpc(self):
        return (self.directory / "journal").read_text().splitlines()

    def pid_rpc(self):
        return os.getpid()

    def hang_rpc(self):
        self.never.wait(PATIENCE)

    def fail_rpc(self):
        raise ZeroDivisionError("on purpose")

    def _hidden_rpc(self):
        return "hidden"

    def local_method(self):
        return "local"

    def close(self):
        if not self.closed:
            self.closed = True
            os.close(self.journal)
            (self.directory / "closed").touch()


class Ledger(RPCServiceBase):
    """The service, with the short way to start a server."""

    def __init__(self, directory, port=0, *, running_unit_tests=False, **options):
        options.setdefault("start_method", "fork")  # the quickest; None is the default of the base
        self.start_method = options["start_method"]
        options.setdefault("call_timeout", PATIENCE)
        options.setdefault("ready_timeout", PATIENCE)
        if "address" in options:
            port = None
        super().__init__("LedgerServer", port, running_unit_tests, **options)
        self.directory = directory
        self._initialize_service()

    def _create_direct_server(self):
        return LedgerServer(self.directory)

    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            LedgerServer, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )

    def enter(self, entry):
        return self._server_proxy.enter_rpc(entry)

    def entries(self):
        return self._server_proxy.entries_rpc()

    def pid(self):
        return self._server_proxy.pid_rpc()


class ClosureLedger(Ledger):
    """A local function as the process' target, and the object's own helper in it."""

    def _start_server_process(self, address, authkey, server_ready):
        def server_main():
            setproctitle("vali_LedgerServer")
            server = LedgerServer(self.directory)
            self._serve_rpc(server, address, authkey, server_ready)

        process = multiprocessing.get_context("fork").Process(target=server_main, daemon=True)
        process.start()
        return process


def start_ledger_server(address, authkey, directory, server_ready):
    with contextlib.closing(LedgerServer(directory)) as server:
        RPCServiceBase._serve_rpc(server, address, authkey, server_ready)


class EntryPointLedger(Ledger):
    """A function of the server's module as the process' target."""

    def _start_server_process(self, address, authkey, server_ready):
        context = multiprocessing.get_context(self.start_method)
        process = context.Process(
            target=start_ledger_server, args=(address, authkey, self.directory, server_ready), daemon=True
        )
        process.start()
        return process


class Alerts:
    """A notifier that keeps what it is told."""

    def __init__(self):
        self.messages = []

    def send_message(self, text, level="info"):
        self.messages.append((level, text))

    def of(self, level):
        return [text for found, text in self.messages if found == level]


class FileAlerts:
    """A notifier whose messages can be read in every process."""

    def __init__(self, directory):
        self.path = directory / "alerts"

    def send_message(self, text, level="info"):
        with self.path.open("a") as file:
            file.write(f"{level}: {text}\n")

    def flush(self, timeout=None):
        with self.path.open("a") as file:
            file.write("flushed\n")

    def levels(self):
        return [line.split(":")[0] for line in self.lines()]

    def lines(self):
        return self.path.read_text().splitlines() if self.path.exists() else []


class Clock:
    """Milliseconds that pass when they are told to."""

    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now

    def later(self, seconds):
        self.now += seconds * 1000
        return self.now
