"""The settings of a service: where it is, how long what may take, how its calls are made."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from shmelim.rpc.channel.address import normalize
from shmelim.rpc.channel.codec import MSGPACK
from shmelim.rpc.channel.protocol import DEFAULT_MAX_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from shmelim.rpc.channel.address import Address, Location
    from shmelim.rpc.channel.codec import Codec

__all__ = ["ServiceSettings", "service_location"]

_LOCALHOST = "127.0.0.1"


def _now_ms() -> float:
    return time.time_ns() / 1e6


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What :class:`~shmelim.rpc.service.base.RPCServiceBase` takes besides its arguments, as keywords.

    Attributes
    ----------
    start_method : str | None
        Start method for ``_spawn_server``; None: the default of :mod:`multiprocessing`.
    replace_stale : bool
        Whether a server of this name, user and address that an earlier run left behind is ended.
    outlive_owner : bool
        Whether the server process goes on when its owner is gone without having shut it down.
    ready_timeout : float
        Seconds from the start of the server process to its being ready.
    connect_tries, connect_delay : int, float
        How often to try to connect then, and seconds between two tries.
    stop_timeout : float
        Seconds from SIGTERM to SIGKILL. Calls under way have half of it to finish.
    release_timeout : float
        Seconds in which an address must become free after its server has ended.
    call_timeout : float
        Seconds for a whole call.
    connect_wait : float
        Seconds of that in which a call waits for a server to appear, so that its caller does not see a restart.
    health_check_timeout : float
        Seconds for the call of a health check.
    idempotent : collection of str
        Names of ``_rpc`` methods that may be carried out twice; they are repeated when a connection is lost.
    max_message : int
        Longest message in bytes, both ways.
    codec : Codec | None
        Codec of requests and replies; None: msgpack.
    clock_ms : callable
        Returns the time for health checks that are not given one; default: milliseconds since 1970.

    Raises
    ------
    ValueError
        A figure is negative, or 0 where that makes no sense; the message names it.

    """

    start_method: str | None = None
    replace_stale: bool = True
    outlive_owner: bool = False
    ready_timeout: float = 10.0
    connect_tries: int = 5
    connect_delay: float = 1.0
    stop_timeout: float = 2.0
    release_timeout: float = 2.0
    call_timeout: float = 10.0
    connect_wait: float = 1.0
    health_check_timeout: float = 5.0
    idempotent: Collection[str] = ()
    max_message: int = DEFAULT_MAX_MESSAGE
    codec: Codec | None = None
    clock_ms: Callable[[], float] = _now_ms

    def __post_init__(self) -> None:
        if self.codec is MSGPACK:  # which cannot be pickled, and so is stood for by None
            object.__setattr__(self, "codec", None)
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in {"connect_tries", "max_message"} else 0
            if isinstance(value, (int, float)) and value < least:
                raise ValueError(f"{field.name} must be {least} or more, not {value}")

    @property
    def codec_in_use(self) -> Codec:
        """The codec itself."""
        return self.codec or MSGPACK


def service_location(port: int | None, address: Address | None) -> Location:
    """Return where a service is to be served; ``ValueError`` if it has neither `port` nor `address`, or both."""
    if port is not None and address is None:
        return normalize((_LOCALHOST, port))
    if port is None and address is not None:
        return normalize(address)
    raise ValueError("a service needs a port or an address, and not both")
