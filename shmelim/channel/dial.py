"""How a client comes by a connection: connect, handshake, and when to try again."""

from __future__ import annotations

import functools
import itertools
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from typing import TYPE_CHECKING

from shmelim.channel.address import connect, describe, new_socket
from shmelim.channel.protocol import GOODBYE, HELLO_LIMIT, PROTOCOL, check_key, decode_welcome, encode_hello
from shmelim.errors import (
    AuthenticationFailedError,
    CallTimeoutError,
    ChannelError,
    NotServingError,
    ProtocolError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmelim.channel.address import Location
    from shmelim.channel.pool import Pool
    from shmelim.channel.wire import Wire

_TRIES = 4  # handshakes that the server may break off before a call gives up
_PAUSE_FIRST, _PAUSE_MOST = 0.005, 0.1  # seconds between attempts


class _DroppedError(Exception):
    """The server broke a handshake off; another attempt may succeed."""


class Dialer:
    """Opens connections to one server. Thread-safe: nothing changes after construction.

    Parameters
    ----------
    location
        A normalized address.
    authkey
        The key, or a function that returns it, which is asked after each connect.
    connect_wait
        Seconds to wait for a server to appear.
    pool
        Where the connections are entered.

    """

    def __init__(
        self,
        location: Location,
        authkey: bytes | Callable[[], bytes],
        *,
        connect_wait: float,
        pool: Pool,
    ) -> None:
        self._location = location
        self._authkey = authkey if callable(authkey) else check_key(authkey)
        self._connect_wait = connect_wait
        self._pool = pool

    def dial(self, deadline: float) -> Wire:
        """Open a connection; wait for a server, and forgive one that drops us, as long as allowed.

        Parameters
        ----------
        deadline
            ``time.monotonic()`` value.

        Returns
        -------
        Wire
            The connection, ready for a request.

        Raises
        ------
        NotServingError, CallTimeoutError, AuthenticationFailedError, ProtocolError, ChannelError
            As :meth:`shmelim.channel.client.ChannelClient.call` says.

        """
        give_up = min(deadline, time.monotonic() + self._connect_wait)
        where = describe(self._location)
        pause = _PAUSE_FIRST
        for tries in itertools.count(1):
            until = give_up  # unless there is a server, which is worth the whole deadline
            try:
                return self._dial_once(deadline)
            except NotServingError as error:
                failure: Exception = error
            except BlockingIOError as error:
                failure = CallTimeoutError(f"the server at {where} has too many connections waiting")
                failure.__cause__ = error
                until = deadline
            except _DroppedError as error:
                failure = ChannelError(f"the server at {where} breaks connections off during the handshake")
                failure.__cause__ = error.__cause__
                until = deadline if tries < _TRIES else give_up
            except TimeoutError as error:
                raise CallTimeoutError(f"the server at {where} did not finish a handshake in time") from error
            except ChannelError:
                raise
            except OSError as error:
                raise ChannelError(f"cannot connect to {where}: {error.strerror or error}") from error
            if time.monotonic() + pause > until:
                raise failure
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_MOST)
        raise AssertionError

    def _dial_once(self, deadline: float) -> Wire:
        timeout = deadline - time.monotonic()
        if timeout <= 0:
            raise TimeoutError
        wire, sock = self._pool.open(functools.partial(new_socket, self._location))
        try:
            try:
                connect(sock, self._location, timeout)
            except ConnectionResetError as error:
                raise _DroppedError from error
            wire.deadline = deadline
            # After connecting, so that the key is that of the server that listens now.
            key = check_key(self._authkey()) if callable(self._authkey) else self._authkey
            self._shake_hands(wire, key)
        except BaseException:
            self._pool.discard(wire)
            raise
        return wire

    def _shake_hands(self, wire: Wire, key: bytes) -> None:
        where = describe(self._location)
        try:
            answer_challenge(wire, key)  # type: ignore[arg-type]  # needs no more than a Wire has
            deliver_challenge(wire, key)  # type: ignore[arg-type]
            wire.send_bytes(encode_hello())
            answer = wire.recv_bytes(HELLO_LIMIT)
        except AuthenticationError:
            raise AuthenticationFailedError(
                f"the server at {where} holds another key", hint="load the key again from the server's key file"
            ) from None
        except (ProtocolError, AssertionError) as error:  # the handshake functions assert what the peer sends
            raise ProtocolError(f"whoever listens at {where} does not speak this protocol") from error
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            raise _DroppedError from error
        if answer == GOODBYE:
            raise _DroppedError
        welcome = decode_welcome(answer)
        if welcome.protocol != PROTOCOL:
            raise ProtocolError(
                f"{welcome.service_name} at {where} speaks protocol {welcome.protocol}, this client {PROTOCOL}",
                hint="run the same version of the package at both ends",
            )
        if welcome.refusal is not None:
            raise ChannelError(f"the server at {where} refuses the connection: {welcome.refusal}")
        wire.longest = welcome.max_message
