"""Peers that are silent, slow, wrong or hostile: they are dropped, and never hold up anyone else."""

import contextlib
import errno
import itertools
import resource
import socket
import struct
import threading
import time
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import pytest
from ledger import PATIENCE, until

from shmelim.channel import ChannelClient, ChannelServer
from shmelim.channel.codec import MSGPACK
from shmelim.errors import ChannelError, OutcomeUnknownError, ProtocolError

KEY = b"0123456789abcdef0123456789abcdef"


class Target:
    def echo_rpc(self, value=None):
        return value

    def big_rpc(self, size):
        return "x" * size


@pytest.fixture(params=["unix", "tcp"])
def address(request, tmp_path):
    return str(tmp_path / "s") if request.param == "unix" else ("127.0.0.1", 0)


@contextlib.contextmanager
def serving(address, **limits):
    with ChannelServer(Target(), address, KEY, service_name="svc", **limits) as server:
        yield server


def connect(server):
    sock = socket.socket(socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET)
    sock.settimeout(PATIENCE)
    sock.connect(server.address)
    return sock


def authenticated(server, hello=(1, 77, "raw")):
    """A connection of the standard library that holds the key, and its welcome."""
    sock = connect(server)
    sock.settimeout(None)
    connection = Connection(sock.detach())
    answer_challenge(connection, KEY)
    deliver_challenge(connection, KEY)
    connection.send_bytes(MSGPACK.dumps(list(hello)))
    return connection, MSGPACK.loads(connection.recv_bytes())


def ends(sock):
    """Whether the server ends the connection; what it says before that does not matter."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while sock.recv(4096):
            pass
    return True


def can_call(server):
    with ChannelClient(server.address, KEY, timeout=PATIENCE) as client:
        return client.call("echo_rpc", (1,)) == 1


@pytest.fixture
def many_descriptors():
    """Both ends of 500 connections are in this process."""
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("the system allows too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_descriptors")
def test_500_silent_peers_delay_nobody(address):
    with serving(address, handshake_timeout=PATIENCE * 10) as server:
        silent = [connect(server) for _ in range(500)]
        until(lambda: server.stats()["accepted"] >= 500)
        with ChannelClient(server.address, KEY, timeout=PATIENCE) as client:
            assert client.call("echo_rpc", (1,)) == 1
        assert server.stats()["pending"] <= 128
        until(lambda: server.stats()["dropped"] >= 500 - 128)
        for sock in silent[:300]:  # the oldest made room
            assert ends(sock)
        for sock in silent:
            sock.close()
        until(lambda: server.stats()["pending"] == 0)
        until(lambda: sum(t.name == "svc-peer" for t in threading.enumerate()) == 0, "their threads end")


def test_a_silent_peer_is_dropped_in_time(address, caplog):
    with serving(address, handshake_timeout=0.1) as server, connect(server) as sock:
        assert ends(sock)
        until(lambda: server.stats()["overdue"] == 1)
        assert "did not finish a handshake" in caplog.text


def test_one_byte_at_a_time_does_not_stretch_the_handshake(address):
    with serving(address, handshake_timeout=0.4) as server, connect(server) as sock:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for byte in itertools.chain(struct.pack("!i", 200), itertools.repeat(0)):
                sock.send(bytes([byte]))
                time.sleep(0.01)  # each byte would renew a deadline of a single read
        until(lambda: server.stats()["overdue"] == 1)
        assert can_call(server)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 100,
        b"\xff" * 100,
        struct.pack("!i", 257) + b"x" * 257,
        struct.pack("!i", 2**30) + b"x" * 100,
        struct.pack("!iQ", -1, 2**62) + b"x" * 100,
        struct.pack("!i", 16) + b"x" * 16,
        struct.pack("!i", 0),
    ],
)
def test_garbage_instead_of_a_handshake(address, garbage):
    with serving(address) as server:
        with connect(server) as sock:
            sock.sendall(garbage)
            assert ends(sock)
        until(lambda: server.stats()["malformed"] + server.stats()["wrong_key"] == 1)
        assert can_call(server)


def test_a_peer_that_leaves_in_the_middle_of_a_handshake(address):
    with serving(address) as server:
        for size in (0, 2, 4, 10):
            with connect(server) as sock:
                sock.sendall((struct.pack("!i", 16) + b"x" * 16)[:size])
        until(lambda: server.stats()["accepted"] == 4)
        assert can_call(server)
        until(lambda: server.stats()["pending"] == 0)


def test_a_client_that_does_not_challenge(address):
    """It knows the key, but does not ask us for it: it is no client of this protocol."""
    with serving(address) as server:
        sock = connect(server)
        sock.settimeout(None)
        connection = Connection(sock.detach())
        answer_challenge(connection, KEY)
        connection.send_bytes(MSGPACK.dumps([1, "echo_rpc", [], {}]))
        with pytest.raises((EOFError, ConnectionResetError)):
            connection.recv_bytes()
        connection.close()
        until(lambda: server.stats()["malformed"] + server.stats()["wrong_key"] == 1)


@pytest.mark.parametrize("hello", [(), ("1", 2, "x"), (1, 2), (1, "2", "x"), (1, 2, b"x"), (1, 2, "x" * 600)])
def test_a_bad_hello(address, hello):
    with serving(address) as server:
        with pytest.raises((EOFError, ConnectionResetError)):
            authenticated(server, hello)
        until(lambda: server.stats()["malformed"] == 1)
        assert can_call(server)


def test_another_protocol_of_a_client_is_named(address, caplog):
    with serving(address) as server:
        connection, welcome = authenticated(server, (2, 77, "from the future", "with more"))
        assert welcome[:2] == [1, "svc"]
        with pytest.raises((EOFError, ConnectionResetError)):
            connection.recv_bytes()
        connection.close()
        until(lambda: "speaks protocol 2, this server 1" in caplog.text)


def test_another_protocol_of_a_server_is_named(tmp_path):
    later = MSGPACK.dumps([3, "svc", None, 2**30, "more"])
    with (
        fake_server(tmp_path, lambda *_: None, lambda *_: later) as path,
        ChannelClient(path, KEY) as client,
        pytest.raises(ProtocolError, match=r"svc at .* speaks protocol 3, this client 1"),
    ):
        client.call("echo_rpc")


@pytest.mark.parametrize(
    "message",
    [
        b"garbage",
        b"",
        MSGPACK.dumps([1, 2]),
        MSGPACK.dumps([1, "echo_rpc", [], {}, 0]),
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 50_000,
        b"\x80\x04\x95cos\nsystem\n",
    ],
)
def test_garbage_from_one_who_holds_the_key(address, message, caplog):
    with serving(address) as server:
        connection, _ = authenticated(server)
        connection.send_bytes(message)
        with pytest.raises((EOFError, ConnectionResetError)):
            connection.recv_bytes()
        connection.close()
        until(lambda: "broke the protocol" in caplog.text)
        assert server.stats()["malformed"] == 1
        assert can_call(server)


def test_a_gigabyte_announced_is_dropped_at_the_header(address, caplog):
    with serving(address) as server:
        connection, _ = authenticated(server)
        with socket.socket(fileno=socket.dup(connection.fileno())) as sock:
            sock.sendall(struct.pack("!i", 2**30))
            assert ends(sock)
        connection.close()
        until(lambda: "1073741824 bytes was announced" in caplog.text)
        assert can_call(server)


def test_a_message_that_is_cut(address):
    with serving(address) as server:
        connection, _ = authenticated(server)
        with socket.socket(fileno=socket.dup(connection.fileno())) as sock:
            sock.sendall(struct.pack("!i", 1000) + b"x" * 500)
            sock.shutdown(socket.SHUT_WR)
            assert ends(sock)
        connection.close()
        until(lambda: server.stats()["connections"] == 0)
        assert server.stats()["calls"] == 0


def test_an_idle_connection_may_stay_but_a_begun_message_must_end(address):
    with serving(address, message_timeout=0.3) as server:
        connection, _ = authenticated(server)
        time.sleep(0.4)  # idle for longer than a message may take
        connection.send_bytes(MSGPACK.dumps([1, "echo_rpc", [5], {}]))
        assert MSGPACK.loads(connection.recv_bytes()) == [1, True, 5]
        with socket.socket(fileno=socket.dup(connection.fileno())) as sock:
            sock.sendall(struct.pack("!i", 1000))
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                for _ in itertools.count():
                    sock.send(b"x")
                    time.sleep(0.01)
        connection.close()
        until(lambda: server.stats()["overdue"] == 1)
        assert server.stats()["connections"] == 0


def test_a_peer_that_does_not_take_its_reply(address):
    with serving(address, message_timeout=0.2) as server:
        connection, _ = authenticated(server)
        connection.send_bytes(MSGPACK.dumps([1, "big_rpc", [20_000_000], {}]))
        until(lambda: server.stats()["overdue"] == 1)
        until(lambda: server.stats()["running"] == 0)
        assert can_call(server)
        connection.close()


def test_a_flood_of_faults_does_not_flood_the_log(address, caplog):
    with serving(address) as server:
        for _ in range(200):
            with connect(server) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert ends(sock)
        until(lambda: server.stats()["malformed"] == 200)
        assert 1 <= len(caplog.records) <= 12


def test_out_of_descriptors_the_server_goes_on(address, monkeypatch, caplog):
    real, failures = socket.socket.accept, itertools.count()

    def accept(self):
        if next(failures) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(self)

    with serving(address) as server:
        monkeypatch.setattr(socket.socket, "accept", accept)
        assert can_call(server)
        assert "Too many open files" in caplog.text


def test_no_thread_to_be_had_the_server_goes_on(address, monkeypatch):
    with serving(address) as server:
        real, failures = threading.Thread.start, itertools.count()

        def start(self):
            if self.name == "svc-peer" and next(failures) < 2:
                raise RuntimeError("can't start new thread")
            real(self)

        monkeypatch.setattr(threading.Thread, "start", start)
        assert can_call(server)  # the client tries again after a broken handshake
        until(lambda: server.stats()["pending"] == 0)


@contextlib.contextmanager
def fake_server(tmp_path, behave, welcome=None):
    """A server that shakes hands properly, and then does what `behave` says with each connection."""
    path = str(tmp_path / "fake")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def run():
        for number in itertools.count():
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            connection = Connection(sock.detach())
            with contextlib.suppress(EOFError, OSError):
                deliver_challenge(connection, KEY)
                answer_challenge(connection, KEY)
                connection.recv_bytes()
                usual = MSGPACK.dumps([1, "fake", None, 2**30])
                connection.send_bytes(usual if welcome is None else welcome(number, usual))
                behave(connection, number)
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield path
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def answer(connection, value, number=None):
    request = MSGPACK.loads(connection.recv_bytes())
    connection.send_bytes(MSGPACK.dumps([request[0] if number is None else number, True, value]))


@pytest.mark.parametrize(
    "reply",
    [
        b"garbage",
        MSGPACK.dumps([]),
        MSGPACK.dumps([999, True, 1]),
        MSGPACK.dumps([1, 1, 0]),
        MSGPACK.dumps([1, False, "no failure"]),
    ],
)
def test_a_reply_that_is_none(tmp_path, reply):
    def behave(connection, _):
        connection.recv_bytes()
        connection.send_bytes(reply)

    with (
        fake_server(tmp_path, behave) as path,
        ChannelClient(path, KEY) as client,
        pytest.raises(OutcomeUnknownError, match="may or may not"),
    ):
        client.call("echo_rpc")


def test_a_reply_that_comes_one_byte_at_a_time_does_not_stretch_a_call(tmp_path):
    def behave(connection, _):
        connection.recv_bytes()
        with socket.socket(fileno=socket.dup(connection.fileno())) as sock:
            for byte in itertools.chain(struct.pack("!i", 1000), itertools.repeat(0)):
                sock.send(bytes([byte]))
                time.sleep(0.01)

    with (
        fake_server(tmp_path, behave) as path,
        ChannelClient(path, KEY) as client,
        pytest.raises(OutcomeUnknownError, match="in time"),
    ):
        client.call("echo_rpc", timeout=1.0)


def test_a_connection_lost_after_sending(tmp_path):
    """Repeated when that is allowed, in doubt when not."""

    def behave(connection, number):
        if number < 2:
            connection.recv_bytes()
        else:
            answer(connection, number)

    with fake_server(tmp_path, behave) as path, ChannelClient(path, KEY) as client:
        with pytest.raises(
            OutcomeUnknownError, match=r"echo_rpc was sent to .*fake, but the connection was closed"
        ):
            client.call("echo_rpc")
        assert client.call("echo_rpc", idempotent=True) == 2


def test_a_connection_lost_each_time(tmp_path):
    seen = []

    def behave(connection, number):
        connection.recv_bytes()
        seen.append(number)

    with (
        fake_server(tmp_path, behave) as path,
        ChannelClient(path, KEY) as client,
        pytest.raises(OutcomeUnknownError),
    ):
        client.call("echo_rpc", idempotent=True)
    assert len(seen) == 4


def test_a_request_that_could_not_be_sent_whole_is_sent_again(tmp_path):
    """The first server closes with the request half received; nobody can have carried it out."""

    def behave(connection, number):
        if number:
            answer(connection, "second")
            return
        with socket.socket(fileno=socket.dup(connection.fileno())) as sock:
            sock.recv(10)

    with fake_server(tmp_path, behave) as path, ChannelClient(path, KEY) as client:
        assert client.call("echo_rpc", ("x" * 20_000_000,)) == "second"


def test_a_server_that_says_goodbye_did_not_carry_it_out(tmp_path):
    def behave(connection, number):
        if number < 6:
            connection.recv_bytes()
            connection.send_bytes(b"")
        else:
            answer(connection, "at last")

    with fake_server(tmp_path, behave) as path, ChannelClient(path, KEY) as client:
        assert client.call("echo_rpc") == "at last"


def test_a_server_may_say_goodbye_before_its_welcome(tmp_path):
    def welcome(number, usual):
        return usual if number else b""

    def behave(connection, _):
        answer(connection, 5)

    with fake_server(tmp_path, behave, welcome) as path, ChannelClient(path, KEY) as client:
        assert client.call("echo_rpc") == 5


@pytest.mark.parametrize(
    "welcome",
    [b"garbage", MSGPACK.dumps(5), MSGPACK.dumps([]), MSGPACK.dumps(["1", "svc", None, 5]), b"\x91" * 99],
)
def test_a_welcome_that_is_none(tmp_path, welcome):
    with (
        fake_server(tmp_path, lambda *_: None, lambda *_: welcome) as path,
        ChannelClient(path, KEY) as client,
        pytest.raises(ProtocolError, match="is not a server of shmelim but a program that holds the key"),
    ):
        client.call("echo_rpc")


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9\r\n", struct.pack("!i", 5) + b"hello", b"\x00" * 64])
def test_whoever_listens_is_no_server(tmp_path, greeting):
    path = str(tmp_path / "other")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def run():
            sock, _ = listener.accept()
            with sock:
                sock.sendall(greeting)
                ends(sock)

        thread = threading.Thread(target=run)
        thread.start()
        with ChannelClient(path, KEY) as client, pytest.raises(ChannelError, match="other"):
            client.call("echo_rpc")
        thread.join()


def test_a_server_that_breaks_every_handshake_off(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def run():
            for _ in range(4):
                listener.accept()[0].close()

        thread = threading.Thread(target=run)
        thread.start()
        with ChannelClient(path, KEY) as client, pytest.raises(ChannelError, match="during the handshake"):
            client.call("echo_rpc")
        thread.join()


def test_a_client_never_talks_to_itself():
    """A connection to a free local port can be given that port as its own, and be connected to itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    real = socket.socket.connect

    def connect_to_itself(self, address):
        self.bind(("127.0.0.1", port))
        real(self, ("127.0.0.1", port))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_to_itself)
        with (
            ChannelClient(("127.0.0.1", port), KEY, timeout=PATIENCE) as client,
            pytest.raises(ConnectionError, match="nobody serves"),
        ):
            client.call("echo_rpc")
