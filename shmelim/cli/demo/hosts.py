"""Hosts of their own on one machine for a demonstration's followers: network namespaces, where they may be made.

Each is joined to this host by a pair of interfaces with addresses of 198.18.0.0/15, which RFC 2544 sets aside for
measurements. Linux alone has them, they need ``ip`` (iproute2) and root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from typing import Final

_NETWORK: Final = "198.18"
_TIMEOUT: Final = 10.0


class Hosts:
    """So many namespaces; none, and ``missing`` says why, where they cannot be made."""

    def __init__(self, count: int) -> None:
        self.missing = ""
        self._names: list[str] = []
        if os.geteuid() != 0 or shutil.which("ip") is None:
            self.missing = "network namespaces need root, and iproute2"
            return
        try:
            for number in range(count):
                self._make(number)
        except (OSError, subprocess.SubprocessError) as error:
            self.close()
            self.missing = f"no network namespace can be made: {_said(error)}"

    def __bool__(self) -> bool:
        return bool(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def here(self, number: int) -> str:
        """Return the address of this host, as a host of its own sees it."""
        return f"{_NETWORK}.{os.getpid() % 256}.{4 * number + 1}"

    def command(self, number: int) -> list[str]:
        """Return what a command begins with that is to run on a host."""
        return ["ip", "netns", "exec", self._names[number]] if self else []

    def link(self, number: int, state: str) -> None:
        """Cut the link to a host (``"down"``), or mend it (``"up"``)."""
        _ip("link", "set", self._link(number), state)

    def close(self) -> None:
        """Remove them all."""
        for number, name in enumerate(self._names):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                # The other end goes with it, which may still be here.
                _ip("link", "delete", self._link(number))
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                _ip("netns", "delete", name)
        self._names.clear()

    def _make(self, number: int) -> None:
        name, here, there = f"shmelim-demo-{os.getpid()}-{number}", self._link(number), f"{self._link(number)}p"
        _ip("netns", "add", name)
        self._names.append(name)
        _ip("link", "add", here, "type", "veth", "peer", "name", there)
        _ip("link", "set", there, "netns", name)
        _ip("address", "add", f"{self.here(number)}/30", "dev", here)
        _ip("link", "set", here, "up")
        _ip("-n", name, "address", "add", f"{_NETWORK}.{os.getpid() % 256}.{4 * number + 2}/30", "dev", there)
        _ip("-n", name, "link", "set", there, "up")

    @staticmethod
    def _link(number: int) -> str:
        return f"sh{os.getpid()}-{number}"  # an interface's name has at most 15 characters


def free_port(address: str) -> int:
    """Return a port that is free on an address of this host."""
    with socket.socket() as listening:
        listening.bind((address, 0))
        return int(listening.getsockname()[1])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=_TIMEOUT)  # noqa: S603, S607


def _said(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    return said.decode(errors="replace").strip() if isinstance(said, bytes) and said else str(error)
