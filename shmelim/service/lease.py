"""Where a service is reached, and who may be there: key, address, and servers that an earlier run left behind.

A process is ended only if it holds the address, is known as a server of this service (by its title, or by a mark
where titles cannot be set), belongs to this user, and has no living owner. All that is looked at once more right
before each signal. Anything else at the address is an error that names it, a Python process included.

Marks are names in the kernel: abstract Unix sockets, bound and never listened on. They are gone the moment their
process is, however that dies, and leave no file. Where the system has no such names (they are Linux'), there are
no marks, and every server counts as left behind. A name protects itself by nothing: every local user who guesses
the id of a process can bind it. So an owner's mark can only keep a server from being ended; and a server's counts
only if that very process holds it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing.context
import os
import secrets
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from shmelim.channel.address import Location, describe, new_socket, peer_credentials
from shmelim.channel.key import KEY_SIZE, load_key, load_or_create_key
from shmelim.errors import ChannelError, KeyFileError, NotServingError
from shmelim.service.settings import server_title
from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.processes import ProcessIdentity, is_of_this_user, title_of

_PROBE: Final = 1.0  # seconds for the question who answers at a socket file
_POLL: Final = 0.01
_DYING: Final = 0.1  # seconds in which a process that has lost its title is dead
_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104  # nothing is bound to them here

_logger = logging.getLogger("shmelim.service")


# ---------------------------------------------------------------------- the key


class ServiceKey:
    """The key that a service's server and clients share.

    Without a file it exists in the memory of the processes that need it only, and can be pickled to a process
    that is being started, as the keys of :mod:`multiprocessing` can, and in no other way.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else os.path.abspath(path)  # noqa: PTH100  # links are for load_key to judge
        self._key = secrets.token_bytes(KEY_SIZE) if path is None else b""

    def for_server(self) -> bytes:
        """Return the key for a server, making the file if there is none; ``KeyFileError`` if it cannot be had."""
        return self._key if self.path is None else load_or_create_key(self.path)

    def for_client(self) -> bytes:
        """Return the key that the server has; ``NotServingError`` or ``KeyFileError`` if it cannot be had."""
        return self._key if self.path is None else load_key(self.path)

    def check_available(self) -> None:
        """Raise ``KeyFileError`` if a server could not get the key; makes nothing."""
        if self.path is None:
            return
        try:
            load_key(self.path)
        except NotServingError:
            if not os.access(Path(self.path).parent, os.W_OK | os.X_OK):
                raise KeyFileError(f"the key file {self.path} is missing and cannot be made") from None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        return self.__dict__


# ---------------------------------------------------------------------- marks


def server_mark(service_name: str) -> socket.socket:
    """Mark this process as a server of the service, until the returned socket is closed."""
    return _bound(_server_mark(os.getpid(), service_name))


def owner_mark(pid: int) -> socket.socket:
    """Say that a server process has its owner here, until the returned socket is closed or this process ends."""
    return _bound(_owner_mark(pid))


def _server_mark(pid: int, service_name: str) -> str:
    return f"\0shmelim.server.{os.getuid()}.{pid}.{service_name}"


def _owner_mark(pid: int) -> str:
    return f"\0shmelim.owner.{os.getuid()}.{pid}"


def _bound(name: str) -> socket.socket:
    with forks.creating_descriptors:
        mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if sys.platform == "linux":
        try:
            mark.bind(name.encode())
        except OSError as error:
            _logger.warning("process %d cannot be marked as what it is: %s", os.getpid(), error)
    return mark


def has_living_owner(pid: int) -> bool:
    """Tell whether a server process of this user has an owner that lives: this process, or another."""
    if sys.platform != "linux":
        return False
    with forks.creating_descriptors, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(_owner_mark(pid).encode())
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def is_server_of(pid: int, service_name: str) -> bool:
    """Tell whether a process carries the title of the service's servers, or holds their mark."""
    return title_of(pid) == server_title(service_name) or _holds(pid, "@" + _server_mark(pid, service_name)[1:])


def _holds(pid: int, shown: str) -> bool:
    """Tell whether a process has a socket of that name, as /proc/net/unix shows it."""
    try:
        lines = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = {f"socket:[{line.split(maxsplit=7)[6]}]" for line in lines if line.endswith(f" {shown}")}
        return bool(wanted) and any(
            str(link.readlink()) in wanted for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()
        )
    except OSError:
        return False


# ---------------------------------------------------------------------- which object of this process has it


# Read and written inside forks.creating_descriptors, so that no child is forked in between; nothing blocks there.
_holders: dict[Location, weakref.ref[Any]] = {}


def claim(location: Location, claimant: Any, *, takes_over: bool) -> None:
    """Give an address to a service's core; ``ChannelError`` if another living one of this process has it.

    The later of two objects of one service ends the earlier one, if it may, as when a name is bound anew: else
    each of them, when it restarts its server, would end the other's.
    """
    with forks.creating_descriptors:
        reference = _holders.get(location)
        holder = None if reference is None else reference()
        if holder is claimant:
            return
        if holder is not None and holder.refusal is None:
            if holder.identity != claimant.identity or not takes_over:
                raise ChannelError(
                    f"{describe(location)} is in use by another {holder.identity[0]} of this process",
                    hint="shut that down first, or choose another address",
                )
        else:
            holder = None
        _holders[location] = weakref.ref(claimant)
    if holder is not None:
        holder.end(f"a later {claimant.identity[0]} of this process has taken {describe(location)}")


def give_up(location: Location, claimant: Any) -> None:
    """Give an address back, if the claimant has it."""
    with forks.creating_descriptors:
        reference = _holders.get(location)
        if reference is not None and reference() in (claimant, None):
            del _holders[location]


# ---------------------------------------------------------------------- whether an address is free


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
    deadline = monotonic() + timeout
    while not is_free(location):
        if monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def check_usable(location: Location) -> None:
    """Raise ``ChannelError`` if no server could listen at an address, even if it is free."""
    if isinstance(location, str):
        directory = Path(location).parent
        if not (directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)):
            raise ChannelError(f"no server can be at {location}: it cannot use the directory {directory}")


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


# ---------------------------------------------------------------------- stale servers


def clear_stale(location: Location, service_name: str, *, grace: float = 1.0, release: float = 2.0) -> list[int]:
    """Make an address free for a new server, if it is free or held by a server of the same service.

    Ends stale servers by SIGTERM, and after `grace` seconds SIGKILL; returns their ids. Waits `release` seconds
    for the address to become free once its holders are gone, or where only connections hold the port.
    ``ChannelError`` names whoever else holds it.
    """
    if is_free(location):
        return []
    listening, connected = _pids_at(location)
    if not listening:
        if wait_until_free(location, release if connected else 0.0):  # it has gone away
            return []
        raise _nobody_listens(location, connected)
    # All of them first: where one is not ours, nothing may be ended.
    for pid in listening:
        _check(pid, service_name, location)
    for pid in listening:
        _logger.warning("ending process %d, a stale server of %s at %s", pid, service_name, describe(location))
        if not ProcessIdentity.of(pid).end(grace, _checking(pid, service_name, location)):
            raise ChannelError(f"the stale server {pid} at {describe(location)} cannot be ended")
    if not wait_until_free(location, release):
        raise ChannelError(f"{describe(location)} is still in use {release:g} s after its stale server was ended")
    return listening


def _pids_at(location: Location) -> tuple[list[int], list[int]]:
    """Return who listens at an address, and who only has a connection from that port (0: who is not seen)."""
    import psutil  # noqa: PLC0415  # an address is mostly free

    listening: set[int | None] = set()
    connected: set[int | None] = set()
    with contextlib.suppress(psutil.AccessDenied):  # some systems show nothing to an ordinary user
        if isinstance(location, str):
            with _connected(location) as (sock, taken):
                pid = peer_credentials(sock)[0] if taken else None
            # Where its queue is full the kernel does not say who it is.
            found = psutil.net_connections("unix") if pid is None else []
            listening = {entry.pid for entry in found if str(entry.laddr) == location} | {pid}
        else:
            host, port = location
            for entry in psutil.net_connections("tcp"):
                if not entry.laddr or entry.laddr.port != port or entry.status == psutil.CONN_TIME_WAIT:
                    continue
                address = entry.laddr.ip.removeprefix("::ffff:")
                if address in {host, *_WILDCARDS} or host == "localhost":
                    # What is bound and does not listen shows as closed, or not at all.
                    bound = entry.status in {psutil.CONN_LISTEN, psutil.CONN_CLOSE}
                    (listening if bound else connected).add(entry.pid)
    return sorted(pid for pid in listening if pid), sorted(pid or 0 for pid in connected - listening)


def _nobody_listens(location: Location, connected: list[int]) -> ChannelError:
    """Return what to say of an address at which nobody is seen to listen; 0 is a process that is not seen."""
    if not any(connected):
        return ChannelError(
            f"{describe(location)} is in use by a process that this user may not see",
            hint="stop it, or choose another address",
        )
    pid = connected[-1]
    hint = f"end that, choose another port, or use a Unix socket (address=); {_range_hint(location)}"
    return ChannelError(
        f"{describe(location)} is in use: an outgoing connection of process {pid} ({_name_of(pid)}) holds it",
        hint=hint,
    )


def _range_hint(location: Location) -> str:
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split())
    except (OSError, ValueError):
        first, last = 0, 0
    if isinstance(location, str) or not first <= location[1] <= last:
        return "a program chose the port for it"
    return (
        f"the system gives connections any port from {first} to {last}: "
        f"`sysctl net.ipv4.ip_local_reserved_ports={location[1]}` keeps this one for you"
    )


def _check(pid: int, service_name: str, location: Location) -> None:
    """Raise ``ChannelError`` unless a process is a server of this service and user that was left behind."""
    # This process and those above it cannot be left over from an earlier run.
    if pid in _family() or not (is_of_this_user(pid) and is_server_of(pid, service_name)):
        if ProcessIdentity.of(pid).wait(_DYING):
            return  # it goes by itself; one that is about to be dead has no title any more
        raise ChannelError(
            f"{describe(location)} is in use by process {pid} ({_name_of(pid)})",
            hint="stop it, or choose another address; only a server titled "
            f"{server_title(service_name)!r} of this user is replaced",
        )
    if has_living_owner(pid):
        raise ChannelError(
            f"{describe(location)} is in use by process {pid}, the server of a process that lives",
            hint="end that first, or choose another address",
        )


def _checking(pid: int, service_name: str, location: Location) -> Callable[[int], None]:
    return lambda _signal: _check(pid, service_name, location)


def _family() -> set[int]:
    """Return the ids of this process and of those above it."""
    import psutil  # noqa: PLC0415

    return {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}


def _name_of(pid: int) -> str:
    import psutil  # noqa: PLC0415

    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "of another user"
