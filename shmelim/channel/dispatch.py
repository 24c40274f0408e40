"""From the bytes of a request to the bytes of its reply: which methods exist, who calls, what went wrong."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

from shmelim.channel.codec import Codec, UncarriedValueError
from shmelim.channel.failures import pack_failure
from shmelim.errors import MessageTooLargeError, ProtocolError, ShmelimError, UnknownMethodError
from shmelim.system.logs import LimitedLog

_NAME_SHOWN = 100  # characters of a peer's method name that go into messages
_ANSWERS = (ValueError, TypeError, LookupError, ShmelimError)  # no faults of the server, that its log must explain


@dataclass(frozen=True, slots=True)
class Caller:
    """The process that made a call.

    `pid` is its id, on a Unix socket as the kernel knows it, on TCP as the client says; `uid` its user's id as the
    kernel knows it, None on TCP; `program` the program's name, and `epoch` that under which it speaks ("": under
    none), as the client says.
    """

    pid: int
    uid: int | None
    program: str
    epoch: str = ""


# Set once in each connection's thread, which serves one client only.
this_caller: ContextVar[Caller | None] = ContextVar("shmelim_rpc_caller", default=None)


def current_caller() -> Caller | None:
    """Return who called the remote method that is running in this thread (or context); None outside of one.

    Examples
    --------
    >>> current_caller() is None
    True

    """
    return this_caller.get()


def is_remote_name(name: str, listed: Collection[str] = ()) -> bool:
    """Whether a method of that name may be called from outside: it ends in ``_rpc``, or is listed."""
    return (name.endswith("_rpc") or name in listed) and not name.startswith("_") and name.isidentifier()


class Dispatcher:
    """The remote methods of one object. Thread-safe: nothing changes after construction.

    The methods are looked up once, on the object's type: an entry in the instance's ``__dict__``, a property or a
    ``__getattr__`` can never become a remote method.
    """

    def __init__(
        self, target: object, methods: Collection[str], codec: Codec, largest: int, name: str, log: LimitedLog
    ) -> None:
        self._methods = _remote_methods(target, methods)
        self._codec = codec
        self._largest = largest
        self._service_name = name
        self._log = log

    def answer(self, data: bytes) -> bytes:
        """Carry out a request and return its reply: the result, or whatever the method raised, an exit included.

        ``ProtocolError`` if `data` is not a request.
        """
        request = self._codec.loads(data)
        # Exact types: a bool is an int too.
        if type(request) is not list or list(map(type, request)) != [int, str, list, dict]:
            raise ProtocolError("the request has an unknown form")
        number, name, args, kwargs = request
        try:
            method = self._methods.get(name) or self._unknown(name)
            result = method(*args, **kwargs)
        except BaseException as error:  # a method must not end the thread of its connection
            if not isinstance(error, _ANSWERS):
                self._log(logging.ERROR, "method failed", "%s: %s failed", self._service_name, name, exc_info=True)
            return self._failure(number, error)
        try:
            reply = self._codec.dumps([number, True, result])
        except UncarriedValueError as error:
            text = f"{name}: {error.naming('result', error.path[1:])}"
            self._log(logging.ERROR, "result not carried", "%s: %s", self._service_name, text)
            return self._failure(number, TypeError(text))
        if len(reply) > self._largest:
            text = f"{name}: the result has {len(reply)} bytes, the limit is {self._largest}"
            hint = "the call was carried out; ask for less at a time"
            return self._failure(number, MessageTooLargeError(text, hint=hint))
        return reply

    def _failure(self, number: int, error: BaseException) -> bytes:
        return self._codec.dumps([number, False, pack_failure(error, self._codec)])

    def _unknown(self, name: str) -> NoReturn:
        name = name[:_NAME_SHOWN]
        close = difflib.get_close_matches(name, self._methods, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else None
        raise UnknownMethodError(f"{self._service_name} has no remote method {name!r}", hint=hint)


def _remote_methods(target: object, listed: Collection[str]) -> dict[str, Callable[..., Any]]:
    """Return the remote methods of `target`, bound, by name; ``ValueError`` if a listed one cannot be one."""
    if isinstance(listed, str):
        raise TypeError(f"methods is a collection of names, not the text {listed!r}")
    kind = type(target)
    methods: dict[str, Callable[..., Any]] = {}
    for name in dir(kind):
        raw: Any = inspect.getattr_static(kind, name)
        # Not a property, a constant or a nested class.
        is_method = isinstance(raw, (staticmethod, classmethod)) or (callable(raw) and not isinstance(raw, type))
        if is_method and is_remote_name(name, listed):
            bind = getattr(type(raw), "__get__", None)
            methods[name] = raw if bind is None else bind(raw, target, kind)
    for name in listed:
        if name not in methods:
            raise ValueError(f"methods: {kind.__qualname__} has no public method {name!r} that could be served")
    return methods
