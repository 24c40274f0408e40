"""A service as one process has it: connections and end; in its owner the server process over its restarts, too."""

from __future__ import annotations

import contextlib
import multiprocessing.context
import multiprocessing.util
import os
import signal
import threading
import weakref
from collections.abc import Callable, Collection
from pickle import PicklingError
from typing import Any, Final, NoReturn

from shmelim.channel.address import Location, describe, is_free, wait_until_free
from shmelim.channel.client import ChannelClient, Proxy
from shmelim.channel.codec import MSGPACK
from shmelim.channel.key import SharedKey
from shmelim.errors import (
    AuthenticationFailedError,
    ChannelError,
    NotServingError,
    ProtocolError,
    UnknownMethodError,
)
from shmelim.service.health import Health, SharedPage
from shmelim.service.lease import check_available, claim, clear_stale, is_server_of
from shmelim.service.process import ServerOptions, ServerProcess, ServerReady
from shmelim.service.settings import ServiceSettings
from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.processes import ProcessIdentity
from shmelim.system.text import get_logger

_DYING: Final = 0.1  # seconds in which a process that has lost its title is dead
_STABLE: Final = 10.0  # seconds that a server must live for its death not to count as one more
_FREE_DEATHS: Final = 2  # restarts in a row without a pause
_MEANT: Final = 0.5  # seconds; whoever told the server to end in good order may be about to end its owner, too
_LOOK_AGAIN: Final = 1.0  # seconds; automatic restart may be switched on at any time
_JOIN: Final = 1.0  # seconds; the watching thread may be at a hook
_NOT_PICKLED: Final = (
    "either start it by self._spawn_server(), with a function or class of a module and arguments that can be "
    'pickled, or where multiprocessing forks, by multiprocessing.get_context("fork").Process'
)

_logger = get_logger("shmelim.service")


class Absent:
    """What stands in a service's place for its server, where there is none: falsy, and every call says why."""

    def __init__(self, why: str, hint: str | None = None) -> None:
        self._why, self._hint = why, hint

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks for such names itself
            raise AttributeError(name)
        raise ChannelError(self._why, hint=self._hint)

    def __repr__(self) -> str:
        return f"<no server: {self._why}>"


class Core(Health):
    """A service as one process has it. Pickled to a process that is being started, or forked, it is a client's.

    In the process that made the service it starts, watches, restarts and ends the server process: whoever does one
    of these waits for the others. One thread waits for the server's end, and brings back one that died.
    """

    direct: Any = None  # the server object, in direct mode
    client: ChannelClient | None = None
    _checking: ChannelClient | None = None
    server: ServerProcess | None = None  # in the owner: the one that serves, or was the last to
    _starting: ServerProcess | None = None
    _thread: threading.Thread | None = None
    _telling: threading.Thread | None = None

    def __init__(
        self,
        name: str,
        location: Location | None,
        key: SharedKey,
        settings: ServiceSettings,
        methods: Collection[str],
        page: SharedPage | None = None,
        maker: ProcessIdentity | None = None,
    ) -> None:
        super().__init__(name, location, settings, page, maker)
        self.key = key
        self.methods = frozenset(methods)
        # Held over whole starts and stops; guards the server, and the location. Re-entrant, since a signal handler
        # may end what its thread is starting; so a start that is ready looks once more whether it is still wanted.
        self._lock = threading.RLock()
        self._changed = threading.Event()  # there is another server, or the end: the watching thread need not rest

    def begin_here(self) -> None:
        """Make what each process has of its own."""
        super().begin_here()
        self._ending = threading.RLock()  # guards `refusal`; re-entrant as the other
        forks.register(self)
        # Called before multiprocessing ends and waits for children, in its own children, too; keeps nothing alive.
        self._at_exit = multiprocessing.util.Finalize(None, _end_at_exit, (weakref.ref(self),), exitpriority=110)

    def __reduce__(self) -> tuple[Any, ...]:
        multiprocessing.context.assert_spawning(self)
        if self.location is None:
            raise TypeError(f"{self.name} is in direct mode: its server lives in this process only")
        arguments = self.name, self.location, self.key, self.settings, self.methods, self.page, self.maker
        return _copy, (self.client is not None, *arguments)

    def after_fork_in_child(self) -> None:
        """Become a client. Called by :mod:`shmelim.system.forks`."""
        self.is_makers = False
        for server in (self.server, self._starting):  # of another thread, which does not exist here
            if server is not None:
                server.mark.close()
        self.server = self._starting = None
        self.begin_here()

    def __repr__(self) -> str:
        return f"{self.name!r} {'direct' if self.location is None else f'at {describe(self.location)}'}"

    # ------------------------------------------------------------------ connections

    def connect(self) -> None:
        """Have connections; none is made before the first call."""
        assert self.location is not None
        settings, codec = self.settings, self.settings.codec or MSGPACK
        self.client = ChannelClient(
            self.location,
            self.key.for_client,
            timeout=settings.call_timeout,
            connect_wait=settings.connect_wait,
            max_message=settings.max_message,
            codec=codec,
            epoch=settings.epoch,
        )
        # Its calls are short, and tell of a missing server at once.
        self._checking = ChannelClient(
            self.location, self.key.for_client, timeout=settings.health_check_timeout, codec=codec
        )

    def proxy(self) -> Proxy | Absent:
        """Return what stands for the server."""
        if self.client is None:
            return Absent(f"{self.name} has no server yet", hint="call _initialize_service() first")
        return self.client.proxy(idempotent=self.settings.idempotent, methods=self.methods)

    def _reach(self, server: ProcessIdentity) -> None:
        """Connect to a server that says it is ready; raises what :meth:`ChannelClient.connect` does."""
        if self._checking is None:
            self.connect()
        assert self._checking is not None
        for left in reversed(range(self.settings.connect_tries)):
            try:
                return self._checking.connect()
            except (AuthenticationFailedError, ProtocolError):
                raise  # another server is there, and will be
            except (NotServingError, ChannelError) as error:
                self.check_not_ended()
                _logger.warning("%s: cannot connect, %d tries left: %s", self.name, left, error)
                # Whoever shuts down meanwhile ends it.
                if not left or server.wait(self.settings.connect_delay):
                    raise
        return None

    # ------------------------------------------------------------------ the end

    def end(self, why: str) -> None:
        """Shut down, and let whoever still wants something know why; idempotent."""
        with self._ending:
            if self.refusal is not None:
                return
            self.refusal = why
        self._at_exit.cancel()
        if self.is_makers:
            self.page.state.ended = 1  # first, so that no copy takes what follows for a failure
        clients = [client for client in (self.client, self._checking) if client is not None]
        for client in clients:
            client.retire(why)
        try:
            if self.is_makers and self.location is not None:
                self._end_server()
        finally:
            for client in clients:
                client.close(why)
            if (facade := self.facade()) is not None:
                facade._server_proxy = Absent(why)  # noqa: SLF001
        close = getattr(self.direct, "close", None)
        if self.is_makers and callable(close):
            close()

    def _end_server(self) -> None:
        """End the server process for good. A start that is under way is broken off, and waited for."""
        self._changed.set()
        if (starting := self._starting) is not None:
            starting.stop(self.settings.stop_timeout)
        with self._lock:
            if self.server is not None:
                self.server.stop(self.settings.stop_timeout)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN)

    def check_not_ended(self) -> None:
        """Raise ``ChannelError`` once it has ended."""
        if self.refusal is not None:
            raise ChannelError(self.refusal)

    # ------------------------------------------------------------------ the server process, in the owner

    def begin(self) -> None:
        """Start the first server process, and wait for its end from then on."""
        self.page.state.owner_tells = self.notifier() is not None
        self.start()
        if self.settings.restart_on_exit:
            self._thread = threading.Thread(target=self._watch, name=f"{self.name}-owner", daemon=True)
            self._thread.start()

    def start(self) -> None:
        """Start a server process, and return when it can be reached."""
        settings = self.settings
        with self._lock:
            ready = ServerReady(
                ServerOptions(
                    self.name,
                    None if settings.outlive_owner else self.maker,
                    settings.codec,
                    settings.max_message,
                    settings.stop_timeout / 2,
                    self.methods,
                )
            )
            server = None
            try:
                server = self._starting = self._launched(ready)
                self.check_not_ended()  # from here on, an end ends the process
                location = ready.outcome(server, settings.ready_timeout) or self.location
                assert location is not None
                if location[1] == 0:
                    raise ChannelError("the server process does not say which port it has", hint="name a port")  # noqa: TRY301
                if location != self.location:
                    # The address of an object whose server is dead may have come to us by chance.
                    with contextlib.suppress(ChannelError):
                        claim(location, self, takes_over=False)
                    self.location = location
                if self.server is not None:  # which is dead
                    self.server.mark.close()
                    self.server.process.join(0.0)
                    self.page.state.restarts += 1
                self.server, self.page.server = server, server.identity
                server.ready_at = monotonic()
                self._reach(server.identity)
            except BaseException as error:
                if server is not None:
                    server.stop(settings.stop_timeout)
                if isinstance(error, Exception):
                    self.check_not_ended()  # which is why it was broken off
                raise
            finally:
                self._starting = None
                ready.close()
            _logger.info("process %d serves %r", server.pid, self)
            self._changed.set()

    def _launched(self, ready: ServerReady) -> ServerProcess:
        """Free the address of what earlier objects and runs left there, and have the subclass start a process."""
        settings, location, facade = self.settings, self.location, self.facade()
        assert location is not None
        if facade is None:
            raise ChannelError(f"{self.name} is gone")
        try:
            if location[1] != 0 and self.server is None:
                check_available(location, self.key)  # before an earlier object is ended, and what it left
                claim(location, self, takes_over=settings.replace_stale)
            if location[1] != 0 and settings.replace_stale and not is_free(location):
                grace = min(settings.stop_timeout, 1.0)
                clear_stale(location, self.name, grace=grace, release=settings.release_timeout)
        except ChannelError as error:
            raise type(error)(f"{self.name} cannot be served: {error.message}", hint=error.hint) from error
        try:
            process = facade._start_server_process(location, self.key.for_server(), ready)  # noqa: SLF001
        except (PicklingError, AttributeError, TypeError) as error:
            if "pickle" not in str(error):
                raise
            text = f"the server process of {self.name} cannot be started: {error}"
            raise ChannelError(text, hint=_NOT_PICKLED) from error
        return ServerProcess(process, self.name)

    def restart(self, failing: ProcessIdentity | None = None) -> bool:
        """End the server process, and start another at the same address with the same key.

        Returns whether that was done: not if there is another one by now than `failing`, or the watching thread
        brings it back. What the next server needs is checked before this one is ended.
        """
        with self._lock:
            self.check_not_ended()
            server = self.server
            assert server is not None
            assert self.location is not None
            lives = server.identity.is_running()
            if failing is not None and (server.identity != failing or (self._thread is not None and not lives)):
                return False
            if lives:
                try:
                    check_available(self.location, self.key)
                    server.check_replaceable()
                    if (facade := self.facade()) is not None:
                        facade._check_startable()  # noqa: SLF001
                except Exception as error:
                    text = f"{self.name} goes on with its server, since another could not be started: {error}"
                    raise ChannelError(text) from error
                if failing is not None:
                    self.page.state.ended_by = os.getpid()
                _logger.warning("%s: restarting the server process", self.name)
                server.stop(self.settings.stop_timeout)
                wait_until_free(self.location, self.settings.release_timeout)
            self.start()
            return True

    def restart_by_hand(self) -> None:
        """Restart the server process, and find out whether all is well."""
        with self._lock:
            self.page.state.restarting = 1  # whoever finds no server meanwhile need not tell
            try:
                self.restart()
            finally:
                self.page.state.restarting = 0
            # A health check may have been ending the same server; the end of the next one is not its work.
            self.page.state.ended_by = 0
        self.look()

    # ------------------------------------------------------------------ watching it

    def _watch(self) -> None:
        """Bring each server back that dies, until the service ends."""
        dead, deaths = None, 0
        while True:
            self._changed.clear()
            server = self.server
            if self.refusal is not None or server is None:
                return
            server.identity.wait(None)
            try:
                if server is not dead:
                    deaths = 0 if monotonic() - server.ready_at >= _STABLE else deaths
                    dead = server
                    self._tell_of_death(server)
                deaths += 1
                self._bring_back(server, deaths)
            except BaseException:
                _logger.exception("%s: watching its server failed, and goes on", self.name)
                self._changed.wait(_LOOK_AGAIN)

    def _is_missed(self, dead: ServerProcess) -> bool:
        """Whether nobody has put another server into its place, or ended the service."""
        with self._lock:  # whoever restarts or ends it on purpose is waited for
            return self.server is dead and self.refusal is None

    def _may_restart(self) -> bool:
        return bool(getattr(self.facade(), "enable_auto_restart", False))

    def _tell_of_death(self, dead: ServerProcess) -> None:
        """Raise the problem that the server is down, unless a health check has ended it, which has told why."""
        state, how = self.page.state, dead.how_it_ended()
        if dead.process.exitcode in {0, -signal.SIGTERM} and not state.ended_by:
            self._changed.wait(_MEANT)
        state.owner_tells = self.notifier() is not None
        if self._is_missed(dead) and not state.ended_by:
            what = "another is being started" if self._may_restart() else "restart_server() starts another"
            self._aside(lambda: self.report_down(f"the server, process {dead.pid}, {how}; {what}"))

    def _bring_back(self, dead: ServerProcess, deaths: int) -> None:
        """Put a server in the place of one that died, after a pause; what keeps it from that is told."""
        if deaths > _FREE_DEATHS:
            pause = self.settings.restart_pause * 2 ** min(deaths - _FREE_DEATHS - 1, 60)
            self._changed.wait(min(pause, self.settings.restart_pause_most))
        while self._is_missed(dead) and not self._may_restart():
            self._changed.wait(_LOOK_AGAIN)
        try:
            with self._lock:
                if self._is_missed(dead):
                    self.restart()
                    self._aside(self._tell_of_restart)
        except BaseException as error:  # a subclass's exit must not end the watching
            if self._is_missed(dead):  # else another one was ready, and has died in its turn; or the end has come
                text = f"restart failed, will be tried again: {type(error).__name__}: {error}"
                self._aside(lambda: self.report_down(text, "failing"))

    def _tell_of_restart(self) -> None:
        """Say that a server was restarted which a health check had ended, and find out whether all is well."""
        if who := self.page.state.ended_by:
            self.say_restarted(f"server restarted: process {who} found that it hung, and ended it")
        else:
            self.look()

    def _aside(self, tell: Callable[[], object]) -> None:
        """Have something told in its turn by another thread, so that a slow notifier holds up no restart."""
        before = self._telling

        def run() -> None:
            if before is not None:
                before.join()
            tell()

        self._telling = threading.Thread(target=run, name=f"{self.name}-alerts", daemon=True)
        self._telling.start()

    # ------------------------------------------------------------------ health

    def ask(self) -> object:
        """Return what the server says of itself; ``UnknownMethodError`` if it says nothing."""
        if self._checking is None:
            check = getattr(getattr(self.facade(), "_server_proxy", None), "health_check_rpc", None)
            if not callable(check):
                raise UnknownMethodError(f"{self.name} has no remote method 'health_check_rpc'")
            return check()
        return self._checking.call("health_check_rpc", idempotent=True)

    def replace(self, asked: ProcessIdentity) -> bool | str:
        """Restart a server that hangs, in the owner, or end it, in a copy, for the owner to see that.

        One that is dead the owner has seen already. Returns whether that was done, or why it may not be.
        """
        if self.location is None or not self._may_restart():
            return "no automatic restart"
        if self.server is not None:
            return self.restart(asked)
        if not self.maker.is_running():
            return f"nobody restarts it: process {self.maker.pid}, which made the service, is gone"
        if not self.settings.restart_on_exit:
            return f"only process {self.maker.pid}, which made the service, restarts it"
        if asked != self.page.server or not asked.is_running():
            return False

        def check(_signal: int) -> None:
            # One that is about to be dead has no title any more.
            if not is_server_of(asked.pid, self.name) and not asked.wait(_DYING):
                raise ChannelError(
                    f"process {asked.pid} does not look like the server of {self.name}, and is left alone"
                )
            self.page.state.ended_by = os.getpid()
            if self.page.server != asked:  # it had died, and there is another one: there is nothing to tell of
                self.page.state.ended_by = 0

        check_available(self.location, self.key)
        _logger.warning("%s: ending the server, process %d, for its owner to start another", self.name, asked.pid)
        asked.end(self.settings.stop_timeout, check)
        return True


def _copy(has_server: bool, *arguments: Any) -> Core:
    core = Core(*arguments)
    if has_server:
        core.connect()
    return core


def _end_at_exit(reference: weakref.ref[Core]) -> None:
    core = reference()
    if core is not None:
        try:
            core.end(f"{core.name} was shut down")
        except Exception:
            _logger.exception("%r could not be shut down", core)
