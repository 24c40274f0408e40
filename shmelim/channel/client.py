"""The client's end of a channel: calls remote methods, each under one deadline, and reconnects by itself.

Every call ends in one of three ways, and says which: it was carried out (a result, or the exception of the
method), it was not (``NotServingError``, ``ChannelError`` and its other subclasses), or nobody here can know
(``OutcomeUnknownError``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

from shmelim.channel.address import Address, describe, normalize
from shmelim.channel.codec import MSGPACK, Codec
from shmelim.channel.connections import Connections
from shmelim.channel.dispatch import is_remote_name
from shmelim.channel.failures import unpack_failure
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE, GOODBYE, decode_reply, encode_request
from shmelim.channel.wire import Wire
from shmelim.errors import (
    CallTimeoutError,
    ChannelError,
    MessageTooLargeError,
    NotServingError,
    OutcomeUnknownError,
    ProtocolError,
    UnknownMethodError,
)
from shmelim.system.clock import monotonic

_TRIES = 4  # connections that the server may break off before a call gives up


class _Failure(NamedTuple):
    """An attempt that brought no reply: why, whether it may be carried out, whether there is a bound to such."""

    error: Exception
    sent: bool
    counts: bool


class ChannelClient:
    """Calls the remote methods of the object that a :class:`~shmelim.channel.server.ChannelServer` serves.

    Nothing is connected before the first call. Connections are kept; each carries one call at a time, so that
    many threads can have calls under way at once. After a restart of the server the next call finds the new
    one, and one that the server closed because it was idle is replaced without an error.

    Thread-safe. A forked child closes its copies of the connections without a word to the server, and opens its
    own. Cannot be pickled: give the other process the address and a way to the key.

    Parameters
    ----------
    address
        Path of a Unix socket, or ``(host, port)``.
    authkey
        The key, or a function that returns it, which is asked after each connect (so that the key of a restarted
        server is found); whatever it raises ends the call, but a ``NotServingError`` is tried again within
        `connect_wait`.
    timeout
        Seconds for a whole call, connecting included, unless the call says otherwise. No signal, patched socket or
        stopped clock stretches it.
    connect_wait
        Seconds of that in which a call waits for a server to appear.
    max_message
        Longest message in bytes, both ways.
    codec
        Codec of requests and replies; the server's.

    Raises
    ------
    TypeError, ValueError
        `address` or `authkey` is not what it should be, or a time is negative.

    Examples
    --------
    >>> import tempfile
    >>> from shmelim.channel import ChannelServer
    >>> class Adder:
    ...     def add_rpc(self, a, b):
    ...         return a + b
    >>> key = b"32 random bytes, from a key file"
    >>> with tempfile.TemporaryDirectory() as place, ChannelServer(Adder(), f"{place}/socket", key) as server:
    ...     with ChannelClient(server.address, key, timeout=5.0) as client:
    ...         client.call("add_rpc", (1,), {"b": 2})
    ...         client.proxy(idempotent=["add_rpc"]).add_rpc(20, 22)
    3
    42

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
        self._connections = Connections(self._location, authkey, connect_wait=connect_wait, patience=self._timeout)
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
        """Call a remote method and return its result: about 25 µs over a Unix socket, and what the method takes.

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
        NotServingError, CallTimeoutError, AuthenticationFailedError, ProtocolError, CallerFaultError, ChannelError
            Not carried out: nobody listens at the address; no connection, or none that took the request, came
            about within the deadline; the server has another key; whoever listens is not a server of this
            protocol; this process lacks what it takes to connect (a right, a descriptor, the key:
            ``KeyFileError``), and the server may be well; the client is closed, the server is at its limit of
            connections and all are busy, or the channel failed otherwise.
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
        deadline = self._deadline(timeout)
        number = next(self._numbers)
        request = encode_request(self._codec, number, method, args, kwargs or {})
        _check_size(method, request, self._max_message)
        reply = self._exchange(method, request, deadline, idempotent=idempotent)
        try:
            succeeded, value = decode_reply(self._codec, reply, number)
            failure = None if succeeded else unpack_failure(value)
        except ProtocolError as error:
            raise self._unknown_outcome(method, error) from error
        if failure is not None:
            raise failure
        return value

    def connect(self, *, timeout: float | None = None) -> None:
        """Make sure within `timeout` seconds (None: the client's) that there is a connection, calling nothing.

        Raises
        ------
        NotServingError, CallTimeoutError, AuthenticationFailedError, CallerFaultError, ProtocolError, ChannelError
            As :meth:`call`.

        """
        self._connections.give_back(self._connection(self._deadline(timeout)))

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
            Names of methods that can be called though they do not end in ``_rpc``; the server must list them, too.

        Returns
        -------
        Proxy
            ``proxy.some_rpc(1, x=2)`` is ``call("some_rpc", (1,), {"x": 2})``.

        """
        return Proxy(self, timeout, frozenset(idempotent), frozenset(methods))

    def retire(self, why: str) -> None:
        """Take no more calls, which raise ``ChannelError(why)``; those under way are left alone. Idempotent."""
        self._connections.retire(why)

    def close(self, why: str = "the client is closed") -> None:
        """Close every connection; idempotent. Calls under way in other threads end with an error.

        Further calls raise ``ChannelError(why)``, unless a reason was given before. May be called by a signal
        handler, whatever its thread was doing.
        """
        self._connections.close(why)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deadline(self, timeout: float | None) -> float:
        return monotonic() + (self._timeout if timeout is None else _checked_timeout(timeout))

    def _connection(self, deadline: float) -> Wire:
        return self._connections.take() or self._connections.dial(deadline)

    def _exchange(self, method: str, request: bytes, deadline: float, *, idempotent: bool) -> bytes:
        """Send a request and return the reply, on as many connections as that takes and is allowed."""
        perhaps_done = False  # an attempt of an idempotent call may have been carried out
        tries = 0
        while True:
            try:
                wire = self._connection(deadline)
            except (NotServingError, ChannelError) as error:
                if perhaps_done:
                    lost = ChannelError(f"the connection was lost, and then: {error}")
                    raise self._unknown_outcome(method, lost) from error
                raise
            if wire.longest is not None and len(request) > wire.longest:
                self._connections.give_back(wire)
                _check_size(method, request, wire.longest)
            wire.deadline = deadline
            outcome = self._attempt(wire, request)
            if isinstance(outcome, bytes):
                return outcome
            why = outcome.error
            perhaps_done = perhaps_done or outcome.sent
            tries += outcome.counts
            final = isinstance(why, (TimeoutError, ProtocolError))  # another attempt would end so, too
            over = final or tries >= _TRIES or self._connections.refusal is not None
            if perhaps_done and (over or not idempotent):
                raise self._unknown_outcome(method, why) from why
            if over:
                kind = CallTimeoutError if final else ChannelError
                text = _reason(why, "the server did not take it in time")
                raise kind(f"{method} could not be sent to {describe(self._location)}: {text}") from why

    def _attempt(self, wire: Wire, request: bytes) -> bytes | _Failure:
        """Send a request on a connection, and return the reply or why there is none."""
        sent = False  # what the kernel never took whole nobody can carry out
        try:
            wire.send_bytes(request)
            sent = True
            reply = wire.recv_bytes(self._max_message)
        except BaseException as error:
            # Also after a KeyboardInterrupt: the reply may still come, and must find nobody.
            self._connections.discard(wire)
            if isinstance(error, (EOFError, OSError)):
                return _Failure(error, sent, counts=True)
            raise
        if reply == GOODBYE:  # not carried out; and the next attempt is with another server, or finds more room
            self._connections.discard(wire)
            return _Failure(EOFError("the server is closing"), sent=False, counts=False)
        self._connections.give_back(wire)
        return reply

    def _unknown_outcome(self, method: str, error: Exception) -> OutcomeUnknownError:
        what = _reason(error, "no reply came in time")
        return OutcomeUnknownError(
            f"{method} was sent to {describe(self._location)}, but {what}",
            hint="it may or may not have been carried out",
        )


class Proxy:
    """The remote methods of a :class:`ChannelClient`, as methods. Thread-safe; cannot be pickled.

    Only names that end in ``_rpc`` or were listed, and do not start with an underscore, become calls, so that
    no protocol method of Python ever does. Made by :meth:`ChannelClient.proxy`.

    Examples
    --------
    >>> proxy = ChannelClient("/run/socket", b"32 random bytes, from a key file").proxy(methods=["latest"])
    >>> callable(proxy.latest), callable(proxy.add_rpc)
    (True, True)
    >>> proxy.other
    Traceback (most recent call last):
    shmelim.errors.UnknownMethodError: 'other' is not the name of a remote method (they end in _rpc, or are listed)

    """

    def __init__(
        self,
        client: ChannelClient,
        timeout: float | None,
        idempotent: frozenset[str],
        methods: frozenset[str],
    ) -> None:
        self._client = client
        self._timeout = timeout
        self._idempotent = idempotent
        self._methods = methods

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not is_remote_name(name, self._methods):
            hint = "they end in _rpc, or are listed"
            raise UnknownMethodError(f"{name!r} is not the name of a remote method", hint=hint)

        def remote_method(*args: Any, **kwargs: Any) -> Any:
            return self._client.call(
                name, args, kwargs, timeout=self._timeout, idempotent=name in self._idempotent
            )

        remote_method.__name__ = remote_method.__qualname__ = name
        self.__dict__[name] = remote_method  # the next access finds it without coming here
        return remote_method

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._client!r}>"


def _check_size(method: str, request: bytes, limit: int) -> None:
    if len(request) > limit:
        raise MessageTooLargeError(f"{method}: the request has {len(request)} bytes, the limit is {limit}")


def _reason(error: Exception, late: str) -> str:
    """Return why an attempt failed."""
    return late if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)


def _checked_timeout(timeout: float) -> float:
    if not 0 <= timeout < math.inf:
        raise ValueError(f"a timeout is a number of seconds, 0 or more, not {timeout}")
    return timeout
