"""The client's end of a channel: calls remote methods, each under one deadline, and reconnects by itself.

Every call ends in one of three ways, and says which: it was carried out (a result, or the exception of the
method), it was not (``NotServingError``, ``ChannelError`` and its other subclasses), or nobody here can know
(``OutcomeUnknownError``).
"""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING, Any, NoReturn, Self

from shmelim.channel.address import describe, normalize
from shmelim.channel.codec import MSGPACK
from shmelim.channel.dial import Dialer
from shmelim.channel.failures import unpack_failure
from shmelim.channel.pool import Pool
from shmelim.channel.protocol import (
    DEFAULT_MAX_MESSAGE,
    GOODBYE,
    decode_reply,
    encode_request,
)
from shmelim.channel.proxy import Proxy
from shmelim.errors import (
    CallTimeoutError,
    ChannelError,
    MessageTooLargeError,
    NotServingError,
    OutcomeUnknownError,
    ProtocolError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from types import TracebackType

    from shmelim.channel.address import Address
    from shmelim.channel.codec import Codec
    from shmelim.channel.wire import Wire

_MAX_IDLE = 8  # connections kept for later calls
_TRIES = 4  # connections that the server may break off before a call gives up


class _AttemptError(Exception):
    """A request was sent on a connection, and no reply came.

    Attributes
    ----------
    final : bool
        Whether another attempt would be in vain.
    counts : bool
        Whether there is a bound to attempts that end so, besides the call's deadline.

    """

    def __init__(self, what: str, *, final: bool = False, counts: bool = True) -> None:
        super().__init__(what)
        self.final = final
        self.counts = counts


class _NotDoneError(_AttemptError):
    """A request was certainly not carried out on a connection."""


class ChannelClient:
    """Calls the remote methods of the object that a :class:`~shmelim.channel.server.ChannelServer` serves.

    Nothing is connected before the first call. Connections are pooled; each carries one call at a time, so that
    many threads can have calls under way at once. After a restart of the server the next call finds the new
    one.

    Thread-safe. A forked child closes its copies of the connections without a word to the server, and opens its
    own. Cannot be pickled: give the other process the address and a way to the key.

    Parameters
    ----------
    address
        Path of a Unix socket, or ``(host, port)``.
    authkey
        The key, or a function that returns it, which is asked after each connect (so that the key of a restarted
        server is found); whatever it raises ends the call, except ``NotServingError``, which counts as nobody
        listening.
    timeout
        Seconds for a whole call, connecting included, unless the call says otherwise.
    connect_wait
        Seconds of that in which a call waits for a server to appear.
    max_message
        Longest message in bytes, both ways.
    codec
        Codec of requests and replies; the server's.

    Raises
    ------
    TypeError, ValueError
        `address` or `authkey` is none, or a time is negative.

    """

    def __init__(
        self,
        address: Address,
        authkey: bytes | Callable[[], bytes],
        *,
        timeout: float = 10.0,
        connect_wait: float = 0.0,
        max_message: int = DEFAULT_MAX_MESSAGE,
        codec: Codec = MSGPACK,
    ) -> None:
        if connect_wait < 0:
            raise ValueError(f"connect_wait must not be negative, and is {connect_wait}")
        self._location = normalize(address)
        self._timeout = _checked_timeout(timeout)
        self._pool = Pool(max_idle=_MAX_IDLE, patience=self._timeout)
        self._dialer = Dialer(self._location, authkey, connect_wait=connect_wait, pool=self._pool)
        self._max_message = max_message
        self._codec = codec
        self._numbers = itertools.count(1)  # next() of it is atomic

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {describe(self._location)}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: it holds connections and a key; "
            f"give the other process the address, and let it load the key"
        )

    @property
    def address(self) -> str | tuple[str, int]:
        """Where it calls."""
        return self._location

    def call(
        self,
        method: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        idempotent: bool = False,
    ) -> Any:
        """Call a remote method and return its result.

        Parameters
        ----------
        method
            Its name.
        args, kwargs
            Its arguments; see the codec for what they may be.
        timeout
            Seconds for the whole call; None: the client's.
        idempotent
            Whether the call may be carried out twice. If so, it is repeated within its deadline when a
            connection is lost after the request was sent.

        Returns
        -------
        Any
            What the method returned; tuples have become lists.

        Raises
        ------
        NotServingError
            Nobody listens at the address. Not carried out.
        CallTimeoutError
            No connection, or none that took the request, within the deadline. Not carried out.
        AuthenticationFailedError
            The server has another key. Not carried out.
        ProtocolError
            Whoever listens is no server of this protocol. Not carried out.
        ChannelError
            The client is closed, the server is at its limit of connections, keeps breaking connections off, or the
            channel failed otherwise. Not carried out.
        OutcomeUnknownError
            The request was sent and no reply came. Perhaps carried out.
        MessageTooLargeError
            The request is larger than `max_message` (not carried out), or the result is larger than the
            server's limit (carried out, as the message says).
        UnknownMethodError
            There is no such remote method.
        TypeError
            An argument cannot be carried; or the method raised it.
        RemoteError
            The method raised something of a type that is neither built in nor of this package.
        Exception
            Whatever else the method raised, if its type is built in or of this package.

        """
        deadline = time.monotonic() + (self._timeout if timeout is None else _checked_timeout(timeout))
        number = next(self._numbers)
        request = encode_request(self._codec, number, method, args, kwargs or {})
        self._check_size(method, request, self._max_message)
        reply = self._exchange(method, request, deadline, idempotent=idempotent)
        try:
            succeeded, value = decode_reply(self._codec, reply, number)
            failure = None if succeeded else unpack_failure(value)
        except ProtocolError as error:
            raise self._unknown_outcome(method, str(error)) from error
        if failure is not None:
            raise failure
        return value

    def connect(self, *, timeout: float | None = None) -> None:
        """Make sure that there is a connection, without calling anything.

        Parameters
        ----------
        timeout
            Seconds; None: the client's.

        Raises
        ------
        NotServingError, CallTimeoutError, AuthenticationFailedError, ProtocolError, ChannelError
            As :meth:`call`.

        """
        deadline = time.monotonic() + (self._timeout if timeout is None else _checked_timeout(timeout))
        self._pool.give_back(self._pool.take() or self._dialer.dial(deadline))

    def proxy(
        self, *, timeout: float | None = None, idempotent: Collection[str] = (), methods: Collection[str] = ()
    ) -> Proxy:
        """Return an object whose remote methods can be called like its own.

        Parameters
        ----------
        timeout
            Seconds for each call; None: the client's.
        idempotent
            Names of the methods that may be carried out twice.
        methods
            Names of further methods that the server has, which do not end in ``_rpc``.

        Returns
        -------
        Proxy
            ``proxy.some_rpc(1, x=2)`` is ``call("some_rpc", (1,), {"x": 2})``.

        """
        return Proxy(self, timeout=timeout, idempotent=frozenset(idempotent), methods=frozenset(methods))

    def retire(self, why: str) -> None:
        """Take no more calls; those under way are left alone. Idempotent.

        Parameters
        ----------
        why
            The message of the ``ChannelError`` that further calls raise.

        """
        self._pool.retire(why)

    def close(self, why: str = "the client is closed") -> None:
        """Close every connection; idempotent. Calls under way in other threads end with an error.

        May be called by a signal handler, whatever its thread was doing.

        Parameters
        ----------
        why
            The message of the ``ChannelError`` that further calls raise, unless a reason was given before.

        """
        self._pool.close(why)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(self, method: str, request: bytes, deadline: float, *, idempotent: bool) -> bytes:
        """Send a request and return the reply, on as many connections as that takes and is allowed."""
        perhaps_done = False  # an earlier attempt of an idempotent call may have been carried out
        tries = 0
        while True:
            wire = self._connection(method, request, deadline, perhaps_done=perhaps_done)
            wire.deadline = deadline
            try:
                outcome = self._send(wire, request) or self._receive(wire)
            except BaseException:  # such as KeyboardInterrupt: the reply may still come, and must find nobody
                self._pool.discard(wire)
                raise
            if isinstance(outcome, bytes):
                self._pool.give_back(wire)
                return outcome
            self._pool.discard(wire)
            error = outcome
            tries += error.counts
            if not isinstance(error, _NotDoneError):
                perhaps_done = True
                if not idempotent:
                    raise self._unknown_outcome(method, str(error)) from error
            if error.final or tries >= _TRIES or self._pool.refusal is not None:
                if perhaps_done:
                    raise self._unknown_outcome(method, str(error)) from error
                kind = CallTimeoutError if error.final else ChannelError
                raise kind(f"{method} could not be sent to {describe(self._location)}: {error}") from error

    def _connection(self, method: str, request: bytes, deadline: float, *, perhaps_done: bool) -> Wire:
        """Return a connection that is up, that no other call uses, and that takes a request of that size."""
        try:
            wire = self._pool.take() or self._dialer.dial(deadline)
        except (NotServingError, ChannelError) as error:
            if perhaps_done:
                raise self._unknown_outcome(method, f"the connection was lost, and then: {error}") from error
            raise
        if wire.longest is not None and len(request) > wire.longest:
            self._pool.give_back(wire)
            self._check_size(method, request, wire.longest)
        return wire

    @staticmethod
    def _send(wire: Wire, request: bytes) -> _NotDoneError | None:
        """Send; return why that failed. The kernel then never took all of it, so nobody can carry it out."""
        try:
            wire.send_bytes(request)
        except TimeoutError:
            return _NotDoneError("the server did not take it in time", final=True)
        except OSError as error:
            return _NotDoneError(_reason(error))
        return None

    def _receive(self, wire: Wire) -> bytes | _AttemptError:
        """Return the reply, or why there is none."""
        try:
            reply = wire.recv_bytes(self._max_message)
        except TimeoutError:
            return _AttemptError("no reply came in time", final=True)
        except ProtocolError as error:  # too large: it would be so again
            return _AttemptError(str(error), final=True)
        except (EOFError, OSError) as error:
            return _AttemptError(_reason(error))
        if reply == GOODBYE:
            return _NotDoneError("the server is closing", counts=False)  # the next is with another server
        return reply

    @staticmethod
    def _check_size(method: str, request: bytes, limit: int) -> None:
        if len(request) > limit:
            raise MessageTooLargeError(f"{method}: the request has {len(request)} bytes, the limit is {limit}")

    def _unknown_outcome(self, method: str, what: str) -> OutcomeUnknownError:
        return OutcomeUnknownError(
            f"{method} was sent to {describe(self._location)}, but {what}",
            hint="it may or may not have been carried out",
        )


def _reason(error: EOFError | OSError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _checked_timeout(timeout: float) -> float:
    if not 0 <= timeout < math.inf:
        raise ValueError(f"a timeout is a number of seconds, 0 or more, not {timeout}")
    return timeout
