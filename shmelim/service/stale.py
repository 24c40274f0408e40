"""Frees an address from a server that an earlier run of the same service left behind, and from nothing else.

A process is ended only if it holds the address, carries the service's title, belongs to this user, and has no
living owner (see :mod:`shmelim.service.ownership`). Which of two service objects of one process gets an
address was settled before (see :mod:`shmelim.service.claims`). All that is looked at once more right before
each signal, on a process that cannot be mistaken for a later one of the same id meanwhile. Anything else at the
address is an error that names it, a Python process included.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING

import psutil

from shmelim.channel.address import describe, new_socket, peer_credentials
from shmelim.errors import ChannelError
from shmelim.service.ownership import has_living_owner
from shmelim.system.processes import title_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmelim.channel.address import Location

_PROBE = 1.0  # seconds for the question who answers at a socket file
_KILLED = 5.0  # seconds that a process may take to vanish after SIGKILL
_POLL = 0.01
_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104  # nothing is bound to them here

_logger = logging.getLogger("shmelim.service")


def clear_stale(location: Location, title: str, *, grace: float = 1.0, release: float = 2.0) -> list[int]:
    """Make an address free for a new server, if it is free or held by a server of the same service.

    Parameters
    ----------
    location
        A normalized address.
    title
        The process title of the service's servers.
    grace
        Seconds between SIGTERM and SIGKILL.
    release
        Seconds for the address to become free once its holders are gone.

    Returns
    -------
    list of int
        Ids of the processes that were ended; empty if the address was free.

    Raises
    ------
    ChannelError
        Somebody else holds the address, at once; or it does not become free.

    """
    if is_free(location):
        return []
    holders = _holders(location)
    if not holders:
        if is_free(location):  # it went away meanwhile
            return []
        raise ChannelError(
            f"{describe(location)} is in use by a process that this user may not see",
            hint="stop it, or choose another address",
        )
    # All of them first: where one is not ours, nothing may be ended.
    for process in holders:
        _check(process, title, location)
    for process in holders:
        _logger.warning(
            "ending process %d, a stale server titled %r at %s", process.pid, title, describe(location)
        )
        _end(process, title, location, grace)
    if not wait_until_free(location, release):
        raise ChannelError(f"{describe(location)} is still in use {release:g} s after its stale server was ended")
    return [process.pid for process in holders]


def is_free(location: Location) -> bool:
    """Whether a server could listen at an address; True where the question itself fails, which listening will."""
    if isinstance(location, str):
        with _connected(location) as (_, taken):
            return not taken
    with new_socket(location) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(location)
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def wait_until_free(location: Location, timeout: float) -> bool:
    """Wait until a server could listen at an address; return whether it can."""
    deadline = time.monotonic() + timeout
    while not is_free(location):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def _holders(location: Location) -> list[psutil.Process]:
    """Return the processes that hold an address, as far as this user may see them."""
    pids = set(_unix_pids(location) if isinstance(location, str) else _tcp_pids(*location))
    found = []
    for pid in sorted(pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def _tcp_pids(host: str, port: int) -> Iterator[int]:
    with contextlib.suppress(psutil.AccessDenied):  # some systems show nothing to an ordinary user
        for entry in psutil.net_connections("tcp"):
            # A mere connection from this port keeps a server from it, too.
            if entry.pid and entry.laddr and entry.laddr.port == port and entry.status != psutil.CONN_TIME_WAIT:
                address = entry.laddr.ip.removeprefix("::ffff:")
                if address == host or address in _WILDCARDS or host == "localhost":
                    yield entry.pid


def _unix_pids(path: str) -> Iterator[int]:
    with _connected(path) as (sock, taken):
        pid = peer_credentials(sock)[0] if taken else None
    if pid is not None:
        yield pid
        return
    # Its queue is full, so that the kernel does not say who it is; or the system has no such question.
    with contextlib.suppress(psutil.AccessDenied):
        for entry in psutil.net_connections("unix"):
            if entry.pid and str(entry.laddr) == path:
                yield entry.pid


@contextlib.contextmanager
def _connected(path: str) -> Iterator[tuple[socket.socket, bool]]:
    """Connect to a socket file for a moment; also say whether anybody listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE)
        taken = True
        try:
            probe.connect(path)
        except (BlockingIOError, TimeoutError):
            pass  # its queue is full: somebody listens
        except OSError:
            taken = False  # nobody, or no socket at all, which listening will complain of
        yield probe, taken


def _check(process: psutil.Process, title: str, location: Location) -> None:
    """Raise ``ChannelError`` unless `process` is a server of this service and user."""
    found = title_of(process)
    try:
        name, user = process.name(), process.uids()
        mine = user.real == os.getuid() and user.effective == os.geteuid()
    except psutil.NoSuchProcess:
        return  # gone by itself
    except psutil.Error:
        name, mine = "of another user", False
    if not process.is_running():
        return
    # This process and those above it cannot be left over from an earlier run.
    family = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    if not mine or found != title or process.pid in family:
        raise ChannelError(
            f"{describe(location)} is in use by process {process.pid} ({name})",
            hint=f"stop it, or choose another address; only a server titled {title!r} of this user is replaced",
        )
    if has_living_owner(process.pid):
        raise ChannelError(
            f"{describe(location)} is in use by process {process.pid}, the server of a process that lives",
            hint="end that first, or choose another address",
        )


def _end(process: psutil.Process, title: str, location: Location, grace: float) -> None:
    """End one process: SIGTERM, then SIGKILL, each after another look at who it is."""
    opener = getattr(os, "pidfd_open", None)
    descriptor = None
    if opener is not None:
        try:
            descriptor = opener(process.pid)
        except ProcessLookupError:
            return
        except OSError:  # an old kernel
            descriptor = None
    try:
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, _KILLED)):
            # From here on the descriptor keeps meaning the process that is looked at now.
            _check(process, title, location)
            if _has_ended(process):
                return
            try:
                if descriptor is not None:
                    signal.pidfd_send_signal(descriptor, number)
                else:
                    os.kill(process.pid, number)
            except ProcessLookupError:
                return
            if _wait_for_end(process, descriptor, seconds):
                return
    finally:
        if descriptor is not None:
            os.close(descriptor)
    raise ChannelError(f"the stale server {process.pid} at {describe(location)} cannot be ended")


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _wait_for_end(process: psutil.Process, descriptor: int | None, seconds: float) -> bool:
    if descriptor is not None:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return bool(poller.poll(seconds * 1000))
    deadline = time.monotonic() + seconds
    while not _has_ended(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
