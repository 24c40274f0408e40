"""Who may be at a service's address: which object of this process, and servers that an earlier run left behind.

A process is ended only if it holds the address, carries the title of this service's servers, belongs to this user,
and has no living owner. All that is looked at once more right before each signal. Anything else at the address is
an error that names it, a Python process included.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from shmelim.channel.address import Location, describe, has_socket, wait_until_free, who_answers
from shmelim.channel.key import SharedKey, load_key
from shmelim.errors import ChannelError, KeyFileError, NotServingError
from shmelim.service.process import has_living_owner
from shmelim.service.settings import server_title
from shmelim.system import forks
from shmelim.system.clock import monotonic
from shmelim.system.processes import ProcessIdentity, family, is_of_this_user, title_of
from shmelim.system.text import get_logger

_DYING: Final = 0.1  # seconds in which a process that has lost its title is dead
_ENDING: Final = 30.0  # seconds that a server may need for its end
_SLICE: Final = 0.5  # of these, between two reports
_NAME_CUT: Final = 15  # bytes of a name, which the kernel cuts off there
_WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104  # nothing is bound to them here

_logger = get_logger("shmelim.service")


def check_available(location: Location, key: SharedKey) -> None:
    """Raise ``ChannelError`` if no server could have an address, once that is free, and key; makes nothing."""
    if isinstance(location, str):
        if not _is_writable(Path(location).parent):
            text = f"no server can be at {location}: it cannot use the directory {Path(location).parent}"
            raise ChannelError(text)
        has_socket(location)  # and nothing else
    if key.path is None:
        return
    try:
        load_key(key.path)
    except NotServingError:
        if not _is_writable(Path(key.path).parent):
            raise KeyFileError(f"the key file {key.path} is missing and cannot be made") from None


def _is_writable(directory: Path) -> bool:
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


# ---------------------------------------------------------------------- which object of this process has it


# Read and written inside forks.creating_descriptors, so that no child is forked in between; nothing blocks there.
_holders: weakref.WeakValueDictionary[Location, Any] = weakref.WeakValueDictionary()


def claim(location: Location, claimant: Any, *, takes_over: bool) -> None:
    """Give an address to a service's core; ``ChannelError`` if another living one of this process has it.

    The later of two objects of one service ends the earlier one, if it may, as when a name is bound anew: else
    each of them, when it restarts its server, would end the other's.
    """
    with forks.creating_descriptors:
        holder = _holders.get(location)
        if holder is not None and (holder is claimant or holder.refusal is not None or not holder.is_makers):
            holder = None
        if holder is not None:
            same = (holder.name, holder.key.path) == (claimant.name, claimant.key.path)
            if not (same and takes_over):
                raise ChannelError(
                    f"{describe(location)} is in use by another {holder.name} of this process",
                    hint="shut that down first, or choose another address",
                )
        _holders[location] = claimant
    if holder is not None:
        holder.end(f"a later {claimant.name} of this process has taken {describe(location)}")


# ---------------------------------------------------------------------- whose server a process is


def is_server_of(pid: int, service_name: str) -> bool:
    """Tell whether a process of this user carries the title of the service's servers."""
    return is_of_this_user(pid) and title_of(pid) == server_title(service_name)


def let_end(pid: int, service_name: str, on_wait: Callable[[], object]) -> bool:
    """Wait for a server whose owner has died, as it ends by itself; return whether it has ended.

    One that was being started breaks that off. `on_wait` is called again and again meanwhile.
    False at once for any other process that lives.
    """
    server, deadline = ProcessIdentity.of(pid), monotonic() + _ENDING
    if pid == os.getpid():
        return False
    if not is_server_of(pid, service_name):
        return server.wait(_DYING)
    if not has_living_owner(pid):
        _logger.warning("waiting for the end of process %d, a server whose owner has died", pid)
        while monotonic() < deadline:
            on_wait()
            if server.wait(_SLICE):
                return True
    return False


# ---------------------------------------------------------------------- stale servers


def clear_stale(location: Location, service_name: str, *, grace: float = 1.0, release: float = 2.0) -> list[int]:
    """Make an address that is taken free for a new server, if a server of the same service holds it.

    Ends stale servers by SIGTERM, and after `grace` seconds SIGKILL; returns their ids. Waits `release` seconds
    for the address to become free once its holders are gone, or where only connections hold the port.
    ``ChannelError`` names whoever else holds it.
    """
    listening, connected = _pids_at(location)
    if not listening and not wait_until_free(location, release if connected else 0.0):
        raise _nobody_listens(location, connected)
    # All of them first: where one is not ours, nothing may be ended.
    for pid in listening:
        _check(pid, service_name, location)
    for pid in listening:
        _logger.warning("ending process %d, a stale server of %s at %s", pid, service_name, describe(location))
        if not ProcessIdentity.of(pid).end(grace, lambda _signal, pid=pid: _check(pid, service_name, location)):  # type: ignore[misc]
            raise ChannelError(f"the stale server {pid} at {describe(location)} cannot be ended")
    if not wait_until_free(location, release):
        raise ChannelError(f"{describe(location)} is still in use {release:g} s after its stale server was ended")
    return listening


def _pids_at(location: Location) -> tuple[list[int], list[int]]:
    """Return who listens at an address, and who only has a connection from that port (0: who is not seen)."""
    import psutil  # noqa: PLC0415  # an address is mostly free

    listening: set[int | None] = set()
    connected: set[int | None] = set()
    # Some systems show nothing to an ordinary user, and systemd's ProcSubset=pid nothing to anybody.
    with contextlib.suppress(psutil.AccessDenied, FileNotFoundError):
        if isinstance(location, str):
            pid = None
            with contextlib.suppress(OSError):
                pid = who_answers(location)
            found = [] if pid else psutil.net_connections("unix")
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
    if isinstance(location, str) or not any(connected):
        return ChannelError(
            f"{describe(location)} is in use by a process that this user may not see",
            hint="stop it, or choose another address",
        )
    who = f"process {connected[-1]} ({_name_of(connected[-1])})"
    return ChannelError(
        f"{describe(location)} is in use: an outgoing connection of {who} holds it",
        hint="end that, use a Unix socket (address=), or choose a port outside of net.ipv4.ip_local_port_range: "
        f"connections get any of it, but for `sysctl net.ipv4.ip_local_reserved_ports={location[1]}`",
    )


def _check(pid: int, service_name: str, location: Location) -> None:
    """Raise ``ChannelError`` unless a process is a server of this service and user that was left behind."""
    # This process and those above it cannot be left over from an earlier run.
    if pid in family() or not is_server_of(pid, service_name):
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


def _name_of(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return "of another user"
    title = title_of(pid) or ""
    return title if len(name) == _NAME_CUT and title.startswith(name) else name
