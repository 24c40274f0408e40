"""Telling systemd how a service is (``Type=notify``): a datagram to a socket that the environment names."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

_SOCKET = "NOTIFY_SOCKET"


def notify_supervisor(*states: str) -> bool:
    """Say states such as ``READY=1`` or ``STATUS=…``; return whether a supervisor heard them. Waits for nobody.

    The protocol is that of sd_notify(3). Where the environment names no socket nothing is done.
    """
    address = os.environ.get(_SOCKET, "")
    if not address.startswith(("/", "@")):
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as said:
        said.settimeout(0)
        said.sendto("\n".join(states).encode(), "\0" + address[1:] if address[0] == "@" else address)
        return True
    return False
