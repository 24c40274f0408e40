"""The settings of a service: where it is, how long what may take, how its calls are made."""

from __future__ import annotations

import difflib
import multiprocessing
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self

from shmelim.channel.address import normalize
from shmelim.channel.codec import MSGPACK
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shmelim.channel.address import Address, Location
    from shmelim.channel.codec import Codec

_LOCALHOST = "127.0.0.1"


def _now_ms() -> float:
    return time.time_ns() / 1e6


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What :class:`~shmelim.service.base.RPCServiceBase` takes besides its arguments, as keywords.

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
    TypeError
        A setting is of a type that it cannot be of; the message names it.
    ValueError
        A figure is negative, or 0 where that makes no sense, or there is no such start method; the message names
        it.

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
        for name, (kind, least) in _FIGURES.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                number = "a whole number" if kind is int else "a number"
                raise TypeError(f"{name} must be {number}, not {value!r}")
            if not value >= least:  # which is no number, too
                raise ValueError(f"{name} must be {least} or more, not {value}")
        for name, (fits, what) in _OTHERS.items():
            value = getattr(self, name)
            if not fits(value):
                raise TypeError(f"{name} must be {what}, not {value!r}")
        methods = multiprocessing.get_all_start_methods()
        if self.start_method not in {None, *methods}:
            raise ValueError(
                f"start_method must be None or one of {', '.join(methods)}, not {self.start_method!r}"
            )

    @classmethod
    def checked(cls, owner: str, settings: Mapping[str, Any]) -> Self:
        """Return settings from keywords; an error names `owner`, whose they are, as well as the setting."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"{owner} has no setting {name!r}{hint}")
        try:
            return cls(**settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{owner}: {error}") from None

    @property
    def codec_in_use(self) -> Codec:
        """The codec itself."""
        return self.codec or MSGPACK


_SECONDS = (int, float)
_FIGURES: Final[dict[str, tuple[Any, int]]] = {
    "ready_timeout": (_SECONDS, 0),
    "connect_tries": (int, 1),
    "connect_delay": (_SECONDS, 0),
    "stop_timeout": (_SECONDS, 0),
    "release_timeout": (_SECONDS, 0),
    "call_timeout": (_SECONDS, 0),
    "connect_wait": (_SECONDS, 0),
    "health_check_timeout": (_SECONDS, 0),
    "max_message": (int, 1),
}
_OTHERS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "replace_stale": (lambda value: isinstance(value, bool), "True or False"),
    "outlive_owner": (lambda value: isinstance(value, bool), "True or False"),
    "start_method": (lambda value: value is None or isinstance(value, str), "a name or None"),
    # A text is a collection of its letters, which nobody means.
    "idempotent": (
        lambda value: isinstance(value, Collection) and not isinstance(value, str),
        "a collection of names",
    ),
    "codec": (
        lambda value: value is None or (hasattr(value, "dumps") and hasattr(value, "loads")),
        "a codec or None",
    ),
    "clock_ms": (callable, "a function"),
}


def service_location(port: int | None, address: Address | None) -> Location:
    """Return where a service is to be served; ``ValueError`` if it has neither `port` nor `address`, or both."""
    if port is not None and address is None:
        return normalize((_LOCALHOST, port))
    if port is None and address is not None:
        return normalize(address)
    raise ValueError("a service needs a port or an address, and not both")
