"""The base of a service: an object served by a process of its own, or living in this one, behind the same methods.

A complete service::

    class Positions(RPCServiceBase):
        def __init__(self, limit, running_unit_tests=False):
            super().__init__("PositionManagerServer", 50002, running_unit_tests)
            self.limit = limit
            self._initialize_service()

        def _create_direct_server(self):
            return PositionServer(self.limit)

        def _start_server_process(self, address, authkey, server_ready):
            return self._spawn_server(
                PositionServer, self.limit, address=address, authkey=authkey, server_ready=server_ready
            )

        def open_position(self, hotkey, pair, size):
            return self._server_proxy.open_position_rpc(hotkey, pair, size)
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

from shmelim.channel.address import describe
from shmelim.errors import ChannelError, UnknownMethodError
from shmelim.service import log_streams
from shmelim.service.absent import Absent
from shmelim.service.client import ServiceClient
from shmelim.service.key import ServiceKey
from shmelim.service.lifetimes import end_at_exit, weakly
from shmelim.service.monitor import HealthMonitor, HealthPolicy, tell
from shmelim.service.outages import Outages
from shmelim.service.restarts import RestartDesk
from shmelim.service.serving import run_server, serve_rpc
from shmelim.service.settings import ServiceSettings, service_location
from shmelim.service.supervisor import Supervisor
from shmelim.service.titles import check_service_name
from shmelim.system import forks

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess
    from types import TracebackType

    from shmelim.channel.address import Address, Location
    from shmelim.service.launch import ServerReady
    from shmelim.service.monitor import Notifier
    from shmelim.service.outages import Finding


class RPCServiceBase(ABC):
    """A service: starts its server, keeps it alive, and carries its clients' calls.

    In RPC mode the server is a process of its own, and a child of the process that made the service: its owner.
    A copy of the service in another process, forked or given to a process that is being started, is a client:
    its calls go over connections of its own, and it never ends or starts anything. In direct mode the server
    is an object of this process, without process, address or key.

    Of two objects of one process that are the same service (of equal name and key path) at one address, the later
    one takes it, and the earlier one ends as if it had been shut down. Objects of different services are refused.

    Thread-safe. Every call has a deadline, and ends as :class:`~shmelim.channel.client.ChannelClient` says.

    Parameters
    ----------
    service_name
        Name for messages, threads and titles: the server process is titled ``vali_<service_name>``.
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
        Whether they do; otherwise they are only told.
    slack_notifier
        Who is told: anything with ``send_message(text, level=...)``. The owner's is told what any process finds.
        That of a copy is told what the copy finds after the owner's death, or if the owner had none when the copy
        was made.
    address
        Path of a Unix socket, or ``(host, port)``, instead of `port`.
    key_path
        File for the key, for clients that are no copies of this object; None: the key is in memory only.
    settings
        The fields of :class:`~shmelim.service.settings.ServiceSettings`: every figure, each with a default.

    Attributes
    ----------
    service_name, running_unit_tests
        As given.
    port
        As given, or as chosen by the system; None for a Unix socket.
    enable_health_check, health_check_interval_s, max_consecutive_failures, enable_auto_restart, slack_notifier
        As given; may be changed at any time.

    Raises
    ------
    TypeError, ValueError
        There is neither `port` nor `address` in RPC mode, or both; the name is no title for a process; or a
        setting is unknown or impossible.

    """

    # On the class as well, for mocks made after it, and for objects that are forgotten before they are made.
    _server_proxy: Any = None
    _closed = True
    _why_ended = "it was shut down"
    _owner_tells = True  # in a copy: whether the owner had a notifier

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
        **settings: Any,
    ) -> None:
        self.service_name = check_service_name(service_name)
        self.port = port
        self.running_unit_tests = running_unit_tests
        self.enable_health_check = enable_health_check
        self.health_check_interval_s = health_check_interval_s
        self.max_consecutive_failures = max_consecutive_failures
        self.enable_auto_restart = enable_auto_restart
        self.slack_notifier = slack_notifier
        self._location = None if running_unit_tests else service_location(port, address)
        self._service_key = ServiceKey(key_path)
        self._settings = ServiceSettings.checked(type(self).__name__, settings)
        # Written by _initialize_service(), by shutdown(), and by a forked child, which is alone.
        self._server_proxy = self._not_yet()
        self._supervisor: Supervisor | None = None  # in the owner only
        self._desk: RestartDesk | None = None
        self._client: ServiceClient | None = None
        self._owner_pid = os.getpid()
        self._begin_here()

    def _begin_here(self) -> None:
        """Make what each process has of its own."""
        # Guards `_closed`. Re-entrant, since a signal handler may shut down what its thread is shutting down.
        self._closing = threading.RLock()
        self._closed = False
        self._outages = Outages(self.service_name, weakly(self._tell))
        self._monitor = HealthMonitor(
            self.service_name,
            weakly(self._probe),
            weakly(self._restart_after),
            weakly(self._report),
            weakly(self._is_over),
        )
        forks.register(self)
        end_at_exit(self)

    # ------------------------------------------------------------------ what a subclass writes

    @abstractmethod
    def _create_direct_server(self) -> Any:
        """Return the server object for direct mode.

        Its methods are called as they are: values do not pass through the codec. So a tuple stays a tuple, an
        object arrives that no server process would get, and what a method returns may be its own state.
        """

    @abstractmethod
    def _start_server_process(self, address: Location, authkey: bytes, server_ready: ServerReady) -> BaseProcess:
        """Start a process that serves, and return it.

        Either by :meth:`_spawn_server`, or by a ``Process`` of one's own that calls :meth:`_serve_rpc`. Called
        again for each restart, from any thread.

        Parameters
        ----------
        address
            Where to serve.
        authkey
            The key: 32 bytes that must not get into a log, an environment or an argument list.
        server_ready
            To be handed to :meth:`_serve_rpc`.

        """

    # ------------------------------------------------------------------ what a subclass uses

    def _initialize_service(self) -> None:
        """Make the server, in direct or in RPC mode; to be called once the subclass is ready for it.

        Afterwards ``self._server_proxy.some_rpc(...)`` calls the server's methods.

        Raises
        ------
        ChannelError
            Another process, or another service of this one, is at the address; or this process may have no
            children.
        TimeoutError
            The server was not ready in time.
        NotServingError
            The server process ended before it was ready.
        Exception
            Whatever kept the server from being made.

        """
        if not isinstance(self._server_proxy, Absent) or self._closed:
            raise RuntimeError(f"{self.service_name} was initialized or shut down before")
        if self.running_unit_tests:
            self._server_proxy = self._create_direct_server()
            return
        assert self._location is not None
        supervisor = Supervisor(
            self._location, self._service_key, self.service_name, self._settings, weakly(self._end)
        )
        self._supervisor = supervisor
        try:
            self._location = supervisor.start(self._start_server_process)
            if not isinstance(self._location, str):
                self.port = self._location[1]
            self._client = ServiceClient(self._location, self._service_key, self._settings)
            self._check_not_ended()  # by a signal handler, meanwhile
            self._client.reach(self.service_name)
            # Also without health checks: they can be enabled at any time, in any copy.
            with forks.creating_descriptors:
                self._desk = RestartDesk()
            self._desk.open(self.service_name, weakly(self._restart), weakly(self._report))
            self._server_proxy = self._client.proxy
            self._check_not_ended()
        except BaseException:
            self.shutdown()
            if self._desk is not None:
                self._desk.close()
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

        Works with every start method; for all but ``fork``, `factory`, its arguments and `on_listening` must be
        picklable. If the object has a method ``close``, that is called at the process' end. `on_listening` is
        called in that process, with the object and its address, before clients are told that it is ready.
        """
        this = multiprocessing.current_process()
        if this.daemon:
            raise ChannelError(
                f"{self.service_name} cannot be served: the daemonic process {this.name!r} may have no children",
                hint="make that process with daemon=False, or give it a copy of a service that is made elsewhere",
            )
        context = multiprocessing.get_context(self._settings.start_method)
        process: BaseProcess = context.Process(  # type: ignore[attr-defined]  # each context has one
            target=run_server,
            args=(factory, args, kwargs, address, authkey, server_ready, on_listening),
            name=self.service_name,
            daemon=True,
        )
        with log_streams.at_rest():
            process.start()
        return process

    _serve_rpc = staticmethod(serve_rpc)

    # ------------------------------------------------------------------ life

    @property
    def address(self) -> Location | None:
        """Where the server is; None in direct mode."""
        return self._location

    @property
    def _server_process(self) -> BaseProcess | None:
        """The server process that was started last; None in direct mode and outside of the owner."""
        supervisor = self._supervisor
        return None if supervisor is None else supervisor.process

    @property
    def server_pid(self) -> int | None:
        """Id of the server process that was started last; None in direct mode and outside of the owner."""
        process = self._server_process
        return None if process is None else process.pid

    def restart_server(self) -> None:
        """Restart the server process by hand; clients reconnect by themselves.

        Raises
        ------
        ChannelError
            There is no server process; this process is not the owner; or the service was shut down; or as for
            :meth:`_initialize_service`.

        """
        self._restart(None)

    @property
    def has_ended(self) -> bool:
        """Whether it was shut down, here or by its owner, or a later object has taken its address."""
        return self._closed or (self._desk is not None and not self._is_owner and self._desk.has_ended())

    def shutdown(self) -> None:
        """End the server, if this process is its owner, and close this process' connections. Idempotent.

        Calls of this process that are under way get their answers, as far as the server gives them within half of
        `stop_timeout`; others end with an error. Copies in other processes see an end, and no failure. May be
        called by a signal handler, whatever its thread was doing.
        """
        self._end(f"{self.service_name} was shut down")

    def _end(self, why: str) -> None:
        """Shut down, and let whoever still wants something know why."""
        with self._closing:
            if self._closed:
                return
            self._closed, self._why_ended = True, why
        desk = self._desk if self._is_owner else None
        if desk is not None:
            desk.close()  # first, so that no copy takes what follows for a failure
        if self._client is not None:
            self._client.retire(why)
        try:
            if self._supervisor is not None:
                self._supervisor.close(why)
        finally:
            if self._client is not None:
                self._client.close(why)
            server, self._server_proxy = self._server_proxy, Absent(why)
        if desk is not None:
            desk.join(_DESK_JOIN)
        if self.running_unit_tests and not isinstance(server, Absent):
            close = getattr(server, "close", None)
            if self._is_owner and callable(close):
                close()

    def _check_not_ended(self) -> None:
        if self._closed:
            raise ChannelError(self._why_ended)

    def _not_yet(self) -> Absent:
        return Absent(f"{self.service_name} has no server yet", hint="call _initialize_service() first")

    @property
    def _is_owner(self) -> bool:
        return self._owner_pid == os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if not self._closed:
            self.shutdown()

    def __repr__(self) -> str:
        where = "direct" if self._location is None else f"at {describe(self._location)}"
        return f"<{type(self).__name__} {self.service_name!r} {where}>"

    # ------------------------------------------------------------------ other processes

    def after_fork_in_child(self) -> None:
        """Become a client. Called by :mod:`shmelim.system.forks`."""
        if self._supervisor is not None:
            self._owner_tells = self.slack_notifier is not None
            self._supervisor.disown()
            self._supervisor = None
        if self._desk is not None:
            self._desk.after_fork_in_child()
        closed = self._closed
        self._begin_here()
        self._closed = closed

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        if self.running_unit_tests:
            raise TypeError(f"{self.service_name} is in direct mode: its server lives in this process only")
        state = {name: getattr(self, name) for name in _names(self) if name not in _OF_ONE_PROCESS}
        if self._supervisor is not None:
            state["_owner_tells"] = self.slack_notifier is not None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in (dict.fromkeys(_OF_ONE_PROCESS) | state).items():
            setattr(self, name, value)
        self._owner_pid = 0  # nobody's
        self._begin_here()
        self._server_proxy = self._not_yet() if self._client is None else self._client.proxy

    # ------------------------------------------------------------------ health

    def health_check(self, current_time_ms: float | None = None) -> bool:
        """Check the server, if it is time to; restart it when it failed too often in a row.

        May be called as often as one likes, from any thread, and in any copy of the service.

        Parameters
        ----------
        current_time_ms
            The time in milliseconds; None: now.

        Returns
        -------
        bool
            Whether the check found the server healthy: it answered ``health_check_rpc`` with the status "ok".
            False also if it was restarted since. What the last check found, if it is not time yet. True while
            health checks are not enabled, and if the server has no ``health_check_rpc``, which is told once.
            False, without a check, once the service :attr:`has_ended`, and before it has a server.

        """
        if not self.enable_health_check:
            return True
        if self.has_ended or isinstance(self._server_proxy, Absent):
            return False
        restarts = self.enable_auto_restart and not self.running_unit_tests
        policy = HealthPolicy(self.health_check_interval_s * 1000, self.max_consecutive_failures, restarts)
        return self._monitor.check(
            self._settings.clock_ms() if current_time_ms is None else current_time_ms, policy
        )

    def _probe(self) -> Any:
        if self.running_unit_tests:
            check = getattr(self._server_proxy, "health_check_rpc", None)
            if not callable(check):
                raise UnknownMethodError(f"{self.service_name} has no remote method 'health_check_rpc'")
            return check()
        assert self._client is not None
        return self._client.health()

    def _is_over(self) -> bool:
        return self.has_ended

    def _report(self, finding: Finding) -> None:
        """Have a finding told, by the owner if there is one."""
        if self.has_ended:
            return
        if self._supervisor is not None:
            self._outages.report(finding, self._supervisor.restarted_at)
            return
        if self._desk is not None and (self._owner_tells or self.slack_notifier is None):
            try:
                self._desk.report(finding)
            except ChannelError:
                pass  # it is gone
            else:
                return
        self._outages.report(finding)

    def _tell(self, text: str, level: str) -> None:
        tell(self.slack_notifier, text, level)

    def _restart(self, failed_at: float | None) -> None:
        """Restart the server, unless that was done since `failed_at`; in the owner."""
        self._check_not_ended()
        if self.running_unit_tests:
            raise ChannelError(f"{self.service_name} is in direct mode: it has no server process to restart")
        if self._is_owner and isinstance(self._server_proxy, Absent):
            raise self._server_proxy.error()
        if self._supervisor is None or self._client is None:
            raise ChannelError(f"{self.service_name} can only be restarted by the process that made it")
        if self._supervisor.restart(self._start_server_process, failed_at):
            self._client.reach(self.service_name)

    def _restart_after(self, failed_at: float) -> None:
        """Restart the server, or have it restarted by the owner."""
        if self._supervisor is not None or self._desk is None:
            self._restart(failed_at)
        else:
            figures = self._settings
            patience = figures.stop_timeout + figures.release_timeout + figures.ready_timeout
            self._desk.ask_and_wait(failed_at, self._monitor.is_well, patience)


_DESK_JOIN = 1.0  # seconds; its thread may be at a notifier, or in this very shutdown

# Attributes of the base that mean nothing in another process.
_OF_ONE_PROCESS = frozenset({"_server_proxy", "_supervisor", "_closing", "_closed", "_monitor", "_outages"})


def _names(service: RPCServiceBase) -> set[str]:
    """Return the names of all attributes that an object has of its own, in its dict or in slots."""
    slots = {name for kind in type(service).__mro__ for name in getattr(kind, "__slots__", ())}
    return {*service.__dict__, *(name for name in slots if hasattr(service, name))}
