"""Opening a file of shared memory: how it is opened, what is checked on its descriptor, and who owns that.

A name in ``/dev/shm`` may be anybody's, and lead to anything. So it is opened without waiting and without
following links, what it is and whose it is are looked at on the descriptor, and every error says what stands
there.

A mapping owns no descriptor, a writer's lock neither: a program that closes all it finds, to become a daemon, must
not have one closed once more later, under a number that is something else's by then. (``mmap.mmap`` keeps one.)
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from functools import cache, partial
from typing import Any, Final

from shmelim.errors import NotServingError, SegmentError, UntrustedSegmentError
from shmelim.shm.native import extension

READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
WRITE: Final = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_LIMITS: Final = {
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EAGAIN: "raise the limit on locked memory (ulimit -l): this process locks whatever it maps",
    errno.ENOMEM: "raise the limit on what a process maps (ulimit -v)",
}
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str, flags: int) -> Any:
    """Open a file; the result has ``fileno()`` and ``close()``, and closes it once nobody refers to it.

    Opening and owning are one call: a signal handler that raises finds the descriptor owned, or not there yet. An
    epoll object is the standard library's plainest owner of a descriptor; nothing is polled.
    """
    return next(map(_epoll().fromfd, map(os.open, (path,), (flags,), (0o600,))))


@cache
def _epoll() -> Any:
    import select  # noqa: PLC0415  # not before it is needed

    if hasattr(select, "epoll"):
        return select.epoll
    # gevent and eventlet take it out of the module that they patch. Another copy of that has it.
    from importlib.util import module_from_spec  # noqa: PLC0415

    copy: Any = module_from_spec(select.__spec__)
    copy.__spec__.loader.exec_module(copy)
    return copy.epoll


def map_file(path: str) -> tuple[Any, os.stat_result]:
    """Map a file for reading, through a descriptor that is closed again; return the memory and the file's status.

    The memory is None where the file is none, or is empty. ``OSError`` as it comes.
    """
    if extension is not None:
        memory, *status = extension.map_file(path)
        return memory, os.stat_result((*status, 0, 0, 0))
    with open_file(path, READ) as file:
        found = os.fstat(file.fileno())
        is_file = stat.S_ISREG(found.st_mode) and found.st_size > 0
        return (_map(file.fileno(), found.st_size, mmap.PROT_READ) if is_file else None), found


def map_writable(descriptor: int, size: int) -> Any:
    """Map an open file for reading and writing; the mapping keeps the file's ``flock``."""
    if extension is not None:
        return extension.map_writable(descriptor, size)
    return _map(descriptor, size, mmap.PROT_READ | mmap.PROT_WRITE)


def _map(descriptor: int, size: int, protection: int) -> Any:
    # First the place, and who gives it back: whatever interrupts this, no file stays mapped, and no lock held.
    place = _mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    mapped = _kind(place, size, is_writable=bool(protection & mmap.PROT_WRITE)).from_address(place)
    _mmap(place, size, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
    return mapped


def _mmap(place: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    address: int = _libc().mmap(place, size, protection, flags, descriptor, 0)
    if address == _FAILED:
        import ctypes  # noqa: PLC0415

        raise OSError(number := ctypes.get_errno(), os.strerror(number))
    return address


_MAP_FIXED: Final = 0x10
_FAILED: Final = (1 << 64) - 1


@cache
def _libc() -> Any:
    import ctypes  # noqa: PLC0415  # where there is no extension

    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = address
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_long)
    libc.munmap.argtypes = (address, size)
    libc.madvise.argtypes = (address, size, number)
    return libc


def _kind(place: int, size: int, *, is_writable: bool) -> Any:
    """Return the type of the mapping at this place, which stands for the extension's ``Memory``."""
    import ctypes  # noqa: PLC0415

    libc = _libc()
    byte: Any = type("Byte", (ctypes.Union,), {"_fields_": [("byte", ctypes.c_ubyte)]})

    class Mapped(ctypes.c_char * size):  # type: ignore[misc]
        __del__ = staticmethod(partial(libc.munmap, place, size))  # which nothing in Python interrupts

        def plain(self) -> memoryview:
            # An array of ctypes says that it is one of "<c", which cannot be cast; unions are plain bytes.
            view = memoryview((byte * size).from_buffer(self))
            return view if is_writable else view.toreadonly()

        def __setitem__(self, key: Any, value: Any) -> None:
            self.plain()[key] = value  # an array of ctypes would take each byte by itself

        def discard(self) -> None:
            libc.madvise(place, size, mmap.MADV_DONTNEED)

    return Mapped


# ---------------------------------------------------------------------- what stands there


_EVERYBODY: Final = [b"0", b"0", b"4294967295"]


def is_anybody(uid: int) -> bool:
    """Tell whether a uid stands for all users whom this user namespace does not know, if there are any."""
    try:
        return uid == int(_read("/proc/sys/fs/overflowuid")) and _read("/proc/self/uid_map").split() != _EVERYBODY
    except (OSError, ValueError):
        return False


@cache
def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # pathlib is for writers
        return file.read(4096)


def check_file(path: str, status: os.stat_result, trusted: set[int]) -> None:
    """Raise unless this is a file that one of ``trusted`` owns, and nobody else can write to.

    Whom this user namespace does not know is trusted by nobody: that may be anybody.
    """
    if not stat.S_ISREG(status.st_mode):
        raise _not_a_file(path, status)
    if status.st_uid not in trusted:
        raise untrusted(path, f"it belongs to uid {status.st_uid}")
    if is_anybody(status.st_uid):
        why = f"uid {status.st_uid} is any user whom this user namespace does not know"
        raise untrusted(path, why, "look from outside of this user namespace, or choose another name")
    if stat.S_IMODE(status.st_mode) & 0o022:
        why = f"its mode {stat.S_IMODE(status.st_mode):#o} lets others write"
        raise untrusted(path, why, "who knows who made or changed it: choose another name, or remove it")


def open_error(path: str, error: OSError, action: str = "open") -> Exception:
    """Return the error that says why a file cannot be opened: what stands there, whose it is, what is used up."""
    if error.errno == errno.ENOENT:
        return NotServingError(f"there is no {path}")
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        whose = "this process" if error.errno == errno.EMFILE else "this machine"
        return SegmentError(
            f"cannot {action} {path}: {whose} has as many files open as it may have",
            hint="close some, or raise the limit (ulimit -n)",
        )
    try:
        status = os.lstat(path)
    except OSError:
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        return _not_a_file(path, status)
    if status is not None and error.errno in {errno.EACCES, errno.EPERM}:
        return untrusted(
            path,
            f"this user (uid {os.geteuid()}) may not {action} it, which belongs to uid {status.st_uid} "
            f"and has mode {stat.S_IMODE(status.st_mode):#o}",
            "run it as that user, or of that user's group where the server is to be --group-readable; "
            "or choose another name",
        )
    return SegmentError(f"cannot {action} {path}: {error.strerror or error}", hint=_LIMITS.get(error.errno or 0))


def _not_a_file(path: str, status: os.stat_result) -> SegmentError:
    what = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
    return UntrustedSegmentError(
        f"{path} is {what} of uid {status.st_uid}, not a file", hint="remove it, or choose another name"
    )


_WHOSE: Final = (
    "if that user's is meant, say so (--owner UID on the command line, owner= or SHMELIM_OWNER); "
    "else another user took the name: choose another one"
)


def untrusted(path: str, why: str, hint: str = _WHOSE) -> UntrustedSegmentError:
    """Return the error for a file of somebody else, by default of one who could be named."""
    return UntrustedSegmentError(f"{path} is not to be trusted: {why}", hint=hint)
