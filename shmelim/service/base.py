"""The base of a service: an object served by a process of its own, or in this one, behind the same methods."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar, Self

from shmelim.channel.address import Address, Location
from shmelim.channel.key import SharedKey
from shmelim.errors import ChannelError, NoTableError
from shmelim.notify.problems import Notifier, checked_notifier
from shmelim.service.owner import Absent, Core
from shmelim.service.process import ServerReady, serve_rpc, start_server
from shmelim.service.settings import Figure, ServiceSettings, check_service_name, service_location
from shmelim.system.arguments import number
from shmelim.table import Reader


class RPCServiceBase(ABC):
    """A service: starts its server, keeps it alive, and carries its clients' calls.

    In RPC mode the server is a process of its own; the process that made the service is its *owner*. A server that
    dies is back within a second or two with nobody calling anything: the owner waits for its end. A server that
    hangs is found by :meth:`health_check`. A service whose state is in memory only comes back empty.

    A copy of the service in another process, forked or given to a process that is being started, is a client:
    its calls go over connections of its own. It never starts a server; when its checks find that the server hangs,
    it ends that, and the owner starts another. If the owner is gone, so is the server, and checks say so. In
    direct mode the server is an object of this process, without process, address or key.

    Of two objects of one process that are the same service (of equal name and key path) at one address, the later
    one takes it, and the earlier one ends as if it had been shut down. Objects of different services are refused.
    Dropping the last reference to a service ends it, as :meth:`shutdown` does.

    Thread-safe and fork-safe. Every call has a deadline, and ends as
    :meth:`~shmelim.channel.client.ChannelClient.call` says; it costs some 50 to 100 µs.

    Parameters
    ----------
    service_name
        Name for messages, threads and titles, 1 to 60 bytes: the server process is titled ``vali_<service_name>``.
    port
        TCP port on 127.0.0.1, 0 for any; None if there is an `address`.
    running_unit_tests
        Direct mode.
    enable_health_check
        Whether :meth:`health_check` does anything.
    health_check_interval_s
        Seconds between two checks.
    max_consecutive_failures
        Failures in a row that lead to a restart.
    enable_auto_restart
        Whether they do, and whether a server that died is restarted; otherwise both are only told.
    slack_notifier
        Who is told: anything with ``send_message(text, level=...)``. An outage is told once for all processes,
        and so is its end: of a server that died by the owner, if it has a notifier; of one that hangs by the
        process that finds it first.
    address
        Path of a Unix socket, or ``(host, port)``, instead of `port`.
    key_path
        File for the key, for clients that are no copies of this object; None: the key is in memory only.
    health_check_interval_ms
        Instead of `health_check_interval_s`.
    published_table
        Name of the table in shared memory in which the server publishes what its callers ask most, for
        :attr:`_server_table`; None if there is none. Kept for subclasses, which give it to their server.
    settings
        The fields of :class:`~shmelim.service.settings.ServiceSettings`: every figure, each with a default.

    Attributes
    ----------
    served_methods : collection of str
        For the subclass to list: methods of the server that can be called without a name that ends in ``_rpc``.
    port : int | None
        As given, or as chosen by the system; None for a Unix socket.
    service_name, running_unit_tests, published_table
        As given; no table in direct mode, where it is in private memory.
    enable_health_check, health_check_interval_s, max_consecutive_failures, enable_auto_restart, slack_notifier
        As given; may be changed at any time.

    Raises
    ------
    TypeError, ValueError
        There is neither `port` nor `address` in RPC mode, or both; the name cannot be a process' title; or a
        setting is unknown or impossible.

    Examples
    --------
    >>> class CountingServer:
    ...     total = 0
    ...     def add_rpc(self, number):
    ...         self.total += number
    ...         return self.total
    ...     def health_check_rpc(self):
    ...         return {"status": "ok"}
    >>> class Counting(RPCServiceBase):
    ...     def __init__(self, **options):
    ...         super().__init__("CountingServer", 50005, **options)
    ...         self._initialize_service()
    ...     def _create_direct_server(self):
    ...         return CountingServer()
    ...     def _start_server_process(self, address, authkey, server_ready):
    ...         return self._spawn_server(
    ...             CountingServer, address=address, authkey=authkey, server_ready=server_ready)
    ...     def add(self, number):
    ...         return self._server_proxy.add_rpc(number)
    >>> with Counting(running_unit_tests=True, enable_health_check=True) as counting:
    ...     counting.add(2), counting.add(3), counting.health_check()
    (2, 5, True)

    """

    # Everything else that the base has stands in one object, so that no name of a subclass can collide with it.
    __core: Core
    _server_proxy: Any = None  # on the class for mocks that are made after it
    served_methods: ClassVar[Collection[str]] = ()
    health_check_interval_s: float = Figure(60.0)  # type: ignore[assignment]
    max_consecutive_failures: int = Figure(3)  # type: ignore[assignment]

    def __init__(
        self,
        service_name: str,
        port: int | None,
        running_unit_tests: bool = False,
        enable_health_check: bool = False,
        health_check_interval_s: float = 60,
        max_consecutive_failures: int = 3,
        enable_auto_restart: bool = True,
        slack_notifier: Notifier | None = None,
        *,
        address: Address | None = None,
        key_path: str | os.PathLike[str] | None = None,
        health_check_interval_ms: float | None = None,
        published_table: str | None = None,
        **settings: Any,
    ) -> None:
        self.service_name = check_service_name(service_name)
        self.port = port
        self.running_unit_tests = running_unit_tests
        self.enable_health_check = enable_health_check
        self.health_check_interval_s = health_check_interval_s
        if health_check_interval_ms is not None:
            self.health_check_interval_ms = health_check_interval_ms
        self.max_consecutive_failures = max_consecutive_failures
        self.enable_auto_restart = enable_auto_restart
        self.slack_notifier = checked_notifier(slack_notifier)
        self.published_table = None if running_unit_tests else published_table
        self.__published: Reader[str, Any] | None = None
        self.__core = Core(
            service_name,
            None if running_unit_tests else service_location(port, address),
            SharedKey(key_path),
            ServiceSettings.checked(type(self).__name__, settings),
            self.served_methods,
        )
        self.__core.facade = weakref.ref(self)
        self._server_proxy = self.__core.proxy()

    # ------------------------------------------------------------------ what a subclass writes

    @abstractmethod
    def _create_direct_server(self) -> Any:
        """Return the server object for direct mode.

        Its methods are called as they are: values do not pass through the codec. So a tuple stays a tuple, an
        object arrives that no server process would get, and what a method returns may be its own state.
        """

    @abstractmethod
    def _start_server_process(self, address: Location, authkey: bytes, server_ready: ServerReady) -> BaseProcess:
        """Start a process that serves at `address`, and return it. Called again for each restart, from any thread.

        Either by :meth:`_spawn_server`, or by a ``Process`` of one's own that calls :meth:`_serve_rpc`, which
        `server_ready` is for (it can be used like a :class:`multiprocessing.Event`). The key, `authkey`, is 32
        bytes that must not get into a log, an environment or an argument list.
        """

    def _check_startable(self) -> None:  # noqa: B027
        """Raise what would keep another server from starting, where a subclass knows of more than address and key.

        Called before a server that runs is ended for another one to take its place.
        """

    # ------------------------------------------------------------------ what a subclass uses

    def _initialize_service(self) -> None:
        """Make the server, in direct or in RPC mode; to be called once the subclass is ready for it.

        Afterwards ``self._server_proxy.some_rpc(...)`` calls the server's methods. Costs the start of a process
        in RPC mode, some 0.3 s and what the server's constructor takes.

        Raises
        ------
        ChannelError
            Another process, or another service of this one, is at the address; or what the process needs cannot be
            given to it.
        TimeoutError, NotServingError
            The server was not ready in time; its process ended before it was.
        RuntimeError
            It was called before.
        SystemExit
            The caller's script is being run again by :mod:`multiprocessing`, in a process that it starts.
        Exception
            Whatever kept the server from being made.

        """
        core = self.__core
        if core.refusal is not None or not isinstance(self._server_proxy, Absent):
            raise RuntimeError(f"{self.service_name} was initialized or shut down before")
        if self.running_unit_tests:
            self._server_proxy = core.direct = self._create_direct_server()
            return
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # Not an Exception: what catches one would leave a second service in a process that is to be a server.
            raise SystemExit(
                f"{self.service_name} is made a second time, while multiprocessing runs the script again in a "
                f'process that it starts: put that part of the script under `if __name__ == "__main__":`'
            )
        try:
            core.begin()
            if isinstance(core.location, tuple):
                self.port = core.location[1]
            self._server_proxy = core.proxy()
            core.check_not_ended()  # by a signal handler, meanwhile
        except BaseException:
            self.shutdown()
            raise

    def _spawn_server(
        self,
        factory: Callable[..., object],
        *args: Any,
        address: Location,
        authkey: bytes,
        server_ready: ServerReady,
        on_listening: Callable[[Any, Location], object] | None = None,
        **kwargs: Any,
    ) -> BaseProcess:
        """Start a process that serves ``factory(*args, **kwargs)``; for :meth:`_start_server_process`.

        The process is a fresh interpreter, which imports what it needs and does not run the caller's script again:
        the script needs no ``if __name__ == "__main__":``, and nothing is forked. Where `factory` or an argument
        lives in that script, :mod:`multiprocessing` starts the process in its way; the setting ``start_method``
        chooses one of its ways in any case. For all but ``fork`` everything given must be picklable.

        If the object has a method ``close``, that is called at the process' end. A factory that takes longer than
        ``ready_timeout`` calls :func:`~shmelim.service.report_progress` as it gets on. `on_listening` is called in
        that process, with the object and its address, before clients are told that it is ready.

        Returns the process, which may not yet be ready; ``ChannelError`` if it cannot be started in the way of
        :mod:`multiprocessing`.
        """
        method, recipe = self.__core.settings.start_method, (factory, args, kwargs, on_listening)
        return start_server(self.service_name, method, recipe, address, authkey, server_ready)

    _serve_rpc = staticmethod(serve_rpc)

    def _call_server(
        self,
        method: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        idempotent: bool = False,
    ) -> Any:
        """Call a method of the server with a deadline of its own; else as through ``self._server_proxy``.

        As :meth:`~shmelim.channel.client.ChannelClient.call` in all; with a `timeout` of None the setting
        ``call_timeout`` holds. In direct mode it has no effect.
        """
        client = self.__core.client
        if client is None or not self._server_proxy:
            return getattr(self._server_proxy, method)(*args, **(kwargs or {}))
        return client.call(method, args, kwargs, timeout=timeout, idempotent=idempotent)

    @property
    def _server_table(self) -> Reader[str, Any]:
        """What the server publishes, read without asking it, and also while it is not there.

        The server object makes a :class:`~shmelim.table.Writer` of the name :attr:`published_table` (None, in
        direct mode, is private memory), keeps it as its attribute ``table``, and puts into it before its methods
        return. Attached when it is first asked for, and kept. ``examples/`` has services that do so.

        ``NoTableError`` if the service names no table, ``NotServingError`` if the server has not made it;
        ``SegmentError`` if what stands in shared memory cannot be read, or not so: other keys or another encoding.
        """
        if self.__published is None:
            if self.running_unit_tests:
                self.__published = self._server_proxy.table.reader()
            elif self.published_table is None:
                # As of an attribute that is missing, to who asks for all: a mock of this object, a debugger.
                raise NoTableError(
                    f"{self.service_name} names no table", hint="give its constructor published_table=name"
                )
            else:
                self.__published = Reader(self.published_table)
        return self.__published

    def _tell_problems(self) -> None:
        """Ask the server, in the process that made the service, what is wrong with it, so that Slack hears now."""
        if self.__core.is_makers:
            self.__core.find()

    # ------------------------------------------------------------------ life

    @property
    def address(self) -> Location | None:
        """Where the server is: a path, or host and port; None in direct mode."""
        return self.__core.location

    @property
    def server_pid(self) -> int | None:
        """Id of the server process that serves, or was the last to; None in direct mode and in copies."""
        server = self.__core.server
        return None if server is None else server.pid

    @property
    def has_ended(self) -> bool:
        """Whether it was shut down, here or by its owner, or a later object has taken its address."""
        return self.__core.refusal is not None or bool(self.__core.page.state.ended)

    @property
    def owner_lives(self) -> bool:
        """Whether the process that made the service runs; costs a look at ``/proc``, but in that process."""
        return self.__core.is_owned()

    @property
    def health_check_interval_ms(self) -> float:
        """Milliseconds between two checks: :attr:`health_check_interval_s` in another unit."""
        return self.health_check_interval_s * 1000

    @health_check_interval_ms.setter
    def health_check_interval_ms(self, value: float) -> None:
        self.health_check_interval_s = number("health_check_interval_ms", value) / 1000

    def restart_server(self) -> None:
        """Restart the server process by hand; clients reconnect by themselves.

        What the next server needs (key, address, what its process is given) is checked before this one is ended.
        Costs the end of a process and the start of another.

        ``ChannelError``: there is no server process; this process is not the owner; the service was shut down;
        another server could not be started, so that this one goes on; or as for :meth:`_initialize_service`.
        """
        core = self.__core
        core.check_not_ended()
        if core.location is None:
            raise ChannelError(f"{core.name} is in direct mode: it has no server process to restart")
        if core.client is None:
            raise ChannelError(f"{core.name} has no server yet", hint="call _initialize_service() first")
        if not core.is_makers:
            raise ChannelError(f"{core.name} can only be restarted by the process that made it")
        core.restart_by_hand()

    def shutdown(self, why: str | None = None) -> None:
        """End the server, if this process is its owner, and close this process' connections. Idempotent.

        Calls of this process that are under way get their answers, as far as the server gives them within half of
        `stop_timeout`; others end with an error. Copies in other processes see an end, and no failure. May be
        called by a signal handler, whatever its thread was doing. Takes up to `stop_timeout` seconds, and
        longer only for what the kernel needs to end a process. Whoever still uses the service is told `why`.
        """
        core = self.__core
        if core.refusal is None:
            why = why or f"{self.service_name} was shut down"
            core.end(why)
            self._server_proxy = Absent(why)  # whether or not the core still finds this object

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def __del__(self) -> None:
        # An object whose constructor was refused early has no core.
        if hasattr(self, "_RPCServiceBase__core"):
            self.shutdown()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.__core!r}>"

    # ------------------------------------------------------------------ other processes

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        slots = {name for kind in type(self).__mro__ for name in getattr(kind, "__slots__", ())}
        names = {*self.__dict__, *slots} - {
            "_server_proxy",
            "_RPCServiceBase__published",
            "__dict__",
            "__weakref__",
        }
        return {name: getattr(self, name) for name in names if name in self.__dict__ or hasattr(self, name)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.__core.facade = weakref.ref(self)
        self.__published = None
        self._server_proxy = self.__core.proxy()

    # ------------------------------------------------------------------ health

    def health_check(self, current_time_ms: float | None = None) -> bool:
        """Check the server, if it is time to; have it replaced when it failed too often in a row.

        May be called as often as one likes, from any thread, and in any copy of the service. A check costs one
        call of ``health_check_rpc``; between two checks it costs about a microsecond. At the threshold the owner
        restarts a server that hangs, which takes as long as :meth:`restart_server`; a copy ends it, and leaves the
        rest to the owner. A server that is dead is the owner's, too: a check counts that it found none. What is
        this process' own fault (a key that it may not read, a limit of descriptors) is not counted, and told once.

        `current_time_ms` is the time in milliseconds (None: now); ``TypeError`` if it is no number. Returns
        whether the check, or the last one if it is not time yet, found the server healthy: it answered
        ``health_check_rpc`` with the status "ok" or "degraded". False also if it was restarted since, and without
        a check once the service :attr:`has_ended`, and before it has a server. True while health checks are not
        enabled, and if the server has no ``health_check_rpc``, which is told once.
        """
        if not self.enable_health_check:
            return True
        core = self.__core
        if core.page.state.ended or isinstance(self._server_proxy, Absent):
            return False
        clock = core.settings.clock_ms
        if current_time_ms is None and clock is None:
            current_time_ms = time.time_ns() / 1e6
        else:
            given = clock() if current_time_ms is None and clock is not None else current_time_ms
            # Noted as the last check's, what is no time would fail all the next.
            current_time_ms = float(number("current_time_ms", given, least=-inf, unit="of milliseconds"))
        return core.check(current_time_ms, self.health_check_interval_s * 1000)


class _LastProcess:
    """The server process that was started last; a subclass may set an attribute of that name for itself."""

    def __get__(self, service: RPCServiceBase | None, kind: type) -> BaseProcess | None:
        server = getattr(getattr(service, "_RPCServiceBase__core", None), "server", None)
        return None if server is None else server.process


RPCServiceBase._server_process = _LastProcess()  # type: ignore[attr-defined]  # noqa: SLF001
