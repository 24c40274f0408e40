"""How a server process of a living owner is told from one that an earlier run left behind.

The owner holds a name in the kernel that says whose server a process is: an abstract Unix socket, bound and never
listened on. It is gone the moment the owner is, however that dies, and leaves no file. Where the system has no
such names (they are Linux'), every server counts as left behind.

Such a name protects itself by nothing: every local user who guesses the id of a process can bind it. All that this
achieves is that a server that was left behind is not replaced, and that whoever starts the next one is told of a
living owner where there is none; no process is ever ended because of a name.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys

from shmelim.system import forks

_logger = logging.getLogger("shmelim.service")

# Server processes that are marked as this process' own. Each change is one step; a forked child closes all marks.
_own: set[int] = set()


class OwnerMark:
    """Says, as long as this process lives and until :meth:`close`, that a server process has its owner here.

    Parameters
    ----------
    pid
        The server process.

    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._socket: socket.socket | None = None
        if sys.platform != "linux":
            return
        with forks.creating_descriptors:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(_name(pid))
        except OSError as error:
            _logger.warning("the server process %d cannot be marked as ours: %s", pid, error)
        _own.add(pid)

    def close(self) -> None:
        """Take the mark back; in a forked child, give up the copy of it. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            _own.discard(self._pid)


def has_living_owner(pid: int) -> bool:
    """Tell whether a server process of this user has an owner that lives: this process, or another."""
    if sys.platform != "linux":
        return False
    if pid in _own:
        return True
    with forks.creating_descriptors, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(_name(pid))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _name(pid: int) -> bytes:
    return f"\0shmelim.owner.{os.getuid()}.{pid}".encode()
