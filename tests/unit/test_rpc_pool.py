"""The client's pool, closed at every single step of its own methods, as by a signal handler of the same thread."""

import gc
import socket
import sys
import threading

import pytest
from waiting import PATIENCE

from shmelim.channel.client import Connections
from shmelim.errors import ChannelError


class Sockets:
    """Connected sockets, all of which can be asked whether they were closed."""

    def __init__(self):
        self.made = []
        self.others = []

    def make(self, _location):
        here, there = socket.socketpair()
        self.made.append(here)
        self.others.append(there)
        return here

    def all_closed(self):
        return all(sock.fileno() == -1 for sock in self.made)


@pytest.fixture
def sockets(monkeypatch):
    sockets = Sockets()
    monkeypatch.setattr("shmelim.channel.client.new_socket", sockets.make)
    yield sockets
    for sock in sockets.others:
        sock.close()


def take(pool, _sockets):
    wire = pool.take()
    if wire is not None:
        pool.discard(wire)


def take_and_give_back(pool, _sockets):
    pool.give_back(pool.take())


def take_a_broken_one(pool, sockets):
    sockets.others[0].close()
    assert pool.take() is None


def open_one(pool, sockets):
    pool.discard(pool.open("/nowhere"))


def retire_and_close(pool, _sockets):
    pool.retire("for now")
    pool.close("for good")


def interrupted_at(step, function, interrupt):
    """Call a function, and `interrupt` it before that step of this package's code; say if it came to that."""
    left = step

    def trace(frame, event, _argument):
        nonlocal left
        if "shmelim" not in frame.f_code.co_filename or left < 0:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if left == 0:
                left = -1
                sys.settrace(None)
                interrupt()
                return None
            left -= 1
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return left < 0


@pytest.mark.parametrize(
    "use", [take, take_and_give_back, take_a_broken_one, open_one, retire_and_close], ids=lambda use: use.__name__
)
def test_closed_by_a_signal_handler_at_any_step(sockets, use):
    steps = []

    def at_every_step():
        while True:
            pool = Connections()
            sockets.made.clear()
            sockets.others.clear()
            pool.give_back(pool.open("/nowhere"))
            try:
                came = interrupted_at(len(steps), lambda: use(pool, sockets), lambda: pool.close("the end"))  # noqa: B023
            except ChannelError:
                came = True
            if not came:
                return
            steps.append(sockets.all_closed())
            with pytest.raises(ChannelError, match=r"the end|for now"):
                pool.take()

    thread = threading.Thread(target=at_every_step, daemon=True)  # one that waits for itself would never come back
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert len(steps) > 10
    assert all(steps)


def test_one_that_is_retired_leaves_those_in_use_alone(sockets):
    pool = Connections()
    idle, used = pool.open("/nowhere"), pool.open("/nowhere")
    pool.give_back(idle)
    pool.retire("not any more")
    with pytest.raises(ChannelError, match="not any more"):
        pool.take()
    with pytest.raises(ChannelError, match="not any more"):
        pool.open("/nowhere")
    assert [sock.fileno() == -1 for sock in sockets.made] == [True, False, True]
    sockets.others[1].sendall(b"\0\0\0\2ok")
    assert used.recv_bytes(10) == b"ok"
    pool.close("the end")
    with pytest.raises(EOFError):
        used.recv_bytes(10)
    pool.give_back(used)
    assert sockets.all_closed()


def test_one_that_ends_in_a_cycle_closes_what_is_idle(sockets):
    pool = Connections()
    pool.give_back(pool.open("/nowhere"))
    pool.itself = pool
    del pool
    gc.collect()
    assert sockets.all_closed()
