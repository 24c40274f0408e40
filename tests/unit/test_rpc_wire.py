"""A wire speaks the framing of multiprocessing.connection, and obeys its deadline."""

import socket
import struct
import threading
import time
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import pytest

from shmelim.channel.wire import Wire
from shmelim.errors import ProtocolError


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    wire = Wire(left, patience=10.0)
    yield wire, right
    wire.close()
    right.close()


SIZES = [0, 1, 3, 4, 5, 100, 16 * 1024 - 5, 16 * 1024 - 4, 16 * 1024, 16 * 1024 + 1, 300_000, 3_000_000]


@pytest.mark.parametrize("size", SIZES)
def test_interoperates_with_connection(pair, size):
    wire, sock = pair
    other = Connection(sock.detach())
    message = bytes(range(256)) * (size // 256 + 1)
    message = message[:size]
    wire.deadline = time.monotonic() + 30

    def echo():
        other.send_bytes(other.recv_bytes())

    thread = threading.Thread(target=echo)
    thread.start()
    wire.send_bytes(message)
    assert wire.recv_bytes(10**7) == message
    thread.join()
    other.close()


def test_the_handshake_functions_run_over_it(pair):
    wire, sock = pair
    other = Connection(sock.detach())
    key = b"k" * 32

    def peer():
        answer_challenge(other, key)
        deliver_challenge(other, key)
        other.send_bytes(b"directly after")

    thread = threading.Thread(target=peer)
    thread.start()
    deliver_challenge(wire, key)
    answer_challenge(wire, key)
    assert wire.recv_bytes(100) == b"directly after"
    thread.join()
    other.close()


def test_messages_that_come_together_are_kept_apart(pair):
    wire, sock = pair
    messages = [b"a" * n for n in (0, 1, 5, 20_000, 3)]
    sock.sendall(b"".join(struct.pack("!i", len(m)) + m for m in messages) + struct.pack("!i", 2) + b"x")
    assert [wire.recv_bytes(30_000) for _ in messages] == messages
    assert not wire.quiet()
    sock.sendall(b"y")
    assert wire.recv_bytes(10) == b"xy"
    assert wire.quiet()


def test_long_header(pair):
    wire, sock = pair
    sock.sendall(struct.pack("!iQ", -1, 3) + b"abc")
    assert wire.recv_bytes(10) == b"abc"


@pytest.mark.parametrize(
    "header",
    [struct.pack("!i", 11), struct.pack("!i", -2), struct.pack("!i", 2**30), struct.pack("!iQ", -1, 2**63)],
)
def test_announced_too_large_is_refused_at_the_header(pair, header):
    wire, sock = pair
    sock.sendall(header)
    with pytest.raises(ProtocolError, match="announced"):
        wire.recv_bytes(10)


def test_end_of_file_between_and_within_messages(pair):
    wire, sock = pair
    sock.sendall(struct.pack("!i", 5) + b"ab")
    sock.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        wire.recv_bytes(10)
    with pytest.raises(EOFError):
        wire.recv_bytes(10)


def test_a_slow_sender_does_not_stretch_the_deadline(pair):
    wire, sock = pair
    stop = threading.Event()

    def drip():
        sock.sendall(struct.pack("!i", 10_000))
        while not stop.wait(0.01):
            sock.send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    wire.deadline = time.monotonic() + 0.2
    with pytest.raises(TimeoutError):
        wire.recv_bytes(20_000)
    stop.set()
    thread.join()


def test_a_message_that_has_begun_must_end_even_without_a_deadline(pair):
    wire, sock = pair
    wire.patience = 0.1
    sock.sendall(b"\x00\x00")
    with pytest.raises(TimeoutError):
        wire.recv_bytes(10)


def test_waiting_for_a_first_byte_has_no_limit_even_after_one_with_a_limit(pair):
    wire, sock = pair
    wire.deadline = time.monotonic() + 0.05
    with pytest.raises(TimeoutError):
        wire.recv_bytes(10)
    wire.deadline = None
    got = []
    thread = threading.Thread(target=lambda: got.append(wire.recv_bytes(10)))
    thread.start()
    thread.join(0.15)  # longer than the limit that the kernel had
    assert thread.is_alive()
    sock.sendall(struct.pack("!i", 1) + b"z")
    thread.join(20)
    assert got == [b"z"]


@pytest.mark.parametrize("size", [10_000, 10_000_000])
def test_sending_to_a_peer_that_takes_nothing_ends(pair, size):
    wire, _ = pair
    wire.deadline = time.monotonic() + 0.2

    def fill():
        while True:
            wire.send_bytes(b"x" * size)

    with pytest.raises(TimeoutError):
        fill()


def test_shutdown_wakes_a_waiting_thread(pair):
    wire, _ = pair
    ended = []

    def wait():
        try:
            wire.recv_bytes(10)
        except EOFError:
            ended.append("EOF")

    thread = threading.Thread(target=wait)
    thread.start()
    wire.shutdown()
    thread.join(20)
    assert ended == ["EOF"]
    wire.close()
    wire.close()
    wire.shutdown()


def test_quiet(pair):
    wire, sock = pair
    assert wire.quiet()
    sock.send(b"x")
    assert not wire.quiet()


def test_a_closed_peer_is_not_quiet(pair):
    wire, sock = pair
    sock.close()
    assert not wire.quiet()
