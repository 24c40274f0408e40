"""What each process has of a service: connections, health, who is told; in the owner its server process, too."""

from __future__ import annotations

import logging
import multiprocessing.context
import multiprocessing.util
import os
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from multiprocessing.process import BaseProcess
from typing import Any, Final, NoReturn

from shmelim.channel.address import Location, describe
from shmelim.channel.client import ChannelClient, Proxy
from shmelim.channel.codec import MSGPACK
from shmelim.errors import (
    AuthenticationFailedError,
    ChannelError,
    NotServingError,
    ProtocolError,
    ShmelimError,
    UnknownMethodError,
)
from shmelim.notify.problems import ProblemMessages, take_over
from shmelim.service.health import DOWN, Alerts, Finding, HealthChecks, checks
from shmelim.service.lease import ServiceKey, check_usable, is_server_of
from shmelim.service.process import ServerReady
from shmelim.service.settings import ServiceSettings
from shmelim.service.shared import SharedPage
from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.logs import log_problems
from shmelim.system.problems import Problems, Severity
from shmelim.system.processes import ProcessIdentity, is_of_this_user

_DYING: Final = 0.1  # seconds in which a process that closed its connections is dead
_POLL: Final = 0.1  # seconds between two looks whether there is something to wait for

_logger = logging.getLogger("shmelim.service")


class Absent:
    """What stands in a service's place for its server, where there is none: falsy, and every call says why."""

    def __init__(self, why: str, hint: str | None = None) -> None:
        self._error = ChannelError(why, hint=hint)

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python asks for such names itself
            raise AttributeError(name)
        raise ChannelError(self._error.message, hint=self._error.hint)

    def __repr__(self) -> str:
        return f"<no server: {self._error.message}>"


class Core:
    """A service as one process has it. Pickled to a process that is being started, or forked, it is a client's.

    Knows the object that people hold by a weak reference only, so that dropping that ends the service.
    """

    owner: Any = None  # an Owner, in the process that made the service, and in RPC mode
    direct: Any = None  # the server object, in direct mode
    client: ChannelClient | None = None
    _checking: ChannelClient | None = None
    refusal: str | None = None  # why it serves no more; never goes back

    def __init__(
        self,
        name: str,
        location: Location | None,
        key: ServiceKey,
        settings: ServiceSettings,
        methods: Collection[str],
        page: SharedPage | None = None,
        maker: ProcessIdentity | None = None,
    ) -> None:
        self.name = name
        self.location = location  # None in direct mode; with port 0 until a server is ready
        self.key = key
        self.settings = settings
        self.methods = frozenset(methods)
        self.page = page or SharedPage(name, shared=location is not None)
        self.maker = maker or ProcessIdentity.this_process()
        self.identity = name, key.path
        self._facade: Callable[[], Any] = lambda: None
        # Written by whoever checks: the server that was asked last, and that which failed last.
        self._asked = self._failing = ProcessIdentity(0, 0.0)
        self.alerts = Alerts(name, self.page, self._notifier)
        self._begin_here()

    def _begin_here(self) -> None:
        """Make what each process has of its own."""
        # Guards `refusal`. Re-entrant, since a signal handler may end what its thread is ending.
        self._ending = threading.RLock()
        self.problems = Problems()
        log_problems(self.problems, _logger)
        self.problems.subscribe(self.alerts)
        self._reported = Problems()  # what the server says is wrong with it
        ProblemMessages(self._reported, self._notifier)
        self.checks = HealthChecks(self._ask, self._found)
        forks.register(self)
        # Called before multiprocessing ends and waits for children, in its own children, too; keeps nothing alive.
        self._at_exit = multiprocessing.util.Finalize(None, _end_at_exit, (weakref.ref(self),), exitpriority=110)

    def belong_to(self, facade: object) -> None:
        """Say by which object people hold it."""
        self._facade = weakref.ref(facade)

    def __reduce__(self) -> tuple[Any, ...]:
        multiprocessing.context.assert_spawning(self)
        if self.location is None:
            raise TypeError(f"{self.name} is in direct mode: its server lives in this process only")
        arguments = self.name, self.location, self.key, self.settings, self.methods, self.page, self.maker
        return _copy, (*arguments, self.client is not None)

    def after_fork_in_child(self) -> None:
        """Become a client. Called by :mod:`shmelim.system.forks`."""
        self.page.begin_here()
        if self.owner is not None:
            self.owner.disown()
            self.owner = None
        self._begin_here()

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

    def reach(self, server: ProcessIdentity) -> None:
        """Connect to a server that says it is ready; raises what :meth:`ChannelClient.connect` does."""
        if self._checking is None:
            self.connect()
        assert self._checking is not None
        for left in reversed(range(self.settings.connect_tries)):
            try:
                self._checking.connect()
            except (AuthenticationFailedError, ProtocolError):
                raise  # another server is there, and will be
            except (NotServingError, ChannelError) as error:
                self.check_not_ended()
                _logger.warning("%s: cannot connect, %d tries left: %s", self.name, left, error)
                pause_ends = monotonic() + self.settings.connect_delay
                while left and (pause := pause_ends - monotonic()) > 0:
                    if self.refusal is not None or server.wait(min(pause, _POLL)):
                        raise
                if not left:
                    raise
            else:
                return

    # ------------------------------------------------------------------ the end

    @property
    def is_makers(self) -> bool:
        """Whether this process made the service."""
        return self.maker.pid == os.getpid()

    @property
    def has_ended(self) -> bool:
        """Whether the service was shut down, here or by its owner, or a later object has taken its address."""
        return self.refusal is not None or bool(self.page.state.ended)

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
            if self.owner is not None:
                self.owner.close()
        finally:
            for client in clients:
                client.close(why)
            facade = self._facade()
            if facade is not None:
                facade._server_proxy = Absent(why)  # noqa: SLF001
        close = getattr(self.direct, "close", None)
        if self.is_makers and callable(close):
            close()

    def check_not_ended(self) -> None:
        """Raise ``ChannelError`` once it has ended."""
        if self.refusal is not None:
            raise ChannelError(self.refusal)

    # ------------------------------------------------------------------ what the owner asks

    def start_by_hook(self, location: Location, key: bytes, ready: ServerReady) -> BaseProcess:
        """Have the subclass start a process."""
        facade = self._facade()
        if facade is None:
            raise ChannelError(f"{self.name} is gone")
        process: BaseProcess = facade._start_server_process(location, key, ready)  # noqa: SLF001
        return process

    def may_restart(self) -> bool:
        """Whether a server that died is restarted."""
        return self.settings.restart_on_exit and bool(getattr(self._facade(), "enable_auto_restart", False))

    def is_heard(self) -> bool:
        """Whether this process has a notifier."""
        return self._notifier() is not None

    def look(self) -> None:
        """Find out whether a restart has ended the outage: where nobody checks, it has."""
        if not getattr(self._facade(), "enable_health_check", False) or self.checks.find() is None:
            self._well()

    def _notifier(self) -> Any:
        return getattr(self._facade(), "slack_notifier", None)

    # ------------------------------------------------------------------ health

    def _ask(self) -> object:
        """Return what the server says of itself; one that says nothing counts as good."""
        self._asked = self.page.server
        try:
            if self._checking is not None:
                answer = self._checking.call("health_check_rpc", idempotent=True)
            else:
                check = getattr(getattr(self._facade(), "_server_proxy", None), "health_check_rpc", None)
                answer = check() if callable(check) else self._unknown()
        except UnknownMethodError as error:
            text = f"health cannot be checked, and counts as good: {error}"
            self.problems.report("unchecked", text, subject=self.name, severity="notice")
            return {"status": "ok"}
        if self.is_makers and isinstance(answer, Mapping):  # copies would tell of the same once more
            take_over(self._reported, answer.get("problems"))
        return answer

    def _unknown(self) -> NoReturn:
        raise UnknownMethodError(f"{self.name} has no remote method 'health_check_rpc'")

    def _found(self, finding: Finding | None, failures: int) -> bool:
        """Tell of what a check found, and at the threshold have the server replaced."""
        if finding is None:
            self._well()
        elif self.has_ended:
            return False
        elif finding.own:
            text = f"this process ({os.getpid()}) cannot check the server, which may be well: {finding.text}"
            self.problems.report("cannot_check", text, subject=self.name, severity="notice")
        elif self._asked != self.page.server:
            return True  # there is another one by now
        else:
            if self._asked != self._failing:  # what its predecessor did counts no more
                self._failing, self.checks.failures, failures = self._asked, 1, 1
            limit = getattr(self._facade(), "max_consecutive_failures", failures)
            # The traceback of the first only: the next are mostly the same. And an error of ours says it all.
            trace = None if failures > 1 or isinstance(finding.error, ShmelimError) else finding.error
            text = "%s: health check failed (%d in a row, the limit is %d): %s"
            _logger.warning(text, self.name, failures, limit, finding.text, exc_info=trace)
            if not self._owner_tells():
                self.report_down(f"health check failed: {finding.text}")
            return failures >= limit and self._replace(failures, finding.text)
        return False

    def report_down(self, text: str, severity: Severity = "degraded") -> None:
        """Raise the problem that the server is down."""
        if self.is_heard() and not self.page.state.level:
            self.problems.clear(DOWN, self.name)  # an earlier one, whose end another process has told
        self.problems.report(DOWN, text, subject=self.name, severity=severity)

    def _well(self) -> None:
        """End whatever a good check ends; also an outage of which another process told that has ended since."""
        if self.problems.stands("cannot_check", self.name):
            self.problems.clear("cannot_check", self.name)
        if (self.problems.stands(DOWN, self.name) or self.page.state.level) and not self._is_being_replaced():
            self.problems.clear(DOWN, self.name)
            self.alerts.recovered()

    def _owner_tells(self) -> bool:
        """Whether the owner tells of this failure: it does of a server that has died."""
        return (
            self.location is not None
            and self.settings.restart_on_exit
            and bool(self.page.state.owner_tells)
            and (self.is_makers or self.maker.is_running())
            and self._asked.wait(_DYING)
        )

    def _is_being_replaced(self) -> bool:
        """Whether the owner is about to tell of another server, which answers and is not yet in the books."""
        if self.location is None or not (self.page.state.ended_by or not self.page.server.is_running()):
            return False
        return self.is_makers or self.maker.is_running()

    def _replace(self, failures: int, text: str) -> bool:
        """Have a server that failed so often replaced, if that may be; return whether the count begins anew."""
        facade = self._facade()
        try:
            if self.location is None or not getattr(facade, "enable_auto_restart", False):
                why_not = "no automatic restart"
            elif self.owner is not None:
                return self._restart(failures)
            elif not self.maker.is_running():
                why_not = f"nobody restarts it: process {self.maker.pid}, which made the service, is gone"
            elif not self.settings.restart_on_exit:
                why_not = f"only process {self.maker.pid}, which made the service, restarts it"
            else:
                return self._end_server()
        except Exception as error:
            if self.has_ended:
                return False
            trace = None if isinstance(error, ShmelimError) else error
            _logger.error("%s: restart failed: %s", self.name, error, exc_info=trace)  # noqa: TRY400
            why_not = f"restart failed, will be tried again: {type(error).__name__}: {error}"
        self.report_down(f"{checks(failures)} in a row, {why_not}: {text}", "failing")
        return False

    def _restart(self, failures: int) -> bool:
        """Restart a server that hangs, in the owner. One that is dead is brought back anyway."""
        if not self.owner.restart(self._asked):
            return False
        self.alerts.restarted(f"server restarted after {checks(failures)}")
        self.page.state.ended_by = 0  # from here on, also copies may tell that all is well
        self.look()
        return True

    def _end_server(self) -> bool:
        """End a server that hangs, in a copy, for the owner to see that. One that is dead it has seen already."""
        server = self._asked
        if server != self.page.server or not server.is_running():
            return False
        assert self.location is not None
        self.key.check_available()
        check_usable(self.location)
        _logger.warning("%s: ending the server, process %d, for its owner to start another", self.name, server.pid)
        server.end(self.settings.stop_timeout, self._about_to_end)
        return True

    def _about_to_end(self, _signal: int) -> None:
        """Raise unless the process to be ended is the server of this service and user; let the owner know."""
        pid = self._asked.pid
        # One that is about to be dead has no title any more.
        if not (is_of_this_user(pid) and is_server_of(pid, self.name)) and not self._asked.wait(_DYING):
            raise ChannelError(f"process {pid} does not look like the server of {self.name}, and is left alone")
        self.page.state.ended_by = os.getpid()
        if self.page.server != self._asked:  # it had died, and there is another one: there is nothing to tell of
            self.page.state.ended_by = 0

    def __repr__(self) -> str:
        return f"{self.name!r} {'direct' if self.location is None else f'at {describe(self.location)}'}"


def _copy(*arguments: Any) -> Core:
    *own, has_server = arguments
    core = Core(*own)
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
