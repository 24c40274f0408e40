"""The history of the store: who changed what, when, from which process, with the old and the new record.

Events are written in the transaction of the change they tell of, and never changed or deleted.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from shmelim.eliminations.record import decode


class Origin(NamedTuple):
    """The process that asked for a change."""

    pid: int
    uid: int | None
    program: str


class Change(NamedTuple):
    """What an event tells of one change; records as msgpack."""

    action: str
    hotkey: str | None = None
    old: bytes | None = None
    new: bytes | None = None
    note: str | None = None


class Event(NamedTuple):
    """One line of the history; `at_ms` is in milliseconds since 1970, UTC, records are msgpack.

    `commit_number` is that of the transaction that wrote it; None before schema 3.
    """

    id: int
    at_ms: int
    action: str
    hotkey: str | None
    pid: int
    uid: int | None
    program: str
    note: str | None
    old: bytes | None
    new: bytes | None
    commit_number: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it with its records decoded, as callers of the server get it."""
        old, new = (None if record is None else decode(record) for record in (self.old, self.new))
        return self._asdict() | {"old": old, "new": new}


def this_process() -> Origin:
    """Return this process as an origin."""
    return Origin(os.getpid(), os.getuid(), _program())


@cache
def _program() -> str:
    return Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
