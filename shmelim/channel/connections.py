"""A client's connections: how they are made, which are idle, and what a forked child does with its copies."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge

from shmelim.channel import protocol
from shmelim.channel.address import Location, connect, describe, new_socket
from shmelim.channel.key import check_key, whose
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

    A signal handler may call any method, also while its thread is inside one: :meth:`close` most of all. In a
    forked child it is empty, and its copies of the descriptors are closed without a word to the server.
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
        self._where = describe(location)
        self._authkey = authkey if callable(authkey) else check_key(authkey)
        self._connect_wait = connect_wait
        self._patience = patience
        self._max_idle = max_idle
        self.refusal: str | None = None  # why no more connections are handed out; never goes back
        # The lock guards everything below, from other threads. It is re-entrant, since a signal handler that
        # closes may have interrupted its holder at any point: so whoever has entered a wire looks once more
        # whether it was closed meanwhile. `_wires` has every connection; `_idle` those that no call uses, the
        # last used one last. Entries of `_wires` are also made inside forks.creating_descriptors, so that a
        # forked child finds every inherited descriptor here.
        self._lock = threading.RLock()
        self._wires: dict[Wire, None] = {}
        self._idle: list[Wire] = []
        forks.register(self)

    def __del__(self) -> None:
        # Nobody else holds a reference, so no call is under way.
        for wire in getattr(self, "_wires", ()):
            wire.close()

    # ------------------------------------------------------------------ the books

    def take(self) -> Wire | None:
        """Return an idle connection that is up, the last used one first; None if there is none."""
        while True:
            wire = self._pop_idle()
            if self.refusal is not None:
                if wire is not None:
                    self.discard(wire)
                raise ChannelError(self.refusal)
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
        elif self.refusal is not None:
            self._close_idle()

    def discard(self, wire: Wire) -> None:
        """Strike a connection that its caller has in use, and close it."""
        with self._lock:
            self._wires.pop(wire, None)
        wire.close()

    def retire(self, why: str) -> None:
        """Hand out no more connections, and close idle ones; those in use are left alone."""
        if self.refusal is None:
            self.refusal = why
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

        Raises what :meth:`ChannelClient.call` does where a call is not carried out.
        """
        give_up = min(deadline, monotonic() + self._connect_wait)
        pause, drops = _PAUSE_FIRST, 0
        while True:
            until = give_up
            cause: BaseException | None = None
            failure: Exception
            try:
                return self._dial_once(deadline)
            except NotServingError as error:
                failure = error
            except _NoKeyError as error:
                hint = "a living server puts it back within a second; else this process looks in the wrong place"
                failure = KeyFileError(f"a server listens at {self._where}, but {error}", hint=hint)
            except BlockingIOError as error:
                cause, until = error, deadline  # there is a server, which is worth the whole deadline
                failure = CallTimeoutError(f"the server at {self._where} has too many connections waiting")
            except _DroppedError as error:
                drops += 1
                cause, until = error.__cause__, deadline if drops < _TRIES else give_up
                failure = ChannelError(f"the server at {self._where} breaks connections off during the handshake")
            except TimeoutError as error:
                hint = "it hangs or is stopped, or another program listens there"
                text = f"the server at {self._where} did not finish a handshake in time"
                raise CallTimeoutError(text, hint=hint) from error
            except ChannelError:
                raise
            except OSError as error:
                raise self._cannot_connect(error) from error
            if monotonic() + pause > until:
                raise failure from cause
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_MOST)

    def _cannot_connect(self, error: OSError) -> ChannelError:
        text = f"cannot connect to {self._where}: {error.strerror or error}"
        if error.errno not in _OWN_FAULTS:
            return ChannelError(text)
        if error.errno in _RIGHTS and isinstance(self._location, str):
            return CallerFaultError(f"{text}; {whose(self._location)}", hint="run as its owner")
        hint = f"process {os.getpid()}, which asked, is at a limit of its own: close what it has open, or raise it"
        return CallerFaultError(text, hint=hint)

    def open(self) -> Wire:
        """Enter a new wire, which is not connected yet; ``ChannelError`` when closed."""
        with forks.creating_descriptors:
            sock = new_socket(self._location)
            with self._lock:
                wire = Wire(sock, patience=self._patience)
                self._wires[wire] = None
        if self.refusal is not None:
            self.discard(wire)
            raise ChannelError(self.refusal)
        return wire

    def _dial_once(self, deadline: float) -> Wire:
        if deadline <= monotonic():
            raise TimeoutError
        wire = self.open()
        try:
            try:
                connect(wire.sock, self._location, deadline)
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
        try:
            answer_challenge(wire, key)  # type: ignore[arg-type]  # needs no more than a Wire has
            deliver_challenge(wire, key)  # type: ignore[arg-type]
            wire.send_bytes(protocol.encode_hello())
            answer = wire.recv_bytes(protocol.WELCOME_LIMIT)
        except AuthenticationError:
            raise self._other_key(wire) from None
        except (ProtocolError, AssertionError) as error:  # the handshake functions assert what the peer sends
            raise self._stranger(f"another program ({error})") from error
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            raise _DroppedError from error
        if answer == protocol.GOODBYE:
            raise _DroppedError
        if protocol.is_managers_reply(answer):
            raise self._stranger("a multiprocessing manager (BaseManager), and it holds the same key")
        try:
            welcome = protocol.decode_welcome(answer)
        except ProtocolError as error:
            raise self._stranger(f"a program that holds the key ({error.message})") from error
        ours = protocol.PROTOCOL
        if welcome.protocol != ours:
            raise ProtocolError(
                f"{welcome.service_name} at {self._where} speaks protocol {welcome.protocol}, this client {ours}",
                hint="run the same version of the package at both ends",
            )
        if welcome.refusal is not None:
            raise ChannelError(f"the server at {self._where} refuses the connection: {welcome.refusal}")
        wire.longest = welcome.max_message

    def _other_key(self, wire: Wire) -> ChannelError:
        """Say who refused our key, or has another: a manager says one thing more before it hangs up."""
        wire.deadline = min(wire.deadline or 0.0, monotonic() + _LAST_WORDS)
        with contextlib.suppress(EOFError, OSError):
            if protocol.is_managers_reply(wire.recv_bytes(protocol.WELCOME_LIMIT)):
                return self._stranger("a multiprocessing manager (BaseManager), and it holds another key")
        return AuthenticationFailedError(
            f"the server at {self._where} holds another key",
            hint="load the key again from the server's key file; or see whether another service listens there",
        )

    def _stranger(self, what: str) -> ProtocolError:
        return ProtocolError(
            f"whoever listens at {self._where} is not a server of shmelim but {what}",
            hint="stop that program, or give the server another address",
        )
