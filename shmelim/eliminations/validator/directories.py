"""The miners' directories: one for each hotkey, under one root."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from shmelim.eliminations.record import check_hotkey

if TYPE_CHECKING:
    from collections.abc import Iterator


class MinerDirectories:
    """Lists and removes miners' directories, and touches nothing outside of their root.

    A hotkey is text chosen by strangers, so it is never joined to a path: it must be the name of a real directory
    that stands in the root itself. Symbolic links are neither listed nor followed.

    Parameters
    ----------
    root
        The directory that holds them; it need not exist yet.

    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._known: frozenset[str] = frozenset()  # names that were hotkeys at the last look: checked once

    def hotkeys(self) -> list[str]:
        """Return the hotkeys that have a directory; hidden ones, and names that can be no hotkey, are left out."""
        try:
            entries = os.scandir(self.root)
        except FileNotFoundError:
            return []
        with entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        known = self._known
        miners = [name for name in names if name in known or _is_miner(name)]
        self._known = frozenset(miners)
        return sorted(miners)

    def remove(self, hotkey: str) -> bool:
        """Remove a hotkey's directory and all that is in it; False if there is none."""
        if not _is_miner(hotkey) or not _is_plain_name(hotkey):
            return False
        with _opened(self.root) as root:
            if root is None or not _is_directory(hotkey, root):
                return False
            # By the root's descriptor, and links are not followed: nobody can put another place under the name.
            shutil.rmtree(hotkey, dir_fd=root)
        return True


def _is_miner(name: str) -> bool:
    try:
        check_hotkey(name)
    except ValueError:
        return False
    return not name.startswith(".")


def _is_plain_name(name: str) -> bool:
    return "/" not in name and "\0" not in name


@contextlib.contextmanager
def _opened(root: Path) -> Iterator[int | None]:
    try:
        opened = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield None
        return
    try:
        yield opened
    finally:
        os.close(opened)


def _is_directory(name: str, root: int) -> bool:
    try:
        found = os.stat(name, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode)
