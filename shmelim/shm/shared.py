"""Segments in POSIX shared memory, and the lock that makes a writer the only one of its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import sys
import weakref
from typing import Any, Final

from shmelim.errors import (
    AlreadyServingError,
    NotServingError,
    SegmentError,
    SegmentFullError,
    UnsupportedPlatformError,
)
from shmelim.shm.layout import PAGE, ROOT_MAGIC, ROOT_SIZE
from shmelim.shm.mapping import WRITE, check_file, map_file, map_writable, open_error, open_file, untrusted
from shmelim.shm.native import READ_PATH
from shmelim.shm.segment import Lock, Namespace, Segment, check_name

_SHM_DIR: Final = "/dev/shm"  # noqa: S108  # where Linux keeps POSIX shared memory
_ZEROS: Final = bytes(1 << 20)
_UNNAMED: Final = "root-"
"""How the names of root segments go on that are not done yet."""
_FORMAT_1: Final = ROOT_MAGIC + (1).to_bytes(4, "little")


class SharedNamespace(Namespace):
    """Segments ``/shmelim.<name>`` and ``/shmelim.<name>.<generation>`` in POSIX shared memory.

    ``name`` is 1 to 16 of ``a-z 0-9 _ -``; ``mode`` the permissions of segments made here, 0o600, or 0o640 to let
    a group read; ``owner`` the uid whose segments a reader trusts, by default the one in ``SHMELIM_OWNER``, or
    else this user's and root's.

    ValueError for a bad name or mode; UnsupportedPlatformError where there is no ``/dev/shm``, or where the
    machine's memory order is too weak for the pure-Python path, and the extension is not there.

    The lock is an ``flock`` on ``shmelim.<name>.lock``, a file of its own that readers never open: the kernel
    releases it however the writer dies. A forked child closes its copy.

    >>> SharedNamespace("docs").root_name
    '/shmelim.docs'
    """

    def __init__(self, name: str, *, mode: int = 0o600, owner: int | None = None) -> None:
        self.name = check_name(name)
        if mode not in (0o600, 0o640):
            shown = f"{mode:#o}" if type(mode) is int else repr(mode)
            raise ValueError(f"mode must be 0o600, or 0o640 to let a group read, not {shown}")
        require_store_order()
        self._mode = mode
        if owner is None and "SHMELIM_OWNER" in os.environ:
            from shmelim.system.owner import named_owner  # noqa: PLC0415  # which few readers need

            owner = named_owner()
        if owner is None:
            self._trusted = {os.geteuid(), 0}
        else:
            from shmelim.system.arguments import whole  # noqa: PLC0415  # as above

            self._trusted = {whole("owner", owner, least=0)}

    @property
    def readers_prefix(self) -> str:  # type: ignore[override]  # not to be set
        """How the paths of its readers' pages begin, see counting.py."""
        return f"{_SHM_DIR}{self.root_name.replace('shmelim', 'shmelim-readers', 1)}."

    @property
    def root_name(self) -> str:
        """The name of the root segment, as ``shm_open`` takes it."""
        return f"/shmelim.{self.name}"

    def data_name(self, generation: int) -> str:
        """Return the name of a data segment, as ``shm_open`` takes it."""
        return f"{self.root_name}.{generation}"

    # ------------------------------------------------------------------ the lock

    def acquire(self) -> Lock:
        path = f"{_SHM_DIR}{self.root_name}.lock"
        if os.geteuid() not in self._trusted:
            owner = min(self._trusted)
            raise SegmentError(
                f"uid {os.geteuid()} cannot write {self.name!r}, as another user's is meant: uid {owner}",
                hint="run it as that user, or do not name one (SHMELIM_OWNER, owner=)",
            )
        while True:
            file = self._open_lock(path)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._already_serving() from None
            except OSError as error:
                raise open_error(path, error, "lock") from error
            try:
                lock = _FileLock(file, path)
            except OSError as error:  # at a limit on locked memory, it is a BlockingIOError, too
                raise open_error(path, error, "map") from error
            # The lock of a file that was removed or replaced between open and flock keeps nobody out.
            if self.holds(lock):
                return lock

    def _open_lock(self, path: str) -> Any:
        # Without O_CREAT first: in a sticky directory, the kernel may refuse that for a file of another user's.
        for flags in (WRITE, WRITE | os.O_CREAT | os.O_EXCL):
            try:
                file = open_file(path, flags)
                status = os.fstat(file.fileno())
                check_file(path, status, {os.geteuid()})
                if flags & os.O_CREAT:
                    os.fchmod(file.fileno(), 0o600)
            except OSError as error:
                if isinstance(error, SegmentError):
                    raise
                if error.errno != (errno.EEXIST if flags & os.O_CREAT else errno.ENOENT):
                    raise (_no_room(path, 0, error) if flags & os.O_CREAT else open_error(path, error)) from error
            else:
                return file
        raise self._already_serving()  # it was made just now, by who serves

    def _already_serving(self) -> AlreadyServingError:
        return AlreadyServingError(
            f"{self.name!r} is already served by another process",
            hint=f"see `shmelim status --name {self.name}`, or serve under another --name",
        )

    def holds(self, lock: Lock) -> bool:
        assert isinstance(lock, _FileLock)
        return _identity_at(lock.path) == lock.identity

    # ------------------------------------------------------------------ segments

    def open_root(self, *, writable: bool = False) -> Segment:
        return self._open_writable(self.root_name, root=True) if writable else self._open(self.root_name)

    def make_root(self) -> Segment:
        return self._create(f"{self.root_name}.{_UNNAMED}{os.urandom(4).hex()}", ROOT_SIZE)

    def name_root(self, root: Segment) -> None:
        path = f"{_SHM_DIR}{self.root_name}"
        try:
            os.rename(f"{_SHM_DIR}{root.label}", path)  # noqa: PTH104  # pathlib is for writers that wait
        except OSError as error:
            raise open_error(path, error, "replace") from error
        root.label = self.root_name

    def create_data(self, generation: int, size: int) -> Segment:
        return self._create(self.data_name(generation), size)

    def open_data(self, generation: int, *, writable: bool = False) -> Segment:
        label = self.data_name(generation)
        return self._open_writable(label, root=False) if writable else self._open(label)

    def remove_data(self, generation: int) -> None:
        with contextlib.suppress(OSError):
            _remove_own(f"{_SHM_DIR}{self.data_name(generation)}")

    def leads_to(self, segment: Segment) -> bool:
        return _identity_at(f"{_SHM_DIR}{segment.label}") == segment.identity

    def unlink(self, segment: Segment) -> None:
        if self.leads_to(segment):
            _unlink(segment.label)

    def tidy(self, keep: int) -> None:
        self._remove(lambda rest: (rest.isdecimal() and rest != str(keep)) or rest.startswith(_UNNAMED))

    def remove(self) -> None:
        """Unlink everything of this name; for temporary tables that are done with."""
        self._remove(lambda rest: rest.isdecimal() or rest == "lock" or rest.startswith(_UNNAMED))
        _unlink(self.root_name)
        directory, _, start = self.readers_prefix.rpartition("/")
        for name in os.listdir(directory):  # noqa: PTH208
            if name.startswith(start):
                with contextlib.suppress(SegmentError):
                    _unlink(f"/{name}")

    def is_empty(self) -> bool:
        """Tell whether there is nothing of this name."""
        return not (os.path.lexists(f"{_SHM_DIR}{self.root_name}") or self._rests())

    def generations(self) -> list[int]:
        """Return the generations that have a data segment."""
        return sorted(int(rest) for rest in self._rests() if rest.isdecimal())

    def _rests(self) -> list[str]:
        """Return what comes after the name in the names of everything but the root segment."""
        prefix = self.root_name[1:] + "."
        return [name.removeprefix(prefix) for name in os.listdir(_SHM_DIR) if name.startswith(prefix)]  # noqa: PTH208

    def _remove(self, chosen: Any) -> None:
        for rest in self._rests():
            # What another user put there is not ours, and nothing reads it.
            if chosen(rest):
                with contextlib.suppress(SegmentError):
                    _unlink(f"{self.root_name}.{rest}")

    def _create(self, label: str, size: int) -> Segment:
        path = f"{_SHM_DIR}{label}"
        try:
            try:
                file = open_file(path, WRITE | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                _remove_own(path)
                file = open_file(path, WRITE | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            raise error if isinstance(error, SegmentError) else _no_room(path, size, error) from error
        with file:
            try:
                os.fchmod(file.fileno(), self._mode)
                reserve(file.fileno(), size)
                return _map(file.fileno(), label, size)
            except (OSError, ValueError) as error:
                _unlink(label)
                raise _no_room(path, size, error) from error

    def _open_writable(self, label: str, *, root: bool) -> Segment:
        path = f"{_SHM_DIR}{label}"
        try:
            with open_file(path, WRITE) as file:
                status = os.fstat(file.fileno())
                check_file(path, status, {os.geteuid()})
                size = status.st_size
                if root and size < ROOT_SIZE:
                    # Who has it mapped must find a page there. An emptied root is never continued.
                    os.ftruncate(file.fileno(), 0)
                    reserve(file.fileno(), ROOT_SIZE)
                    size = ROOT_SIZE
                # Who may read is as this writer has it, not as the one before.
                os.fchown(file.fileno(), -1, os.getegid())
                os.fchmod(file.fileno(), self._mode)
                if root and not _try_lock(file) and os.pread(file.fileno(), 12, 0) == _FORMAT_1:
                    raise self._already_serving()
                return _map(file.fileno(), label, size)
        except (OSError, ValueError) as error:
            raise self._error(path, error) from error

    def _open(self, label: str) -> Segment:
        path = f"{_SHM_DIR}{label}"
        try:
            memory, status = map_file(path)
            check_file(path, status, self._trusted)
        except (OSError, ValueError) as error:
            raise self._error(path, error) from error
        if memory is None:
            raise self._not_serving(": no writer has published anything yet")
        return Segment(label, memory, (status.st_dev, status.st_ino))

    def _error(self, path: str, error: Exception) -> Exception:
        if isinstance(error, (SegmentError, AlreadyServingError)):
            return error
        if isinstance(error, FileNotFoundError):
            return self._not_serving()
        if isinstance(error, OSError):
            return open_error(path, error)
        return SegmentError(f"cannot map {path}: {error}")

    def _not_serving(self, why: str = "") -> NotServingError:
        return NotServingError(
            f"nothing is served under the name {self.name!r}{why}",
            hint=f"start it with `shmelim serve --name {self.name}`",
        )


class _FileLock(Lock):
    """An ``flock``, and the mapping that holds it."""

    def __init__(self, file: Any, path: str) -> None:
        self._held = map_writable(file.fileno(), PAGE)
        self.path = path
        status = os.fstat(file.fileno())
        self.identity = (status.st_dev, status.st_ino)
        self.number = status.st_ino
        _locks.add(self)

    def release(self) -> None:
        self._held = None


def _identity_at(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _try_lock(file: Any) -> bool:
    """Lock a root segment against writers of format 1, whose lock that was; it lasts as long as the mapping.

    Who reads with a group's rights can have it, and keeps nobody out: from format 2 on it is not what counts.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _map(descriptor: int, label: str, size: int) -> Segment:
    status = os.fstat(descriptor)
    return Segment(label, map_writable(descriptor, size), (status.st_dev, status.st_ino))


def _remove_own(path: str) -> None:
    status = os.lstat(path)
    if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
        raise untrusted(path, f"it is there already, and belongs to uid {status.st_uid}")
    os.unlink(path)  # noqa: PTH108


def _unlink(label: str) -> None:
    path = f"{_SHM_DIR}{label}"
    try:
        os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        pass
    except OSError as error:
        raise open_error(path, error, "remove") from None


def require_store_order() -> None:
    """Raise UnsupportedPlatformError unless the extension or the machine keeps stores and loads in order."""
    if sys.platform != "linux":
        raise UnsupportedPlatformError(f"shmelim needs /dev/shm, which {sys.platform!r} does not have")
    machine = os.uname().machine
    words = struct.calcsize("P")
    if READ_PATH == "native" or (machine in ("x86_64", "AMD64") and sys.byteorder == "little" and words == 8):  # noqa: PLR2004
        return
    raise UnsupportedPlatformError(
        f"the pure-Python path of shmelim needs the store order of x86-64, and a Python whose words have 64 bits; "
        f"this machine is {machine!r}, and this Python's words have {8 * words}",
        hint="install shmelim where there is a C compiler (SHMELIM_BUILD=native says what is wrong), "
        "and do not set SHMELIM_PURE",
    )


def reserve(descriptor: int, size: int) -> None:
    """Give a new segment ``size`` bytes of zeroed memory, or raise ``OSError`` now rather than SIGBUS later."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
        else:
            return
    # The segment grows with what is written: its size never promises memory that is not there.
    offset = 0
    while offset < size:
        # Where room ends, a write is cut short before one fails.
        offset += os.pwrite(descriptor, _ZEROS[: size - offset], offset)


def _no_room(path: str, size: int, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
        return SegmentFullError(
            f"no room for the {size:,} bytes of {path}: shared memory is full",
            hint="enlarge /dev/shm (Docker: --shm-size) or remove what fills it; the published state stands",
        )
    if isinstance(error, FileNotFoundError):
        return SegmentError(f"cannot make {path}: there is no {_SHM_DIR}", hint=f"mount a tmpfs at {_SHM_DIR}")
    if isinstance(error, OSError):
        return open_error(path, error, "make")
    return SegmentError(f"cannot make {path} of {size:,} bytes: {error}")


# A child finds the locks of its parent here; nobody is kept from releasing one by forgetting it.
_locks: weakref.WeakSet[_FileLock] = weakref.WeakSet()


def _drop_locks_in_child() -> None:
    # An flock lives as long as anybody has the file: a child must not keep a dead writer's lock.
    for lock in list(_locks):
        lock.release()


os.register_at_fork(after_in_child=_drop_locks_in_child)
