"""Whose tables, keys and sockets a process takes for those that it means, where that is not its own user."""

from __future__ import annotations

import os
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
