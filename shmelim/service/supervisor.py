"""Starts, restarts and stops the one server process of a service, in the process that owns it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, TypeAlias

from shmelim.channel.address import describe
from shmelim.errors import ChannelError
from shmelim.service.claims import claim, give_up
from shmelim.service.launch import ServerOptions, ServerProcess, ServerReady
from shmelim.service.ownership import OwnerMark
from shmelim.service.stale import clear_stale, wait_until_free
from shmelim.service.titles import server_title
from shmelim.system.processes import ProcessIdentity

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess

    from shmelim.channel.address import Location
    from shmelim.service.key import ServiceKey
    from shmelim.service.settings import ServiceSettings

_logger = logging.getLogger("shmelim.service")

Start: TypeAlias = "Callable[[Location, bytes, ServerReady], BaseProcess]"


class Supervisor:
    """The server process of a service, over its restarts.

    Thread-safe: whoever starts, restarts or stops waits for the others. Belongs to the process that made it; in a
    forked child nothing but :meth:`disown` may be called.

    Parameters
    ----------
    location
        Where to serve. If the system chooses the port, the first start decides it for all others.
    key
        The key of every server.
    service_name
        Its name.
    settings
        How long what may take, and what else a server process must know.
    on_give_way
        Called with the reason when a later object of this process takes the address.

    Attributes
    ----------
    restarted_at : float
        The ``time.monotonic()`` of the last restart.

    """

    def __init__(
        self,
        location: Location,
        key: ServiceKey,
        service_name: str,
        settings: ServiceSettings,
        on_give_way: Callable[[str], object],
    ) -> None:
        self.location = location
        self._key = key
        self._name = service_name
        self._settings = settings
        self._options = ServerOptions(
            service_name,
            None if settings.outlive_owner else ProcessIdentity.this_process(),
            settings.codec,
            settings.max_message,
            settings.stop_timeout / 2,
        )
        self._on_give_way = on_give_way
        # The lock is held over whole starts and stops, and guards everything below and `location`. It is
        # re-entrant, since a signal handler may close while its thread starts a server; so a start that is ready
        # looks once more whether it is still wanted.
        self._lock = threading.RLock()
        self._server: ServerProcess | None = None
        self._mark: OwnerMark | None = None
        self.restarted_at = float("-inf")
        self._refusal: str | None = None  # written without the lock, so that its holder sees it; never goes back

    @property
    def identity(self) -> tuple[str, str | None]:
        """What the objects of one service have in common."""
        return self._name, self._key.path

    @property
    def refusal(self) -> str | None:
        """Why nothing is started any more; None if it is."""
        return self._refusal

    @property
    def process(self) -> BaseProcess | None:
        """The server process that was started last."""
        server = self._server
        return None if server is None else server.process

    def start(self, start: Start) -> Location:
        """Start a server process, and return its address when it is ready.

        Raises
        ------
        ChannelError
            Another process is at the address; or a server process cannot be had, as its subclasses say.
        Exception
            Whatever kept the server process from serving.

        """
        with self._lock:
            self._check_wanted()
            if not _chosen_by_system(self.location):
                self._claim()
            ready = ServerReady(self._options, lambda: self._refusal)
            try:
                process = start(self.location, self._key.for_server(), ready)
                self._server = ServerProcess(process, self._name)
                assert process.pid is not None
                self._mark = OwnerMark(process.pid)
                try:
                    self.location = self._settled(ready.outcome(process, self._settings.ready_timeout))
                    # The address of an object whose server is dead may have come to us by chance.
                    with contextlib.suppress(ChannelError):
                        claim(self.location, self, takes_over=False)
                    self._check_wanted()
                except BaseException:
                    self._stop_server()
                    raise
            finally:
                ready.close()
            _logger.info("%s: process %d serves at %s", self._name, process.pid, describe(self.location))
            return self.location

    def _check_wanted(self) -> None:
        if self._refusal is not None:
            raise ChannelError(self._refusal)

    def _settled(self, reported: Location | None) -> Location:
        location = reported or self.location
        if _chosen_by_system(location):
            raise ChannelError("the server process does not say which port it has", hint="name a port")
        return location

    def _claim(self) -> None:
        """Free the address of an earlier object of this service, and of what an earlier run has left there."""
        claim(self.location, self, takes_over=self._settings.replace_stale)
        try:
            if self._settings.replace_stale:
                clear_stale(
                    self.location,
                    server_title(self._name),
                    grace=min(self._settings.stop_timeout, 1.0),
                    release=self._settings.release_timeout,
                )
        except ChannelError as error:
            raise type(error)(f"{self._name} cannot be served: {error.message}", hint=error.hint) from error

    def restart(self, start: Start, failed_at: float | None = None) -> bool:
        """Stop the server process, and start another at the same address with the same key.

        Parameters
        ----------
        start
            As for :meth:`start`.
        failed_at
            The ``time.monotonic()`` since which the server is known to fail; if it was restarted later than that,
            nothing is done.

        Returns
        -------
        bool
            Whether it was restarted.

        """
        with self._lock:
            if failed_at is not None and failed_at < self.restarted_at:
                return False
            self._check_wanted()
            _logger.warning("%s: restarting the server process", self._name)
            self._stop_server()
            wait_until_free(self.location, self._settings.release_timeout)
            self.start(start)
            self.restarted_at = time.monotonic()
            return True

    def close(self, why: str) -> None:
        """Stop the server process for good; idempotent. A start that is under way is broken off, and waited for.

        Parameters
        ----------
        why
            What whoever wants to start it again is told; the first reason stays.

        """
        if self._refusal is None:
            self._refusal = why
        with self._lock:
            self._stop_server()
        give_up(self.location, self)

    def give_way(self, why: str) -> None:
        """End for good, since a later object has the address."""
        try:
            self._on_give_way(why)
        except ChannelError:  # the service is gone, and about to close this
            _logger.debug("%s: %s", self._name, why)
        self.close(why)

    def _stop_server(self) -> None:
        if self._server is not None:
            self._server.stop(self._settings.stop_timeout)
        self._unmark()

    def _unmark(self) -> None:
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.close()

    def disown(self) -> None:
        """Let a forked child's exit leave the server process alone; the child then drops this object."""
        if self._server is not None:
            self._server.disown()
        self._unmark()
        give_up(self.location, self)


def _chosen_by_system(location: Location) -> bool:
    return not isinstance(location, str) and location[1] == 0
