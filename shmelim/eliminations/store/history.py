"""The history of the store: who changed what, when, from which process, with the old and the new record.

Events are written in the transaction of the change they tell of, and never changed or deleted.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shmelim.eliminations.record import decode
from shmelim.eliminations.store.database import reading

if TYPE_CHECKING:
    import sqlite3

INSERT = (
    "INSERT INTO events (at_ms, action, hotkey, pid, uid, program, note, old, new)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_SELECT = "SELECT id, at_ms, action, hotkey, pid, uid, program, note, old, new FROM events"
_LARGEST_ID = (1 << 63) - 1


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
    """One line of the history; `at_ms` is in milliseconds since 1970, UTC, records are msgpack."""

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

    def as_dict(self) -> dict[str, Any]:
        """Return it with its records decoded, as callers of the server get it."""
        old, new = (None if record is None else decode(record) for record in (self.old, self.new))
        return self._asdict() | {"old": old, "new": new}


def this_process() -> Origin:
    """Return this process as an origin."""
    return Origin(os.getpid(), os.getuid(), _program())


def read_events(
    directory: str | os.PathLike[str],
    hotkey: str | None = None,
    limit: int | None = 100,
    before_id: int | None = None,
    *,
    busy_timeout: float = 5.0,
) -> list[Event]:
    """Return events from a state directory, newest first, whether or not a server runs there.

    Opens the database read-only for this one call, so it may be called from any thread and process.

    Parameters
    ----------
    directory
        The state directory.
    hotkey
        Only this hotkey's events; None means all.
    limit
        At most so many; None means all.
    before_id
        Only events older than this one; for the next page.
    busy_timeout
        Seconds to wait where another process holds the file locked.

    Raises
    ------
    StoreError
        There is no store there, or it cannot be read.
    DamagedStoreError
        It is damaged.

    """
    with reading(directory, busy_timeout) as db:
        return select(db, hotkey, limit, before_id)


def select(db: sqlite3.Connection, hotkey: str | None, limit: int | None, before_id: int | None) -> list[Event]:
    """Return events, newest first."""
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be at least 0, not {limit}")
    before = _LARGEST_ID if before_id is None else before_id
    arguments: list[Any] = [before]
    where = " WHERE id < ?"
    if hotkey is not None:
        where += " AND hotkey = ?"
        arguments.append(hotkey)
    arguments.append(-1 if limit is None else limit)
    return [Event._make(row) for row in db.execute(f"{_SELECT}{where} ORDER BY id DESC LIMIT ?", arguments)]


@cache
def _program() -> str:
    return Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
