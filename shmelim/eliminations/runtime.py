"""Where a name's things are: its runtime directory with key and socket, and its state directory.

::

    <runtime>/shmelim/<name>/     0700, of this user
        key                       32 random bytes, 0600: who can read it may change the state
        socket                    the command channel, unless it is on a TCP port
        server.json               address and state directory of the server that started last
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import warnings
from pathlib import Path
from typing import Final, Self

import msgspec
import platformdirs

from shmelim.errors import AlreadyServingError, NotServingError, StoreError
from shmelim.shm import check_name

_PRIVATE: Final = 0o700

_log = logging.getLogger("shmelim.runtime")


class ServerInfo(msgspec.Struct, frozen=True):
    """What a server leaves for its clients; ``address`` is a socket path or (host, port)."""

    address: str | tuple[str, int]
    state_dir: str | None
    pid: int


class RuntimeDirectory:
    """The runtime directory of a name.

    Parameters
    ----------
    name
        The name that is served.
    base
        Where runtime directories are; default: the user's, by ``platformdirs``.

    Raises
    ------
    ValueError
        The name is no legal name.

    """

    def __init__(self, name: str, base: Path | str | None = None) -> None:
        self.name = check_name(name)
        self._is_default = base is None
        self.path = (_default_base() if base is None else Path(base)) / name

    @property
    def key(self) -> Path:
        """The key file."""
        return self.path / "key"

    @property
    def socket(self) -> Path:
        """The Unix socket."""
        return self.path / "socket"

    def create(self) -> Self:
        """Make the directory, private to this user, and check that it is.

        Raises
        ------
        StoreError
            It cannot be made, or others could enter it.

        """
        try:
            self.path.parent.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            self.path.mkdir(mode=_PRIVATE, exist_ok=True)
            status = self.path.lstat()
        except OSError as error:
            raise StoreError(
                f"the runtime directory {self.path} cannot be made: {error.strerror}",
                hint="set XDG_RUNTIME_DIR to a directory of your own",
            ) from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise StoreError(
                f"the runtime directory {self.path} belongs to uid {status.st_uid}",
                hint="remove it, or set XDG_RUNTIME_DIR to a directory of your own",
            )
        if stat.S_IMODE(status.st_mode) & 0o077:
            self.path.chmod(_PRIVATE)
        if self._is_default:
            self._check_above()
        return self

    def _check_above(self) -> None:
        """Refuse directories of another user on the way, who could put another one in the place of ours."""
        for above in (self.path.parent, self.path.parent.parent):
            owner = above.stat().st_uid
            if owner not in {0, os.geteuid()}:
                raise StoreError(
                    f"the runtime directory {above} belongs to uid {owner}",
                    hint="set XDG_RUNTIME_DIR to a directory of your own",
                )

    def announce(self, info: ServerInfo) -> None:
        """Write down how the server is reached, in one step."""
        target = self.path / "server.json"
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(msgspec.json.encode(info))
        temporary.chmod(0o600)
        temporary.replace(target)

    def server(self) -> ServerInfo:
        """Return how the server is reached, whether or not it runs.

        Raises
        ------
        NotServingError
            None ever ran here, or what it left cannot be read.

        """
        try:
            return msgspec.json.decode((self.path / "server.json").read_bytes(), type=ServerInfo)
        except (OSError, msgspec.DecodeError) as error:
            raise NotServingError(
                f"no server of the name {self.name!r} can be found in {self.path}"
                + (f": {error.strerror}" if isinstance(error, PermissionError) else ""),
                hint=f"start it with `shmelim serve --name {self.name}`",
            ) from None


class StateLock:
    """The lock on a state directory: no two servers, of whatever names, use one.

    An ``flock``, which the kernel releases however its holder dies. A forked child closes its copy, so that it
    does not keep a dead server's lock.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises
        ------
        AlreadyServingError
            Another server uses the directory.
        StoreError
            The directory cannot be made or written.

        """
        path = self._directory / "lock"
        try:
            self._directory.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(
                f"the state directory {self._directory} cannot be used: {error.strerror}",
                hint="make it writable for this user, or name another (state_dir, --state-dir)",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise AlreadyServingError(
                f"the state directory {self._directory} is in use by another server",
                hint="name another (state_dir, --state-dir), or stop that server",
            ) from None
        self._descriptor = descriptor
        _held.add(self)

    def release(self) -> None:
        """Give the lock back. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        _held.discard(self)
        if descriptor is not None:
            os.close(descriptor)


# Strong references: a lock that its holder forgot is held all the same.
_held: set[StateLock] = set()


def _drop_locks_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_drop_locks_in_child)


def _default_base() -> Path:
    """Return where runtime directories are; what is said of a bad XDG_RUNTIME_DIR goes to the log."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        base = Path(platformdirs.user_runtime_dir("shmelim"))
    for warning in said:
        _log.info("%s", warning.message)
    return base


def default_state_directory(name: str) -> Path:
    """Return the state directory that a name has by default."""
    return Path(platformdirs.user_state_dir("shmelim")) / check_name(name)
