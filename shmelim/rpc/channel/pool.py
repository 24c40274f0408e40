"""The client's connections: which there are, which are idle, and what a forked child does with its copies."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from shmelim.errors import ChannelError
from shmelim.rpc import forks
from shmelim.rpc.channel.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

__all__ = ["Pool"]


class Pool:
    """Connections of one client. Every method is thread-safe, short, and never waits for the network.

    In a forked child it is empty, and its copies of the descriptors are closed without a word to the server.

    Parameters
    ----------
    max_idle
        Connections kept for later.
    patience
        See :class:`~shmelim.rpc.channel.wire.Wire`.

    """

    def __init__(self, *, max_idle: int, patience: float) -> None:
        self._max_idle = max_idle
        self._patience = patience
        # The lock guards everything below. `_wires` has every connection; `_idle` those that no call uses, the
        # last used one last. Entries of `_wires` are also made inside forks.creating_descriptors, so that a
        # forked child finds every inherited descriptor here.
        self._lock = threading.Lock()
        self._wires: dict[Wire, None] = {}
        self._idle: list[Wire] = []
        self._closed = False
        forks.register(self)

    def __del__(self) -> None:
        # Nobody else holds a reference, so no call is under way.
        for wire in self._wires:
            wire.close()

    def open(self, make: Callable[[], socket]) -> tuple[Wire, socket]:
        """Make a socket, and enter the wire over it; ``ChannelError`` when closed."""
        with forks.creating_descriptors:
            sock = make()
            with self._lock:
                if not self._closed:
                    wire = Wire(sock, patience=self._patience)
                    self._wires[wire] = None
                    return wire, sock
            sock.close()
        raise ChannelError("the client is closed")

    def take(self) -> Wire | None:
        """Return an idle connection that is up, the last used one first; None if there is none."""
        while True:
            with self._lock:
                if self._closed:
                    raise ChannelError("the client is closed")
                if not self._idle:
                    return None
                wire = self._idle.pop()
            if wire.quiet():
                return wire
            self.discard(wire)  # the server has closed it

    def give_back(self, wire: Wire) -> None:
        """Make a connection idle after a complete exchange; it is closed if there are enough."""
        with self._lock:
            # A wire that was in use at a fork is not in the child's books.
            if not self._closed and len(self._idle) < self._max_idle and wire in self._wires:
                self._idle.append(wire)
                return
        self.discard(wire)

    def discard(self, wire: Wire) -> None:
        """Strike a connection that its caller has in use, and close it."""
        with self._lock:
            self._wires.pop(wire, None)
        wire.close()

    def close(self) -> None:
        """Close idle connections, and shut those in use, which their users then discard; idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for wire in idle:
                del self._wires[wire]
            for wire in self._wires:
                wire.shutdown()
        for wire in idle:
            wire.close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called; never goes back."""
        return self._closed

    def after_fork_in_child(self) -> None:
        """Close the inherited descriptors. Called by :mod:`shmelim.rpc.forks`."""
        self._lock = threading.Lock()
        for wire in self._wires:
            wire.abandon()
        self._wires = {}
        self._idle = []
