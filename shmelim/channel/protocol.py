"""The messages of the channel, their limits, and the order in which they go.

A connection starts with the mutual HMAC handshake of ``multiprocessing.connection`` (the server challenges first),
then the client says hello and the server answers; from there on it is one request, one reply::

    client                                server
      hello   [protocol, pid, program]      →
                                            ←   welcome [protocol, service name, refusal or None, longest request]
      request [id, method, args, kwargs]    →
                                            ←   reply   [id, True, result] or [id, False, failure]
                                            ←   goodbye, an empty message

With its goodbye a server says: no request that came after my last reply on this connection was carried out, or
will be. So its client can send such a request again elsewhere, although it cannot know what happened to one that
was lost in any other way. Hello and welcome are always msgpack; requests and replies are in the channel's codec.

The managers of :mod:`multiprocessing` begin with the same handshake, so that one of them and one of us may even
hold the same key. What they say next is a pickle, which is recognised, answered in their way, and never unpickled.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shmelim.channel.codec import MSGPACK, Codec, UncarriedValueError, is_pickle
from shmelim.errors import ProtocolError

PROTOCOL = 1  # raised with every change that one of the two ends would misunderstand
DEFAULT_MAX_MESSAGE = 64 * 1024 * 1024  # bytes
GOODBYE = b""
HELLO_LIMIT = 512  # bytes; hello and welcome
WELCOME_LIMIT = 64 * 1024  # bytes; what may come in its place, such as a manager's traceback

_NAME_LIMIT = 60  # characters of a program or service name; four bytes each still fit into HELLO_LIMIT


class Hello(NamedTuple):
    """What a client says of itself."""

    protocol: int
    pid: int
    program: str


class Welcome(NamedTuple):
    """What a server answers; `refusal` says why it takes no requests."""

    protocol: int
    service_name: str
    refusal: str | None
    max_message: int  # longest request in bytes


def encode_hello() -> bytes:
    """Return this process' hello."""
    program = Path((sys.argv and sys.argv[0]) or sys.executable).name
    return MSGPACK.dumps([PROTOCOL, os.getpid(), _short(program)])


def decode_hello(data: bytes) -> Hello:
    """Return the hello in `data`. A later protocol may add items, and is told so; else ``ProtocolError``."""
    match MSGPACK.loads(data):
        case [int(protocol), int(pid), str(program), *_]:
            return Hello(protocol, pid, program[:_NAME_LIMIT])
    raise ProtocolError("the client's hello has an unknown form")


def encode_welcome(service_name: str, refusal: str | None, max_message: int) -> bytes:
    """Return the answer to a hello."""
    return MSGPACK.dumps([PROTOCOL, _short(service_name), refusal, max_message])


def decode_welcome(data: bytes) -> Welcome:
    """Return the welcome in `data`; ``ProtocolError`` if there is none."""
    match MSGPACK.loads(data):
        case [int(protocol), str(service_name), None | str() as refusal, int(max_message), *_]:
            return Welcome(protocol, service_name, refusal, max_message)
    raise ProtocolError("the server's welcome has an unknown form")


def is_managers_reply(data: bytes) -> bool:
    """Whether this is what a manager of :mod:`multiprocessing` answers to whatever is not a call of its own."""
    return is_pickle(data) and any(kind in data[:40] for kind in (b"#TRACEBACK", b"#ERROR", b"#RETURN"))


def encode_managers_refusal(text: str) -> bytes:
    """Return what makes a client of a :mod:`multiprocessing` manager raise ``RemoteError`` with that text."""
    return pickle.dumps(("#TRACEBACK", text))


def encode_request(
    codec: Codec, number: int, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bytes:
    """Return a request; ``TypeError`` names the argument that cannot be carried."""
    try:
        return codec.dumps([number, method, list(args), dict(kwargs)])
    except UncarriedValueError as error:
        _, *place = error.path or (None,)
        root = {2: "args", 3: "kwargs"}.get(error.path[0] if error.path else -1, "request")
        raise TypeError(f"{method}: {error.naming(root, tuple(place))}") from None


def decode_request(codec: Codec, data: bytes) -> tuple[int, str, list[Any], dict[str, Any]]:
    """Return a request's id, method, arguments and keywords; ``ProtocolError`` if `data` is not one."""
    parts = codec.loads(data)
    # Exact types: a bool is an int too.
    if type(parts) is list and [type(part) for part in parts] == [int, str, list, dict]:
        number, method, args, kwargs = parts
        return number, method, args, kwargs
    raise ProtocolError("the request has an unknown form")


def decode_reply(codec: Codec, data: bytes, number: int) -> tuple[bool, Any]:
    """Return whether the call succeeded, and its result or failure; ``ProtocolError`` if that is not its reply."""
    parts = codec.loads(data)
    if type(parts) is not list or len(parts) != 3 or type(parts[1]) is not bool:  # noqa: PLR2004
        raise ProtocolError("the reply has an unknown form")
    if parts[0] != number:
        raise ProtocolError("the reply belongs to another request")
    return parts[1], parts[2]


def _short(name: str) -> str:
    return name[:_NAME_LIMIT].encode("utf-8", "replace").decode()
