"""The server's end of a channel: accepts connections, proves keys, carries out requests, and cannot be held up.

One thread accepts, and does nothing else. Each connection has a thread of its own, in which the handshake and
the calls run, every step under a deadline that the socket itself keeps (see :mod:`shmelim.channel.wire`); so a
silent, slow or hostile peer holds up its own thread, and that one only until its deadline. How many connections
there are, proven and unproven, has a bound each.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Self

from shmelim.channel.address import describe, listen, new_socket, normalize
from shmelim.channel.codec import MSGPACK
from shmelim.channel.dispatch import Caller, Dispatcher, set_caller
from shmelim.channel.failures import FAILURE_LIMIT
from shmelim.channel.peers import Admission, Peer, Peers
from shmelim.channel.protocol import (
    DEFAULT_MAX_MESSAGE,
    GOODBYE,
    HELLO_LIMIT,
    PROTOCOL,
    check_key,
    decode_hello,
    encode_welcome,
)
from shmelim.errors import ProtocolError
from shmelim.system import forks
from shmelim.system.logs import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType

    from shmelim.channel.address import Address, SocketFile
    from shmelim.channel.codec import Codec

_JOIN = 1.0  # seconds for threads whose connection was shut; a method that hangs is left behind, as a daemon
_EXHAUSTED = 0.05  # seconds of pause when the process has no descriptor or thread left for a connection

_logger = logging.getLogger("shmelim.channel")


class ChannelServer:
    """Serves the remote methods of one object to clients that hold the key.

    Remote methods are those of the object's type whose name ends in ``_rpc`` and does not start with an
    underscore. They run in several threads at a time, one for each connection.

    Thread-safe. In a forked child the copy is inert: its descriptors are closed, and it touches neither the socket
    file nor the connections; the parent's goes on.

    Parameters
    ----------
    target
        The object to serve.
    address
        Path of a Unix socket, or ``(host, port)``; port 0 lets the system choose, and `address` then says which.
    authkey
        The key, 16 bytes or more.
    service_name
        Name for clients, messages, and threads.
    max_message
        Longest message in bytes, both ways; 16 KiB or more.
    max_connections
        Bound of connections that hold the key; one more is told that the server is at its limit.
    max_pending
        Bound of connections that have not proven to hold the key; one more makes the oldest be dropped.
    handshake_timeout
        Seconds from accepting a connection to the end of its handshake.
    message_timeout
        Seconds from the first byte of a request to its last, and for the peer to take a reply. An idle connection
        may stay for ever.
    codec
        Codec of requests and replies.
    methods
        Names of further methods to serve, which do not end in ``_rpc``.

    Raises
    ------
    TypeError, ValueError
        `address` or `authkey` is none, or a limit is too small.

    """

    def __init__(
        self,
        target: object,
        address: Address,
        authkey: bytes,
        *,
        service_name: str = "shmelim",
        max_message: int = DEFAULT_MAX_MESSAGE,
        max_connections: int = 512,
        max_pending: int = 128,
        handshake_timeout: float = 5.0,
        message_timeout: float = 30.0,
        codec: Codec = MSGPACK,
        methods: Collection[str] = (),
    ) -> None:
        if not FAILURE_LIMIT <= max_message < 2**31:
            raise ValueError(f"max_message must be {FAILURE_LIMIT} bytes to 2 GiB, not {max_message}")
        if max_connections < 1 or max_pending < 1:
            raise ValueError("max_connections and max_pending must be 1 or more")
        if handshake_timeout <= 0 or message_timeout <= 0:
            raise ValueError("handshake_timeout and message_timeout must be more than 0 seconds")
        self._authkey = check_key(authkey)
        self._location = normalize(address)
        self._service_name = service_name
        self._max_message = max_message
        self._handshake_timeout = handshake_timeout
        self._message_timeout = message_timeout
        self._log = LimitedLog(_logger)
        self._dispatcher = Dispatcher(
            target,
            codec=codec,
            max_message=max_message,
            service_name=service_name,
            log=self._log,
            methods=methods,
        )
        self._peers = Peers(max_pending=max_pending, max_proven=max_connections)
        self._closed = threading.Event()
        # Written by start() and then by the one close() that comes first; a forked child, which is alone,
        # clears them.
        self._started = False
        self._listener: socket.socket | None = None
        self._socket_file: SocketFile | None = None
        self._acceptor: threading.Thread | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None  # ends the accepting thread's wait

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._service_name!r} at {describe(self._location)}>"

    @property
    def address(self) -> str | tuple[str, int]:
        """Where it serves; after :meth:`start` with the real port."""
        return self._location

    def start(self) -> Self:
        """Listen and serve; clients can connect when this returns.

        Returns
        -------
        ChannelServer
            This object.

        Raises
        ------
        ChannelError
            The address is taken or cannot be used.
        RuntimeError
            It was started or closed before.

        """
        if self._started or self._peers.closing:
            raise RuntimeError(f"{self!r} was started or closed before; make a new one")
        self._started = True
        try:
            forks.register(self)
            with forks.creating_descriptors:
                self._listener = new_socket(self._location)
                self._wake = socket.socketpair()
            self._location, self._socket_file = listen(self._listener, self._location)
            self._acceptor = threading.Thread(
                target=self._accept,
                args=(self._listener, self._wake[0]),
                name=f"{self._service_name}-accept",
                daemon=True,
            )
            self._acceptor.start()
        except BaseException:
            self.close(0)
            raise
        return self

    def close(self, drain: float = 2.0) -> None:
        """Stop accepting, let running calls finish, end every connection, remove the socket file. Idempotent.

        May be called from a remote method, whose reply is still sent. A second call from another thread waits
        for the first.

        Parameters
        ----------
        drain
            Seconds for calls that run. A method that takes longer goes on in its thread, but its reply is lost;
            the log says how many there are.

        """
        if not self._peers.begin_closing():
            if not self._peers.has_thread(threading.current_thread()):
                self._closed.wait(drain + 2 * _JOIN)
            return
        self._stop_accepting()
        running = self._peers.drain(drain, _JOIN)
        if running:
            _logger.warning("%s: closed while %d calls still ran", self._service_name, running)
        self._closed.set()

    def __enter__(self) -> Self:
        return self if self._started else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stats(self) -> dict[str, int]:
        """Return counts.

        Returns
        -------
        dict
            Now: `connections` (that hold the key), `pending` (not yet known to), `running` (calls). Since the
            start: `accepted` connections, `calls`, `refused` (limit of connections), `dropped` (limit of
            pending ones), `wrong_key`, `malformed` (no message of this protocol, or too large), `overdue`
            (handshake, request or reply not finished in time).

        """
        return self._peers.stats()

    def after_fork_in_child(self) -> None:
        """Make this copy inert. Called by :mod:`shmelim.system.forks`."""
        self._log.after_fork_in_child()
        self._peers.abandon()
        for sock in (self._listener, *(self._wake or ())):
            if sock is not None:
                sock.close()
        self._listener = self._wake = self._socket_file = self._acceptor = None
        self._closed = threading.Event()
        self._closed.set()

    # Accepting: in the accepting thread only.

    def _accept(self, listener: socket.socket, wake: socket.socket) -> None:
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        poller.register(wake, select.POLLIN)
        while True:
            poller.poll()
            if self._peers.closing:
                return
            try:
                self._accept_one(listener)
            except (BlockingIOError, ConnectionAbortedError):
                continue  # it went away before we came
            except Exception as error:  # no descriptor, memory or thread left: make room, and go on
                self._warn("accept", f"cannot accept a connection: {error}")
                self._peers.drop_oldest()
                time.sleep(_EXHAUSTED)

    def _accept_one(self, listener: socket.socket) -> None:
        peer, sock = self._peers.accept(listener, self._message_timeout)
        try:
            sock.setblocking(True)  # noqa: FBT003
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.wire.deadline = time.monotonic() + self._handshake_timeout
            thread = threading.Thread(
                target=self._converse, args=(peer,), name=f"{self._service_name}-peer", daemon=True
            )
            if self._peers.admit(peer, thread):
                oldest = self._peers.drop_oldest()
                if oldest is not None:
                    crowd = self._peers.max_pending
                    self._warn("dropped", f"dropped {oldest.label}: more than {crowd} handshakes at a time")
            thread.start()
        except BaseException:
            self._peers.forget(peer)
            raise

    def _stop_accepting(self) -> None:
        """End the accepting thread, then free the address; by the one thread that closes."""
        if self._wake is not None:
            self._wake[1].send(b"x")
        if self._acceptor is not None and self._acceptor.is_alive():
            self._acceptor.join()
        for sock in (self._listener, *(self._wake or ())):
            if sock is not None:
                sock.close()
        if self._socket_file is not None:
            try:
                self._socket_file.remove()
            except OSError as error:
                _logger.warning("%s: cannot remove the socket file: %s", self._service_name, error)

    # Conversing: in each connection's own thread.

    def _converse(self, peer: Peer) -> None:
        try:
            if self._shake_hands(peer):
                self._serve(peer)
        except TimeoutError:
            self._blame(peer, "overdue", "did not finish a handshake or message in time")
        except AuthenticationError:
            self._blame(peer, "wrong_key", "does not hold the key")
        except ProtocolError as error:
            self._blame(peer, "malformed", f"broke the protocol: {error}")
        except AssertionError:  # the handshake functions assert what the peer sends
            self._blame(peer, "malformed", "sent no challenge where one was due")
        except (EOFError, OSError):
            pass  # the peer went away, or was sent away: nothing to report
        except BaseException:
            self._log(logging.ERROR, "conversation", "%s: a connection failed", self._service_name, exc_info=True)
        finally:
            self._peers.forget(peer)

    def _shake_hands(self, peer: Peer) -> bool:
        """Prove the key both ways, then exchange hello and welcome; return whether the peer may go on."""
        wire = peer.wire
        deliver_challenge(wire, self._authkey)  # type: ignore[arg-type]  # a Wire has what this uses
        answer_challenge(wire, self._authkey)  # type: ignore[arg-type]
        hello = decode_hello(wire.recv_bytes(HELLO_LIMIT))
        admission = self._peers.prove(peer)
        if admission is Admission.DROPPED:
            return False
        refusal = None
        if admission is Admission.CROWDED:
            refusal = f"{self._service_name} is at its limit of {self._peers.max_proven} connections"
        wire.send_bytes(encode_welcome(self._service_name, refusal, self._max_message))
        if refusal is not None:
            self._warn("refused", f"refused {peer.label}: {refusal}")
            return False
        if hello.protocol != PROTOCOL:
            raise ProtocolError(f"it speaks protocol {hello.protocol}, this server {PROTOCOL}")
        pid = hello.pid if peer.pid is None else peer.pid
        peer.label = f"process {pid} ({hello.program!r})"
        set_caller(Caller(pid, peer.uid, hello.program))
        wire.deadline = None
        return True

    def _serve(self, peer: Peer) -> None:
        wire, peers, answer = peer.wire, self._peers, self._dispatcher.answer
        while True:
            request = wire.recv_bytes(self._max_message)
            if not peers.begin_call(peer):
                break
            try:
                reply = answer(request)
                wire.send_bytes(reply)
            finally:
                may_go_on = peers.end_call(peer)
            if not may_go_on:
                break
            del request, reply  # an idle connection keeps no large message alive
        wire.bid_farewell(GOODBYE)

    def _blame(self, peer: Peer, count: str, what: str) -> None:
        if self._peers.count(count):
            self._warn(count, f"{peer.label} {what}; dropped")

    def _warn(self, topic: str, message: str) -> None:
        self._log(logging.WARNING, topic, "%s: %s", self._service_name, message)
