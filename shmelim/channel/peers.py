"""The server's books: which connections there are, what each one is doing, and which make room for others."""

from __future__ import annotations

import socket
import threading
from typing import Literal, TypeAlias

from shmelim.channel.address import peer_credentials
from shmelim.channel.protocol import GOODBYE
from shmelim.channel.wire import Wire
from shmelim.system import forks
from shmelim.system.clock import monotonic

# What becomes of a connection that has proven to hold the key: an idle one may have been sent away for it; or all
# of them are busy; or it had to make room itself meanwhile.
Admission: TypeAlias = Literal["welcome", "in place of another", "crowded", "dropped"]

_RELIEVED = 0.9  # of the bound: with fewer connections than that it is not crowded any more


class Peer:
    """One connection, seen from the server. Its own thread uses the wire; any may shut it down."""

    __slots__ = ("busy", "label", "pid", "thread", "uid", "wire")

    def __init__(self, sock: socket.socket, patience: float) -> None:
        self.wire = Wire(sock, patience=patience)
        self.pid, self.uid = peer_credentials(sock)
        # What the log calls it; written by the accepting thread, then by its own.
        self.label = "a peer" if self.pid is None else f"process {self.pid} of user {self.uid}"
        self.thread: threading.Thread | None = None  # written once, under the books' lock
        self.busy = False  # from the last byte of a request to the last byte of its reply; under the books' lock


class Peers:
    """All connections of a server. Every method is thread-safe and short, but for :meth:`drain`."""

    def __init__(self, *, max_pending: int, max_proven: int) -> None:
        self.max_pending = max_pending  # connections that have not yet proven to hold the key
        self.max_proven = max_proven  # those that have
        self.closing = False  # never goes back
        faults = ("refused", "dropped", "wrong_key", "malformed", "overdue")
        self._counts = dict.fromkeys(("accepted", "calls", "reclaimed", *faults), 0)
        self._begin()

    def _begin(self) -> None:
        # One lock guards everything here. Nothing blocks or logs while it is held. Re-entrant, since a signal
        # handler may close the server while its thread looks at the counts.
        self._lock = threading.RLock()
        self._call_ended = threading.Condition(self._lock)  # notified only while closing
        self._pending: dict[Peer, None] = {}  # oldest first
        self._proven: dict[Peer, None] = {}  # the one whose last call ended longest ago first
        self._crowded = False
        # Everyone whose thread has not ended, also those that are in none of the two above any more. Entries
        # are made inside forks.creating_descriptors, so that a forked child finds every inherited descriptor here.
        self._all: dict[Peer, None] = {}

    def accept(self, listener: socket.socket, patience: float) -> Peer:
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
        return peer

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
            if peer is not None:
                del self._pending[peer]
                self._counts["dropped"] += 1
                peer.wire.shutdown()
            return peer

    def send_away_idlest(self) -> bool:
        """Say goodbye to the proven connection that has been idle longest; return whether one was idle.

        Its client connects again when it has something to ask. A request that is on its way just now is not
        carried out: the goodbye says so, and the client sends it once more.
        """
        with self._lock:
            peer = next((peer for peer in self._proven if not (peer.busy or peer.wire.begun)), None)
            if peer is not None:
                del self._proven[peer]
                self._counts["reclaimed"] += 1
                peer.wire.bid_farewell(
                    GOODBYE
                )  # its thread sends nothing; or its welcome, which this may overtake
            return peer is not None

    def prove(self, peer: Peer) -> Admission:
        """Decide about a connection that has proven to hold the key."""
        with self._lock:
            if peer not in self._pending or self.closing:
                return "dropped"
            del self._pending[peer]
            admission: Admission = "welcome"
            if len(self._proven) >= self.max_proven:
                self._crowded = True
                if not self.send_away_idlest():
                    self._counts["refused"] += 1
                    return "crowded"
                admission = "in place of another"
            self._proven[peer] = None
            return admission

    def begin_call(self, peer: Peer) -> bool:
        """Enter that a request is complete; return False if it comes too late to be carried out."""
        with self._lock:
            if self.closing or peer not in self._proven:
                return False
            peer.busy = True
            self._counts["calls"] += 1
            return True

    def end_call(self, peer: Peer) -> bool:
        """Enter that the reply is sent, or never will be; return whether the connection may go on."""
        with self._lock:
            peer.busy = False
            if self.closing:
                self._call_ended.notify_all()
            else:  # a busy one is never sent away, and so is there
                del self._proven[peer]
                self._proven[peer] = None
            return not self.closing

    def count(self, what: str) -> bool:
        """Count a fault of a peer; return False while closing, when every connection looks faulty."""
        with self._lock:
            if not self.closing:
                self._counts[what] += 1
            return not self.closing

    def forget(self, peer: Peer) -> bool:
        """Strike a connection whose thread ends, and close it; return whether it was too crowded until now."""
        with self._lock:
            for book in (self._pending, self._proven, self._all):
                book.pop(peer, None)
            relieved = self._crowded and len(self._proven) < _RELIEVED * self.max_proven
            self._crowded = self._crowded and not relieved
        peer.wire.close()
        return relieved

    def begin_closing(self) -> bool:
        """Let no more calls begin; return whether this was the first time."""
        with self._lock:
            first, self.closing = not self.closing, True
            return first

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether `thread` is that of a connection."""
        with self._lock:
            return any(peer.thread is thread for peer in self._all)

    def drain(self, seconds: float, join: float) -> int:
        """End all connections: idle ones at once with a goodbye, the others when their call ends or time is over.

        Call it after :meth:`begin_closing`, when nothing is accepted any more. The connection of the calling
        thread, if it has one, ends after its reply. `join` is for the threads of the others. Return how many calls
        still run; their threads go on, but their replies are lost.
        """
        deadline = monotonic() + seconds
        with self._lock:
            others = [peer for peer in self._all if peer.thread is not threading.current_thread()]
            for peer in others:
                if peer in self._proven and not peer.busy:
                    peer.wire.bid_farewell(GOODBYE)
                elif not peer.busy:
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
            running = sum(peer.busy for peer in self._proven)
            now = {"connections": len(self._proven), "pending": len(self._pending), "running": running}
            return now | self._counts

    def abandon(self) -> None:
        """Close all descriptors of a forked child's copy, and forget them; nothing else is touched."""
        peers, self.closing = self._all, True
        self._begin()
        for peer in peers:
            peer.wire.abandon()
