"""The key of one service: made once, the same across restarts, and shown to nobody."""

from __future__ import annotations

import multiprocessing.context
import os
import secrets
from typing import Any

from shmelim.channel.key import KEY_SIZE, load_key, load_or_create_key


class ServiceKey:
    """The key that a service's server and clients share.

    Without a file it exists in the memory of the processes that need it only, and can be pickled to a process
    that is being started, as the keys of :mod:`multiprocessing` can, and in no other way.

    Parameters
    ----------
    path
        Key file, made when it is needed and missing, so that other processes can find the key; None: there is
        no file.

    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = None if path is None else os.path.abspath(path)  # noqa: PTH100  # links are for load_key to judge
        self._key = secrets.token_bytes(KEY_SIZE) if path is None else b""

    @property
    def path(self) -> str | None:
        """The key file; None: there is none."""
        return self._path

    def for_server(self) -> bytes:
        """Return the key for a server, making the file if there is none; ``KeyFileError`` if it cannot be had."""
        return self._key if self._path is None else load_or_create_key(self._path)

    def for_client(self) -> bytes:
        """Return the key that the server has; ``NotServingError`` or ``KeyFileError`` if it cannot be had."""
        return self._key if self._path is None else load_key(self._path)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def __getstate__(self) -> dict[str, Any]:
        multiprocessing.context.assert_spawning(self)
        return self.__dict__
