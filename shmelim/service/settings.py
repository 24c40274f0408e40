"""The settings of a service: how it is started and kept alive, how long what may take, how its calls are made."""

from __future__ import annotations

import difflib
import multiprocessing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from math import inf
from threading import TIMEOUT_MAX
from typing import Any, Final, Self

from shmelim.channel.address import Address, Location, normalize
from shmelim.channel.codec import MSGPACK, Codec
from shmelim.channel.failures import FAILURE_LIMIT
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE
from shmelim.channel.wire import LONGEST
from shmelim.system.arguments import flags, functions, number, whole

_LOCALHOST: Final = "127.0.0.1"
_NAME_LIMIT: Final = 60  # bytes
_OF_CALLS: Final = frozenset({"call_timeout", "connect_wait", "health_check_timeout"})  # which end some day
_TAKE_TIME: Final = frozenset({"call_timeout", "health_check_timeout", "ready_timeout"})


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What :class:`RPCServiceBase` takes besides its arguments, as keywords.

    Attributes
    ----------
    start_method : str | None
        How ``_spawn_server`` starts a process: ``"fork"``, ``"forkserver"`` or ``"spawn"``, as
        :mod:`multiprocessing` has them. None: a fresh interpreter that does not run the caller's script again, and
        the default of :mod:`multiprocessing` for what lives in that script.
    restart_on_exit : bool
        Whether a server that died is restarted at once, with nobody checking. Otherwise the health checks of the
        process that made the service restart it, and nobody else. Without automatic restart neither happens.
    restart_pause, restart_pause_most : float
        Seconds before a server that died again and again is restarted. The first two deaths cost no pause; each
        further one doubles it, up to the second figure. A server that lived for 10 s begins anew.
    replace_stale : bool
        Whether a server of this name, user and address that an earlier run left behind is ended.
    outlive_owner : bool
        Whether the server process goes on when its owner is gone without having shut it down.
    ready_timeout : float
        Seconds from the start of the server process to its being ready; counted anew each time that it reports
        progress (:func:`report_progress`).
    connect_tries, connect_delay : int, float
        How often to try to connect then, and seconds between two tries.
    stop_timeout : float
        Seconds from SIGTERM to SIGKILL. Calls under way have half of it to finish.
    release_timeout : float
        Seconds in which an address must become free after its server has ended, or while a connection of some
        other process holds the port.
    call_timeout : float
        Seconds for a whole call.
    connect_wait : float
        Seconds of that in which a call waits for a server to appear, so that its caller does not see a restart.
    health_check_timeout : float
        Seconds for the call of a health check.
    idempotent : collection of str
        Names of methods that may be carried out twice; they are repeated when a connection is lost.
    max_message : int
        Longest message in bytes, both ways.
    codec : Codec | None
        Codec of requests and replies; None: msgpack.
    epoch : str
        Under what the service and its copies speak to the server, see
        :class:`~shmelim.channel.dispatch.Caller`; at most 60 characters.
    clock_ms : callable | None
        Returns the time for health checks that are not given one; None: milliseconds since 1970.

    Raises
    ------
    TypeError
        A setting is of a type that it cannot be of; the message names it.
    ValueError
        A figure is negative, or 0 where that makes no sense, or there is no such start method; the message names
        it.

    Examples
    --------
    >>> ServiceSettings(stop_timeout=5).stop_timeout
    5
    >>> ServiceSettings(stop_timeout=-1)
    Traceback (most recent call last):
    ValueError: stop_timeout must be 0 or more, not -1

    """

    start_method: str | None = None
    restart_on_exit: bool = True
    restart_pause: float = 0.25
    restart_pause_most: float = 30.0
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
    epoch: str = ""
    clock_ms: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        if self.codec is MSGPACK:  # which cannot be pickled, and so is stood for by None
            object.__setattr__(self, "codec", None)
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if type(default) is bool:
                flags(**{name: value})
            elif isinstance(default, int | float):
                object.__setattr__(self, name, _figure(name, value, default))
        # A text is a collection of its letters, which nobody means.
        names = isinstance(self.idempotent, Collection) and not isinstance(self.idempotent, str)
        _check("idempotent", names, "a collection of names", self.idempotent)
        codec = hasattr(self.codec, "dumps") and hasattr(self.codec, "loads") and not isinstance(self.codec, type)
        _check("codec", self.codec is None or codec, "a codec or None", self.codec)
        functions(clock_ms=self.clock_ms)
        _check("epoch", isinstance(self.epoch, str), "text", self.epoch)
        _check("start_method", isinstance(self.start_method, str | None), "a name or None", self.start_method)
        methods = multiprocessing.get_all_start_methods()
        if self.start_method not in {None, *methods}:
            raise ValueError(
                f"start_method must be None or one of {', '.join(methods)}, not {self.start_method!r}"
            )

    @classmethod
    def checked(cls, owner: str, settings: Mapping[str, Any]) -> Self:
        """Return settings from keywords; an error names `owner`, whose they are, as well as the setting."""
        for name in settings.keys() - _DEFAULTS.keys():
            close = difflib.get_close_matches(name, _DEFAULTS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{owner} has no setting {name!r}{hint}")
        try:
            return cls(**settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{owner}: {error}") from None


_DEFAULTS: Final = {field.name: field.default for field in fields(ServiceSettings)}


class Figure:
    """An attribute that is checked whenever it is set, as a setting of this default; reading costs nothing."""

    def __init__(self, default: float) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: object, value: float) -> None:
        instance.__dict__[self._name] = _figure(self._name, value, self._default)


def _figure(name: str, value: Any, default: float) -> float:
    if name == "max_message":
        return whole(name, value, least=FAILURE_LIMIT, most=LONGEST)
    if type(default) is int:
        return whole(name, value)
    if name in _TAKE_TIME and value == 0:
        raise ValueError(f"{name} must be more than 0")
    # For ever is 292 years: locks and threads take no longer timeout.
    return min(number(name, value, most=TIMEOUT_MAX if name in _OF_CALLS else inf), TIMEOUT_MAX)  # type: ignore[no-any-return]


def _check(name: str, fits: bool, what: str, value: object) -> None:
    if not fits:
        raise TypeError(f"{name} must be {what}, not {value!r}")


def service_location(port: int | None, address: Address | None) -> Location:
    """Return where a service is to be served; ``ValueError`` if it has neither `port` nor `address`, or both."""
    if port is not None and address is None:
        return normalize((_LOCALHOST, port))
    if port is None and address is not None:
        return normalize(address)
    raise ValueError("a service needs a port or an address, and not both")


def check_service_name(name: str) -> str:
    """Return a service's name if it can stand in a process title; ``TypeError``, ``ValueError`` otherwise."""
    _check("service_name", isinstance(name, str), "text", name)
    if not name or len(name.encode()) > _NAME_LIMIT or not name.isprintable() or name != " ".join(name.split()):
        raise ValueError(f"{name!r} cannot name a service: it takes 1 to {_NAME_LIMIT} printable characters")
    return name


def server_title(service_name: str) -> str:
    """Return the title of a service's server process: how it shows up in ``ps``, and is known again."""
    return f"vali_{service_name}"
