"""A client's connections: how they are made, which are idle, and what a forked child does with its copies."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from typing import TYPE_CHECKING

from shmelim.channel.address import connect, describe, new_socket
from shmelim.channel.key import whose
from shmelim.channel.protocol import (
    GOODBYE,
    PROTOCOL,
    WELCOME_LIMIT,
    check_key,
    decode_welcome,
    encode_hello,
    is_managers_reply,
)
from shmelim.channel.wire import Wire
from shmelim.errors import (
    AuthenticationFailedError,
    CallerFaultError,
    CallTimeoutError,
    ChannelError,
    KeyFileError,
    NotServingError,
    ProtocolError,
)
from shmelim.system import forks
from shmelim.system.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    from shmelim.channel.address import Location

_TRIES = 4  # handshakes that the server may break off before a call gives up
_PAUSE_FIRST, _PAUSE_MOST = 0.005, 0.1  # seconds between attempts
_LAST_WORDS = 0.5  # seconds for what a server may say after it has refused the key

# What keeps a process from connecting to a server that may be well.
_RIGHTS = frozenset({errno.EACCES, errno.EPERM})
_OWN_FAULTS = _RIGHTS | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL}


class _DroppedError(Exception):
    """The server broke a handshake off; another attempt may succeed."""


class _NoKeyError(Exception):
    """A server listens, but its key is not there; it may be in a moment."""


class Connections:
    """The connections of one client. Every method is thread-safe and short, but for :meth:`dial`.

    A signal handler may call any method, also while its thread is inside one: :meth:`close` most of all.

    In a forked child it is empty, and its copies of the descriptors are closed without a word to the server.
    """

    def __init__(
        self,
        location: Location,
        authkey: bytes | Callable[[], bytes],
        *,
        connect_wait: float = 0.0,
        patience: float = 10.0,
        max_idle: int = 8,
    ) -> None:
        self._location = location
        self._authkey = authkey if callable(authkey) else check_key(authkey)
        self._connect_wait = connect_wait
        self._patience = patience
        self._max_idle = max_idle
        # The lock guards everything below, from other threads. It is re-entrant, since a signal handler that
        # closes may have interrupted its holder at any point: so whoever has entered a wire looks once more
        # whether it was closed meanwhile. `_wires` has every connection; `_idle` those that no call uses, the
        # last used one last. Entries of `_wires` are also made inside forks.creating_descriptors, so that a
        # forked child finds every inherited descriptor here.
        self._lock = threading.RLock()
        self._wires: dict[Wire, None] = {}
        self._idle: list[Wire] = []
        self._refusal: str | None = None
        forks.register(self)

    def __del__(self) -> None:
        # Nobody else holds a reference, so no call is under way.
        for wire in getattr(self, "_wires", ()):
            wire.close()

    @property
    def refusal(self) -> str | None:
        """Why no more connections are handed out, None if they are; never goes back."""
        return self._refusal

    # ------------------------------------------------------------------ the books

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
        """Hand out no more connections, and close idle ones; those in use are left alone. The first reason stays."""
        if self._refusal is None:
            self._refusal = why
        self._close_idle()

    def close(self, why: str) -> None:
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

    def after_fork_in_child(self) -> None:
        """Close the inherited descriptors. Called by :mod:`shmelim.system.forks`."""
        self._lock = threading.RLock()
        for wire in self._wires:
            wire.abandon()
        self._wires = {}
        self._idle = []

    # ------------------------------------------------------------------ making one

    def dial(self, deadline: float) -> Wire:
        """Open a connection; wait for a server, and forgive one that drops us, as long as allowed.

        Raises as :meth:`ChannelClient.call` says of what is not carried out.
        """
        give_up = min(deadline, monotonic() + self._connect_wait)
        where = describe(self._location)
        pause = _PAUSE_FIRST
        for tries in itertools.count(1):
            until = give_up  # unless there is a server, which is worth the whole deadline
            failure: Exception
            try:
                return self._dial_once(deadline)
            except NotServingError as error:
                failure = error
            except _NoKeyError as error:
                failure = KeyFileError(
                    f"a server listens at {where}, but {error}",
                    hint="a living server puts it back within a second; else see that this process looks in the right place",
                )
            except BlockingIOError as error:
                failure = CallTimeoutError(f"the server at {where} has too many connections waiting")
                failure.__cause__ = error
                until = deadline
            except _DroppedError as error:
                failure = ChannelError(f"the server at {where} breaks connections off during the handshake")
                failure.__cause__ = error.__cause__
                until = deadline if tries < _TRIES else give_up
            except TimeoutError as error:
                raise CallTimeoutError(
                    f"the server at {where} did not finish a handshake in time",
                    hint="it hangs or is stopped, or another program listens there",
                ) from error
            except ChannelError:
                raise
            except OSError as error:
                raise self._cannot_connect(error) from error
            if monotonic() + pause > until:
                raise failure
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_MOST)
        raise AssertionError

    def _cannot_connect(self, error: OSError) -> ChannelError:
        text = f"cannot connect to {describe(self._location)}: {error.strerror or error}"
        if error.errno not in _OWN_FAULTS:
            return ChannelError(text)
        if error.errno in _RIGHTS and isinstance(self._location, str):
            return CallerFaultError(f"{text}; {whose(self._location)}", hint="run as its owner")
        return CallerFaultError(
            f"{text} (in process {os.getpid()})", hint="this process, not the server, is short of it"
        )

    def _dial_once(self, deadline: float) -> Wire:
        if deadline <= monotonic():
            raise TimeoutError
        wire, sock = self.open(functools.partial(new_socket, self._location))
        try:
            try:
                connect(sock, self._location, deadline)
            except ConnectionResetError as error:
                raise _DroppedError from error
            wire.deadline = deadline
            # After connecting, so that the key is that of the server that listens now.
            self._shake_hands(wire, self._key())
        except BaseException:
            self.discard(wire)
            raise
        return wire

    def _key(self) -> bytes:
        if not callable(self._authkey):
            return self._authkey
        try:
            return check_key(self._authkey())
        except NotServingError as error:
            raise _NoKeyError(error.message) from error

    def _shake_hands(self, wire: Wire, key: bytes) -> None:
        where = describe(self._location)
        try:
            answer_challenge(wire, key)  # type: ignore[arg-type]  # needs no more than a Wire has
            deliver_challenge(wire, key)  # type: ignore[arg-type]
            wire.send_bytes(encode_hello())
            answer = wire.recv_bytes(WELCOME_LIMIT)
        except AuthenticationError:
            raise self._other_key(wire) from None
        except (ProtocolError, AssertionError) as error:  # the handshake functions assert what the peer sends
            raise self._stranger(f"another program ({error})") from error
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            raise _DroppedError from error
        if answer == GOODBYE:
            raise _DroppedError
        if is_managers_reply(answer):
            raise self._stranger("a multiprocessing manager (BaseManager), and it holds the same key")
        try:
            welcome = decode_welcome(answer)
        except ProtocolError as error:
            raise self._stranger(f"a program that holds the key ({error.message})") from error
        if welcome.protocol != PROTOCOL:
            raise ProtocolError(
                f"{welcome.service_name} at {where} speaks protocol {welcome.protocol}, this client {PROTOCOL}",
                hint="run the same version of the package at both ends",
            )
        if welcome.refusal is not None:
            raise ChannelError(f"the server at {where} refuses the connection: {welcome.refusal}")
        wire.longest = welcome.max_message

    def _other_key(self, wire: Wire) -> ChannelError:
        """Say who refused our key, or has another: a manager says one thing more before it hangs up."""
        if wire.deadline is not None:
            wire.deadline = min(wire.deadline, monotonic() + _LAST_WORDS)
        with contextlib.suppress(EOFError, OSError):
            if is_managers_reply(wire.recv_bytes(WELCOME_LIMIT)):
                return self._stranger("a multiprocessing manager (BaseManager), and it holds another key")
        return AuthenticationFailedError(
            f"the server at {describe(self._location)} holds another key",
            hint="load the key again from the server's key file; or see whether another service listens there",
        )

    def _stranger(self, what: str) -> ProtocolError:
        return ProtocolError(
            f"whoever listens at {describe(self._location)} is not a server of shmelim but {what}",
            hint="stop that program, or give the server another address",
        )
