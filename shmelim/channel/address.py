"""Where a channel is: addresses of both families, how to listen at one and how to connect to one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from shmelim.channel.wire import wait
from shmelim.errors import AddressError, ChannelError, NotServingError
from shmelim.system.clock import monotonic

Address: TypeAlias = str | os.PathLike[str] | tuple[str, int]
Location: TypeAlias = str | tuple[str, int]  # an address in the form used inside the package

_PATH_LIMIT = 107  # bytes in sockaddr_un.sun_path, less the final NUL
_PORTS = 65535
_BACKLOG = 512
_POLL = 0.01  # seconds between two looks whether an address is free
LOCK_WAIT = 5.0  # seconds for another server that is starting or stopping in the same directory
_UCRED = struct.Struct("3i")
_TAKEN = "another server uses this address; stop it or choose another address"


def normalize(address: Address) -> Location:
    """Return an address in its one form: an absolute path, or host and port.

    ``TypeError`` if it is neither; ``ValueError`` if the path is empty, has a NUL, or more bytes than a socket
    address holds (``AddressError``), or the port is out of range.
    """
    if isinstance(address, tuple):
        match address:
            case (str(), bool()):
                pass
            case (str(host), int(port)) if host and 0 <= port <= _PORTS:
                return host, port
            case (str(), int()):
                raise ValueError(f"{address!r} is not a TCP address: the port is 0 to 65535, the host not empty")
        raise TypeError(f"a TCP address is (host, port), not {address!r}")
    path = os.fspath(address) if isinstance(address, os.PathLike) else address
    if not isinstance(path, str):
        raise TypeError(f"an address is the path of a socket, or (host, port), not {address!r}")
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is not a socket path: it is empty or has a NUL character")
    path = os.path.abspath(path)  # noqa: PTH100  # links stay: they may be what keeps the path short
    size = len(os.fsencode(path))
    if size > _PATH_LIMIT:
        text = f"the socket path {path!r} has {size} bytes, and the system allows {_PATH_LIMIT}"
        raise AddressError(text, hint="choose a shorter directory, or a TCP port")
    return path


def describe(location: Location) -> str:
    """Return an address as text for messages."""
    return location if isinstance(location, str) else f"{location[0]}:{location[1]}"


def check_free(address: Address) -> Location:
    """Return an address in its one form if a server could listen there now; nothing is made.

    ``TypeError`` or ``ValueError`` if it is not an address; ``ChannelError``, which names it, if it is taken or
    cannot be used.
    """
    location = normalize(address)
    with _explained(location):
        if isinstance(location, str):
            if not os.access(Path(location).parent, os.W_OK | os.X_OK, effective_ids=True):
                Path(location).parent.stat()  # which says what is wrong, where it is not that
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            _is_stale(location)
        else:
            with new_socket(location) as probe:
                _bind_tcp(probe, location)
    return location


def is_free(location: Location) -> bool:
    """Whether a server could listen at an address; True where the question itself fails, which listening will."""
    if isinstance(location, str):
        try:
            return who_answers(location) is None
        except OSError:
            return True
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


class SocketFile:
    """The file of a listening Unix socket, which knows whether it is still the one that was made here."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._identity = _identity(path)

    def is_lost(self) -> bool:
        """Whether clients find nobody by it any more; one system call while nobody touched it."""
        now = _identity(self.path)
        if now == self._identity:
            return False
        if now is None or who_answers(self.path) is None:
            return True
        self._identity = now  # its mode was changed; or another server is there, and stays
        return False

    def remove(self) -> None:
        """Remove the file once its socket is closed, unless another server has put its own in its place."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), _directory_lock(self.path, LOCK_WAIT):
            # An identity may be given out again, so that only the question whether somebody answers tells.
            if _identity(self.path) == self._identity and who_answers(self.path) is None:
                Path(self.path).unlink()


def listen(sock: socket.socket, location: Location, patience: float) -> tuple[Location, SocketFile | None]:
    """Make a socket listen, without blocking; return the real address, and the socket file if there is one.

    A Unix socket file gets mode 0600, and replaces one at which nobody answers. Port 0 lets the system choose one.
    `patience` seconds are for others that start or stop in the same directory. ``ChannelError`` if the address is
    taken or cannot be used. The caller closes the socket, also then.
    """
    with _explained(location):
        sock.setblocking(False)  # noqa: FBT003
        if not isinstance(location, str):
            _bind_tcp(sock, location)
            sock.listen(_BACKLOG)
            host, port = sock.getsockname()[:2]
            return (host, port), None
        # Between two servers that start at once, the second must find the first one listening.
        with _directory_lock(location, patience):
            if _is_stale(location):
                Path(location).unlink(missing_ok=True)
            # The file gets the mode of the unbound socket less the umask, so that it is private from the first.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(location)
            Path(location).chmod(0o600)  # whatever the umask took away
            sock.listen(_BACKLOG)
            return location, SocketFile(location)


@contextlib.contextmanager
def _explained(location: Location) -> Iterator[None]:
    """Turn what the system says into a ``ChannelError`` that names the address."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ChannelError):
            raise
        hint = _TAKEN + _about_port(location) if error.errno == errno.EADDRINUSE else None
        text = f"cannot serve at {describe(location)}: {error.strerror or error}"
        raise ChannelError(text, hint=hint) from error


def _about_port(location: Location) -> str:
    """Say so if a port may be held by a mere connection."""
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except OSError:  # as under systemd's ProcSubset=pid
        return ""
    if isinstance(location, str) or not low <= location[1] <= high:
        return ""
    return (
        f". It may also be an outgoing connection, which the system gives ports from {low} to {high}: take a port "
        f"outside, or reserve this one with the sysctl net.ipv4.ip_local_reserved_ports"
    )


def _bind_tcp(sock: socket.socket, location: tuple[str, int]) -> None:
    # A server's own closed connections linger in TIME_WAIT and must not keep its successor from the port.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # which accepted connections inherit
    sock.bind(location)


def has_socket(path: str) -> bool:
    """Whether a socket file is there; ``ChannelError`` if something else is."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise ChannelError(f"cannot serve at {path}: a file that is not a socket is there", hint="move it away")
    return True


def _is_stale(path: str) -> bool:
    """Whether there is the socket file of a server that is gone; ``ChannelError`` if something else is there."""
    if not has_socket(path):
        return False
    if who_answers(path) is not None:
        raise ChannelError(f"cannot serve at {path}: a server answers there", hint=_TAKEN)
    return True


def who_answers(path: str) -> int | None:
    """Return the process that listens at a socket file, 0 where the kernel does not say which; None: nobody does.

    ``OSError`` where that cannot be asked.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003
        match probe.connect_ex(path):  # at a path that is done at once, or not at all
            case 0:
                return peer_credentials(probe)[0] or 0
            case errno.EAGAIN:
                return 0  # its queue is full: somebody is listening
            case errno.ECONNREFUSED | errno.ENOENT:
                return None
            case code:
                raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _directory_lock(path: str, patience: float) -> Iterator[None]:
    """Keep other servers from changing socket files in the directory of `path`, by ``flock`` on itself.

    So no file is left behind, and the kernel releases the lock when its holder dies.
    """
    directory, deadline = Path(path).parent, monotonic() + patience
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if monotonic() > deadline:
                raise ChannelError(f"{directory} has been locked by another process for {patience:g} s")
            time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not do if a child was forked meanwhile
    finally:
        os.close(descriptor)


def _identity(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns  # the number of a removed file is soon given out again


def connect(sock: socket.socket, location: Location, deadline: float) -> None:
    """Connect a socket, which blocks nobody from then on.

    ``NotServingError`` if nobody listens there; ``TimeoutError`` or ``BlockingIOError`` if somebody does, but took
    no new connection in time, ``ConnectionResetError`` if it was ended at once; ``OSError`` for anything else.
    """
    sock.setblocking(False)  # noqa: FBT003
    code = sock.connect_ex(location)
    if code == errno.EINPROGRESS:  # EAGAIN: the queue of a Unix socket is full
        wait(sock, select.POLLOUT, deadline)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code in (errno.ECONNREFUSED, errno.ENOENT):
        raise NotServingError(f"nobody serves at {describe(location)}") from OSError(code, os.strerror(code))
    if code:
        raise OSError(code, os.strerror(code))
    if not isinstance(location, str):
        # With nobody listening, a connection to a local port of the system's own range can be given that very
        # port as its source, and is then connected to itself, which also keeps the server from the port.
        try:
            own, other = sock.getsockname(), sock.getpeername()
        except OSError as error:
            raise ConnectionResetError(errno.ECONNRESET, "the connection ended at once") from error
        if own == other:
            raise NotServingError(f"nobody serves at {describe(location)}")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def new_socket(location: Location) -> socket.socket:
    """Return an unconnected stream socket of the address' family."""
    if isinstance(location, str):
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    return socket.socket(socket.AF_INET6 if ":" in location[0] else socket.AF_INET, socket.SOCK_STREAM)


def peer_credentials(sock: socket.socket) -> tuple[int | None, int | None]:
    """Return process id and user id of the process at the other end, as the kernel knows them.

    Each is None where it does not: on TCP, and the process id across process namespaces.
    """
    if sock.family != socket.AF_UNIX:
        return None, None
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid or None, uid
