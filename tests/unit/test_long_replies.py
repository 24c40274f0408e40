"""A reply that is longer than a message, and one that only says that it is."""

import socket
import struct
import threading

import pytest

from shmelim.channel.wire import LARGEST, Wire
from shmelim.errors import ProtocolError


@pytest.fixture
def pair():
    wires = [Wire(end, patience=10.0) for end in socket.socketpair()]
    yield wires
    for wire in wires:
        wire.close()


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 200, 12_345, 1_000_000])
def test_what_is_sent_is_received(pair, size):
    reply = bytes(range(0xC1)) * (size // 0xC1 + 1)
    sender = threading.Thread(target=pair[0].send_reply, args=(reply[:size], 100))
    sender.start()
    assert pair[1].recv_reply(100) == reply[:size]
    sender.join()


@pytest.mark.parametrize(
    ("messages", "error", "says"),
    [
        ([struct.pack("!cQ", b"\xc1", LARGEST + 1)], ProtocolError, "was announced"),
        ([b"\xc1"], ProtocolError, "unknown form"),
        ([struct.pack("!cQ", b"\xc1", 10), b"x" * 11], ProtocolError, "the limit is 10"),
        ([struct.pack("!cQ", b"\xc1", 10), b"x" * 4, b""], EOFError, "closing"),
    ],
)
def test_what_contradicts_itself_is_refused(pair, messages, error, says):
    for message in messages:
        pair[0].send_bytes(message)
    with pytest.raises(error, match=says):
        pair[1].recv_reply(100)
