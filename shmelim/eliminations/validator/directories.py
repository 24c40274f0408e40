"""The miners' directories: one for each hotkey, under one root."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from shmelim.eliminations.record import is_hotkey
from shmelim.system.places import place


class MinerDirectories:
    """Lists and removes miners' directories, and touches nothing outside of their root, which need not exist yet.

    A hotkey is text chosen by strangers, so it is never joined to a path: it must be the name of a real directory
    that stands in the root itself. Symbolic links are neither listed nor followed.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = place("miner_directory", root)  # absolute: wherever the process goes
        self._known: frozenset[str] = frozenset()  # names that were hotkeys at the last look: checked once

    def hotkeys(self) -> list[str]:
        """Return the hotkeys that have a directory; hidden ones and names that cannot be hotkeys are not."""
        try:
            entries = os.scandir(self.root)
        except FileNotFoundError:
            return []
        with entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        known = self._known
        miners = [name for name in names if name in known or _can_be_a_miner(name)]
        self._known = frozenset(miners)
        return sorted(miners)

    def remove(self, hotkey: str) -> bool:
        """Remove a hotkey's directory and all that is in it; False if there is none."""
        if not _can_be_a_miner(hotkey):
            return False
        try:
            root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if not stat.S_ISDIR(os.stat(hotkey, dir_fd=root, follow_symlinks=False).st_mode):
                return False
            # By the root's descriptor, and links are not followed: nobody can put another place under the name.
            shutil.rmtree(hotkey, dir_fd=root)
        except FileNotFoundError:
            return False
        finally:
            os.close(root)
        return True


def _can_be_a_miner(name: str) -> bool:
    return is_hotkey(name) and not name.startswith(".") and "/" not in name and "\0" not in name
