"""Whose files a process means or may use, where that is not its own user."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

OWNER_VARIABLE: Final = "SHMELIM_OWNER"
"""A uid; the command line's ``--owner`` sets it for the command."""


def named_owner() -> int | None:
    """Return the uid that the environment names; None: nobody. ValueError where it is none."""
    text = os.environ.get(OWNER_VARIABLE, "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{OWNER_VARIABLE}: {text!r} is not a uid")
    return int(text)


def means_another() -> bool:
    """Return whether the environment names another user than this process is."""
    return named_owner() not in {None, os.geteuid()}


def whose(path: str | os.PathLike[str]) -> str:
    """Say who this process is, and whose the file is that it may not use, or the nearest directory it can see."""
    user = f"this process runs as user {os.geteuid()}"
    for place in (Path(path), *Path(path).parents):
        with contextlib.suppress(OSError):
            found = place.lstat()
            return f"{user}, {place} belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):04o}"
    return user
