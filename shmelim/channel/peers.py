"""The server's books: which connections there are, what each one is doing, and which make room for others."""

from __future__ import annotations

import threading
from enum import Enum
from typing import TYPE_CHECKING

from shmelim.channel.address import peer_credentials
from shmelim.channel.protocol import GOODBYE
from shmelim.channel.wire import Wire
from shmelim.system import forks
from shmelim.system.clock import monotonic

if TYPE_CHECKING:
    import socket

_RELIEVED = 0.9  # of the bound: with fewer connections than that it is not crowded any more


class Admission(Enum):
    """What becomes of a connection that has proven to hold the key."""

    WELCOME = "welcome"
    IN_PLACE = "in place of another"  # an idle connection was sent away for it
    CROWDED = "crowded"  # the bound is reached, and every connection has a call under way
    DROPPED = "dropped"  # it had to make room for a newer one meanwhile, or the server closes


class Peer:
    """One connection, seen from the server.

    Attributes
    ----------
    wire : Wire
        The connection; used by the peer's own thread, shut down by any.
    pid, uid : int | None
        Of the process at the other end, as far as the kernel says.
    label : str
        What the log calls it; written by the accepting thread, then by the peer's own.
    thread : threading.Thread | None
        Its own thread; written once, under the books' lock.
    busy : bool
        Whether a call is under way: from the last byte of a request to the last byte of its reply. Under the
        books' lock.

    """

    __slots__ = ("busy", "label", "pid", "thread", "uid", "wire")

    def __init__(self, sock: socket.socket, patience: float) -> None:
        self.wire = Wire(sock, patience=patience)
        self.pid, self.uid = peer_credentials(sock)
        self.label = "a peer" if self.pid is None else f"process {self.pid} of user {self.uid}"
        self.thread: threading.Thread | None = None
        self.busy = False


class Peers:
    """All connections of a server. Every method is thread-safe and short, but for :meth:`drain`."""

    def __init__(self, *, max_pending: int, max_proven: int) -> None:
        self.max_pending = max_pending  # connections that have not yet proven to hold the key
        self.max_proven = max_proven  # those that have
        self._all: dict[Peer, None] = {}
        self._counts = dict.fromkeys(
            ("accepted", "calls", "reclaimed", "refused", "dropped", "wrong_key", "malformed", "overdue"), 0
        )
        self._closing = False
        self._begin()

    def _begin(self) -> None:
        # One lock guards everything here. Nothing blocks or logs while it is held. Re-entrant, since a signal handler
        # may close the server while its thread looks at the counts.
        self._lock = threading.RLock()
        self._call_ended = threading.Condition(self._lock)  # notified only while closing
        self._pending: dict[Peer, None] = {}  # oldest first
        self._proven: dict[Peer, None] = {}  # the one whose last call ended longest ago first
        self._crowded = False
        # Everyone whose thread has not ended, also those that are in none of the two above any more. Entries
        # are made inside forks.creating_descriptors, so that a forked child finds every inherited descriptor
        # here.
        self._all = {}

    @property
    def closing(self) -> bool:
        """Whether :meth:`begin_closing` was called; never goes back."""
        return self._closing

    def accept(self, listener: socket.socket, patience: float) -> tuple[Peer, socket.socket]:
        """Accept a connection from a non-blocking listener and enter it; ``OSError`` if there is none."""
        with forks.creating_descriptors:
            sock, _ = listener.accept()
            try:
                peer = Peer(sock, patience)
            except BaseException:
                sock.close()
                raise
            with self._lock:
                self._all[peer] = None
        return peer, sock

    def admit(self, peer: Peer, thread: threading.Thread) -> bool:
        """Let the handshake begin in `thread`; return whether too many are in that state now."""
        with self._lock:
            peer.thread = thread
            self._pending[peer] = None
            self._counts["accepted"] += 1
            return len(self._pending) > self.max_pending

    def drop_oldest(self) -> Peer | None:
        """End the connection whose handshake has taken longest, and return it, if there is one."""
        with self._lock:
            peer = next(iter(self._pending), None)
            if peer is None:
                return None
            del self._pending[peer]
            self._counts["dropped"] += 1
        peer.wire.shutdown()
        return peer

    def send_away_idlest(self) -> Peer | None:
        """Say goodbye to the proven connection that has been idle longest, and return it, if one is idle.

        Its client connects again when it has something to ask. A request that is on its way just now is not carried
        out: the goodbye says so, and the client sends it once more.
        """
        with self._lock:
            peer = next((peer for peer in self._proven if not peer.busy), None)
            if peer is not None:
                del self._proven[peer]
                self._counts["reclaimed"] += 1
                peer.wire.bid_farewell(
                    GOODBYE
                )  # its thread sends nothing; or its welcome, which this may overtake
            return peer

    def prove(self, peer: Peer) -> Admission:
        """Decide about a connection that has proven to hold the key."""
        with self._lock:
            if peer not in self._pending or self._closing:
                return Admission.DROPPED
            del self._pending[peer]
            admission = Admission.WELCOME
            if len(self._proven) >= self.max_proven:
                self._crowded = True
                if self.send_away_idlest() is None:
                    self._counts["refused"] += 1
                    return Admission.CROWDED
                admission = Admission.IN_PLACE
            self._proven[peer] = None
            return admission

    def begin_call(self, peer: Peer) -> bool:
        """Enter that a request is complete; return False if it comes too late to be carried out."""
        with self._lock:
            if self._closing or peer not in self._proven:
                return False
            peer.busy = True
            self._counts["calls"] += 1
            return True

    def end_call(self, peer: Peer) -> bool:
        """Enter that the reply is sent, or never will be; return whether the connection may go on."""
        with self._lock:
            peer.busy = False
            if self._closing:
                self._call_ended.notify_all()
            else:
                del self._proven[peer]  # a busy one is never sent away
                self._proven[peer] = None
            return not self._closing

    def count(self, what: str) -> bool:
        """Count a fault of a peer; return False while closing, when every connection looks faulty."""
        with self._lock:
            if self._closing:
                return False
            self._counts[what] += 1
            return True

    def forget(self, peer: Peer) -> bool:
        """Strike a connection whose thread ends (or could not begin), and close it.

        Return whether there were too many before this, and are not any more.
        """
        with self._lock:
            self._pending.pop(peer, None)
            self._proven.pop(peer, None)
            self._all.pop(peer, None)
            relieved = self._crowded and len(self._proven) < _RELIEVED * self.max_proven
            if relieved:
                self._crowded = False
        peer.wire.close()
        return relieved

    def begin_closing(self) -> bool:
        """Let no more calls begin; return whether this was the first time."""
        with self._lock:
            first, self._closing = not self._closing, True
            return first

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether `thread` is that of a connection."""
        with self._lock:
            return any(peer.thread is thread for peer in self._all)

    def drain(self, seconds: float, join: float) -> int:
        """End all connections: idle ones at once with a goodbye, the others when their call ends or time is over.

        The connection of the calling thread, if it has one, is left alone: it ends after its reply. Call this
        after :meth:`begin_closing`, when nothing is accepted any more. `seconds` are for the calls under way, `join`
        for the threads of the ended connections. Return how many calls were still running; their threads go on, but
        their replies are lost.
        """
        deadline = monotonic() + seconds
        with self._lock:
            others = [peer for peer in self._all if peer.thread is not threading.current_thread()]
            for peer in others:
                if not peer.busy:
                    if peer in self._proven:
                        peer.wire.bid_farewell(GOODBYE)
                    else:
                        peer.wire.shutdown()
            while running := sum(peer.busy for peer in others):
                left = deadline - monotonic()
                if left <= 0:
                    break
                self._call_ended.wait(left)
            for peer in others:
                peer.wire.shutdown()
            threads = [peer.thread for peer in others if peer.thread is not None and not peer.busy]
        deadline = monotonic() + join
        for thread in threads:
            thread.join(max(0.0, deadline - monotonic()))
        return running

    def stats(self) -> dict[str, int]:
        """Return the counts that :meth:`ChannelServer.stats` documents."""
        with self._lock:
            return {
                "connections": len(self._proven),
                "pending": len(self._pending),
                "running": sum(peer.busy for peer in self._proven),
                **self._counts,
            }

    def abandon(self) -> None:
        """Close all descriptors of a forked child's copy, and forget them; nothing else is touched."""
        peers, self._closing = self._all, True
        self._begin()
        for peer in peers:
            peer.wire.abandon()
