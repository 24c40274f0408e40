"""The server's process dies at any moment: the client says what it knows, and works again with the next one."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest

from shmelim.channel import ChannelClient, ChannelServer, load_key, load_or_create_key
from shmelim.errors import NotServingError, OutcomeUnknownError

PATIENCE = 60.0
context = multiprocessing.get_context("fork")


class Target:
    def __init__(self, journal):
        self.journal = journal

    def note_rpc(self, number):
        """Carried out once it is in the journal: one line, written by one system call."""
        os.write(self.journal, f"{number}\n".encode())
        return number

    def hang_rpc(self):
        os.write(self.journal, b"entered\n")
        threading.Event().wait(PATIENCE)

    def pid_rpc(self):
        return os.getpid()


def serve(address, directory, ready):
    journal = os.open(f"{directory}/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    server = ChannelServer(Target(journal), address, load_or_create_key(f"{directory}/key")).start()
    ready.send(server.address)
    while True:
        signal.pause()


def start(address, directory):
    ready, ready_child = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(address, str(directory), ready_child), daemon=True)
    process.start()
    assert ready.poll(PATIENCE)
    return process, ready.recv()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.fixture(params=["unix", "tcp"])
def address(request, tmp_path):
    return str(tmp_path / "s") if request.param == "unix" else ("127.0.0.1", 0)


@pytest.fixture
def processes():
    started = []
    yield started
    for process in started:
        if process.is_alive():
            kill(process)


def test_killed_and_started_again(address, tmp_path, processes):
    process, real_address = start(address, tmp_path)
    processes.append(process)
    client = ChannelClient(real_address, lambda: load_key(tmp_path / "key"), timeout=PATIENCE)
    for _ in range(3):
        assert client.call("pid_rpc") == process.pid
        kill(process)
        with pytest.raises(NotServingError):
            client.call("pid_rpc")
        process, _ = start(real_address, tmp_path)  # replaces the stale socket file, or takes the port
        processes.append(process)
        assert client.call("pid_rpc") == process.pid
    client.close()


def test_killed_in_the_middle_of_a_call(address, tmp_path, processes):
    process, real_address = start(address, tmp_path)
    processes.append(process)
    client = ChannelClient(real_address, lambda: load_key(tmp_path / "key"), timeout=PATIENCE)

    def kill_when_entered():
        deadline = time.monotonic() + PATIENCE
        while b"entered" not in (tmp_path / "journal").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        kill(process)

    killer = threading.Thread(target=kill_when_entered)
    killer.start()
    with pytest.raises(OutcomeUnknownError, match="hang_rpc"):
        client.call("hang_rpc")
    killer.join()
    with pytest.raises(NotServingError):
        client.call("pid_rpc")
    client.close()


def test_killed_under_load(address, tmp_path, processes):
    """Acknowledged calls were carried out once; refused ones never; only those in doubt may be either."""
    process, real_address = start(address, tmp_path)
    processes.append(process)
    client = ChannelClient(
        real_address, lambda: load_key(tmp_path / "key"), timeout=PATIENCE, connect_wait=PATIENCE
    )
    stop, lock, errors = threading.Event(), threading.Lock(), []
    acknowledged, in_doubt = set(), set()

    def call(first):
        number = first
        try:
            while not stop.is_set():
                number += 10
                try:
                    assert client.call("note_rpc", (number,)) == number
                except OutcomeUnknownError:
                    with lock:
                        in_doubt.add(number)
                else:
                    with lock:
                        acknowledged.add(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(first,)) for first in range(5)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            enough = len(acknowledged) + 50
            deadline = time.monotonic() + PATIENCE
            while len(acknowledged) < enough and not errors:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            kill(process)
            process, _ = start(real_address, tmp_path)
            processes.append(process)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        client.close()
    assert errors == []
    journal = [int(line) for line in (tmp_path / "journal").read_text().split()]
    assert len(journal) == len(set(journal)), "a call was carried out twice"
    assert acknowledged <= set(journal) <= acknowledged | in_doubt
    assert len(in_doubt) <= 6 * len(threads)


def test_killed_under_idempotent_load(address, tmp_path, processes):
    """A call that may be repeated comes through every crash without an error."""
    process, real_address = start(address, tmp_path)
    processes.append(process)
    client = ChannelClient(
        real_address, lambda: load_key(tmp_path / "key"), timeout=PATIENCE, connect_wait=PATIENCE
    )
    proxy = client.proxy(idempotent=["note_rpc"])
    stop, errors, done = threading.Event(), [], []

    def call(first):
        number = first
        try:
            while not stop.is_set():
                number += 10
                assert proxy.note_rpc(number) == number
                done.append(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            enough = len(done) + 50
            deadline = time.monotonic() + PATIENCE
            while len(done) < enough and not errors:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            kill(process)
            process, _ = start(real_address, tmp_path)
            processes.append(process)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        client.close()
    assert errors == []
    assert set(done) <= {int(line) for line in (tmp_path / "journal").read_text().split()}


def test_stopped_in_the_middle_of_a_call(address, tmp_path, processes):
    """A server that is stopped, not dead, keeps nobody longer than the deadline."""
    process, real_address = start(address, tmp_path)
    processes.append(process)
    client = ChannelClient(real_address, lambda: load_key(tmp_path / "key"), timeout=PATIENCE)
    assert client.call("pid_rpc") == process.pid
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + PATIENCE
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:  # the signal takes its time
        assert time.monotonic() < deadline
    try:
        with pytest.raises(OutcomeUnknownError):
            client.call("pid_rpc", timeout=0.3)
        with pytest.raises(TimeoutError, match="handshake"):
            client.call("pid_rpc", timeout=0.3)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert client.call("pid_rpc") == process.pid
    client.close()


def test_an_interrupted_call_leaves_no_reply_behind(tmp_path, processes):
    """Ctrl-C in the middle of a call: its late reply must not become the answer to the next one."""
    process, real_address = start(str(tmp_path / "s"), tmp_path)
    processes.append(process)
    client = ChannelClient(real_address, lambda: load_key(tmp_path / "key"), timeout=PATIENCE)
    before = signal.signal(signal.SIGUSR1, _interrupt)

    def interrupt_when_entered():
        with contextlib.suppress(FileNotFoundError):
            deadline = time.monotonic() + PATIENCE
            while b"entered" not in (tmp_path / "journal").read_bytes() and time.monotonic() < deadline:
                time.sleep(0.002)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt_when_entered)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            client.call("hang_rpc")
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert client._connections._wires == {}
    assert client.call("note_rpc", (7,)) == 7
    client.close()


def _interrupt(_signum, _frame):
    raise KeyboardInterrupt
