"""The channel between processes, forked and spawned, with forks at awkward moments and restarts under load."""

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from waiting import PATIENCE, until

from shmelim.channel import ChannelClient, ChannelServer, load_key, load_or_create_key
from shmelim.errors import NotServingError

KEY = b"0123456789abcdef0123456789abcdef"


class Counter:
    def __init__(self):
        self.lock = threading.Lock()
        self.count = 0

    def add_rpc(self, amount=1):
        with self.lock:
            self.count += amount
            return self.count

    def pid_rpc(self):
        return os.getpid()


def serve(address, key_path, ready, stop):
    with ChannelServer(Counter(), address, load_or_create_key(key_path)) as server:
        ready.send(server.address)
        stop.recv()


def call_often(address, key_path, times, results):
    with ChannelClient(address, lambda: load_key(key_path), timeout=PATIENCE) as client:
        results.send([client.call("add_rpc") for _ in range(times)])


@pytest.fixture(params=["fork", "spawn"])
def context(request):
    return multiprocessing.get_context(request.param)


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, context, address, key_path):
        ready, ready_child = context.Pipe(duplex=False)
        stop_child, self.stop = context.Pipe(duplex=False)
        self.process = context.Process(
            target=serve, args=(address, key_path, ready_child, stop_child), daemon=True
        )
        self.process.start()
        assert ready.poll(PATIENCE)
        self.address = ready.recv()

    def end(self):
        self.stop.send("stop")
        self.process.join(PATIENCE)
        assert self.process.exitcode == 0


def test_several_processes_call_one_server(context, address, tmp_path):
    key_path = str(tmp_path / "key")
    server = ServerProcess(context, address, key_path)
    pipes = []
    for _ in range(3):
        results, results_child = context.Pipe(duplex=False)
        process = context.Process(
            target=call_often, args=(server.address, key_path, 100, results_child), daemon=True
        )
        process.start()
        pipes.append((process, results))
    everything = []
    for process, results in pipes:
        assert results.poll(PATIENCE)
        mine = results.recv()
        assert mine == sorted(mine)
        everything += mine
        process.join(PATIENCE)
    assert sorted(everything) == list(range(1, 301))
    server.end()


def in_child(function):
    """Run `function` in a forked child; return what it returns, as text."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(function())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as reader:
        text = reader.read()
    os.waitpid(pid, 0)
    return text


@pytest.fixture
def server(address):
    with ChannelServer(Counter(), address, KEY, service_name="svc") as server:
        yield server


def test_a_forked_child_has_connections_of_its_own(server):
    client = ChannelClient(server.address, KEY, timeout=PATIENCE)
    assert client.call("add_rpc") == 1
    until(lambda: server.stats()["connections"] == 1)

    def child():
        assert client._connections._wires == {}
        return client.call("add_rpc")

    assert in_child(child) == "2"
    assert client.call("add_rpc") == 3
    assert server.stats()["accepted"] == 2  # the parent's connection, still the same, and the child's
    client.close()


def test_a_number_that_is_somebody_elses_by_now_is_neither_used_nor_closed(server):
    client = ChannelClient(server.address, KEY, timeout=PATIENCE)
    assert client.call("add_rpc") == 1
    (wire,) = client._connections._idle
    number = wire.sock.fileno()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.dup2(theirs.fileno(), number)  # as where a program closes all it finds, and then opens its own
        assert client.call("add_rpc") == 2
        client.close()
        with pytest.raises(BlockingIOError):
            ours.recv(1, socket.MSG_DONTWAIT)
        os.close(number)


def test_a_number_that_is_somebody_elses_by_now_is_neither_shut_down_nor_closed_in_a_child(server):
    client = ChannelClient(server.address, KEY, timeout=PATIENCE)
    client.call("add_rpc")
    in_use = client._connections.take()
    number = in_use.sock.fileno()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.dup2(theirs.fileno(), number)
        assert in_child(lambda: os.fstat(number).st_ino) == str(os.fstat(number).st_ino)
        client.close()
        ours.send(b"still up")
        assert theirs.recv(8) == b"still up"
        client._connections.discard(in_use)
        os.close(number)


def test_a_child_says_no_goodbye_on_inherited_connections(server):
    client = ChannelClient(server.address, KEY, timeout=PATIENCE)
    client.call("add_rpc")

    def child():
        client.close()
        client.__dict__.clear()

    assert in_child(child) == "None"
    assert client.call("add_rpc") == 2
    assert server.stats()["accepted"] == 1
    client.close()


def test_forks_while_other_threads_call(server):
    """Whatever state the other threads' locks and connections are in, the child is able to work."""
    client = ChannelClient(server.address, KEY, timeout=PATIENCE)
    stop, errors = threading.Event(), []

    def call():
        try:
            while not stop.is_set():
                client.call("add_rpc", (0,))
                if not server.stats()["calls"] % 7:
                    ChannelClient(server.address, KEY, timeout=PATIENCE).call("add_rpc", (0,))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        answers = {in_child(lambda: client.call("add_rpc", (0,))) for _ in range(15)}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert answers == {"0"}
    assert errors == []
    client.close()


def count_sockets():
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found += str(entry.readlink()).startswith("socket:")
    return found


def test_a_servers_forked_copy_is_inert(address, tmp_path):
    gc.collect()  # sockets that other tests left to the collector
    before = count_sockets()
    with ChannelServer(Counter(), address, KEY) as server, ChannelClient(server.address, KEY) as client:
        client.call("add_rpc")

        def child():
            left = count_sockets()
            server.close()
            return [left, server.stats()["connections"], repr(server.address) == repr(client.address)]

        assert in_child(child) == f"[{before}, 0, True]"
        assert client.call("add_rpc") == 2
        if isinstance(server.address, str):
            assert Path(server.address).is_socket()


def test_a_child_that_is_forked_while_another_thread_calls_holds_no_copy_of_its_connection(address):
    gc.collect()
    before, counter = count_sockets(), Counter()
    with ChannelServer(counter, address, KEY) as server, ChannelClient(server.address, KEY) as client:
        with counter.lock:
            thread = threading.Thread(target=client.call, args=("add_rpc",))
            thread.start()
            until(lambda: server.stats()["running"] == 1)
            assert in_child(count_sockets) == str(before)
        thread.join()
        assert counter.count == 1


def test_a_dead_servers_child_does_not_hold_its_port(context, address, tmp_path):
    """The server's process is killed while a child of it lives; the next server takes over at once."""
    key_path = str(tmp_path / "key")
    outer, inner = context.Pipe()
    process = context.Process(target=serve_with_child, args=(address, key_path, inner))
    process.start()
    assert outer.poll(PATIENCE)
    real_address, child_pid = outer.recv()
    try:
        client = ChannelClient(real_address, lambda: load_key(key_path), timeout=PATIENCE)
        assert client.call("pid_rpc") == process.pid
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with pytest.raises(NotServingError):
            client.call("pid_rpc")
        with ChannelServer(Counter(), real_address, load_or_create_key(key_path)):
            assert client.call("pid_rpc") == os.getpid()
        client.close()
    finally:
        os.kill(child_pid, signal.SIGKILL)


def serve_with_child(address, key_path, pipe):
    with ChannelServer(Counter(), address, load_or_create_key(key_path)) as server:
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        pipe.send((server.address, pid))
        signal.pause()


def test_restarts_under_load_lose_and_repeat_nothing(address):
    """A server that closes in good order leaves no caller in doubt: each call was carried out exactly once."""
    counter = Counter()
    server = ChannelServer(counter, address, KEY).start()
    client = ChannelClient(server.address, KEY, timeout=PATIENCE, connect_wait=PATIENCE)
    stop, errors, acknowledged = threading.Event(), [], []

    def call():
        done = 0
        try:
            while not stop.is_set():
                client.call("add_rpc")
                done += 1
        except Exception as error:
            errors.append(error)
        acknowledged.append(done)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            until(lambda running=server: running.stats()["calls"] >= 30 or errors, "30 calls")
            server.close()
            server = ChannelServer(counter, server.address, KEY).start()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        server.close()
        client.close()
    assert errors == []
    assert counter.count == sum(acknowledged)
