"""The server's end of a channel: accepts connections, proves keys, carries out requests, and cannot be held up.

One thread accepts, and puts back what others removed of the server's address. Each connection has a thread of its
own, in which the handshake and the calls run, every step under a deadline (see :mod:`shmelim.channel.wire`); so a
silent, slow or hostile peer holds up its own thread, and that one only until its deadline. The number of
connections has a bound: beyond it the unproven one that took longest, or the one that was idle longest, makes
room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Collection
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Final, Self

from shmelim.channel.address import LOCK_WAIT, Address, SocketFile, describe, listen, new_socket, normalize
from shmelim.channel.codec import MSGPACK, Codec
from shmelim.channel.dispatch import Caller, Dispatcher, this_caller
from shmelim.channel.failures import FAILURE_LIMIT
from shmelim.channel.key import check_key, restore_key
from shmelim.channel.peers import Peer, Peers
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE, GOODBYE, PROTOCOL, encode_welcome, receive_hello
from shmelim.channel.wire import LARGEST, LONGEST
from shmelim.errors import ProtocolError
from shmelim.system import forks
from shmelim.system.arguments import whole
from shmelim.system.clock import monotonic
from shmelim.system.durable import make_private_directory
from shmelim.system.logs import LimitedLog
from shmelim.system.problems import Problems
from shmelim.system.text import get_logger

CROWDED: Final = "connections_crowded"
UNREACHABLE: Final = "channel_unreachable"

_JOIN = 1.0  # seconds for threads whose connection was shut; a method that hangs is left behind, as a daemon
_EXHAUSTED = 0.05  # seconds of pause when the process has no descriptor or thread left for a connection
_LOOK = 0.5  # seconds between two looks at the server's own address

_logger = get_logger("shmelim.channel")


class ChannelServer:
    """Serves the remote methods of one object to clients that hold the key.

    Remote methods are those of the object's type whose name ends in ``_rpc`` or is listed, and does not start with
    an underscore. They run in several threads at a time, one for each connection. A socket or key file that
    somebody cleans away is put back within a second, its directory (0700) included; connections go on.

    Thread-safe. In a forked child the copy is inert: its descriptors are closed, and it touches neither the socket
    file nor the connections; the parent's goes on.

    Parameters
    ----------
    target, service_name
        The object to serve; and its name for clients, messages, and threads.
    address, authkey
        Path of a Unix socket, or ``(host, port)``, where port 0 lets the system choose, and the attribute then
        says which; and the key, 16 bytes or more.
    methods
        Names of methods that are served though they do not end in ``_rpc``.
    max_message, codec
        Longest message in bytes, both ways, 16 KiB or more (a longer reply goes in several); codec of requests and
        replies.
    max_connections
        Bound of connections that hold the key. One more takes the place of the one that was idle longest, whose
        client connects again by itself; where all are busy, it is told that the server is at its limit.
    max_pending
        Bound of connections that have not proven to hold the key; one more makes the oldest be dropped.
    handshake_timeout, message_timeout
        Seconds from accepting a connection to the end of its handshake; seconds from the first byte of a request
        to its last, and for the peer to take a reply. An idle connection may stay for ever.
    key_path
        The file from which clients load the key, to be put back if it vanishes; None: somebody else sees to it.
    problems
        Where ``connections_crowded`` (idle ones have to make room) and ``channel_unreachable`` (what was cleaned
        away cannot be put back) are reported; None: in the log only.

    Raises
    ------
    TypeError, ValueError
        `address`, `authkey` or one of `methods` is not what it should be, or a limit is too small.

    Examples
    --------
    >>> import tempfile
    >>> from shmelim.channel import ChannelClient
    >>> class Greeter:
    ...     def greet_rpc(self, name):
    ...         return f"hello, {name}"
    >>> key = b"32 random bytes, from a key file"
    >>> with tempfile.TemporaryDirectory() as place, ChannelServer(Greeter(), f"{place}/socket", key) as server:
    ...     with ChannelClient(server.address, key) as client:
    ...         client.call("greet_rpc", ("you",))
    ...     server.stats()["calls"]
    'hello, you'
    1

    """

    def __init__(
        self,
        target: object,
        address: Address,
        authkey: bytes,
        *,
        service_name: str = "shmelim",
        methods: Collection[str] = (),
        max_message: int = DEFAULT_MAX_MESSAGE,
        max_connections: int = 512,
        max_pending: int = 128,
        handshake_timeout: float = 5.0,
        message_timeout: float = 30.0,
        codec: Codec = MSGPACK,
        key_path: str | os.PathLike[str] | None = None,
        problems: Problems | None = None,
    ) -> None:
        whole("max_message", max_message, least=FAILURE_LIMIT, most=LONGEST)
        if min(max_connections, max_pending) < 1:
            raise ValueError("max_connections and max_pending must be 1 or more")
        if min(handshake_timeout, message_timeout) <= 0:
            raise ValueError("handshake_timeout and message_timeout must be more than 0 seconds")
        self._authkey = check_key(authkey)
        self._location = normalize(address)
        self._service_name = service_name
        self._max_message = max_message
        self._handshake_timeout = handshake_timeout
        self._message_timeout = message_timeout
        self._key_path = None if key_path is None else Path(key_path)
        self._problems = Problems() if problems is None else problems
        self._log = LimitedLog(_logger)
        self._dispatcher = Dispatcher(target, methods, codec, LARGEST, service_name, self._log)
        self._peers = Peers(max_pending=max_pending, max_proven=max_connections)
        self._closed = threading.Event()
        # Written by start(), then by the accepting thread, then by the close() that comes first; and by a forked
        # child, which is alone. The last of the listening sockets is the one at the address.
        self._listeners: list[socket.socket] = []
        self._socket_file: SocketFile | None = None
        self._acceptor: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._service_name!r} at {describe(self._location)}>"

    @property
    def address(self) -> str | tuple[str, int]:
        """Where it serves; after :meth:`start` with the real port."""
        return self._location

    def start(self) -> Self:
        """Listen and serve; return this object. Clients can connect when this returns.

        ``ChannelError`` if the address is taken or cannot be used; ``RuntimeError`` if it was started before.
        """
        if self._acceptor is not None or self._peers.closing:
            raise RuntimeError(f"{self!r} was started or closed before; make a new one")
        self._acceptor = threading.Thread(target=self._accept, name=f"{self._service_name}-accept", daemon=True)
        forks.register(self)
        try:
            self._listen(LOCK_WAIT)
            self._acceptor.start()
        except BaseException:
            self.close(0)
            raise
        return self

    def _listen(self, patience: float) -> None:
        with forks.creating_descriptors:
            sock = new_socket(self._location)
            self._listeners.append(sock)
        try:
            self._location, self._socket_file = listen(sock, self._location, patience)
        except BaseException:
            self._listeners.remove(sock)
            sock.close()
            raise

    def close(self, drain: float = 2.0) -> None:
        """Stop accepting, let running calls finish, end every connection, remove the socket file. Idempotent.

        May be called from a remote method, whose reply is still sent, and from a signal handler. A second call
        from another thread waits for the first. Calls that run have `drain` seconds; a method that takes longer
        goes on in its thread, but its reply is lost, and the log says how many there are.
        """
        if not self._peers.begin_closing():
            if not self._peers.has_thread(threading.current_thread()):
                self._closed.wait(drain + 2 * _JOIN)
            return
        for sock in self._listeners[:]:
            with contextlib.suppress(OSError):  # it does not listen yet
                sock.shutdown(socket.SHUT_RDWR)  # which wakes the accepting thread
        if self._acceptor is not None and self._acceptor.is_alive():
            self._acceptor.join()
        for sock in self._listeners:
            sock.close()
        if self._socket_file is not None:
            try:
                self._socket_file.remove()
            except OSError as error:  # which does no harm: the next server at this address replaces the file
                _logger.warning("%s: cannot remove the socket file: %s", self._service_name, error)
        running = self._peers.drain(drain, _JOIN)
        if running:
            _logger.warning("%s: closed while %d calls still ran", self._service_name, running)
        self._closed.set()

    def __enter__(self) -> Self:
        return self.start() if self._acceptor is None else self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> dict[str, int]:
        """Return counts.

        Now: `connections` (that hold the key), `pending` (not yet known to), `running` (calls). Since the start:
        `accepted` connections, `calls`, `reclaimed` (idle connections that made room), `refused` (at the limit,
        all busy), `dropped` (limit of pending ones), `wrong_key`, `malformed` (not a message of this protocol, or
        too large), `overdue` (handshake, request or reply not finished in time).
        """
        return self._peers.stats()

    def after_fork_in_child(self) -> None:
        """Make this copy inert. Called by :mod:`shmelim.system.forks`."""
        self._peers.abandon()
        for sock in self._listeners:
            sock.close()
        self._listeners = []
        self._socket_file = self._acceptor = None
        self._closed = threading.Event()
        self._closed.set()

    # Accepting: in the accepting thread only.

    def _accept(self) -> None:
        look = monotonic() + _LOOK
        while not self._peers.closing:
            listener = self._listeners[-1]
            poller = select.poll()
            poller.register(listener, select.POLLIN)
            poller.poll(_LOOK * 1000)
            self._accept_one(listener)
            if monotonic() >= look:
                self._keep_address()
                look = monotonic() + _LOOK
            for old in self._listeners[:-1]:
                while self._accept_one(old):  # who had connected when its file vanished
                    pass
                self._listeners.remove(old)
                old.close()

    def _accept_one(self, listener: socket.socket) -> bool:
        """Begin a conversation with whoever waits at a listener; return whether anybody did."""
        peers, peer = self._peers, None
        try:
            peer = peers.accept(listener, self._message_timeout)
            peer.wire.deadline = monotonic() + self._handshake_timeout
            name = f"{self._service_name}-peer"
            peer.thread = threading.Thread(target=self._converse, args=(peer,), name=name, daemon=True)
            most = peers.max_pending
            if oldest := peers.drop_oldest(most):
                self._warn("dropped", f"dropped {oldest.label}: more than {most} handshakes at a time")
            peer.thread.start()
        except (BlockingIOError, ConnectionAbortedError):
            return False  # it went away before we came
        except Exception as error:  # no descriptor, memory or thread left: make room, and go on
            if peer is not None:
                peers.forget(peer)
            if not peers.closing:
                self._warn("accept", f"cannot accept a connection: {error}")
                if not peers.drop_oldest():
                    peers.send_away_idlest()
                time.sleep(_EXHAUSTED)
            return False
        return True

    def _keep_address(self) -> None:
        """Put back what clients find the server by, where somebody removed it."""
        put_back = []
        try:
            if self._key_path is not None:
                make_private_directory(self._key_path.parent)
                if restore_key(self._key_path, self._authkey):
                    put_back.append(str(self._key_path))
            if self._socket_file is not None and self._socket_file.is_lost():
                make_private_directory(Path(self._socket_file.path).parent)
                self._listen(_LOOK)
                put_back.append(self._socket_file.path)
        except Exception as error:
            text = f"clients cannot find the server, whose files were removed: {error}"
            self._warn("address", text)
            remedy = "make it possible to put them back, or restart the server"
            self._problems.report(UNREACHABLE, text, subject=self._service_name, remedy=remedy)
        else:
            self._problems.clear(UNREACHABLE, self._service_name)
            if put_back:
                self._warn("put back", f"somebody removed {' and '.join(put_back)}: put back")

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
            pass  # the peer went away, or was sent away
        except BaseException:
            self._log(logging.ERROR, "conversation", "%s: a connection failed", self._service_name, exc_info=True)
        finally:
            if self._peers.forget(peer):
                self._problems.clear(CROWDED, self._service_name)

    def _shake_hands(self, peer: Peer) -> bool:
        """Prove the key both ways, then exchange hello and welcome; return whether the peer may go on."""
        wire, name, bound = peer.wire, self._service_name, self._peers.max_proven
        hello = receive_hello(wire, self._authkey, f"{name} at {describe(self._location)}")
        admission = self._peers.prove(peer)
        if admission == "dropped":
            return False
        refusal = None
        if admission == "crowded":
            refusal = f"{name} is at its limit of {bound} connections, and all are busy"
        if admission != "welcome":
            self._warn("crowded", f"{peer.label} finds {bound} connections: {refusal or 'an idle one goes'}")
            remedy = "see which processes keep so many clients, or raise max_connections"
            text = f"{bound} connections are the limit, and idle ones make room for new ones"
            self._problems.report(CROWDED, text, subject=name, severity="notice", remedy=remedy)
        wire.send_bytes(encode_welcome(name, refusal, self._max_message))
        if refusal is not None:
            return False
        if hello.protocol != PROTOCOL:
            raise ProtocolError(f"it speaks protocol {hello.protocol}, this server {PROTOCOL}")
        pid = hello.pid if peer.pid is None else peer.pid
        peer.label = f"process {pid} ({hello.program!r})"
        this_caller.set(Caller(pid, peer.uid, hello.program, hello.epoch))
        wire.deadline = None
        return True

    def _serve(self, peer: Peer) -> None:
        wire, peers, answer = peer.wire, self._peers, self._dispatcher.answer
        while not peers.closing:
            request = wire.recv_bytes(self._max_message)
            with peers.lock:  # under which idle connections are told to go
                if peers.closing or peer.state != "idle":
                    break
                peer.state = "busy"
                peers.counts["calls"] += 1
            try:
                reply = answer(request)
                wire.send_reply(reply, self._max_message)
            finally:
                peer.idle_since = monotonic()
                peer.state = "idle"
            del request, reply  # an idle connection keeps no large message alive
        wire.bid_farewell(GOODBYE)

    def _blame(self, peer: Peer, count: str, what: str) -> None:
        if self._peers.count(count):
            self._warn(count, f"{peer.label} {what}; dropped")

    def _warn(self, topic: str, message: str) -> None:
        self._log(logging.WARNING, topic, "%s: %s", self._service_name, message)
