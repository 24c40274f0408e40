"""The messages of the channel, their limits and their order; and the handshake, which both ends find here.

A connection starts with the mutual HMAC handshake of ``multiprocessing.connection`` (the server challenges first),
then the client says hello and the server answers; from there on it is one request, one reply::

    client                                server
      hello   [protocol, pid, program, epoch] →
                                            ←   welcome [protocol, service name, refusal or None, longest request]
      request [id, method, args, kwargs]    →
                                            ←   reply   [id, True, result] or [id, False, failure]
                                            ←   or where that is too long for one message: 0xC1, its length in
                                                8 bytes; then as many messages as it takes
                                            ←   goodbye, an empty message

With its goodbye a server says: no request that came after my last reply on this connection was carried out, or
will be. So its client can send such a request again elsewhere, although it cannot know what happened to one that
was lost in any other way. Hello and welcome are always msgpack; requests and replies are in the channel's codec.

The managers of :mod:`multiprocessing` begin with the same handshake, so that one of them and one of us may even
hold the same key. What they say next is a pickle, which is recognised, answered in their way, and never unpickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from typing import NamedTuple

import msgspec

from shmelim.channel.address import Location, describe
from shmelim.channel.codec import MSGPACK, is_pickle
from shmelim.channel.wire import Wire
from shmelim.errors import AuthenticationFailedError, ChannelError, ProtocolError
from shmelim.system.clock import monotonic

PROTOCOL = 1  # raised with every change that one of the two ends would misunderstand
DEFAULT_MAX_MESSAGE = 64 * 1024 * 1024  # bytes
GOODBYE = b""
HELLO_LIMIT = 512  # bytes; hello and welcome
WELCOME_LIMIT = 64 * 1024  # bytes; what may come in its place, such as a manager's traceback

_LAST_WORDS = 0.5  # seconds for what a server may say after it has refused the key
_NAME_LIMIT = 60  # characters of a program, service or epoch; four bytes each still fit into HELLO_LIMIT


class Hello(NamedTuple):
    """What a client says of itself."""

    protocol: int
    pid: int
    program: str
    epoch: str = ""


def encode_hello(epoch: str) -> bytes:
    """Return this process' hello; the epoch is that under which it speaks, "" if under none."""
    program = Path((sys.argv and sys.argv[0]) or sys.executable).name
    return msgspec.msgpack.encode([PROTOCOL, os.getpid(), _short(program), _short(epoch)])


def decode_hello(data: bytes) -> Hello:
    """Return the hello in `data`. A later protocol may add items, and is told so; else ``ProtocolError``."""
    match MSGPACK.loads(data):
        case [int(protocol), int(pid), str(program), str(epoch), *_]:
            return Hello(protocol, pid, program[:_NAME_LIMIT], epoch[:_NAME_LIMIT])
        case [int(protocol), int(pid), str(program), *_]:
            return Hello(protocol, pid, program[:_NAME_LIMIT])
    raise ProtocolError("the client's hello has an unknown form")


def encode_welcome(service_name: str, refusal: str | None, max_message: int) -> bytes:
    """Return the answer to a hello."""
    return msgspec.msgpack.encode([PROTOCOL, _short(service_name), refusal, max_message])


def greet(wire: Wire, key: bytes, where: Location, epoch: str) -> int:
    """Shake hands as a client, under an epoch; return the longest request in bytes that the server takes.

    ``AuthenticationFailedError``, ``ProtocolError`` or ``ChannelError`` if another attempt would end so, too;
    ``OSError`` or ``EOFError`` if the connection broke off or the deadline passed.
    """
    try:
        answer_challenge(wire, key)  # type: ignore[arg-type]  # needs no more than a Wire has
        deliver_challenge(wire, key)  # type: ignore[arg-type]
        wire.send_bytes(encode_hello(epoch))
        answer = wire.recv_bytes(WELCOME_LIMIT)
    except AuthenticationError:
        raise _other_key(wire, where) from None
    except (ProtocolError, AssertionError) as error:  # the handshake functions assert what the peer sends
        raise _stranger(where, f"another program ({error})") from error
    if answer == GOODBYE:
        raise EOFError("the server is closing")
    try:
        parts = MSGPACK.loads(answer)
    except ProtocolError as error:
        if is_managers_reply(answer):
            raise _stranger(where, "a multiprocessing manager (BaseManager), and it holds the same key") from None
        raise _stranger(where, f"a program that holds the key ({error.message})") from error
    match parts:
        case [int(protocol), str(name), *_] if protocol != PROTOCOL:
            raise ProtocolError(
                f"{name} at {describe(where)} speaks protocol {protocol}, this client {PROTOCOL}",
                hint="run the same version of the package at both ends",
            )
        case [int(), str(), None, int(longest), *_]:
            return longest
        case [int(), str(), str(refusal), *_]:
            raise ChannelError(f"the server at {describe(where)} refuses the connection: {refusal}")
    raise _stranger(where, "a program that holds the key (its welcome has an unknown form)")


def receive_hello(wire: Wire, key: bytes, service: str) -> Hello:
    """Shake hands as a server, up to the client's hello, which a welcome should answer."""
    deliver_challenge(wire, key)  # type: ignore[arg-type]
    answer_challenge(wire, key)  # type: ignore[arg-type]
    data = wire.recv_bytes(HELLO_LIMIT)
    if not is_pickle(data):
        return decode_hello(data)
    text = (
        f"{service} is not a multiprocessing manager but a command channel of shmelim: call it with shmelim's "
        f"clients, or give the manager its own address"
    )
    with contextlib.suppress(OSError):
        wire.send_bytes(pickle.dumps(("#TRACEBACK", text)))  # what makes a manager's client raise RemoteError
    raise ProtocolError("it is a client of a multiprocessing manager, and was told so")


def is_managers_reply(data: bytes) -> bool:
    """Whether this is what a manager of :mod:`multiprocessing` answers to whatever is not a call of its own."""
    return is_pickle(data) and any(kind in data[:40] for kind in (b"#TRACEBACK", b"#ERROR", b"#RETURN"))


def _other_key(wire: Wire, where: Location) -> ChannelError:
    """Say who refused our key, or has another: a manager says one thing more before it hangs up."""
    wire.deadline = min(wire.deadline or 0.0, monotonic() + _LAST_WORDS)
    with contextlib.suppress(EOFError, OSError):
        if is_managers_reply(wire.recv_bytes(WELCOME_LIMIT)):
            return _stranger(where, "a multiprocessing manager (BaseManager), and it holds another key")
    return AuthenticationFailedError(
        f"the server at {describe(where)} holds another key",
        hint="load the key again from the server's key file; or see whether another service listens there",
    )


def _stranger(where: Location, what: str) -> ProtocolError:
    return ProtocolError(
        f"whoever listens at {describe(where)} is not a server of shmelim but {what}",
        hint="stop that program, or give the server another address",
    )


def _short(name: str) -> str:
    return name[:_NAME_LIMIT].encode("utf-8", "replace").decode()
