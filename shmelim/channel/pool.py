"""The client's connections: which there are, which are idle, and what a forked child does with its copies."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from shmelim.channel.wire import Wire
from shmelim.errors import ChannelError
from shmelim.system import forks

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket


class Pool:
    """Connections of one client. Every method is thread-safe, short, and never waits for the network.

    A signal handler may call any method, also while its thread is inside one: :meth:`close` most of all.

    In a forked child it is empty, and its copies of the descriptors are closed without a word to the server.

    Parameters
    ----------
    max_idle
        Connections kept for later.
    patience
        See :class:`~shmelim.channel.wire.Wire`.

    """

    def __init__(self, *, max_idle: int, patience: float) -> None:
        self._max_idle = max_idle
        self._patience = patience
        # The lock guards everything below, from other threads. It is re-entrant, since a signal handler that
        # closes may have interrupted its holder at any point: so whoever has entered a wire looks once more
        # whether it was closed meanwhile. `_wires` has every connection; `_idle` those that no call uses, the
        # last used one last. Entries of `_wires` are also made inside forks.creating_descriptors, so that a
        # forked child finds every inherited descriptor here.
        self._lock = threading.RLock()
        self._wires: dict[Wire, None] = {}
        self._idle: list[Wire] = []
        self._refusal: str | None = None  # why no more connections are handed out; never goes back
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
                wire = Wire(sock, patience=self._patience)
                self._wires[wire] = None
        if self._refusal is not None:
            self.discard(wire)
            raise ChannelError(self._refusal)
        return wire, sock

    def take(self) -> Wire | None:
        """Return an idle connection that is up, the last used one first; None if there is none."""
        while True:
            wire = self._pop_idle()
            if self._refusal is not None:
                if wire is not None:
                    self.discard(wire)
                raise ChannelError(self._refusal)
            if wire is None or wire.quiet():
                return wire
            self.discard(wire)  # the server has closed it

    def give_back(self, wire: Wire) -> None:
        """Make a connection idle after a complete exchange; it is closed if there are enough."""
        with self._lock:
            # A wire that was in use at a fork is not in the child's books.
            kept = len(self._idle) < self._max_idle and wire in self._wires
            if kept:
                self._idle.append(wire)
        if not kept:
            self.discard(wire)
        elif self._refusal is not None:
            self._close_idle()

    def discard(self, wire: Wire) -> None:
        """Strike a connection that its caller has in use, and close it."""
        with self._lock:
            self._wires.pop(wire, None)
        wire.close()

    def retire(self, why: str) -> None:
        """Hand out no more connections, and close idle ones; those in use are left alone. Idempotent.

        Parameters
        ----------
        why
            What whoever wants one is told; the first reason stays.

        """
        if self._refusal is None:
            self._refusal = why
        self._close_idle()

    def close(self, why: str = "the client is closed") -> None:
        """Retire, and shut the connections in use, which their users then discard; idempotent."""
        self.retire(why)
        with self._lock:
            for wire in list(self._wires):
                wire.shutdown()

    def _pop_idle(self) -> Wire | None:
        with self._lock, contextlib.suppress(IndexError):  # not asked before: a signal handler may come between
            return self._idle.pop()
        return None

    def _close_idle(self) -> None:
        while (wire := self._pop_idle()) is not None:
            self.discard(wire)

    @property
    def refusal(self) -> str | None:
        """Why no more connections are handed out, None if they are; never goes back."""
        return self._refusal

    def after_fork_in_child(self) -> None:
        """Close the inherited descriptors. Called by :mod:`shmelim.system.forks`."""
        self._lock = threading.RLock()
        for wire in self._wires:
            wire.abandon()
        self._wires = {}
        self._idle = []
