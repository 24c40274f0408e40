"""The server process of a service over its restarts, in the process that made the service: its owner."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pickle import PicklingError
from typing import Any, Final

from shmelim.channel.address import Location, describe
from shmelim.errors import ChannelError
from shmelim.service.core import Core
from shmelim.service.lease import check_usable, claim, clear_stale, give_up, owner_mark, wait_until_free
from shmelim.service.process import ServerOptions, ServerProcess, ServerReady, check_portable
from shmelim.system.clock import monotonic
from shmelim.system.processes import ProcessIdentity

_STABLE: Final = 10.0  # seconds that a server must live for its death not to count as one more
_FREE_DEATHS: Final = 2  # restarts in a row without a pause
_MEANT: Final = 0.5  # seconds; whoever told the server to end in good order may be about to end its owner, too
_LOOK_AGAIN: Final = 1.0  # seconds; automatic restart may be switched on at any time
_JOIN: Final = 1.0  # seconds; the watching thread may be at a hook
_NOT_PICKLED: Final = (
    "either start it by self._spawn_server(), with a function or class of a module and arguments that can be "
    'pickled, or where multiprocessing forks, by multiprocessing.get_context("fork").Process'
)

_logger = logging.getLogger("shmelim.service")


class Owner:
    """Starts, watches, restarts and ends the server process.

    Thread-safe: whoever starts, restarts or stops waits for the others. One thread waits for the server's end,
    and brings back one that died. Belongs to the process that made it; a forked child disowns it and drops it.
    """

    def __init__(self, core: Core, location: Location) -> None:
        self._core = core
        self._location = location
        settings = self._settings = core.settings
        self._options = ServerOptions(
            core.name,
            None if settings.outlive_owner else ProcessIdentity.this_process(),
            settings.codec,
            settings.max_message,
            settings.stop_timeout / 2,
            core.methods,
        )
        # Held over whole starts and stops; guards everything below, and the location. Re-entrant, since a signal
        # handler may close while its thread starts a server; so a start that is ready looks once more whether it
        # is still wanted.
        self._lock = threading.RLock()
        self.server: ServerProcess | None = None  # the one that serves, or was the last to
        self._mark: socket.socket | None = None
        self.recipe: tuple[Any, ...] = ()  # what the last start gave to its process
        self._changed = threading.Event()  # there is another server, or the end: the watching thread need not rest
        self._thread: threading.Thread | None = None
        self._telling: threading.Thread | None = None

    # ------------------------------------------------------------------ starting and ending

    def start(self) -> None:
        """Start a server process, and return when it can be reached."""
        core, settings = self._core, self._settings
        with self._lock:
            core.check_not_ended()
            if not _chosen_by_system(self._location):
                self._free_address()
            ready = ServerReady(self._options)
            try:
                server = self._started(ready)
                mark = owner_mark(server.pid)
                try:
                    said = ready.outcome(server, settings.ready_timeout, lambda: core.refusal)
                    core.location = self._location = self._settled(said)
                    core.check_not_ended()
                    self.disown_mark()
                    if self.server is not None:
                        core.page.state.restarts += 1
                    self.server, self._mark, core.page.server = server, mark, server.identity
                    server.ready_at = monotonic()
                    core.reach(server.identity)
                    core.check_not_ended()
                except BaseException:
                    server.stop(settings.stop_timeout)
                    mark.close()
                    raise
            finally:
                ready.close()
            _logger.info("%s: process %d serves at %s", core.name, server.pid, describe(self._location))
            self._changed.set()

    def _started(self, ready: ServerReady) -> ServerProcess:
        """Return what the subclass' hook starts."""
        core = self._core
        try:
            return ServerProcess(core.start_by_hook(self._location, core.key.for_server(), ready), core.name)
        except (PicklingError, AttributeError, TypeError) as error:
            if "pickle" not in str(error):
                raise
            text = f"the server process of {core.name} cannot be started: {error}"
            raise ChannelError(text, hint=_NOT_PICKLED) from error

    def _settled(self, said: Location | None) -> Location:
        """Return where the server is, once that is certain."""
        location = said or self._location
        if _chosen_by_system(location):
            raise ChannelError("the server process does not say which port it has", hint="name a port")
        # The address of an object whose server is dead may have come to us by chance.
        with contextlib.suppress(ChannelError):
            claim(location, self._core, takes_over=False)
        return location

    def _free_address(self) -> None:
        """Free the address of an earlier object of this service, and of what an earlier run has left there."""
        name, settings = self._core.name, self._settings
        try:
            claim(self._location, self._core, takes_over=settings.replace_stale)
            if settings.replace_stale:
                grace = min(settings.stop_timeout, 1.0)
                clear_stale(self._location, name, grace=grace, release=settings.release_timeout)
        except ChannelError as error:
            raise type(error)(f"{name} cannot be served: {error.message}", hint=error.hint) from error

    def restart(self, failing: ProcessIdentity | None = None) -> bool:
        """End the server process, and start another at the same address with the same key.

        Returns whether that was done: not if there is another one by now than `failing`, or the watching thread
        brings it back. What the next server needs is checked before this one is ended.
        """
        core, settings = self._core, self._settings
        with self._lock:
            core.check_not_ended()
            server = self.server
            lives = server is not None and server.identity.is_running()
            known = failing is None or (server is not None and server.identity == failing)
            if not known or (failing is not None and self._thread is not None and not lives):
                return False
            if server is not None and lives:
                self._check_replaceable()
                if failing is not None:
                    core.page.state.ended_by = os.getpid()
                _logger.warning("%s: restarting the server process", core.name)
                server.stop(settings.stop_timeout)
                wait_until_free(self._location, settings.release_timeout)
            self.start()
            return True

    def _check_replaceable(self) -> None:
        """Raise what would keep the next server from being started, as far as that can be known."""
        try:
            self._core.key.check_available()
            check_usable(self._location)
            if self.recipe:
                check_portable(*self.recipe)
        except Exception as error:
            text = f"{self._core.name} goes on with its server, since another could not be started: {error}"
            raise ChannelError(text) from error

    def close(self) -> None:
        """End the server process for good; idempotent. A start that is under way is broken off, and waited for."""
        self._changed.set()
        with self._lock:
            if self.server is not None:
                self.server.stop(self._settings.stop_timeout)
            self.disown_mark()
        give_up(self._location, self._core)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN)

    def disown_mark(self) -> None:
        """Say no more that the server has its owner here."""
        if self._mark is not None:
            self._mark.close()

    def disown(self) -> None:
        """Let this forked child's exit leave the server process alone."""
        if self.server is not None:
            self.server.disown()
        self.disown_mark()
        give_up(self._location, self._core)

    # ------------------------------------------------------------------ watching

    def watch(self) -> None:
        """Begin to wait for the server's end."""
        self._thread = threading.Thread(target=self._watch, name=f"{self._core.name}-owner", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        """Bring each server back that dies, until the service ends."""
        deaths = 0
        while self._core.refusal is None and self.server is not None:
            server = self.server
            self._changed.clear()
            if server is not self.server or not server.identity.wait(None):
                continue
            deaths = 1 if monotonic() - server.ready_at >= _STABLE else deaths + 1
            try:
                self._tell_of(server)
                while self._is_missed(server) and not self._bring_back(server, deaths):
                    deaths += 1
            except Exception:
                _logger.exception("%s: watching its server failed, and goes on", self._core.name)
                self._changed.wait(_LOOK_AGAIN)

    def _is_missed(self, dead: ServerProcess) -> bool:
        """Whether nobody has put another server into its place, or ended the service."""
        with self._lock:  # whoever restarts or ends it on purpose is waited for
            return self.server is dead and self._core.refusal is None

    def _tell_of(self, dead: ServerProcess) -> None:
        """Raise the problem that the server is down, unless a health check has ended it, which has told why."""
        core = self._core
        how = dead.how_it_ended()
        if dead.process.exitcode in {0, -signal.SIGTERM} and not core.page.state.ended_by:
            self._changed.wait(_MEANT)
        core.page.state.owner_tells = core.is_heard()
        if self._is_missed(dead) and not core.page.state.ended_by:
            what = "another is being started" if core.may_restart() else "restart_server() starts another"
            text = f"the server, process {dead.pid}, {how}; {what}"
            self._aside(lambda: core.report_down(text))

    def _bring_back(self, dead: ServerProcess, deaths: int) -> bool:
        """Put a server in the place of one that died, after a pause; return whether no other try is needed."""
        core, settings = self._core, self._settings
        if deaths > _FREE_DEATHS:
            pause = settings.restart_pause * 2 ** min(deaths - _FREE_DEATHS - 1, 60)
            self._changed.wait(min(pause, settings.restart_pause_most))
        while self._is_missed(dead) and not core.may_restart():
            self._changed.wait(_LOOK_AGAIN)
        try:
            with self._lock:
                if not self._is_missed(dead):
                    return True
                self.restart()
        except Exception as error:
            if not self._is_missed(dead):  # another one was ready, and has died in its turn; or the end has come
                return True
            text = f"restart failed, will be tried again: {type(error).__name__}: {error}"
            self._aside(lambda: core.report_down(text, "failing"))
            return False
        self._aside(self._tell_of_restart)
        return True

    def _tell_of_restart(self) -> None:
        """Say that a server was restarted which a health check had ended, and find out whether all is well."""
        core = self._core
        if core.page.state.ended_by:
            text = f"server restarted: process {core.page.state.ended_by} found that it hung, and ended it"
            core.alerts.restarted(text)
            core.page.state.ended_by = 0
        core.look()

    def _aside(self, tell: Callable[[], object]) -> None:
        """Have something told in its turn by another thread, so that a slow notifier holds up no restart."""
        before = self._telling

        def run() -> None:
            if before is not None:
                before.join()
            tell()

        self._telling = threading.Thread(target=run, name=f"{self._core.name}-alerts", daemon=True)
        self._telling.start()


def _chosen_by_system(location: Location) -> bool:
    return not isinstance(location, str) and location[1] == 0
