"""The server's books: which connections there are, what each one is doing, and which make room for others."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from typing import Literal, TypeAlias

from shmelim.channel.address import peer_credentials
from shmelim.channel.protocol import GOODBYE
from shmelim.channel.wire import Wire
from shmelim.system import forks
from shmelim.system.clock import monotonic

# Has not proven to hold the key; has; has sent a whole request, and not got the whole reply; was told to go.
State: TypeAlias = Literal["pending", "idle", "busy", "gone"]

# What becomes of a connection that has proven to hold the key: an idle one may have been sent away for it; or all
# of them are busy; or it had to make room itself meanwhile.
Admission: TypeAlias = Literal["welcome", "in place of another", "crowded", "dropped"]

_RELIEVED = 0.9  # of the bound: with fewer connections than that it is not crowded any more


class Peer:
    """One connection, seen from the server. Its own thread uses the wire; any may shut it down."""

    def __init__(self, sock: socket.socket, patience: float) -> None:
        self.wire = Wire(sock, patience)
        self.pid, self.uid = peer_credentials(sock)
        # What the log calls it; written by the accepting thread, then by its own.
        self.label = "a peer" if self.pid is None else f"process {self.pid} of user {self.uid}"
        self.thread: threading.Thread | None = None  # written once, before that starts
        # Changes under the books' lock, but for the end of a call: nobody minds to see that late.
        self.state: State = "pending"
        self.idle_since = 0.0


class Peers:
    """All connections of a server. Every method is thread-safe and short, but for :meth:`drain`."""

    def __init__(self, *, max_pending: int, max_proven: int) -> None:
        self.max_pending = max_pending  # connections that have not yet proven to hold the key
        self.max_proven = max_proven  # those that have
        self.closing = False  # never goes back
        faults = ("refused", "dropped", "wrong_key", "malformed", "overdue")
        self.counts = dict.fromkeys(("accepted", "calls", "reclaimed", *faults), 0)
        # One lock guards everything here. Nothing blocks or logs while it is held. Re-entrant, since a signal
        # handler may close the server while its thread looks at the counts.
        self.lock = threading.RLock()
        # Everyone whose thread has not ended, in the order in which they came.
        self._all: dict[Peer, None] = {}

    def accept(self, listener: socket.socket, patience: float) -> Peer:
        """Accept a connection from a non-blocking listener and enter it; ``OSError`` if there is none."""
        with forks.creating_descriptors:
            peer = Peer(listener.accept()[0], patience)
            forks.register(peer.wire)
        with self.lock:
            self._all[peer] = None
            self.counts["accepted"] += 1
        return peer

    def _those(self, *states: State) -> list[Peer]:
        return [peer for peer in self._all if peer.state in states]

    def drop_oldest(self, most: int = 0) -> Peer | None:
        """End the connection whose handshake has taken longest, if there are more than so many; return it."""
        with self.lock:
            pending = self._those("pending")
            if len(pending) <= most:
                return None
            pending[0].state = "gone"
            self.counts["dropped"] += 1
            pending[0].wire.shutdown()
            return pending[0]

    def send_away_idlest(self) -> bool:
        """Say goodbye to the proven connection that has been idle longest; return whether one was idle.

        Its client connects again when it has something to ask. A request that is on its way just now is not
        carried out: the goodbye says so, and the client sends it once more.
        """
        with self.lock:
            idle = [peer for peer in self._those("idle") if not peer.wire.begun]
            if idle:
                peer = min(idle, key=lambda peer: peer.idle_since)
                peer.state = "gone"
                self.counts["reclaimed"] += 1
                # Its own thread sends nothing; or its welcome, which this may overtake.
                peer.wire.bid_farewell(GOODBYE)
            return bool(idle)

    def prove(self, peer: Peer) -> Admission:
        """Decide about a connection that has proven to hold the key."""
        with self.lock:
            if peer.state != "pending" or self.closing:
                return "dropped"
            full = len(self._those("idle", "busy")) >= self.max_proven
            if full and not self.send_away_idlest():
                peer.state = "gone"
                self.counts["refused"] += 1
                return "crowded"
            peer.state, peer.idle_since = "idle", monotonic()
            return "in place of another" if full else "welcome"

    def count(self, what: str) -> bool:
        """Count a fault of a peer; return False while closing, when every connection looks faulty."""
        with self.lock:
            self.counts[what] += not self.closing
            return not self.closing

    def forget(self, peer: Peer) -> bool:
        """Strike a connection whose thread ends, and close it; return whether the rest is not crowded."""
        with self.lock:
            self._all.pop(peer, None)
            roomy = len(self._those("idle", "busy")) < _RELIEVED * self.max_proven
        peer.wire.close()
        return roomy

    def begin_closing(self) -> bool:
        """Let no more calls begin; return whether this was the first time."""
        with self.lock:
            first, self.closing = not self.closing, True
            return first

    def has_thread(self, thread: threading.Thread) -> bool:
        """Whether `thread` is that of a connection."""
        with self.lock:
            return any(peer.thread is thread for peer in self._all)

    def drain(self, seconds: float, join: float) -> int:
        """End all connections: idle ones at once with a goodbye, the others when their call ends or time is over.

        Call it when nothing is accepted any more. That of the calling thread, if it has one, ends after its reply.
        `join` is for the threads of the others. Return how many calls still run, whose replies are lost.
        """
        with self.lock:
            others = [peer for peer in self._all if peer.thread is not threading.current_thread()]
            for peer in others:
                if peer.state == "idle":
                    peer.wire.bid_farewell(GOODBYE)
                elif peer.state != "busy":
                    peer.wire.shutdown()
        _join([peer for peer in others if peer.state == "busy"], seconds)
        for peer in others:
            peer.wire.shutdown()
        _join([peer for peer in others if peer.state != "busy"], join)
        return sum(peer.state == "busy" for peer in others)

    def stats(self) -> dict[str, int]:
        """Return the counts that :meth:`ChannelServer.stats` documents."""
        with self.lock:
            states = Counter(peer.state for peer in self._all)
            proven = states["idle"] + states["busy"]
            now = {"connections": proven, "pending": states["pending"], "running": states["busy"]}
            return now | self.counts

    def abandon(self) -> None:
        """Forget all, in a forked child, where the wires have been closed."""
        self.closing, self.lock, self._all = True, threading.RLock(), {}


def _join(peers: list[Peer], seconds: float) -> None:
    """Wait until the threads of connections have ended, at most so long."""
    deadline = monotonic() + seconds
    for peer in peers:
        if peer.thread is not None:
            peer.thread.join(max(0.0, deadline - monotonic()))
