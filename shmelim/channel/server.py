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
from shmelim.channel.pages import LARGEST, send_reply
from shmelim.channel.peers import Peer, Peers
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE, GOODBYE, PROTOCOL, encode_welcome, receive_hello
from shmelim.channel.wire import poller_of
from shmelim.errors import ProtocolError
from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.durable import make_private_directory
from shmelim.system.logs import LimitedLog
from shmelim.system.problems import Problems

CROWDED: Final = "connections_crowded"
UNREACHABLE: Final = "channel_unreachable"

_JOIN = 1.0  # seconds for threads whose connection was shut; a method that hangs is left behind, as a daemon
_EXHAUSTED = 0.05  # seconds of pause when the process has no descriptor or thread left for a connection
_LOOK = 0.5  # seconds between two looks at the server's own address

_logger = logging.getLogger("shmelim.channel")


class ChannelServer:
    """Serves the remote methods of one object to clients that hold the key.

    Remote methods are those of the object's type whose name ends in ``_rpc`` or is listed, and does not start with
    an underscore. They run in several threads at a time, one for each connection. A socket or key file that
    somebody cleans away is put back within a second, its directory (0700) included; connections are not touched by
    that.

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
    methods
        Names of methods that are served though they do not end in ``_rpc``.
    max_message
        Longest message in bytes, both ways; 16 KiB or more. A longer reply goes in several.
    max_connections
        Bound of connections that hold the key. One more takes the place of the one that was idle longest, whose
        client connects again by itself; where all are busy, it is told that the server is at its limit.
    max_pending
        Bound of connections that have not proven to hold the key; one more makes the oldest be dropped.
    handshake_timeout
        Seconds from accepting a connection to the end of its handshake.
    message_timeout
        Seconds from the first byte of a request to its last, and for the peer to take a reply. An idle connection
        may stay for ever.
    codec
        Codec of requests and replies.
    key_path
        The file from which clients load the key, to be put back if it vanishes; None: that is somebody else's
        care.
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
        if not FAILURE_LIMIT <= max_message < 2**31:
            raise ValueError(f"max_message must be {FAILURE_LIMIT} bytes to 2 GiB, not {max_message}")
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
        # Written by start(), then by the accepting thread, then by the one close() that comes first; a forked
        # child, which is alone, clears them. The last of the listening sockets is the one at the address.
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

        Raises
        ------
        ChannelError
            The address is taken or cannot be used.
        RuntimeError
            It was started or closed before.

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
        self._stop_accepting()
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
            poller_of(listener, select.POLLIN).poll(_LOOK * 1000)
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
        """Accept a connection if there is one; return whether there was."""
        try:
            self._begin_conversation(listener)
        except (BlockingIOError, ConnectionAbortedError):
            return False  # it went away before we came
        except Exception as error:  # no descriptor, memory or thread left: make room, and go on
            if not self._peers.closing:
                self._warn("accept", f"cannot accept a connection: {error}")
                if not self._peers.drop_oldest():
                    self._peers.send_away_idlest()
                time.sleep(_EXHAUSTED)
            return False
        return True

    def _begin_conversation(self, listener: socket.socket) -> None:
        peer = self._peers.accept(listener, self._message_timeout)
        try:
            if listener.family != socket.AF_UNIX:
                peer.wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.wire.deadline = monotonic() + self._handshake_timeout
            peer.thread = threading.Thread(
                target=self._converse, args=(peer,), name=f"{self._service_name}-peer", daemon=True
            )
            most = self._peers.max_pending
            if oldest := self._peers.drop_oldest(most):
                self._warn("dropped", f"dropped {oldest.label}: more than {most} handshakes at a time")
            peer.thread.start()
        except BaseException:
            self._peers.forget(peer)
            raise

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

    def _stop_accepting(self) -> None:
        """End the accepting thread, then free the address; by the one thread that closes."""
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
            if self._peers.forget(peer):
                self._problems.clear(CROWDED, self._service_name)

    def _shake_hands(self, peer: Peer) -> bool:
        """Prove the key both ways, then exchange hello and welcome; return whether the peer may go on."""
        wire = peer.wire
        hello = receive_hello(wire, self._authkey, f"{self._service_name} at {describe(self._location)}")
        admission = self._peers.prove(peer)
        if admission == "dropped":
            return False
        bound, refusal = self._peers.max_proven, None
        if admission == "crowded":
            refusal = f"{self._service_name} is at its limit of {bound} connections, and all are busy"
        if admission != "welcome":
            what = refusal or "an idle one goes"
            self._warn("crowded", f"{peer.label} finds {bound} connections, the limit: {what}")
            remedy = "see which processes keep so many clients, or raise max_connections"
            text = f"{bound} connections are the limit, and idle ones make room for new ones"
            self._problems.report(CROWDED, text, subject=self._service_name, severity="notice", remedy=remedy)
        wire.send_bytes(encode_welcome(self._service_name, refusal, self._max_message))
        if refusal is not None:
            return False
        if hello.protocol != PROTOCOL:
            raise ProtocolError(f"it speaks protocol {hello.protocol}, this server {PROTOCOL}")
        pid = hello.pid if peer.pid is None else peer.pid
        peer.label = f"process {pid} ({hello.program!r})"
        this_caller.set(Caller(pid, peer.uid, hello.program))
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
                send_reply(wire, reply, self._max_message)
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
