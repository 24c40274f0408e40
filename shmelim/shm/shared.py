"""Segments in POSIX shared memory, and the lock that makes a writer the only one of its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import sys
from typing import Final

import posix_ipc

from shmelim.errors import (
    AlreadyServingError,
    NotServingError,
    SegmentError,
    SegmentFullError,
    UnsupportedPlatformError,
    UntrustedSegmentError,
)
from shmelim.shm.layout import ROOT_SIZE
from shmelim.shm.native import READ_PATH
from shmelim.shm.segment import Namespace, Segment, check_name

_SHM_DIR: Final = "/dev/shm"  # noqa: S108  # where Linux keeps POSIX shared memory
_ZEROS: Final = bytes(1 << 20)


class SharedNamespace(Namespace):
    """Segments ``/shmelim.<name>`` and ``/shmelim.<name>.<generation>`` in POSIX shared memory.

    ``name`` is 1 to 16 of ``a-z 0-9 _ -``; ``mode`` the permissions of segments made here, 0o600, or 0o640 to let
    a group read; ``owner`` the uid whose segments a reader trusts, by default this user's and root's.

    ValueError for a bad name or mode; UnsupportedPlatformError where the machine's memory order is too weak for
    the pure-Python path, and the extension is not there.

    The lock is an ``flock`` on the root segment itself, through a descriptor of its own: it has exactly the
    scope of the name, and the kernel releases it however the writer dies. A forked child closes its copy.

    >>> SharedNamespace("docs").root_name
    '/shmelim.docs'
    """

    def __init__(self, name: str, *, mode: int = 0o600, owner: int | None = None) -> None:
        self.name = check_name(name)
        if mode not in (0o600, 0o640):
            raise ValueError(f"mode {mode:#o} must be 0o600, or 0o640 to let a group read")
        require_store_order()
        self._mode = mode
        self._trusted = {os.geteuid(), 0} if owner is None else {owner}
        # Written by the writer's thread only, and by the fork hook in a child.
        self._lock: int | None = None

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_lock": None}

    @property
    def root_name(self) -> str:
        """The name of the root segment, as ``shm_open`` takes it."""
        return f"/shmelim.{self.name}"

    def data_name(self, generation: int) -> str:
        """Return the name of a data segment, as ``shm_open`` takes it."""
        return f"{self.root_name}.{generation}"

    def acquire(self) -> None:
        while True:
            descriptor = self._open_lock()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise AlreadyServingError(
                        f"{self.name!r} is already served by another process",
                        hint=f"see `shmelim status --name {self.name}`, or serve under another --name",
                    ) from None
                raise SegmentError(f"cannot lock segment {self.root_name}: {error}") from error
            # The lock of a root that was removed or replaced between open and flock does not hold the name.
            if self._names(descriptor):
                break
            os.close(descriptor)
        self._lock = descriptor
        _locked.add(self)
        if sys.platform == "linux":
            try:
                os.fchmod(descriptor, self._mode)
                if os.fstat(descriptor).st_size == 0:
                    reserve(descriptor, ROOT_SIZE)
            except OSError as error:
                self.release()
                raise _no_room(self.root_name, ROOT_SIZE, error) from error

    def release(self) -> None:
        descriptor, self._lock = self._lock, None
        _locked.discard(self)
        if descriptor is not None:
            os.close(descriptor)

    def create_root(self) -> Segment:
        previous = self._lock
        self._unlink(self.root_name)
        # Whoever comes first makes it and locks it, in the same way as when there never was one.
        self.acquire()
        if previous is not None:
            os.close(previous)
        return self.open_root(writable=True)

    def open_root(self, *, writable: bool = False) -> Segment:
        return self._open(self.root_name, writable=writable)

    def create_data(self, generation: int, size: int) -> Segment:
        label = self.data_name(generation)
        if self._lost_name():
            raise SegmentError(
                f"the root segment {self.root_name} was removed, and another writer has the name by now",
                hint="restart the server; readers that it had will follow",
            )
        self._unlink(label)
        return self._create(label, size)

    def open_data(self, generation: int, *, writable: bool = False) -> Segment:
        return self._open(self.data_name(generation), writable=writable)

    def remove_data(self, *, keep: int | None) -> None:
        for generation in [] if self._lost_name() else self.generations():
            if generation != keep:
                # What another user put there is not ours, and nothing reads it.
                with contextlib.suppress(UntrustedSegmentError):
                    self._unlink(self.data_name(generation))

    def generations(self) -> list[int]:
        """Return the generations that have a data segment; Linux only, elsewhere the list is empty."""
        from pathlib import Path  # noqa: PLC0415  # for writers alone

        prefix = self.root_name[1:] + "."
        found = [path.name.removeprefix(prefix) for path in Path(_SHM_DIR).glob(f"{prefix}*")]
        return sorted(int(suffix) for suffix in found if suffix.isdecimal())

    def remove(self) -> None:
        """Unlink everything of this name; for temporary tables that are done with."""
        self.remove_data(keep=None)
        self._unlink(self.root_name)

    def root_replaced(self, root: Segment) -> bool:
        try:
            other = self._open(self.root_name, writable=False)
        except SegmentError:
            return True
        except NotServingError:
            return False
        other.close()
        return other.identity != root.identity

    def _open_lock(self) -> int:
        if sys.platform != "linux":
            # flock on shared memory is refused elsewhere: a file with the scope of the user stands in.
            from tempfile import gettempdir  # noqa: PLC0415  # it brings a dozen modules, for this alone

            path = f"{gettempdir()}/shmelim.{os.geteuid()}.{self.name}.lock"
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            shared = posix_ipc.SharedMemory(self.root_name, posix_ipc.O_CREAT, mode=self._mode)
        except posix_ipc.PermissionsError:
            raise self._untrusted(self.root_name, "it belongs to another user") from None
        except OSError as error:
            raise _no_room(self.root_name, ROOT_SIZE, error) from error
        try:
            self._check_owner(shared.fd, self.root_name, writable=True)
        except BaseException:
            shared.close_fd()
            raise
        return int(shared.fd)

    def _names(self, descriptor: int) -> bool | None:
        """Tell whether the name leads to the root segment that is open here; None if it leads nowhere."""
        if sys.platform != "linux":
            return True
        try:
            shared = posix_ipc.SharedMemory(self.root_name, read_only=True)
        except posix_ipc.ExistentialError:
            return None
        except posix_ipc.PermissionsError:
            return False
        try:
            return os.path.sameopenfile(shared.fd, descriptor)
        finally:
            shared.close_fd()

    def _lost_name(self) -> bool:
        """Tell whether the name leads to a root segment other than the one whose lock is held."""
        return self._lock is not None and self._names(self._lock) is False

    def _unlink(self, label: str) -> None:
        try:
            posix_ipc.unlink_shared_memory(label)
        except posix_ipc.ExistentialError:
            pass
        except posix_ipc.PermissionsError:
            raise self._untrusted(label, "it belongs to another user") from None

    def _create(self, label: str, size: int) -> Segment:
        try:
            shared = posix_ipc.SharedMemory(label, posix_ipc.O_CREX, mode=self._mode)
        except (posix_ipc.ExistentialError, posix_ipc.PermissionsError):
            raise self._untrusted(label, "another process made it just now") from None
        except OSError as error:
            raise _no_room(label, size, error) from error
        try:
            os.fchmod(shared.fd, self._mode)
            reserve(shared.fd, size)
            return self._map(shared.fd, label, size, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            posix_ipc.unlink_shared_memory(label)
            raise _no_room(label, size, error) from error
        finally:
            shared.close_fd()

    @staticmethod
    def _map(descriptor: int, label: str, size: int, protection: int) -> Segment:
        status = os.fstat(descriptor)
        memory = mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection)
        return Segment(label, memory, (status.st_dev, status.st_ino))

    def _open(self, label: str, *, writable: bool) -> Segment:
        try:
            shared = posix_ipc.SharedMemory(label, read_only=not writable)
        except posix_ipc.ExistentialError:
            raise self._not_serving() from None
        except posix_ipc.PermissionsError:
            raise self._untrusted(label, "this user may not open it") from None
        try:
            size = self._check_owner(shared.fd, label, writable=writable).st_size
            if size == 0:
                raise self._not_serving(": no writer has published anything yet")
            return self._map(shared.fd, label, size, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        except (NotServingError, SegmentError):
            raise
        except (OSError, ValueError) as error:
            raise SegmentError(f"cannot map segment {label}: {error}") from error
        finally:
            shared.close_fd()

    def _check_owner(self, descriptor: int, label: str, *, writable: bool) -> os.stat_result:
        status = os.fstat(descriptor)
        trusted = {os.geteuid()} if writable else self._trusted
        if status.st_uid not in trusted:
            raise self._untrusted(label, f"it belongs to uid {status.st_uid}")
        if stat.S_IMODE(status.st_mode) & 0o022:
            raise self._untrusted(label, f"its mode {stat.S_IMODE(status.st_mode):#o} lets others write")
        return status

    def _not_serving(self, why: str = "") -> NotServingError:
        return NotServingError(
            f"nothing is served under the name {self.name!r}{why}",
            hint=f"start it with `shmelim serve --name {self.name}`",
        )

    def _untrusted(self, label: str, why: str) -> UntrustedSegmentError:
        return UntrustedSegmentError(
            f"segment {label} is not to be trusted: {why}",
            hint="another user took the name: choose another one, or name its owner's uid if that is meant",
        )


def require_store_order() -> None:
    """Raise UnsupportedPlatformError unless the extension or the machine keeps stores and loads in order."""
    machine = os.uname().machine
    if READ_PATH == "native" or (machine in ("x86_64", "AMD64") and sys.byteorder == "little"):
        return
    raise UnsupportedPlatformError(
        f"the pure-Python path of shmelim needs the store order of x86-64; this machine is {machine!r}",
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


def _no_room(label: str, size: int, error: Exception) -> SegmentError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
        return SegmentFullError(
            f"no room for the {size:,} bytes of segment {label}: shared memory is full",
            hint="enlarge /dev/shm (Docker: --shm-size) or remove what fills it; the published state stands",
        )
    return SegmentError(f"cannot make segment {label} of {size:,} bytes: {error}")


# Strong references: a namespace whose lock was never released still has it to drop in a child.
_locked: set[SharedNamespace] = set()


def _drop_locks_in_child() -> None:
    # An flock lives as long as any copy of its descriptor: a child must not keep a dead writer's lock.
    for namespace in list(_locked):
        namespace.release()


os.register_at_fork(after_in_child=_drop_locks_in_child)
