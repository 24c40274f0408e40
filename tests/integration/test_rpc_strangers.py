"""Peers that speak another protocol: each end is told what answers there, and nothing of theirs is unpickled."""

import contextlib
import os
import pickle
import socket
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from multiprocessing.managers import BaseManager, RemoteError

import pytest
from waiting import PATIENCE, until

from shmelim.channel import ChannelClient, ChannelServer
from shmelim.channel.codec import MSGPACK
from shmelim.errors import AuthenticationFailedError, ProtocolError

KEY = b"0123456789abcdef0123456789abcdef"
OTHER = b"another key, as long as this one"


class Manager(BaseManager):
    """What the field's services still serve with."""


class Target:
    def echo_rpc(self, value=None):
        return value


@pytest.fixture
def manager(address):
    """A manager's server, in threads of this process."""
    server = Manager(address, authkey=KEY).get_server()
    accepting = threading.Thread(target=server.accepter, daemon=True)
    accepting.start()
    yield server
    server.listener.close()


@pytest.mark.parametrize(
    ("key", "words"), [(KEY, "it holds the same key"), (OTHER, "it holds another key")], ids=["same", "another"]
)
def test_a_client_of_ours_is_told_that_a_manager_answers(manager, key, words):
    with (
        ChannelClient(manager.address, key, timeout=PATIENCE) as client,
        pytest.raises(ProtocolError, match=rf"a multiprocessing manager \(BaseManager\), and {words}") as caught,
    ):
        client.call("echo_rpc")
    where = manager.address if isinstance(manager.address, str) else str(manager.address[1])
    assert where in caught.value.message
    assert "another address" in caught.value.hint


def test_a_managers_client_is_told_that_a_channel_answers(address, caplog):
    with ChannelServer(Target(), address, KEY, service_name="svc") as server:
        with pytest.raises(RemoteError, match=r"svc at .* is not a multiprocessing manager but a command channel"):
            Manager(server.address, authkey=KEY).connect()
        until(lambda: "is a client of a multiprocessing manager" in caplog.text)
        assert server.stats()["malformed"] == 1
        with ChannelClient(server.address, KEY) as client:
            assert client.call("echo_rpc", (1,)) == 1


def test_a_managers_client_with_another_key_is_refused_as_a_manager_would(address):
    with ChannelServer(Target(), address, KEY) as server:
        with pytest.raises(AuthenticationError):
            Manager(server.address, authkey=OTHER).connect()
        until(lambda: server.stats()["wrong_key"] == 1)


class Trap:
    """A pickle that leaves a file when somebody loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path):
    return pickle.dumps(("#TRACEBACK", Trap(str(tmp_path / "sprung"))))


def test_what_a_stranger_pickled_is_not_loaded_by_the_server(address, trap, tmp_path):
    with ChannelServer(Target(), address, KEY) as server:
        sock = socket.socket(socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET)
        sock.connect(server.address)
        connection = Connection(sock.detach())
        answer_challenge(connection, KEY)
        deliver_challenge(connection, KEY)
        connection.send_bytes(trap)
        assert b"#TRACEBACK" in connection.recv_bytes()
        connection.close()
    assert not (tmp_path / "sprung").exists()


@contextlib.contextmanager
def answering(tmp_path, behave):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x"))
        listener.listen()

        def run():
            connection = Connection(listener.accept()[0].detach())
            with contextlib.suppress(EOFError, OSError):
                behave(connection)
            connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        yield str(tmp_path / "x")
        thread.join()


def test_what_a_stranger_pickled_is_not_loaded_by_the_client(tmp_path, trap):
    def behave(connection):
        deliver_challenge(connection, KEY)
        answer_challenge(connection, KEY)
        connection.recv_bytes()
        connection.send_bytes(trap)

    with (
        answering(tmp_path, behave) as path,
        ChannelClient(path, KEY) as client,
        pytest.raises(ProtocolError, match="manager"),
    ):
        client.call("echo_rpc")
    assert not (tmp_path / "sprung").exists()


def test_a_program_that_holds_the_key_and_is_something_else_is_named_as_that(tmp_path):
    def behave(connection):
        deliver_challenge(connection, KEY)
        answer_challenge(connection, KEY)
        connection.recv_bytes()
        connection.send_bytes(MSGPACK.dumps("welcome"))

    with (
        answering(tmp_path, behave) as path,
        ChannelClient(path, KEY) as client,
        pytest.raises(ProtocolError, match="not a server of shmelim but a program that holds the key"),
    ):
        client.call("echo_rpc")


def test_the_first_words_of_a_stranger_are_shown(tmp_path):
    def behave(connection):
        with socket.socket(fileno=socket.dup(connection.fileno())) as sock:
            sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            sock.recv(100)

    with (
        answering(tmp_path, behave) as path,
        ChannelClient(path, KEY) as client,
        pytest.raises(ProtocolError, match=r"another program .*SSH-2\.0-OpenSSH"),
    ):
        client.call("echo_rpc")


def test_a_web_browser_is_named_in_the_log(address, caplog):
    with ChannelServer(Target(), address, KEY, service_name="svc") as server:
        family = socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET
        with socket.socket(family) as sock:
            sock.connect(server.address)
            sock.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: "begins with b'GET /status" in caplog.text)
            assert "speaks another protocol" in caplog.text


def test_another_key_stays_another_key(address):
    with (
        ChannelServer(Target(), address, KEY) as server,
        ChannelClient(server.address, OTHER) as client,
        pytest.raises(AuthenticationFailedError, match="holds another key"),
    ):
        client.call("echo_rpc")


def test_pickles_are_named_where_msgpack_is_due():
    with pytest.raises(ProtocolError, match="not valid msgpack: a pickle"):
        MSGPACK.loads(pickle.dumps([1, "echo_rpc", [], {}]))
