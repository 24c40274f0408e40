"""Files that survive a crash: read by one open, written whole or not at all, set aside under names of their own.

Everything here follows symbolic links: a file behind a link is written and renamed where it is, and the link
stays. Functions that write raise ``OSError``; :func:`writing` makes a :class:`~shmelim.errors.StoreError` of it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from glob import escape
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

from shmelim.errors import DamagedFileError, ShmelimError, StoreError

_PERMISSIONS: Final = "make it and its directory readable and writable for this user"
_MOUNTED: Final = "it is mounted by itself, so that nothing can take its place: mount its directory instead"
_UNLOCKABLE: Final = "that file system cannot lock files: use a directory on a local one"
_HINTS: Final = {
    errno.ENOSPC: "make room on that file system",
    errno.EDQUOT: "make room: this user's quota on that file system is used up",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "this process has as many files open as it may: close some, or raise the limit (ulimit -n)",
    errno.ENFILE: "this machine has as many files open as it may: close some, or raise fs.file-max",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "mount that file system writable, or use another directory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file stands where a directory should be",
    errno.EEXIST: "a file stands where a directory should be",
    errno.EISDIR: "a directory stands where the file should be: move it away",
    errno.ELOOP: "its symbolic links lead in a circle: mend them",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount that file system again: its server does not know the file any more",
    errno.EBUSY: _MOUNTED,
    errno.EXDEV: _MOUNTED,
    errno.ENOLCK: _UNLOCKABLE,
    errno.EOPNOTSUPP: _UNLOCKABLE,
}
PIECE: Final = 4 << 20
"""Bytes of a large file after which it is synced while it is written: all at once keeps the disk from others."""

_CIRCLE: Final = "a link that leads to itself"
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: _CIRCLE,
}
_NOT_OPENED: Final = {errno.ENXIO: "a socket", errno.ELOOP: _CIRCLE}


def make_private_directory(path: Path) -> None:
    """Make a directory and what is missing above it, all for this user alone (``Path.mkdir``: only the last).

    Where a whole XDG_RUNTIME_DIR was removed, one that others may enter would not be used by anybody.
    """
    for directory in (*reversed(path.parents), path):
        if not directory.is_dir():
            directory.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def writing(what: str, hint: str | None = None) -> Iterator[None]:
    """Make an OSError a StoreError: `what`, why, and what to do; `hint` is for what the errno does not explain."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ShmelimError):
            raise
        raise StoreError(f"{what}: {error.strerror or error}", hint=hint_of(error, hint)) from error


def hint_of(error: OSError, otherwise: str | None = None) -> str | None:
    """Return what to do about an error of the system, or `otherwise` where its errno does not say."""
    return _HINTS.get(error.errno or 0, otherwise)


class Found(NamedTuple):
    """What stood in a file, and what tells it from every other, and from itself after it was written to.

    The latter is empty for a pipe.
    """

    data: bytes
    identity: tuple[int, ...]


def read_once(path: Path, *, stream: bool = False) -> Found | None:
    """Read a file whole, by one open that waits for nobody; None where there is none.

    DamagedFileError for what is not a file. With `stream` a pipe or a terminal is read to its end too, which may
    be a wait: somebody named it.
    """
    try:
        with reading(path, stream=stream) as file:
            status = os.fstat(file.fileno())
            return Found(file.read(), _identity(status) if stat.S_ISREG(status.st_mode) else ())
    except FileNotFoundError:
        return None


@contextmanager
def reading(path: Path, *, stream: bool = False) -> Iterator[BufferedReader]:
    """Open a file as :func:`read_once` does; FileNotFoundError where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | (0 if stream else os.O_NONBLOCK))
    except OSError as error:
        if error.errno in _NOT_OPENED:
            raise _not_a_file(path, _NOT_OPENED[error.errno]) from None
        raise
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind == stat.S_IFDIR or not stream:
            _need_file(path, kind)
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Return a file's :attr:`Found.identity`; None where there is no file."""
    try:
        return _identity(path.stat())
    except FileNotFoundError:
        return None


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _need_file(path: Path, kind: int) -> None:
    if kind != stat.S_IFREG:
        raise _not_a_file(path, _KINDS.get(kind, "something else"))


def _not_a_file(path: Path, what: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is {what}, not a file", hint="move it away")


def write_whole(
    path: Path,
    parts: Iterable[bytes],
    *,
    mode: int = 0o600,
    before_rename: Callable[[tuple[int, ...]], object] | None = None,
) -> tuple[int, ...]:
    """Replace a file in one step; it is durable when this returns. Returns its :attr:`Found.identity`.

    One that exists keeps its permissions, owner and group, as far as this user may give them away; a new one gets
    `mode`. `before_rename` is called with that identity when the new file is complete and about to take its place.
    What it or `parts` raises leaves the old file as it was. DamagedFileError where something else than a file
    stands (a device that a link leads to): that is not replaced.
    """
    target = _behind_links(path)
    temporary = make_aside(target, ".tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            descriptor = file.fileno()
            _copy_permissions(target, descriptor, mode)
            unsynced = 0
            for part in parts:
                # A raw write may take less than it is given, as on a disk that fills up.
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
                unsynced += len(part)
                if unsynced >= PIECE:
                    os.fsync(descriptor)
                    unsynced = 0
            os.fsync(descriptor)
            identity = _identity(os.fstat(descriptor))
        if before_rename is not None:
            before_rename(identity)
        with suppress(FileNotFoundError):
            _need_file(path, stat.S_IFMT(target.lstat().st_mode))
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(target.parent)
    return identity


def _behind_links(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _copy_permissions(path: Path, descriptor: int, mode: int) -> None:
    with suppress(FileNotFoundError):
        old = path.stat()
        mode = stat.S_IMODE(old.st_mode)
        with suppress(PermissionError):
            os.fchown(descriptor, old.st_uid, -1)
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except PermissionError:
            mode &= ~stat.S_IRWXG  # this user's group is not the one that was let in
    os.fchmod(descriptor, mode)


def make_aside(path: Path, suffix: str, *, directory: bool = False) -> Path:
    """Make an empty file (0600), or directory (0700), in which what is to take a path's place is made.

    What others left behind in this way when they were killed is removed.
    """
    for leftover in path.parent.glob(f".{escape(path.name)}.*{suffix}"):
        owner = leftover.name.removeprefix(f".{path.name}.").split(".")[0]
        with suppress(ValueError, OverflowError, PermissionError):
            try:
                os.kill(int(owner), 0)
            except ProcessLookupError:
                shutil.rmtree(leftover, ignore_errors=True) if directory else leftover.unlink(missing_ok=True)
    prefix = f".{path.name}.{os.getpid()}."
    if directory:
        return Path(tempfile.mkdtemp(suffix, prefix, path.parent))
    descriptor, name = tempfile.mkstemp(suffix, prefix, path.parent)
    os.close(descriptor)
    return Path(name)


def write_aside(path: Path, what: str, content: bytes, suffix: str = "") -> Path:
    """Write a durable file ``<name>.<what>-<UTC time><suffix>`` (0600) beside another one; returns its path."""
    aside = _unused_name(path, what, suffix)
    try:
        aside.write_bytes(content)
        sync_file(aside)
    except BaseException:
        aside.unlink()
        raise
    return aside


def move_aside(path: Path, what: str = "damaged", companions: Iterable[str] = ()) -> Path:
    """Rename a file to ``<name>.<what>-<UTC time>``, never over an earlier one; returns the new path.

    After it go its companions that exist, which have its name with a suffix. Of a link to what is not a file (a
    device, a directory) the link is renamed. Raises StoreError if there is no such file, or it cannot be renamed.
    """
    with writing(f"{path} cannot be moved aside", hint="move it by hand"):
        behind = _behind_links(path)
        old = behind if behind.is_file() else path
        status = old.lstat()  # that there is one, before a name is taken for it
        aside = _unused_name(old, what, directory=stat.S_ISDIR(status.st_mode))
        try:
            old.replace(aside)
        except BaseException:
            aside.rmdir() if aside.is_dir() else aside.unlink()
            raise
        for suffix in companions:
            with suppress(FileNotFoundError):
                old.with_name(old.name + suffix).replace(aside.with_name(aside.name + suffix))
        sync_directory(old.parent)
    return aside


def kept_of(path: Path, what: str) -> list[Path]:
    """Return what was set aside of a file as `what` and is still there, the oldest first."""
    places = {path, _behind_links(path)}
    return sorted(found for place in places for found in place.parent.glob(f"{escape(place.name)}.{what}-*"))


def _unused_name(path: Path, what: str, suffix: str = "", *, directory: bool = False) -> Path:
    """Take a name beside a file by creating it, empty and private; as a directory if it is for one."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    names = (f"{path.name}.{what}-{stamp}{f'-{n}' if n else ''}{suffix}" for n in count())
    while True:
        taken = path.with_name(next(names))
        with suppress(FileExistsError):
            if directory:
                taken.mkdir(mode=0o700)
                return taken
            os.close(os.open(taken, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            return taken


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    _sync(directory, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make a file that somebody else holds open durable, its name included."""
    _sync(path, 0)
    sync_directory(path.parent)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
