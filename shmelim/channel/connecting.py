"""One attempt of a client to connect and to prove its key, and what it says of an attempt that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Literal

from shmelim.channel.address import Location, connect, describe
from shmelim.channel.key import check_key
from shmelim.channel.protocol import greet
from shmelim.channel.wire import Wire
from shmelim.errors import CallerFaultError, CallTimeoutError, ChannelError, KeyFileError, NotServingError
from shmelim.system.owner import whose

# What keeps a process from connecting to a server that may be well.
_RIGHTS = frozenset({errno.EACCES, errno.EPERM})
_OWN_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})


class TryAgainError(Exception):
    """An attempt to connect failed where another one may not.

    `failure` is for who has no time left for one; `server` is what it showed of a server, if it did.
    """

    def __init__(self, failure: Exception, server: Literal["busy", "drops us"] | None = None) -> None:
        super().__init__()
        self.failure = failure
        self.server = server


def establish(
    wire: Wire, location: Location, authkey: bytes | Callable[[], bytes], deadline: float, epoch: str
) -> None:
    """Connect a wire to the server at an address, and shake hands; ``TryAgainError`` where that may help."""
    where = describe(location)
    try:
        connect(wire.sock, location, deadline)
        wire.deadline = deadline
        # The key is asked for after connecting, so that it is that of the server that listens now.
        key = _ask(authkey, where) if callable(authkey) else authkey
        wire.longest = greet(wire, key, where, epoch)
    except NotServingError as error:
        raise TryAgainError(error) from None
    except ChannelError:
        raise
    except BlockingIOError as error:
        busy = CallTimeoutError(f"the server at {where} has too many connections waiting")
        raise TryAgainError(busy, "busy") from error
    except TimeoutError as error:
        text = f"the server at {where} did not finish a handshake in time"
        raise CallTimeoutError(text, hint="it hangs or is stopped, or another program listens there") from error
    except (EOFError, ConnectionError) as error:
        dropped = ChannelError(f"the server at {where} breaks connections off during the handshake")
        raise TryAgainError(dropped, "drops us") from error
    except OSError as error:
        raise cannot_connect(location, error) from error


def _ask(authkey: Callable[[], bytes], where: str) -> bytes:
    try:
        return check_key(authkey())
    except NotServingError as error:
        hint = "a living server puts it back within a second; else this process looks in the wrong place"
        missing = KeyFileError(f"a server listens at {where}, but {error.message}", hint=hint)
        raise TryAgainError(missing) from error


def cannot_connect(location: Location, error: OSError) -> ChannelError:
    """Return the package's error for the system's, which may be the fault of this process."""
    text = f"cannot connect to {describe(location)}: {error.strerror or error}"
    if error.errno in _RIGHTS and isinstance(location, str):
        return CallerFaultError(f"{text}; {whose(location)}", hint="run as its owner")
    if error.errno in _RIGHTS | _OWN_LIMITS:
        hint = f"process {os.getpid()}, which asked, is at a limit of its own: close what it has open, or raise it"
        return CallerFaultError(text, hint=hint)
    return ChannelError(text)
