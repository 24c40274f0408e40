"""More clients than connections: those that are idle make room, and nobody loses a call by it."""

import errno
import resource
import socket
import struct
import threading

import pytest
from waiting import PATIENCE, until

from shmelim.channel import MSGPACK, ChannelClient, ChannelServer
from shmelim.errors import ChannelError
from shmelim.system.problems import Problems

KEY = b"0123456789abcdef0123456789abcdef"


class Target:
    def __init__(self):
        self.lock = threading.Lock()
        self.count = 0
        self.release = threading.Event()

    def add_rpc(self):
        with self.lock:
            self.count += 1
            return self.count

    def hang_rpc(self):
        assert self.release.wait(PATIENCE)
        return "done"


@pytest.fixture(params=["unix", "tcp"])
def address(request, tmp_path):
    return str(tmp_path / "s") if request.param == "unix" else ("127.0.0.1", 0)


@pytest.fixture
def target():
    target = Target()
    yield target
    target.release.set()


def call_and_rest(client, server):
    """Call, and wait until the server counts the connection as idle, which it does once the reply is sent."""
    client.call("add_rpc")
    until(lambda: server.stats()["running"] == 0)


class Crowd:
    """Clients that have called once each, and keep an idle connection."""

    def __init__(self, server, number):
        self.clients = [ChannelClient(server.address, KEY, timeout=PATIENCE) for _ in range(number)]
        for client in self.clients:
            call_and_rest(client, server)

    def __enter__(self):
        return self.clients

    def __exit__(self, *_):
        for client in self.clients:
            client.close()


def test_one_client_more_than_connections_is_served_and_the_others_do_not_notice(address, target):
    with ChannelServer(target, address, KEY, max_connections=8) as server, Crowd(server, 8) as clients:
        with ChannelClient(server.address, KEY, timeout=PATIENCE) as another:
            assert another.call("add_rpc") == 9
            assert server.stats()["connections"] == 8
            for client in clients:
                client.call("add_rpc")  # not to be repeated, and not an error
            assert another.call("add_rpc") == 18
        assert target.count == 18
        stats = server.stats()
        assert stats["refused"] == stats["malformed"] == stats["overdue"] == 0
        assert stats["reclaimed"] >= 1


def test_512_idle_clients_do_not_lock_out_the_next(tmp_path, target):
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("the system allows too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        with ChannelServer(target, tmp_path / "s", KEY) as server, Crowd(server, 512):
            with ChannelClient(server.address, KEY, timeout=PATIENCE) as another:
                assert another.call("add_rpc") == 513
            assert server.stats()["reclaimed"] == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_one_that_was_idle_longest_goes(address, target):
    with ChannelServer(target, address, KEY, max_connections=3) as server, Crowd(server, 3) as clients:
        call_and_rest(clients[0], server)
        with ChannelClient(server.address, KEY) as another:
            another.call("add_rpc")
            until(lambda: not clients[1]._connections._idle[0].quiet(), "the second client's goodbye")
            assert clients[0]._connections._idle[0].quiet()
            assert clients[2]._connections._idle[0].quiet()


def test_nobody_who_has_a_call_under_way_is_sent_away(address, target):
    problems = Problems()
    server = ChannelServer(target, address, KEY, service_name="svc", max_connections=2, problems=problems)
    with server, Crowd(server, 2) as clients:
        answers = []
        threads = [threading.Thread(target=lambda c=c: answers.append(c.call("hang_rpc"))) for c in clients]
        for thread in threads:
            thread.start()
        until(lambda: server.stats()["running"] == 2)
        with ChannelClient(server.address, KEY) as another:
            with pytest.raises(ChannelError, match="at its limit of 2 connections, and all are busy"):
                another.call("add_rpc")
            target.release.set()
            for thread in threads:
                thread.join()
            assert another.call("add_rpc") == 3
        assert answers == ["done", "done"]
        assert server.stats()["refused"] == 1


def test_nobody_who_is_sending_a_request_is_sent_away(address, target):
    with ChannelServer(target, address, KEY, max_connections=2) as server, Crowd(server, 2) as clients:
        request = MSGPACK.dumps([77, "add_rpc", [], {}])
        message = struct.pack("!i", len(request)) + request
        wire = clients[0]._connections.take()
        wire.sock.send(message[:7])
        (peer, *_) = server._peers._all
        until(lambda: peer.wire.begun, "the beginning of the request")
        with Crowd(server, 1):  # in the place of the second, although the first is idle for longer
            assert server.stats()["reclaimed"] == 1
        wire.sock.send(message[7:])
        wire.deadline = None
        assert MSGPACK.loads(wire.recv_bytes(1000)) == [77, True, 4]
        clients[0]._connections.give_back(wire)


def test_health_names_the_crowd_until_it_is_gone(address, target):
    problems = Problems()
    server = ChannelServer(target, address, KEY, service_name="svc", max_connections=4, problems=problems)
    with server:
        with Crowd(server, 4):
            assert problems.standing() == []
            with Crowd(server, 1):
                (problem,) = problems.standing()
                assert (problem.name, problem.subject, problem.severity) == (
                    "connections_crowded",
                    "svc",
                    "notice",
                )
                assert "4 connections" in problem.text
                assert problem.remedy
        until(lambda: problems.standing() == [], "the end of the problem")


def test_a_crowd_that_calls_all_the_time_loses_and_repeats_nothing(address, target):
    """The goodbye may cross a request: that was not carried out then, and is sent again."""
    errors, done = [], []
    with ChannelServer(target, address, KEY, max_connections=4) as server:

        def work():
            with ChannelClient(server.address, KEY, timeout=PATIENCE) as client:
                calls = 0
                # Until connections have made room, however the threads take turns.
                while not errors and (calls < 60 or server.stats()["reclaimed"] < 20):
                    try:
                        client.call("add_rpc")
                    except ChannelError as error:
                        if "all are busy" not in str(error):
                            errors.append(error)
                    else:
                        calls += 1
                done.append(calls)

        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert target.count == sum(done) >= 720


def test_out_of_descriptors_an_idle_connection_makes_room(address, target, monkeypatch):
    with ChannelServer(target, address, KEY) as server, Crowd(server, 2):
        real = socket.socket.accept

        def accept(sock):
            if server.stats()["reclaimed"] == 0:
                raise OSError(errno.EMFILE, "Too many open files")
            return real(sock)

        monkeypatch.setattr(socket.socket, "accept", accept)
        with ChannelClient(server.address, KEY, timeout=PATIENCE) as another:
            assert another.call("add_rpc") == 3
        assert server.stats()["reclaimed"] == 1
