"""Hosts of their own on one machine for a demonstration's followers: network namespaces, where they may be made.

Each is joined to this host by a pair of interfaces with addresses of 198.18.0.0/15, which RFC 2544 sets aside for
measurements. Linux alone has them, they need ``ip`` (iproute2) and root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import Final

_TIMEOUT: Final = 10.0


class Host:
    """A network namespace and its link to this host, whose address is ``here`` on it."""

    def __init__(self, number: int, undo: contextlib.ExitStack) -> None:
        network = f"198.18.{os.getpid() % 256}"
        self.here, there = f"{network}.{4 * number + 1}", f"{network}.{4 * number + 2}"
        self._name = f"shmelim-demo-{os.getpid()}-{number}"
        self._link = f"sh{os.getpid()}-{number}"  # an interface's name has at most 15 characters
        undo.callback(self._remove)
        _ip("netns", "add", self._name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", self._link, "netns", self._name)
        _ip("address", "add", f"{self.here}/30", "dev", self._link)
        _ip("link", "set", self._link, "up")
        _ip("-n", self._name, "address", "add", f"{there}/30", "dev", self._link)
        _ip("-n", self._name, "link", "set", self._link, "up")

    def command(self, *command: str) -> list[str]:
        """Return what runs a command there."""
        return ["ip", "netns", "exec", self._name, *command]

    def link(self, state: str) -> None:
        """Cut the link (``"down"``), or mend it (``"up"``)."""
        _ip("link", "set", self._link, state)

    def _remove(self) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            _ip("netns", "delete", self._name)  # both ends of the link go with it


def make_hosts(count: int, undo: contextlib.ExitStack) -> tuple[list[Host], str]:
    """Return so many hosts; none, and why, where they cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return [], "network namespaces need root, and iproute2"
    try:
        return [Host(number, undo) for number in range(count)], ""
    except (OSError, subprocess.SubprocessError) as error:
        return [], f"no network namespace can be made: {getattr(error, 'stderr', None) or error}".strip()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=_TIMEOUT)  # noqa: S603, S607
