"""The file with the secret key that both ends of a channel prove to hold.

A key is 32 random bytes. It appears in no message, log or ``repr`` of this package.
"""

from __future__ import annotations

import contextlib
import multiprocessing.context
import os
import secrets
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from shmelim.errors import KeyFileError, NotServingError
from shmelim.system.durable import hint_of
from shmelim.system.owner import named_owner, whose

KeyPath: TypeAlias = str | os.PathLike[str]

KEY_SIZE = 32
_SHORTEST = 16  # bytes; a shorter key is a mistake

# A FIFO must not block the open, and a symbolic link may lead to a file that somebody else controls.
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ANEW = "stop the server, delete the file, and start the server again"


def load_or_create_key(path: KeyPath) -> bytes:
    """Return a server's key of 32 bytes, making the file if there is none yet, in a directory of this user's own.

    A new file appears whole and with mode 0600: it is written under another name first. Of several processes
    that do this at once, all return the same key.

    ``KeyFileError``: the file is a symbolic link or not a regular file, belongs to another user, may be written by
    group or others, may be read by others, or does not have 32 bytes; or it can be neither read nor made.
    """
    with contextlib.suppress(FileNotFoundError):
        return _read(path, server=True)
    _put(path, secrets.token_bytes(KEY_SIZE), os.link)  # where another process was faster, its key counts
    return _read(path, server=True)


def load_key(path: KeyPath) -> bytes:
    """Return the key of 32 bytes that a server left for its clients, also for members of a group that may read it.

    ``NotServingError``: there is no such file, as no server has been started there. (A client that has reached a
    server raises ``KeyFileError`` instead.) ``KeyFileError``: this process may not read the file, as the message
    explains; or it is not to be trusted, for the reasons that :func:`load_or_create_key` names (that of the user
    whom ``SHMELIM_OWNER`` names is). It says nothing of the server.
    """
    try:
        return _read(path, server=False)
    except FileNotFoundError as error:
        raise NotServingError(f"there is no key file {path}", hint="start the server first") from error


def restore_key(path: KeyPath, key: bytes) -> bool:
    """Put a server's key file back if it was removed, replaced or opened to others; return whether it was.

    ``KeyFileError`` where that cannot be done. The directory must exist.
    """
    with contextlib.suppress(FileNotFoundError, KeyFileError):
        if _read(path, server=True) == key:
            return False
    _put(path, key, os.replace)
    return True


def check_key(authkey: object) -> bytes:
    """Return a key that is one; ``TypeError`` or ``ValueError`` otherwise, without showing it."""
    if not isinstance(authkey, bytes):
        raise TypeError(f"the key must be bytes, not {type(authkey).__name__}")
    if len(authkey) < _SHORTEST:
        raise ValueError(f"the key must have {_SHORTEST} bytes or more; it has {len(authkey)}")
    return authkey


class SharedKey:
    """The key of a server and its clients, who are copies of one object: in a file, or without one.

    Without a file it exists in the memory of the processes that need it only, and can be pickled to a process
    that is being started, as the keys of :mod:`multiprocessing` can, and in no other way.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else os.path.abspath(path)  # noqa: PTH100  # links are for load_key to judge
        self._key = secrets.token_bytes(KEY_SIZE) if path is None else b""

    def for_server(self) -> bytes:
        """Return the key for a server, making the file if there is none; ``KeyFileError`` if it cannot be had."""
        return self._key if self.path is None else load_or_create_key(self.path)

    @property
    def for_client(self) -> bytes | Callable[[], bytes]:
        """What a client takes for its key: the key, or :func:`load_key` for the file that a server has by then."""
        return self._key if self.path is None else partial(load_key, self.path)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        return self.__dict__


def _put(path: KeyPath, key: bytes, install: Callable[[str, KeyPath], object]) -> None:
    """Make a whole key file of mode 0600 and install it, unless it would have to replace one and may not."""
    temporary = f"{os.fspath(path)}.{secrets.token_hex(8)}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # whatever the umask took away
            os.write(descriptor, key)
            os.fsync(descriptor)
            with contextlib.suppress(FileExistsError):
                install(temporary, path)
        finally:
            os.close(descriptor)
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        text = f"cannot make the key file {path}: {error.strerror or error}"
        raise KeyFileError(text, hint=hint_of(error)) from error


def _read(path: KeyPath, *, server: bool) -> bytes:
    """Return the key in the file; ``FileNotFoundError`` if there is none."""
    try:
        descriptor = os.open(path, _OPEN)
    except FileNotFoundError:
        raise
    except OSError as error:
        hint = hint_of(error)
        if isinstance(error, PermissionError):
            hint = "run as its owner, or as a member of its group if that may read it"
        if os.path.islink(path):  # noqa: PTH114  # which a directory that may not be entered does not upset
            hint = "it is a symbolic link; put the file itself there"
        why = f"{error.strerror or error}; {whose(path)}"
        raise KeyFileError(f"cannot read the key file {path}: {why}", hint=hint) from error
    try:
        _check(path, os.fstat(descriptor), server=server)
        key = os.read(descriptor, KEY_SIZE + 1)  # one byte more, so that a file that is too long shows
    finally:
        os.close(descriptor)
    if len(key) != KEY_SIZE:
        raise KeyFileError(f"the key file {path} does not hold {KEY_SIZE} bytes", hint=_ANEW)
    return key


def _check(path: KeyPath, status: os.stat_result, *, server: bool) -> None:
    """Raise ``KeyFileError`` if others than its owner decide, or know, what is in the file."""
    mode = status.st_mode
    if not stat.S_ISREG(mode):
        raise KeyFileError(f"the key file {path} is not a regular file", hint="move it away")
    if mode & (stat.S_IWGRP | stat.S_IWOTH | stat.S_IROTH):
        text = f"the key file {path} has mode {stat.S_IMODE(mode):04o}: others may read or change it"
        raise KeyFileError(text, hint=f"others may know the key, so {_ANEW}")
    user = os.geteuid()
    shared = mode & stat.S_IRGRP and status.st_gid in {os.getegid(), *os.getgroups()}
    if status.st_uid != user and (server or not (status.st_uid in {0, named_owner()} or shared)):
        text = f"the key file {path} belongs to user {status.st_uid}, not to {user}"
        hint = (
            f"run as its owner, say that you mean that one (--owner {status.st_uid}), or choose another directory"
        )
        raise KeyFileError(text, hint=hint)
