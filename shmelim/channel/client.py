"""The client's end of a channel: calls remote methods, each under one deadline, and reconnects by itself.

Every call ends in one of three ways, and says which: it was carried out (a result, or the exception of the
method), it was not (``NotServingError``, ``ChannelError`` and its other subclasses), or nobody here can know
(``OutcomeUnknownError``).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from threading import TIMEOUT_MAX
from typing import Any, Literal, NoReturn, Self

from shmelim.channel.address import Address, Location, connect, describe, new_socket, normalize
from shmelim.channel.codec import MSGPACK, Codec, UncarriedValueError
from shmelim.channel.dispatch import is_remote_name
from shmelim.channel.failures import unpack_failure
from shmelim.channel.key import check_key
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE, GOODBYE, greet
from shmelim.channel.wire import Wire
from shmelim.errors import (
    CallerFaultError,
    CallTimeoutError,
    ChannelError,
    KeyFileError,
    MessageTooLargeError,
    NotServingError,
    OutcomeUnknownError,
    ProtocolError,
    UnknownMethodError,
)
from shmelim.system import forks
from shmelim.system.arguments import seconds
from shmelim.system.clock import monotonic
from shmelim.system.owner import whose

# What keeps a process from connecting to a server that may be well.
_RIGHTS = frozenset({errno.EACCES, errno.EPERM})
_OWN_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})

_TRIES = 4  # connections that the server may break off before a call gives up
_MOST_IDLE = 8
_PAUSE_FIRST, _PAUSE_MOST = 0.005, 0.1  # seconds between attempts to connect


class _TryAgainError(Exception):
    """An attempt to connect failed where another one may not.

    `failure` is for who has no time left for one; `server` is what it showed of a server, if it did.
    """

    def __init__(self, failure: Exception, server: Literal["busy", "drops us"] | None = None) -> None:
        super().__init__()
        self.failure = failure
        self.server = server


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
        Path of a Unix socket, or ``(host, port)``; or a function that returns it, which is asked now and before
        each connect, so that a server is found that was restarted elsewhere.
    authkey
        The key, or a function that returns it, which is asked after each connect (so that the key of a restarted
        server is found). Whatever these functions raise ends the call, but a ``NotServingError`` is tried again
        within `connect_wait`.
    timeout, connect_wait
        Seconds for a whole call, connecting included, unless the call says otherwise (no signal, patched socket or
        stopped clock stretches them; connecting never takes longer than `timeout`, whatever a call says); and
        seconds of that in which it waits for a server to appear.
    max_message, codec
        Longest message in bytes, both ways (a longer reply comes in several); codec of requests and replies: the
        server's.
    epoch
        Under what it speaks, for the server to decide what that may do: at most 60 characters; "": under nothing.

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
        address: Address | Callable[[], Address],
        authkey: bytes | Callable[[], bytes],
        *,
        timeout: float = 10.0,
        connect_wait: float = 0.0,
        max_message: int = DEFAULT_MAX_MESSAGE,
        codec: Codec = MSGPACK,
        epoch: str = "",
    ) -> None:
        self._find = address if callable(address) else None
        self._location = normalize(address() if callable(address) else address)
        self._authkey = authkey if callable(authkey) else check_key(authkey)
        self._timeout = _finite("timeout", timeout)
        self._connect_wait = _finite("connect_wait", connect_wait)
        self._connections = Connections()
        self._max_message = max_message
        self._codec = codec
        self._epoch = epoch
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
        """Where it calls, or called last."""
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
        method, args, kwargs
            Its name and arguments; see the codec for what they may be. Tuples in the result have become lists.
        timeout
            Seconds for the whole call; None: the client's.
        idempotent
            Whether the call may be carried out twice. If so, it is repeated within its deadline when a
            connection is lost after the request was sent.

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
            The request is larger than `max_message` (not carried out), or the result is larger than
            4 GiB (carried out, as the message says).
        UnknownMethodError, TypeError, RemoteError, Exception
            There is no such remote method; an argument cannot be carried; the method raised something of a type
            that is neither built in nor of this package; or whatever else the method raised.

        """
        deadline = monotonic() + (self._timeout if timeout is None else _finite("timeout", timeout))
        number = next(self._numbers)
        try:
            request = self._codec.dumps([number, method, list(args), dict(kwargs or {})])
        except UncarriedValueError as error:
            root = {2: "args", 3: "kwargs"}.get(error.path[0] if error.path else -1, "request")
            raise TypeError(f"{method}: {error.naming(root, error.path[1:])}") from None
        if len(request) > self._max_message:
            raise _too_large(method, request, self._max_message)
        reply = self._exchange(method, request, deadline, idempotent=idempotent)
        try:
            match self._codec.loads(reply):
                case [answered, True, result] if answered == number:
                    return result
                case [answered, False, parts] if answered == number:
                    failure = unpack_failure(parts)
                    vars(failure)["is_servers"] = True  # for who must not take it for a fault of this process
                case _:
                    failure = self._unknown_outcome(method, "the reply has an unknown form")
        except ProtocolError as error:
            raise self._unknown_outcome(method, error.message) from error
        raise failure

    def connect(self, *, timeout: float | None = None) -> None:
        """Make sure within `timeout` seconds (None: the client's) that there is a connection, calling nothing.

        Raises what :meth:`call` raises where a call is not carried out.
        """
        deadline = monotonic() + (self._timeout if timeout is None else _finite("timeout", timeout))
        self._connections.give_back(self._connections.take() or self._dial(deadline))

    def proxy(self, *, idempotent: Collection[str] = (), methods: Collection[str] = ()) -> Proxy:
        """Return an object whose remote methods can be called like its own.

        ``proxy.some_rpc(1, x=2)`` is ``call("some_rpc", (1,), {"x": 2})``. `idempotent` names the methods that may
        be carried out twice; `methods` those that can be called though they do not end in ``_rpc`` (the server
        must list them, too).
        """
        return Proxy(self, frozenset(idempotent), frozenset(methods))

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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _dial(self, deadline: float) -> Wire:
        """Open a connection; wait for a server, and forgive one that drops us, as long as allowed."""
        give_up = min(deadline, monotonic() + self._connect_wait)
        pause, drops = _PAUSE_FIRST, 0
        while True:
            try:
                return self._connect(deadline)
            except _TryAgainError as error:
                drops += error.server == "drops us"
                # A server that is there is worth the whole deadline, unless it drops us again and again.
                until = deadline if error.server and drops < _TRIES else give_up
                if monotonic() + pause > until:
                    raise error.failure from error.__cause__
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_MOST)

    def _connect(self, deadline: float) -> Wire:
        """Connect to the server, and shake hands; ``_TryAgainError`` where another attempt may help."""
        if self._find is not None:
            try:
                self._location = normalize(self._find())
            except NotServingError as error:
                raise _TryAgainError(error) from None
        location = self._location
        wire = self._connections.open(location)
        try:
            connect(wire.sock, location, deadline)
            wire.deadline = deadline
            wire.longest = greet(wire, self._key(location), location, self._epoch)
        except BaseException as error:
            self._connections.discard(wire)
            where = describe(location)
            match error:
                case NotServingError():
                    raise _TryAgainError(error) from None
                case ChannelError():
                    raise
                case BlockingIOError():
                    busy = CallTimeoutError(f"the server at {where} has too many connections waiting")
                    raise _TryAgainError(busy, "busy") from error
                case TimeoutError():
                    text = f"the server at {where} did not finish a handshake in time"
                    hint = "it hangs or is stopped, or another program listens there"
                    raise CallTimeoutError(text, hint=hint) from error
                case EOFError() | ConnectionError():
                    dropped = ChannelError(f"the server at {where} breaks connections off during the handshake")
                    raise _TryAgainError(dropped, "drops us") from error
                case OSError():
                    raise _cannot_connect(location, error) from error
            raise
        return wire

    def _key(self, location: Location) -> bytes:
        """Return the key, asked for after connecting, so that it is that of the server that listens now."""
        if not callable(self._authkey):
            return self._authkey
        try:
            return check_key(self._authkey())
        except NotServingError as error:
            hint = "a living server puts it back within a second; else this process looks in the wrong place"
            missing = KeyFileError(f"a server listens at {describe(location)}, but {error.message}", hint=hint)
            raise _TryAgainError(missing) from error

    def _exchange(self, method: str, request: bytes, deadline: float, *, idempotent: bool) -> bytes:
        """Send a request and return the reply, on as many connections as that takes and is allowed."""
        connections = self._connections
        perhaps_done = False  # an attempt of an idempotent call may have been carried out
        tries = 0
        while True:
            try:
                # A call that may take long is no reason to wait as long for a server that is stopped.
                wire = connections.take() or self._dial(min(deadline, monotonic() + self._timeout))
            except (NotServingError, ChannelError) as error:
                if perhaps_done:
                    raise self._unknown_outcome(method, f"the connection was lost, and then: {error}") from error
                raise
            if len(request) > wire.longest:
                connections.give_back(wire)
                raise _too_large(method, request, wire.longest)
            wire.deadline = deadline
            sent = False  # what the kernel never took whole nobody can carry out
            try:
                wire.send_bytes(request)
                sent = True
                reply = wire.recv_reply(self._max_message)
            except BaseException as error:  # after a KeyboardInterrupt, too, the reply must find nobody
                connections.discard(wire)
                if not isinstance(error, (EOFError, OSError)):
                    raise
                failure: Exception = error
                perhaps_done = perhaps_done or sent
                tries += 1
            else:
                if reply != GOODBYE:
                    connections.give_back(wire)
                    return reply
                # Not carried out; and the next attempt is with another server, or finds more room.
                connections.discard(wire)
                failure = EOFError("the server is closing")
            # Another attempt would run late, or be misunderstood, too.
            hopeless = isinstance(failure, (TimeoutError, ProtocolError)) or connections.refusal is not None
            if hopeless or tries >= _TRIES or (perhaps_done and not idempotent):
                raise self._unanswered(method, failure, perhaps_done=perhaps_done) from failure

    def _unanswered(self, method: str, failure: Exception, *, perhaps_done: bool) -> ChannelError:
        late = isinstance(failure, TimeoutError)
        why = getattr(failure, "strerror", None) or str(failure)
        if perhaps_done:
            return self._unknown_outcome(method, "no reply came in time" if late else why)
        kind, why = (CallTimeoutError, "the server did not take it in time") if late else (ChannelError, why)
        return kind(f"{method} could not be sent to {describe(self._location)}: {why}")

    def _unknown_outcome(self, method: str, what: str) -> OutcomeUnknownError:
        text = f"{method} was sent to {describe(self._location)}, but {what}"
        return OutcomeUnknownError(text, hint="it may or may not have been carried out")


class Connections:
    """The connections of one client. Every method is thread-safe and short.

    A signal handler may call any method, also while its thread is inside one: :meth:`close` most of all. So there
    is no lock, but only atomic steps on a dict and a list; and whoever has entered a connection looks once more
    whether it was closed meanwhile. In a forked child it is empty.
    """

    def __init__(self) -> None:
        self.refusal: str | None = None  # why no more connections are handed out; never goes back
        # All, by id. One that a signal handler's exception has torn from its call is in use by nobody, and goes.
        self._wires: weakref.WeakValueDictionary[int, Wire] = weakref.WeakValueDictionary()
        self._idle: list[Wire] = []  # those that no call uses, the last used one last
        forks.register(self)

    def __del__(self) -> None:
        # Nobody else holds a reference, so no call is under way. Without a lock of forks, which a fork holds while
        # it waits for that of the logging module, inside which the collector may come here.
        if hasattr(self, "_idle"):
            for wire in {*self._wires.values(), *self._idle}:  # in a cycle, the collector has emptied the first
                wire.close()

    def open(self, location: Location) -> Wire:
        """Enter a new wire, which is not connected yet; ``ChannelError`` when closed."""
        try:
            with forks.creating_descriptors:
                wire = Wire(new_socket(location))
                self._wires[id(wire)] = wire
        except OSError as error:
            raise _cannot_connect(location, error) from error
        if self.refusal is not None:
            self.discard(wire)
            raise ChannelError(self.refusal)
        return wire

    def take(self) -> Wire | None:
        """Return an idle connection that is up, the last used one first; None if there is none."""
        while True:
            try:
                wire = self._idle.pop()
            except IndexError:  # not asked before: a signal handler, or another thread, may come between
                wire = None
            if self.refusal is not None:
                if wire is not None:
                    self.discard(wire)
                raise ChannelError(self.refusal)
            if wire is None or wire.quiet():
                return wire
            self.discard(wire)  # the server has closed it

    def give_back(self, wire: Wire) -> None:
        """Make a connection idle after a complete exchange; it is closed if there are enough."""
        # A wire that was in use at a fork is closed in the child.
        if len(self._idle) >= _MOST_IDLE or wire.sock.fileno() < 0:
            self.discard(wire)
            return
        self._idle.append(wire)
        if self.refusal is not None:
            self._close_idle()

    def discard(self, wire: Wire) -> None:
        """Strike a connection that its caller has in use, and close it."""
        wire.close()  # first: a child that is forked meanwhile finds it in the books
        self._wires.pop(id(wire), None)

    def retire(self, why: str) -> None:
        """Hand out no more connections, and close idle ones; those in use are left alone."""
        if self.refusal is None:
            self.refusal = why
        self._close_idle()

    def close(self, why: str) -> None:
        """Retire, and shut the connections in use, which their users then discard; idempotent."""
        self.retire(why)
        for reference in self._wires.valuerefs():
            if (wire := reference()) is not None:
                wire.shutdown()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self.discard(self._idle.pop())

    def after_fork_in_child(self) -> None:
        """Close and forget all, which is the parent's. Called by :mod:`shmelim.system.forks`."""
        for wire in list(self._wires.values()):
            wire.after_fork_in_child()
        self._wires, self._idle = weakref.WeakValueDictionary(), []


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

    def __init__(self, client: ChannelClient, idempotent: frozenset[str], methods: frozenset[str]) -> None:
        self._client = client
        self._idempotent = idempotent
        self._methods = methods

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # A copy that is being made is asked for names of Python's before it has any attribute.
        if name.startswith("_") or not is_remote_name(name, self._methods):
            hint = "they end in _rpc, or are listed"
            raise UnknownMethodError(f"{name!r} is not the name of a remote method", hint=hint)

        def remote_method(*args: Any, **kwargs: Any) -> Any:
            return self._client.call(name, args, kwargs, idempotent=name in self._idempotent)

        remote_method.__name__ = remote_method.__qualname__ = name
        self.__dict__[name] = remote_method  # the next access finds it without coming here
        return remote_method

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._client!r}>"


def _too_large(method: str, request: bytes, limit: int) -> MessageTooLargeError:
    return MessageTooLargeError(f"{method}: the request has {len(request)} bytes, the limit is {limit}")


def _finite(name: str, value: float) -> float:
    return float(seconds(name, value, most=TIMEOUT_MAX))


def _cannot_connect(location: Location, error: OSError) -> ChannelError:
    """Return the package's error for the system's, which may be the fault of this process."""
    text = f"cannot connect to {describe(location)}: {error.strerror or error}"
    if error.errno in _RIGHTS and isinstance(location, str):
        return CallerFaultError(f"{text}; {whose(location)}", hint="run as its owner")
    if error.errno in _RIGHTS | _OWN_LIMITS:
        hint = f"process {os.getpid()}, which asked, is at a limit of its own: close what it has open, or raise it"
        return CallerFaultError(text, hint=hint)
    return ChannelError(text)
