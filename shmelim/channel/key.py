"""The file with the secret key that both ends of a channel prove to hold.

A key is 32 random bytes. It appears in no message, log or ``repr`` of this package.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from shmelim.errors import KeyFileError, NotServingError

KEY_SIZE = 32

# A FIFO must not block the open, and a symbolic link may point to a file that somebody else controls.
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def load_or_create_key(path: str | os.PathLike[str]) -> bytes:
    """Return the key of a server, making the file if there is none yet.

    A new file appears whole and with mode 0600: it is written under another name first. Of several processes
    that do this at once, all return the same key.

    Parameters
    ----------
    path
        The key file, in a directory that only this user may write to.

    Returns
    -------
    bytes
        32 bytes.

    Raises
    ------
    KeyFileError
        The file is a symbolic link or no regular file, belongs to another user, may be written by group or others,
        may be read by others, or does not have 32 bytes; or it can be neither read nor made.

    """
    path = os.fspath(path)
    with contextlib.suppress(FileNotFoundError):
        return _read(path, server=True)
    temporary = f"{path}.{secrets.token_hex(8)}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.fchmod(descriptor, 0o600)  # whatever the umask took away
                os.write(descriptor, secrets.token_bytes(KEY_SIZE))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            with contextlib.suppress(FileExistsError):  # another process was faster, and its key counts
                os.link(temporary, path)
        finally:
            Path(temporary).unlink()
        return _read(path, server=True)
    except OSError as error:
        if isinstance(error, KeyFileError):
            raise
        raise KeyFileError(f"cannot make the key file {path}: {error.strerror or error}") from error


def load_key(path: str | os.PathLike[str]) -> bytes:
    """Return the key that a server left for its clients.

    Parameters
    ----------
    path
        The key file. One that its group may read is accepted from a member of that group.

    Returns
    -------
    bytes
        32 bytes.

    Raises
    ------
    NotServingError
        There is no such file: no server has been started there.
    KeyFileError
        The file may not be read, or is not to be trusted, for the reasons that :func:`load_or_create_key` names.

    """
    path = os.fspath(path)
    try:
        return _read(path, server=False)
    except FileNotFoundError as error:
        raise NotServingError(f"there is no key file {path}", hint="start the server first") from error


def _read(path: str, *, server: bool) -> bytes:
    """Return the key in the file; ``FileNotFoundError`` if there is none."""
    try:
        descriptor = os.open(path, _OPEN)
    except FileNotFoundError:
        raise
    except OSError as error:
        hint = "run as its owner, or as a member of its group if that may read it"
        if Path(path).is_symlink():
            hint = "it is a symbolic link; put the file itself there"
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror or error}", hint=hint) from error
    try:
        status = os.fstat(descriptor)
        _check(path, status, server=server)
        # One byte more than expected, so that a file that is too long shows.
        key = os.read(descriptor, KEY_SIZE + 1)
    finally:
        os.close(descriptor)
    if len(key) != KEY_SIZE:
        raise KeyFileError(
            f"the key file {path} does not hold {KEY_SIZE} bytes", hint="delete it and restart the server"
        )
    return key


def _check(path: str, status: os.stat_result, *, server: bool) -> None:
    """Raise ``KeyFileError`` if others than its owner decide, or know, what is in the file."""
    mode = status.st_mode
    if not stat.S_ISREG(mode):
        raise KeyFileError(f"the key file {path} is no regular file", hint="move it away")
    if mode & (stat.S_IWGRP | stat.S_IWOTH | stat.S_IROTH):
        raise KeyFileError(
            f"the key file {path} has mode {stat.S_IMODE(mode):04o}: others may read or change it",
            hint="others may know the key, so delete the file and restart the server",
        )
    user = os.geteuid()
    shared = mode & stat.S_IRGRP and status.st_gid in {os.getegid(), *os.getgroups()}
    if status.st_uid != user and (server or not (status.st_uid == 0 or shared)):
        raise KeyFileError(
            f"the key file {path} belongs to user {status.st_uid}, not to {user}",
            hint="run as its owner, or choose another directory",
        )
