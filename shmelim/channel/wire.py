"""One connected socket that carries whole messages, each step of which obeys a deadline.

The bytes are those of ``multiprocessing.connection.Connection``: four bytes of length, big-endian and signed,
then the message (a length of -1 announces eight more bytes of length). The two interoperate, and the handshake
functions of ``multiprocessing.connection`` run over a :class:`Wire`. It exists because a ``Connection`` has no
deadlines, and costs two reads a message and, above 16 KiB, two writes; a ``Wire`` reads and writes most
messages with one system call each.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time

from shmelim.errors import ProtocolError

_HEADER = struct.Struct("!i")
_LONG_HEADER = struct.Struct("!iQ")
_TIMEVAL = struct.Struct("@ll")

_FIRST_READ = 16 * 1024  # most messages whole; small enough to be cheap to allocate for every idle connection
_NEXT_READ = 256 * 1024  # memory grows with what has come in, not with what was announced
_JOINED = 16 * 1024  # up to here one copy is cheaper than a gathering write
_SLACK = 0.05  # seconds by which a kernel timeout may overshoot a deadline, to save setting it anew for each call


class Wire:
    """A connected stream socket with message framing and deadlines.

    One thread at a time may send and receive; :meth:`shutdown`, :meth:`bid_farewell` and :meth:`close` may come
    from any.

    Parameters
    ----------
    sock
        Connected and blocking; the wire owns it from now on.
    patience
        Seconds that a message may take once its first byte has come in, and that sending one may take, while no
        `deadline` is set.

    Attributes
    ----------
    deadline : float | None
        ``time.monotonic()`` value at which sending and receiving give up with ``TimeoutError``. None: wait for
        ever for the first byte of a message, and `patience` for everything else. Set by the thread that uses
        the wire.
    longest : int | None
        Longest message in bytes that the peer takes, if it has said so. Kept here for whoever sends.

    """

    __slots__ = ("_closing", "_limits", "_poller", "_sock", "_surplus", "deadline", "longest", "patience")

    def __init__(self, sock: socket.socket, *, patience: float) -> None:
        self.deadline: float | None = None
        self.patience = patience
        self.longest: int | None = None
        self._sock = sock
        # Only the thread that uses the wire touches these two.
        self._surplus = b""  # received beyond the last message
        self._limits = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}  # what the kernel has; 0: no limit
        self._poller: select.poll | None = None
        # Orders shutdown() before close(), so that it never hits a descriptor number that was given away again.
        # Re-entrant, since a signal handler may shut a wire that its thread is about to close.
        self._closing = threading.RLock()

    def send_bytes(self, data: bytes) -> None:
        """Send one message.

        Parameters
        ----------
        data
            The message, up to 2 GiB.

        Raises
        ------
        TimeoutError
            The peer did not take it in time.
        OSError
            The connection broke. After any of the two the peer cannot have got the whole message: the kernel never
            accepted all of it. The wire is of no use any more.

        """
        size = len(data)
        header = _HEADER.pack(size)
        deadline = self.deadline
        if deadline is None:
            deadline = time.monotonic() + self.patience
        if size <= _JOINED:
            left = memoryview(header + data)
            while left:
                self._limit(socket.SO_SNDTIMEO, deadline)
                try:
                    left = left[self._sock.send(left) :]
                except BlockingIOError:
                    continue  # the kernel's timeout; _limit() says whether it is ours
            return
        parts = [memoryview(header), memoryview(data)]
        while parts:
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:
                continue
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][sent:]

    def recv_bytes(self, maxlength: int) -> bytes:
        """Receive one message.

        Parameters
        ----------
        maxlength
            Longest acceptable message in bytes. Nothing is allocated for an announced length.

        Returns
        -------
        bytes
            The message.

        Raises
        ------
        EOFError
            The peer closed the connection, or it was shut down here.
        TimeoutError
            The deadline passed, or a message that had begun did not end in time.
        ProtocolError
            A longer message was announced.
        OSError
            The connection broke. After any of these the wire is of no use any more.

        """
        deadline = self.deadline
        data = self._surplus
        if data:
            self._surplus = b""
        else:
            data = self._receive(_FIRST_READ, deadline)
        if len(data) >= _HEADER.size:  # the usual case, kept short: one whole message
            (size,) = _HEADER.unpack_from(data)
            if 0 <= size <= maxlength and len(data) == _HEADER.size + size:
                return data[_HEADER.size :]
        if deadline is None:  # it has begun, so that it must end
            deadline = time.monotonic() + self.patience
        return self._receive_rest(data, maxlength, deadline)

    def _receive_rest(self, data: bytes, maxlength: int, deadline: float) -> bytes:
        """Finish a message of which `data` (at least a byte, perhaps more than the message) is here."""
        header = _HEADER.size
        while len(data) < header:
            data += self._receive(_FIRST_READ, deadline)
        (size,) = _HEADER.unpack_from(data)
        if size == -1:
            header = _LONG_HEADER.size
            while len(data) < header:
                data += self._receive(_FIRST_READ, deadline)
            _, size = _LONG_HEADER.unpack_from(data)
        if not 0 <= size <= maxlength:
            raise ProtocolError(f"a message of {size} bytes was announced, the limit is {maxlength}")
        end = header + size
        if len(data) < end:
            parts = [data]
            missing = end - len(data)
            while missing:
                part = self._receive(min(missing, _NEXT_READ), deadline)
                parts.append(part)
                missing -= len(part)
            data = b"".join(parts)
        self._surplus = data[end:]
        return data[header:end]

    def _receive(self, size: int, deadline: float | None) -> bytes:
        """Return 1 to `size` bytes as soon as there are any."""
        while True:
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                data = self._sock.recv(size)
            except BlockingIOError:
                continue  # the kernel's timeout; _limit() says whether it is ours
            if not data:
                raise EOFError("the connection was closed")
            return data

    def _limit(self, option: int, deadline: float | None) -> None:
        """Make the kernel give up near `deadline`; raise ``TimeoutError`` when that has passed."""
        kept = self._limits[option]
        if deadline is None:
            wanted = 0.0
            if kept == wanted:
                return
        else:
            wanted = deadline - time.monotonic()
            if wanted <= 0:
                raise TimeoutError("the deadline has passed")
            # A shorter limit only costs another round of the caller's loop, so that one setting serves many calls.
            if wanted / 2 <= kept <= wanted + _SLACK:
                return
        seconds, fraction = divmod(wanted, 1.0)
        microseconds = int(fraction * 1e6)
        if wanted and not seconds:
            microseconds = max(microseconds, 1000)  # 0 would mean no limit at all
        self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(seconds), microseconds))
        self._limits[option] = wanted

    def quiet(self) -> bool:
        """Whether the connection is up and nothing has come in: what an idle connection must look like."""
        if self._surplus:
            return False
        poller = self._poller
        if poller is None:
            poller = select.poll()
            poller.register(self._sock.fileno(), select.POLLIN)
            self._poller = poller
        return not poller.poll(0)

    def shutdown(self) -> None:
        """End the connection and wake the thread that waits on it; harmless on a closed wire."""
        with self._closing, contextlib.suppress(OSError):  # closed here, or the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)

    def bid_farewell(self, data: bytes) -> None:
        """Send a short last message if that is possible at once, then :meth:`shutdown`.

        Another thread may be receiving meanwhile, but none sending.
        """
        with self._closing, contextlib.suppress(OSError):  # no room, or nobody there: then without it
            self._sock.send(_HEADER.pack(len(data)) + data, socket.MSG_DONTWAIT)
        self.shutdown()

    def close(self) -> None:
        """Release the descriptor. Call it when no other thread uses the wire; idempotent."""
        with self._closing:
            self._sock.close()

    def abandon(self) -> None:
        """Close a forked child's copy of the descriptor: without the lock and without a word to the peer."""
        self._closing = threading.RLock()
        self._sock.close()
