"""One connected socket that carries whole messages, each step of which obeys a deadline.

The bytes are those of ``multiprocessing.connection.Connection``: four bytes of length, big-endian and signed,
then the message (a length of -1 announces eight more bytes of length). The two interoperate, and the handshake
functions of ``multiprocessing.connection`` run over a :class:`Wire`. It exists because a ``Connection`` has no
deadlines, and costs two reads a message and, above 16 KiB, two writes.

The socket never blocks; whoever must wait polls for the time that is left. The kernel's own timers (SO_RCVTIMEO)
will not do: after each signal Python makes the interrupted call again, with the whole of its timeout, and under
gevent they have no effect at all.

A reply may be longer than one message: then one says how long it is, and several follow. That one begins with a
byte with which neither msgpack nor a pickle begins.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from typing import Final

from shmelim.errors import ProtocolError
from shmelim.system.clock import monotonic

_HEADER = struct.Struct("!i")
_LONG_HEADER = struct.Struct("!iQ")

LONGEST: Final = (2 << 30) - 1
"""Bytes of a message, as its header can say."""
LARGEST: Final = 4 << 30
"""Bytes of a reply, beyond which a result is too large."""
_MARK = b"\xc1"
_ANNOUNCEMENT = struct.Struct("!cQ")

_FIRST_READ = 16 * 1024  # most messages whole; small enough to be cheap to allocate for every idle connection
_NEXT_READ = 256 * 1024  # memory grows with what has come in, not with what was announced
_JOINED = 16 * 1024  # up to here one copy is cheaper than a gathering write
_LONGEST_WAIT = 1e6  # seconds; poll() takes little more
_SHOWN = 24  # bytes of a message that go into an error


def wait(sock: socket.socket, event: int, deadline: float) -> None:
    """Wait until a socket is ready; ``TimeoutError`` when the deadline has passed."""
    poller = select.poll()
    poller.register(sock, event)
    while True:
        left = deadline - monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        if poller.poll(min(left, _LONGEST_WAIT) * 1000):
            return


def file_of(descriptor: int) -> tuple[int, ...] | None:
    """Return which file a descriptor leads to by now; None where it is closed.

    A program that becomes a daemon closes all it finds: then a number may be somebody else's.
    """
    try:
        return os.fstat(descriptor)[1:3]
    except OSError:
        return None


class Wire:
    """A connected stream socket with message framing and deadlines, which owns the socket.

    One thread at a time may send and receive; :meth:`shutdown`, :meth:`bid_farewell` and :meth:`close` may come
    from any. After an error of sending or receiving the wire is of no use any more. Make it together with its
    socket inside ``forks.creating_descriptors``, and have a forked child close its copy: by the books of a client
    (:class:`~shmelim.channel.client.Connections`), or by ``forks.register``.
    """

    def __init__(self, sock: socket.socket, patience: float = 0.0) -> None:
        sock.setblocking(False)  # noqa: FBT003
        # When to give up with TimeoutError, on the clock of system.clock. None: wait for ever for the first byte
        # of a message, and `patience` seconds for everything else. Set by the thread that uses the wire.
        self.deadline: float | None = None
        self.patience = patience
        self.longest: int = 0  # message in bytes that the peer takes, once it has said so
        self.begun = False  # a part of a message has come in; any thread may look
        self.sock = sock
        self._file = file_of(sock.fileno())
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._surplus = b""  # received beyond the last message; only the thread that uses the wire touches it
        # Keeps shutdown() from a descriptor number that was given away again. Re-entrant, since a signal handler
        # may shut a wire that its thread is about to close.
        self._closing = threading.RLock()

    def send_bytes(self, data: bytes) -> None:
        """Send one message of up to 2 GiB; after an error (``OSError``) the peer cannot have got all of it."""
        now = monotonic()
        deadline = now + self.patience if self.deadline is None else self.deadline
        if deadline <= now:
            raise TimeoutError("the deadline has passed")
        header = _HEADER.pack(len(data))
        rest = [memoryview(header + data)] if len(data) <= _JOINED else [memoryview(header), memoryview(data)]
        while rest:
            try:
                sent = self.sock.sendmsg(rest)
            except BlockingIOError:
                wait(self.sock, select.POLLOUT, deadline)
                continue
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][sent:]

    def recv_bytes(self, maxlength: int) -> bytes:
        """Receive one message; nothing is allocated for a length that is only announced.

        ``EOFError``: the connection was closed or shut down; ``TimeoutError``: the message did not come or end in
        time; ``ProtocolError``: a longer one was announced; or another ``OSError``.
        """
        deadline = self.deadline
        data, self._surplus = self._surplus, b""
        if not data:
            data = self._fill(data, 1, deadline)
        if deadline is None:  # it has begun, so that it must end
            deadline = monotonic() + self.patience
        self.begun = True
        try:
            begin = _HEADER.size
            if len(data) < begin:
                data = self._fill(data, begin, deadline)
            (size,) = _HEADER.unpack_from(data)
            if size == -1:
                begin = _LONG_HEADER.size
                data = self._fill(data, begin, deadline)
                _, size = _LONG_HEADER.unpack_from(data)
            if not 0 <= size <= maxlength:
                raise ProtocolError(_too_long(data, size, maxlength))
            end = begin + size
            if len(data) < end:
                data = self._fill(data, end, deadline)
        finally:
            self.begun = False
        self._surplus = data[end:]
        return data[begin:end]

    def send_reply(self, reply: bytes, longest: int) -> None:
        """Send a reply in messages of at most so many bytes; raises as :meth:`send_bytes`."""
        if len(reply) <= longest:
            self.send_bytes(reply)
            return
        self.send_bytes(_ANNOUNCEMENT.pack(_MARK, len(reply)))
        for begin in range(0, len(reply), longest):
            self.send_bytes(reply[begin : begin + longest])

    def recv_reply(self, longest: int) -> bytes:
        """Receive a reply in messages of at most so many bytes; raises as :meth:`recv_bytes`."""
        message = self.recv_bytes(longest)
        if message[:1] != _MARK:
            return message
        if len(message) != _ANNOUNCEMENT.size:
            raise ProtocolError("the reply has an unknown form")
        _, missing = _ANNOUNCEMENT.unpack(message)
        if missing > LARGEST:
            raise ProtocolError(f"a reply of {missing} bytes was announced, the limit is {LARGEST}")
        parts: list[bytes] = []
        while missing > 0:
            parts.append(self.recv_bytes(min(longest, missing)))
            if not parts[-1]:
                raise EOFError("the server is closing")
            missing -= len(parts[-1])
        return b"".join(parts)

    def _fill(self, data: bytes, size: int, deadline: float | None) -> bytes:
        """Return `data` with what comes after it, `size` bytes or more in all."""
        parts, missing = [data] if data else [], size - len(data)  # one alone is not copied
        while missing > 0:
            left = _LONGEST_WAIT if deadline is None else deadline - monotonic()
            if left <= 0:
                raise TimeoutError("the deadline has passed")
            self._readable.poll(min(left, _LONGEST_WAIT) * 1000)
            try:
                part = self.sock.recv(min(max(missing, _FIRST_READ), _NEXT_READ))
            except BlockingIOError:  # nothing came in time; or poll() was wrong
                continue
            if not part:
                raise EOFError("the connection was closed")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def quiet(self) -> bool:
        """Whether the connection is up and nothing has come in: what an idle connection must look like."""
        return file_of(self.sock.fileno()) == self._file and not self._surplus and not self._readable.poll(0)

    def shutdown(self) -> None:
        """End the connection and wake the thread that waits on it; harmless on a closed wire."""
        with self._closing, contextlib.suppress(OSError):  # closed here, or the peer was faster
            if file_of(self.sock.fileno()) == self._file:
                self.sock.shutdown(socket.SHUT_RDWR)

    def bid_farewell(self, data: bytes) -> None:
        """Send a short last message if that is possible at once, and shut down; no thread may be sending."""
        with self._closing, contextlib.suppress(OSError):  # no room, or nobody there: then without it
            self.sock.send(_HEADER.pack(len(data)) + data)
        self.shutdown()

    def close(self) -> None:
        """Release the descriptor, which no other thread may be using; idempotent."""
        with self._closing:
            with contextlib.suppress(OSError):
                if file_of(self.sock.fileno()) == self._file:
                    self.sock.close()
            self.sock.detach()

    def after_fork_in_child(self) -> None:
        """Close the child's copy without a word to the peer, whoever held the lock."""
        self._closing = threading.RLock()
        self.close()


def _too_long(data: bytes, size: int, maxlength: int) -> str:
    text = f"a message of {size} bytes was announced, the limit is {maxlength}"
    begin = data[:_SHOWN]
    if all(byte in b"\r\n\t" or 32 <= byte < 127 for byte in begin):  # noqa: PLR2004  # printable ASCII
        text += f"; it begins with {begin!r}, so the other end speaks another protocol"
    return text
