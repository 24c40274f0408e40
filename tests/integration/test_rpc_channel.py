"""Calls between server and client in one process, over both kinds of address."""

import contextlib
import copy
import logging
import os
import pickle
import socket
import threading
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import pytest
from targets import KEY
from waiting import until

from shmelim.channel import ChannelClient, ChannelServer, current_caller
from shmelim.errors import (
    AuthenticationFailedError,
    CallTimeoutError,
    MessageTooLargeError,
    OutcomeUnknownError,
    UnknownMethodError,
)


def test_a_call_and_its_result(client):
    assert client.call("echo_rpc", (1, (2,)), {"x": {3}}) == [[1, [2]], {"x": {3}}]
    assert client.proxy().echo_rpc(1, timeout=5, idempotent=6) == [[1], {"timeout": 5, "idempotent": 6}]


def test_methods_that_are_listed_are_served_beside_those_that_end_in_rpc(address):
    class Prices:
        def latest(self, pair):
            return {"pair": pair}

        def hidden(self):
            raise AssertionError("called")

        def count_rpc(self):
            return 3

    server = ChannelServer(Prices(), address, KEY, methods=frozenset({"latest"}))
    with server, ChannelClient(server.address, KEY) as client:
        proxy = client.proxy(methods={"latest"}, idempotent={"latest"})
        assert proxy.latest("BTC/USD") == {"pair": "BTC/USD"}
        assert proxy.count_rpc() == 3
        with pytest.raises(UnknownMethodError, match="or are listed"):
            proxy.hidden  # noqa: B018
        with pytest.raises(UnknownMethodError, match="'hidden'"):
            client.call("hidden")
        with pytest.raises(UnknownMethodError):
            client.proxy().latest  # noqa: B018


@pytest.mark.parametrize("name", ["_private", "__init__", "missing", "number", "prices.latest", "Nested"])
def test_what_cannot_be_served_cannot_be_listed(tmp_path, name):
    class Prices:
        number = 1

        class Nested:
            pass

        def _private(self):
            raise AssertionError("called")

    with pytest.raises(ValueError, match=f"no public method '{name}'"):
        ChannelServer(Prices(), tmp_path / "s", KEY, methods=[name])
    with pytest.raises(TypeError, match="collection of names"):
        ChannelServer(Prices(), tmp_path / "s", KEY, methods=name)


def test_exceptions_of_the_method(client):
    with pytest.raises(KeyError) as caught:
        client.call("fail_rpc", ("k",))
    assert caught.value.args == ("k",)
    with pytest.raises(UnknownMethodError):
        client.call("hang")
    with pytest.raises(UnknownMethodError):
        client.proxy().hang  # noqa: B018
    with pytest.raises(AttributeError):
        client.proxy().__deepcopy__  # noqa: B018


def test_a_proxy_can_be_copied(client):
    assert copy.copy(client.proxy()).echo_rpc(1) == [[1], {}]


def test_arguments_are_checked_before_anything_is_sent(client, server):
    with pytest.raises(TypeError, match=r"echo_rpc: args\[1\]\['k'\] cannot be sent: .*object"):
        client.call("echo_rpc", (0, {"k": object()}))
    with pytest.raises(TypeError, match=r"echo_rpc: kwargs\['x'\]\[0\] cannot be sent: .*64 bits"):
        client.call("echo_rpc", kwargs={"x": [2**64]})
    with pytest.raises(ValueError, match="timeout"):
        client.call("echo_rpc", timeout=-1)
    assert server.stats()["accepted"] == 0


def test_large_messages_both_ways(client):
    text = "x" * 5_000_000
    assert client.call("echo_rpc", (text,)) == [[text], {}]


@pytest.mark.parametrize("size", [19_000, 20_000, 39_990, 40_000, 100_001])
def test_a_reply_that_is_longer_than_a_message_comes_in_several(target, address, size):
    with (
        ChannelServer(target, address, KEY, max_message=20_000) as server,
        ChannelClient(server.address, KEY, max_message=20_000) as client,
    ):
        for more in range(3):
            assert client.call("grow_rpc", (size + more,)) == "x" * (size + more)
        assert client.call("echo_rpc", (1,)) == [[1], {}]
        assert server.stats()["accepted"] == 1


def test_limits_of_size(target, address):
    with ChannelServer(target, address, KEY, max_message=20_000) as server:
        with ChannelClient(server.address, KEY, max_message=20_000) as client:
            with pytest.raises(MessageTooLargeError, match="request has"):
                client.call("echo_rpc", ("x" * 20_000,))
            assert server.stats()["accepted"] == 0
        with ChannelClient(server.address, KEY) as client:
            with pytest.raises(MessageTooLargeError, match="the limit is 20000"):  # the server's
                client.call("echo_rpc", ("x" * 5_000_000,))
            assert server.stats()["calls"] == 0
            assert client.call("echo_rpc", (1,)) == [[1], {}]
            assert server.stats()["accepted"] == 1
    with (
        ChannelServer(target, address, KEY) as server,
        ChannelClient(server.address, KEY, max_message=20_000) as client,
    ):
        with pytest.raises(OutcomeUnknownError, match="limit is 20000"):
            client.call("grow_rpc", (30_000,), idempotent=True)
        assert server.stats()["calls"] == 1


def test_a_connection_is_used_again(client, server):
    for number in range(50):
        assert client.call("echo_rpc", (number,)) == [[number], {}]
    assert server.stats()["accepted"] == 1
    assert server.stats()["calls"] == 50


def test_many_threads_have_calls_under_way_at_once(client, server, target):
    threads = 20
    target.barrier = threading.Barrier(threads)  # passes only when all calls are in the server at once
    results = []

    def call(number):
        results.append(client.call("meet_rpc", (number,)))
        for step in range(20):
            assert client.call("echo_rpc", (number, step)) == [[number, step], {}]

    running = [threading.Thread(target=call, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert sorted(results) == list(range(threads))
    until(lambda: server.stats()["connections"] <= 8, "only the bounded number kept idle")


def test_who_calls(client, server):
    pid, uid, program = client.call("caller_rpc")
    assert pid == os.getpid()
    assert uid == (os.getuid() if isinstance(server.address, str) else None)
    assert program
    assert current_caller() is None


def test_what_the_kernel_says_beats_what_the_client_says(client, server, monkeypatch):
    monkeypatch.setattr("shmelim.channel.protocol.os.getpid", lambda: 424242)
    pid, _, _ = client.call("caller_rpc")
    monkeypatch.undo()
    assert (pid == os.getpid()) == isinstance(server.address, str)
    assert (pid == 424242) != isinstance(server.address, str)


def test_a_deadline_on_a_method_that_hangs(client, server, target):
    with pytest.raises(OutcomeUnknownError, match=r"hang_rpc .*no reply came in time") as caught:
        client.call("hang_rpc", timeout=0.3)
    assert str(caught.value).count("may or may not") == 1
    assert target.entered.is_set()
    with pytest.raises(OutcomeUnknownError):
        client.call("hang_rpc", timeout=0.3, idempotent=True)
    target.release.set()
    for number in range(5):  # the late reply must reach nobody
        assert client.call("echo_rpc", (number,)) == [[number], {}]
    until(lambda: server.stats()["running"] == 0)


def test_no_time_at_all(client):
    with pytest.raises(CallTimeoutError):
        client.call("echo_rpc", timeout=0)


def test_a_server_that_never_shakes_hands(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with ChannelClient(tmp_path / "s", KEY) as client, pytest.raises(CallTimeoutError, match="handshake"):
            client.call("echo_rpc", timeout=0.1)


def test_another_key(server, caplog):
    client = ChannelClient(server.address, b"another key, long enough")
    with client, pytest.raises(AuthenticationFailedError):
        client.call("echo_rpc")
    until(lambda: server.stats()["wrong_key"] == 1)
    until(lambda: "does not hold the key" in caplog.text)
    for secret in (KEY, b"another key, long enough"):
        assert secret.decode() not in caplog.text
        assert repr(secret) not in repr(vars(server)).replace(repr(server._authkey), "")


def test_a_server_with_another_key_is_not_believed(tmp_path):
    """The challenge is mutual: a server that accepts any client still has to prove its own key."""
    seen = []

    def impostor(listener):
        sock, _ = listener.accept()
        connection = Connection(sock.detach())
        connection.send_bytes(b"#CHALLENGE#" + b"{sha256}" + b"c" * 20)
        connection.recv_bytes()
        connection.send_bytes(b"#WELCOME#")
        with contextlib.suppress(Exception):
            answer_challenge(connection, b"a guess, and a wrong one")
        with contextlib.suppress(EOFError, OSError):
            seen.append(connection.recv_bytes())
        connection.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=impostor, args=(listener,))
        thread.start()
        with ChannelClient(tmp_path / "s", KEY) as client, pytest.raises(AuthenticationFailedError):
            client.call("echo_rpc", ("secret",))
        thread.join()
    assert seen == []


def test_the_key_is_asked_for_at_each_connect(target, tmp_path):
    keys = [b"a" * 32]
    client = ChannelClient(tmp_path / "s", lambda: keys[-1])
    with ChannelServer(target, tmp_path / "s", keys[-1]):
        assert client.call("echo_rpc") == [[], {}]
    keys.append(b"b" * 32)
    with ChannelServer(target, tmp_path / "s", keys[-1]):
        assert client.call("echo_rpc") == [[], {}]
    client.close()


@pytest.mark.parametrize("key", ["text", b"", b"short", None])
def test_what_is_not_a_key(tmp_path, key):
    with pytest.raises((TypeError, ValueError), match="the key must"):
        ChannelServer(object(), tmp_path / "s", key)
    with pytest.raises((TypeError, ValueError), match="the key must"):
        ChannelClient(tmp_path / "s", key)


def test_tcp_has_no_delay_at_both_ends(target):
    with ChannelServer(target, ("127.0.0.1", 0), KEY) as server, ChannelClient(server.address, KEY) as client:
        client.call("echo_rpc")
        ends = [*server._peers._all, *client._connections._wires.values()]
        for end in ends:
            sock = getattr(end, "wire", end).sock
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert len(ends) == 2


def test_a_plain_connection_of_the_standard_library_can_call(server):
    """The framing and the handshake are those of multiprocessing.connection."""
    from shmelim.channel.codec import MSGPACK

    sock = socket.socket(socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET)
    sock.connect(server.address)
    connection = Connection(sock.detach())
    answer_challenge(connection, KEY)
    deliver_challenge(connection, KEY)
    connection.send_bytes(MSGPACK.dumps([1, 77, "other"]))
    assert MSGPACK.loads(connection.recv_bytes()) == [1, "svc", None, 64 * 1024 * 1024]
    connection.send_bytes(MSGPACK.dumps([5, "echo_rpc", [1], {}]))
    assert MSGPACK.loads(connection.recv_bytes()) == [5, True, [[1], {}]]
    connection.close()


def test_a_codec_can_be_plugged_in(target, tmp_path):
    class Pickle:
        dumps = staticmethod(pickle.dumps)
        loads = staticmethod(pickle.loads)

    server = ChannelServer(target, tmp_path / "s", KEY, codec=Pickle())
    with server, ChannelClient(tmp_path / "s", KEY, codec=Pickle()) as client:
        assert client.call("echo_rpc", ((1, 2j),)) == [[(1, 2j)], {}]
        with pytest.raises(KeyError):
            client.call("fail_rpc", ("k",))


def test_logging_goes_to_the_channels_logger(server, caplog):
    caplog.set_level(logging.WARNING, "shmelim.channel")
    with ChannelClient(server.address, b"x" * 32) as client, pytest.raises(AuthenticationFailedError):
        client.call("echo_rpc")
    until(lambda: caplog.records)
    assert {record.name for record in caplog.records} == {"shmelim.channel"}
