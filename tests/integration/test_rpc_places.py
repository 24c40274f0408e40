"""Where a channel is served: who waits for whom, who closes, which places are taken, refused or left alone."""

import contextlib
import fcntl
import os
import pickle
import signal
import socket
import stat
import threading
from pathlib import Path

import pytest
from targets import KEY
from waiting import PATIENCE, until

from shmelim.channel import ChannelClient, ChannelServer, check_free
from shmelim.errors import (
    AddressError,
    ChannelError,
    NotServingError,
    OutcomeUnknownError,
)


def test_nobody_serves(address):
    free = address if isinstance(address, str) else ("127.0.0.1", _free_port())
    with ChannelClient(free, KEY) as client:
        with pytest.raises(NotServingError, match=str(free[1]) if isinstance(free, tuple) else free):
            client.call("echo_rpc")
        with pytest.raises(NotServingError):
            client.call("echo_rpc", timeout=0.1)


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_client_waits_for_its_server(target, tmp_path):
    asked = threading.Event()

    def key():
        asked.set()
        return KEY

    with ChannelClient(tmp_path / "s", key, connect_wait=PATIENCE, timeout=PATIENCE) as client:
        results = []
        thread = threading.Thread(target=lambda: results.append(client.call("echo_rpc", (1,))))
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        with ChannelServer(target, tmp_path / "s", KEY):
            thread.join()
    assert results == [[[1], {}]]


def test_a_restarted_server_is_found(target, server, client):
    """The pooled connection, which the first server closed, is noticed before anything is sent on it."""
    for round_ in range(3):
        assert client.call("echo_rpc", (round_,)) == [[round_], {}]
        server.close()
        with pytest.raises(NotServingError):
            client.call("echo_rpc")
        server = ChannelServer(target, server.address, KEY).start()
    assert client.call("echo_rpc", (9,)) == [[9], {}]
    assert server.stats()["calls"] == 1
    server.close()


def test_a_server_that_was_restarted_elsewhere_is_found(target, tmp_path):
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    places = [here]
    with ChannelServer(target, here, KEY), ChannelClient(lambda: places[-1], KEY) as client:
        assert client.call("echo_rpc", (1,)) == [[1], {}]
        assert client.address == here
        with ChannelServer(target, there, KEY) as server:
            places.append(there)
            client._connections._close_idle()
            assert client.call("echo_rpc", (2,)) == [[2], {}]
            assert client.address == server.address == there


def test_a_client_waits_for_a_place_that_nobody_knows_yet(target, tmp_path):
    asked = []

    def find():
        asked.append(None)
        if len(asked) in (2, 3):
            raise NotServingError("nobody has said where")
        return tmp_path / "s"

    with ChannelClient(find, KEY, connect_wait=PATIENCE, timeout=PATIENCE) as client:
        with ChannelServer(target, tmp_path / "s", KEY):
            assert client.call("echo_rpc") == [[], {}]
        assert len(asked) == 4


def test_close_lets_a_running_call_finish(server, client, target):
    results = []
    caller = threading.Thread(target=lambda: results.append(client.call("hang_rpc")))
    caller.start()
    assert target.entered.wait(PATIENCE)
    closer = threading.Thread(target=server.close, args=(PATIENCE,))
    closer.start()
    until(lambda: not _connects(server.address), "the address is free")
    assert closer.is_alive()
    assert results == []
    target.release.set()
    closer.join()
    caller.join()
    assert results == ["done"]


def _connects(address):
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        return sock.connect_ex(address) == 0


def test_close_does_not_wait_for_ever(server, client, target, caplog):
    errors = []

    def call():
        try:
            client.call("hang_rpc")
        except OutcomeUnknownError as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert target.entered.wait(PATIENCE)
    server.close(0.05)
    caller.join()
    assert len(errors) == 1
    assert "1 calls still ran" in caplog.text
    target.release.set()


def test_a_method_may_close_the_server(server, client):
    assert client.call("close_rpc") == "closing"
    server.close()
    with pytest.raises(NotServingError):
        client.call("echo_rpc")
    until(lambda: not any(t.name.startswith("svc") for t in threading.enumerate()), "no thread is left")


def test_close_is_idempotent_and_leaves_nothing(target, address, tmp_path):
    server = ChannelServer(target, address, KEY, service_name="leaver")
    server.close()
    server.close()
    with pytest.raises(RuntimeError):
        server.start()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    server = ChannelServer(target, address, KEY, service_name="leaver").start()
    clients = [ChannelClient(server.address, KEY) for _ in range(5)]
    for client in clients:
        client.call("echo_rpc")
    closers = [threading.Thread(target=server.close) for _ in range(3)]
    for thread in closers:
        thread.start()
    for thread in closers:
        thread.join()
    assert not any(thread.name.startswith("leaver") for thread in threading.enumerate())
    for client in clients:
        client.close()
        client.close()
        with pytest.raises(ChannelError, match="closed"):
            client.call("echo_rpc")
    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_a_client_that_is_forgotten_closes_its_connections(server):
    client = ChannelClient(server.address, KEY)
    client.call("echo_rpc")
    assert server.stats()["connections"] == 1
    del client  # by reference count, without waiting for the collector
    until(lambda: server.stats()["connections"] == 0)


def test_closing_a_client_ends_its_calls(server, target):
    client = ChannelClient(server.address, KEY, timeout=PATIENCE)
    errors = []

    def call():
        try:
            client.call("hang_rpc", idempotent=True)
        except OutcomeUnknownError as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert target.entered.wait(PATIENCE)
    client.close()
    caller.join()
    assert len(errors) == 1


def test_what_signal_handlers_raise_in_calls_leaves_no_connection_behind(client, server):
    class LateError(Exception):
        pass

    def late(*_):
        raise LateError

    client.connect()
    before = signal.signal(signal.SIGALRM, late)
    try:
        for number in range(3000):
            with contextlib.suppress(LateError):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + number % 300))
                    for _ in range(10):
                        client.call("echo_rpc")
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    client.call("echo_rpc")
    until(lambda: server.stats()["connections"] == 1, "one connection, which is idle")


def test_a_client_cannot_be_pickled(client):
    for thing in (client, client.proxy()):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(thing)
    assert KEY.decode() not in repr(client) + repr(client.proxy())


def test_starting_twice(server):
    with pytest.raises(RuntimeError):
        server.start()


def test_two_servers_of_one_address(server, target, client):
    with pytest.raises(ChannelError, match="another server uses this address"):
        ChannelServer(target, server.address, KEY).start()
    assert client.call("echo_rpc") == [[], {}]


def test_of_servers_that_start_at_once_one_wins(target, tmp_path):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))  # what all of them want to replace
    servers, losers, barrier = [], [], threading.Barrier(6)

    def start():
        barrier.wait()
        try:
            servers.append(ChannelServer(target, tmp_path / "s", KEY).start())
        except ChannelError as error:
            losers.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(servers), len(losers)) == (1, 5)
    with ChannelClient(tmp_path / "s", KEY) as client:
        assert client.call("echo_rpc") == [[], {}]
    servers[0].close()


def test_a_server_waits_while_another_starts_in_its_directory(target, tmp_path, monkeypatch):
    holder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    server = ChannelServer(target, tmp_path / "s", KEY)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr("shmelim.channel.server.LOCK_WAIT", 0.01)
    with pytest.raises(ChannelError, match="locked by another process"):
        ChannelServer(target, tmp_path / "t", KEY).start()
    monkeypatch.undo()
    os.close(holder)
    thread.join()
    assert (tmp_path / "s").exists()
    server.close()


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_the_socket_file(target, tmp_path, umask):
    path = tmp_path / "s"
    before = os.umask(umask)
    try:
        server = ChannelServer(target, path, KEY).start()
    finally:
        os.umask(before)
    with server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_the_socket_file_is_never_wider(target, tmp_path, monkeypatch):
    """Right after bind(), before anything else could narrow it."""
    modes = []

    class Spy(socket.socket):
        def bind(self, where):
            super().bind(where)
            modes.append(stat.S_IMODE(Path(where).stat().st_mode))

    monkeypatch.setattr("shmelim.channel.address.socket.socket", Spy)
    before = os.umask(0)
    try:
        ChannelServer(target, tmp_path / "s", KEY).start().close()
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_a_file_that_is_no_socket_is_left_alone(target, tmp_path):
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ChannelError, match="not a socket"):
        ChannelServer(target, tmp_path / "s", KEY).start()
    assert (tmp_path / "s").read_text() == "precious"


def test_a_successors_socket_file_is_left_alone(target, tmp_path):
    first = ChannelServer(target, tmp_path / "s", KEY).start()
    (tmp_path / "s").unlink()
    with ChannelServer(target, tmp_path / "s", KEY):
        first.close()
        with ChannelClient(tmp_path / "s", KEY) as client:
            assert client.call("echo_rpc") == [[], {}]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("/tmp/" + "x" * 120, "107"),
        ("", "empty"),
        ("a\0b", "NUL"),
        (("127.0.0.1", 65536), "65535"),
        (("", 1), "host"),
        (("h", "1"), "host, port"),
        (("h", 1, 2), "host, port"),
        (b"bytes", "bytes"),
        (7, "not 7"),
    ],
)
def test_bad_addresses(bad, words):
    for make in (lambda: ChannelServer(object(), bad, KEY), lambda: ChannelClient(bad, KEY)):
        with pytest.raises((TypeError, ValueError), match=words):
            make()


def test_an_address_that_cannot_be_used(target, tmp_path):
    with pytest.raises(ChannelError, match="absent"):
        ChannelServer(target, tmp_path / "absent" / "s", KEY).start()
    with pytest.raises(ChannelError, match=r"192\.0\.2\.1:0"):
        ChannelServer(target, ("192.0.2.1", 0), KEY).start()


def test_a_taken_address_can_be_known_before_anything_is_made(target, address, tmp_path):
    assert check_free(address) == address
    with (
        ChannelServer(target, address, KEY) as server,
        pytest.raises(ChannelError, match="another server uses this"),
    ):
        check_free(server.address)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "s").touch()
    for taken in (tmp_path / "s", tmp_path / "absent" / "s", ("192.0.2.1", 0)):
        with pytest.raises(ChannelError, match="cannot serve at"):
            check_free(taken)
    with pytest.raises(AddressError, match="107"):
        check_free("/tmp/" + "x" * 120)


def test_a_port_that_a_mere_connection_holds_is_explained(target):
    with socket.socket() as listener, socket.socket() as held:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        held.connect(listener.getsockname())
        taken = held.getsockname()
        with pytest.raises(ChannelError, match=r"may also be an outgoing connection.*ip_local_reserved_ports"):
            ChannelServer(target, taken, KEY).start()


def test_bad_limits(tmp_path):
    for limits in (
        {"max_message": 100},
        {"max_message": 2**31},
        {"max_connections": 0},
        {"max_pending": 0},
        {"handshake_timeout": 0},
        {"message_timeout": -1},
    ):
        with pytest.raises(ValueError, match="must be"):
            ChannelServer(object(), tmp_path / "s", KEY, **limits)
    with pytest.raises(ValueError, match="connect_wait"):
        ChannelClient(tmp_path / "s", KEY, connect_wait=-1)
    with pytest.raises(ValueError, match="timeout"):
        ChannelClient(tmp_path / "s", KEY, timeout=float("inf"))
