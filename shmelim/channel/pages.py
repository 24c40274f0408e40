"""Replies larger than one message: told by a message that says how long they are, then sent in several.

That message begins with a byte with which neither msgpack nor a pickle begins.
"""

from __future__ import annotations

import struct
from typing import Final

from shmelim.channel.wire import Wire
from shmelim.errors import ProtocolError

LARGEST: Final = 4 << 30
"""Bytes of a reply, beyond which a result is too large."""

_MARK: Final = b"\xc1"
_ANNOUNCEMENT: Final = struct.Struct("!cQ")


def send_reply(wire: Wire, reply: bytes, longest: int) -> None:
    """Send a reply in messages of at most so many bytes; raises as ``Wire.send_bytes``."""
    if len(reply) <= longest:
        wire.send_bytes(reply)
        return
    wire.send_bytes(_ANNOUNCEMENT.pack(_MARK, len(reply)))
    for begin in range(0, len(reply), longest):
        wire.send_bytes(reply[begin : begin + longest])


def receive_reply(wire: Wire, longest: int) -> bytes:
    """Receive a reply; raises as ``Wire.recv_bytes``."""
    message = wire.recv_bytes(longest)
    if message[:1] != _MARK:
        return message
    if len(message) != _ANNOUNCEMENT.size:
        raise ProtocolError("the reply has an unknown form")
    _, missing = _ANNOUNCEMENT.unpack(message)
    if missing > LARGEST:
        raise ProtocolError(f"a reply of {missing} bytes was announced, the limit is {LARGEST}")
    parts: list[bytes] = []
    while missing > 0:
        parts.append(wire.recv_bytes(min(longest, missing)))
        if not parts[-1]:
            raise EOFError("the server is closing")
        missing -= len(parts[-1])
    return b"".join(parts)
