"""Where a name's things are: its runtime directory with key and socket, and its state directory.

::

    <runtime>/shmelim/<name>/     0700, of this user
        key                       32 random bytes, 0600: who can read it may change the state
        socket                    the command channel, unless it is on a TCP port
        server.json               address and state directory of the server that started last
        publisher.json            what the one that publishes to other hosts says of itself, if there is one
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import msgspec
import platformdirs

from shmelim.channel import restore_key
from shmelim.channel.address import normalize
from shmelim.channel.server import UNREACHABLE
from shmelim.errors import (
    AddressError,
    AlreadyServingError,
    DamagedFileError,
    FollowerError,
    KeyFileError,
    NotServingError,
    SegmentError,
    StoreError,
    UnsupportedPlatformError,
    UntrustedSegmentError,
)
from shmelim.shm import SharedNamespace, TableReader, check_name
from shmelim.shm.following import followed_by
from shmelim.shm.place import place_of
from shmelim.system.durable import make_private_directory, reading, write_whole, writing
from shmelim.system.locks import Lease
from shmelim.system.logs import LimitedLog
from shmelim.system.owner import means_another, named_owner, whose
from shmelim.system.places import place
from shmelim.system.problems import Problems
from shmelim.system.processes import ProcessIdentity
from shmelim.system.text import get_logger

SERVICE_NAME: Final = "EliminationManagerServer"
LOCALHOST: Final = "127.0.0.1"
STATE_LOCK: Final = "lock"

RUNTIME_VARIABLE: Final = "SHMELIM_RUNTIME_DIR"
"""Where runtime directories are, whatever XDG_RUNTIME_DIR says."""

_PRIVATE: Final = 0o700
_FILES: Final = ("key", "socket", "server.json", "publisher.json")
_LEFT: Final = (*_FILES, "key.*", ".*.json.*.tmp")  # the latter by who was killed while writing
_LOOK: Final = 0.5  # seconds between two looks at what clients find a server by
_SET_RUNTIME: Final = f"name a directory of your own, by --runtime-dir, {RUNTIME_VARIABLE} or XDG_RUNTIME_DIR"

_log = get_logger("shmelim.runtime")
_once = LimitedLog(_log, burst=1, interval=3600)


class ServerInfo(msgspec.Struct, frozen=True):
    """What a server leaves for its clients; ``address`` is a socket path or (host, port)."""

    address: str | tuple[str, int]
    state_dir: str | None
    pid: int


class RuntimeDirectory:
    """The runtime directory of a name; `base` is where such directories are: by default the user's.

    ``ValueError`` if the name is not a legal one. Nothing is made before :meth:`create`.
    """

    def __init__(self, name: str, base: Path | str | None = None) -> None:
        self.name = check_name(name)
        self._is_default = base is None
        self.path = (_default_base() if base is None else place("runtime_base", base)) / name
        self.key = self.path / "key"
        self.socket = self.path / "socket"
        self._info = self.path / "server.json"

    @classmethod
    def of_server(cls, name: str, base: Path | str | None = None) -> Self:
        """Return the one of the server that has the name: in `base`, or else where it says in its table.

        So it is found from an environment without XDG_RUNTIME_DIR, or with another one (cron, sudo, docker exec).
        """
        if base is None and RUNTIME_VARIABLE not in os.environ:
            with suppress(NotServingError, SegmentError, UnsupportedPlatformError):
                said = Path(os.fsdecode(place_of(SharedNamespace(name))))
                if said.is_absolute() and said.name == name:
                    base = said.parent
        return cls(name, base)

    def address(self, port: int | None = None) -> str | tuple[str, int]:
        """Return where the name is served; ``AddressError`` if the directory's path is too long for a socket."""
        if port is not None:
            return normalize((LOCALHOST, port))
        try:
            return normalize(self.socket)
        except AddressError as error:
            hint = "set XDG_RUNTIME_DIR to a directory with a shorter path, or serve on a TCP port"
            raise AddressError(error.message, hint=hint) from None

    def create(self) -> Self:
        """Make the directory, private to this user; ``StoreError`` if that cannot be, or others could enter it.

        As well where nothing could be announced in it.
        """
        try:
            make_private_directory(self.path)
            status = self.path.lstat()
        except OSError as error:
            raise StoreError(
                f"the runtime directory {self.path} cannot be made: {error.strerror}", hint=_SET_RUNTIME
            ) from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise StoreError(
                f"the runtime directory {self.path} belongs to uid {status.st_uid}",
                hint=f"remove it, or {_SET_RUNTIME}",
            )
        if stat.S_IMODE(status.st_mode) & 0o077:
            self.path.chmod(_PRIVATE)
        if self._info.is_dir():
            raise StoreError(f"{self._info} is a directory, not a file", hint="move it away")
        for above in (self.path.parent, self.path.parent.parent) if self._is_default else ():
            # Another user's could have another one put in the place of ours.
            owner = above.stat().st_uid
            if owner not in {0, os.geteuid()}:
                raise StoreError(f"the runtime directory {above} belongs to uid {owner}", hint=_SET_RUNTIME)
        return self

    def remove(self) -> None:
        """Remove what servers left, and the directory; OSError where it stays, as with anything else in it."""
        with suppress(FileNotFoundError):
            for pattern in _LEFT:
                for path in self.path.glob(pattern):
                    path.unlink()
            self.path.rmdir()

    def announce(self, info: ServerInfo) -> None:
        """Write down how the server is reached, in one step."""
        write_whole(self._info, [msgspec.json.encode(info)])

    def server(self) -> ServerInfo:
        """Return how the server is reached, whether or not it runs.

        ``NotServingError`` if none ever ran here, or what it left cannot be understood; ``FollowerError`` if the
        table follows one of another host; ``KeyFileError`` if this user may not look.
        """
        need_own(self.name)
        try:
            with reading(self._info) as file:
                return msgspec.json.decode(file.read(), type=ServerInfo)
        except PermissionError as error:
            raise KeyFileError(
                f"cannot look for the server of the name {self.name!r}: {error.strerror}; {whose(self._info)}",
                hint="run as the server's user",
            ) from None
        except (OSError, DamagedFileError, ValueError):
            raise self._not_found() from None

    def _not_found(self) -> NotServingError:
        """Return the error for a name whose server left nothing here; it may live all the same."""
        with suppress(NotServingError, SegmentError, UnsupportedPlatformError):
            writer = TableReader(SharedNamespace(self.name)).writer()
            if writer.alive:
                return NotServingError(
                    f"process {writer.pid} serves {self.name!r}, and nothing in {self.path} says how to reach it",
                    hint="it may keep that elsewhere (name the place by --runtime-dir, or in XDG_RUNTIME_DIR), or"
                    " publish from a process of its own, which alone can change it then",
                )
        return NotServingError(
            f"no server of the name {self.name!r} can be found in {self.path}",
            hint=f"start it with `shmelim serve --name {self.name}`",
        )


class Announcement:
    """What clients find a server by, kept where it belongs until :meth:`stop`: directory, key and ``server.json``.

    Runtime directories are cleaned up by others (systemd-tmpfiles, a logout); a server that lives through that
    would be found by nobody. So a thread looks twice a second, and puts back what is gone or is not as it was.
    (The socket is the channel's, which looks after it in the same way.) What cannot be put back is one of the
    `problems`.
    """

    def __init__(
        self, runtime: RuntimeDirectory, info: ServerInfo, key: bytes, problems: Problems | None = None
    ) -> None:
        self._runtime = runtime
        self._info = info
        self._key = key
        self._problems = Problems() if problems is None else problems
        self._stopped = threading.Event()
        self._say = LimitedLog(_log)
        self._thread = threading.Thread(target=self._run, name="shmelim-runtime", daemon=True)

    def start(self) -> Self:
        """Announce the server, and look after that from now on."""
        self._runtime.announce(self._info)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Look no more; what stands there stays. Idempotent."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def restore(self) -> bool:
        """Put back what is missing or damaged, and return whether anything was.

        ``StoreError``, ``KeyFileError`` or ``OSError`` if that cannot be done.
        """
        lost = restore_key(self._runtime.create().key, self._key)
        try:
            found = self._runtime.server()
        except (NotServingError, KeyFileError):
            found = None
        # Another server of the name that lives speaks for itself.
        if found != self._info and not (
            found is not None and found.pid != self._info.pid and ProcessIdentity.of(found.pid).is_running()
        ):
            self._runtime.announce(self._info)
            lost = True
        return lost

    def _run(self) -> None:
        place = str(self._runtime.path)
        while not self._stopped.wait(_LOOK):
            try:
                if self.restore():
                    self._say(logging.WARNING, "put back", "%s had been cleaned up: put back", place)
            except Exception as error:
                text = f"clients cannot find the server any more: {error}"
                self._say(logging.WARNING, "lost", "%s", text)
                self._problems.report(UNREACHABLE, text, subject=place, remedy=f"move away what stands in {place}")
            else:
                self._problems.clear(UNREACHABLE, place)


def lock_state(directory: Path, store: str | None = None) -> Lease:
    """Take the lease on a state directory, and on the `store` in it: no two servers, of whatever names, use one.

    ``AlreadyServingError`` if another server has it, ``StoreError`` if it cannot be written, or is another user's:
    then nothing is made in it.
    """
    with suppress(OSError):
        if (owner := directory.stat().st_uid) != os.geteuid():
            raise StoreError(
                f"the state directory {directory} belongs to uid {owner}, and this process runs as uid"
                f" {os.geteuid()}",
                hint="run as its owner, give it to this user (chown -R), or name another (state_dir, --state-dir)",
            )
    lease = Lease(directory / STATE_LOCK, None if store is None else directory / store)
    with writing(f"the state directory {directory} cannot be used", "name another (state_dir, --state-dir)"):
        try:
            directory.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            lease.acquire()
        except BlockingIOError as error:
            raise _in_use(lease, error) from None
    return lease


def secure_state(lease: Lease) -> None:
    """Make the lease proof against the removal of its file, once the store is there.

    ``AlreadyServingError`` if another server has come in meanwhile.
    """
    try:
        lease.secure()
    except BlockingIOError as error:
        raise _in_use(lease, error) from None


def _in_use(lease: Lease, error: BlockingIOError) -> AlreadyServingError:
    if error.filename is not None:
        return AlreadyServingError(
            f"{error.filename} is locked by another process, most likely a server of another directory, from which"
            " a link or a mount leads here",
            hint="stop that server, or copy the store instead (shmelim backup, shmelim restore)",
        )
    holder = lease.holder()
    return AlreadyServingError(
        f"the state directory {lease.path.parent} is in use by another server"
        + (f", process {holder}" if holder else ""),
        hint="name another (state_dir, --state-dir), or stop that server",
    )


def _default_base() -> Path:
    """Return where runtime directories are; a variable that is set and cannot be used is worth a warning.

    Decided here, since versions of libraries disagree, and what differs between two processes keeps them apart.
    """
    if chosen := os.environ.get(RUNTIME_VARIABLE):
        return Path(chosen)
    said, usual = os.environ.get("XDG_RUNTIME_DIR"), Path(f"/run/user/{os.geteuid()}")
    if said:
        problem = _unusable(Path(said))
        if problem is None:
            return Path(said, "shmelim")
        _once(logging.WARNING, "base", "XDG_RUNTIME_DIR=%s is not used: it %s", said, problem)
    elif usual.is_dir() and _unusable(usual) is None:
        return usual / "shmelim"
    base = Path(tempfile.gettempdir(), f"runtime-{os.geteuid()}", "shmelim")
    if not said:
        _once(logging.INFO, "base", "XDG_RUNTIME_DIR is not set, and there is no %s: using %s", usual, base)
    return base


def _unusable(directory: Path) -> str | None:
    """Return why a directory is not this user's alone; None where it is, or can be made so."""
    if not directory.is_absolute():
        return "is not absolute"
    try:
        status = directory.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a directory"
    if status.st_uid != os.geteuid():
        return f"belongs to uid {status.st_uid}"
    mode = stat.S_IMODE(status.st_mode)
    return f"has mode {mode:#o}, so that others may enter" if mode & 0o077 else None


def default_state_directory(name: str) -> Path:
    """Return the state directory that a name has by default."""
    return Path(platformdirs.user_state_dir("shmelim")) / check_name(name)


def need_own(name: str) -> None:
    """Raise ``FollowerError`` if the table of a name follows one of another host."""
    with suppress(UnsupportedPlatformError):
        if source := followed_by(SharedNamespace(name)):
            raise FollowerError(
                f"{name!r} on this host follows {source!r}: changes, debts and history are where its server is",
                hint="do that there; `shmelim fleet status` names the host",
            )


def announced_state_directory(name: str) -> Path | None:
    """Return the state directory of the server of a name that started last; None where none is known of.

    Errors are those of :func:`state_directory_of`.
    """
    try:
        TableReader(SharedNamespace(name))
    except UntrustedSegmentError:
        raise
    except (NotServingError, SegmentError, UnsupportedPlatformError):
        pass
    announced = None
    with suppress(NotServingError):
        announced = RuntimeDirectory.of_server(name).server().state_dir
    return None if announced is None else Path(announced)


def state_directory_of(name: str) -> Path:
    """Return the state directory of the server of a name that started last, or else the name's default one.

    The default is this user's, so another user's name never has it: ``UntrustedSegmentError`` if that is not the
    user who is meant, ``KeyFileError`` if this one may not look, ``NotServingError`` if nothing was left to go by.
    """
    if (announced := announced_state_directory(name)) is not None:
        return announced
    if means_another():
        text = f"nothing tells where the state of uid {named_owner()} under the name {name!r} is"
        raise NotServingError(text, hint="name its directory: --state-dir")
    return default_state_directory(name)
