"""The history of the store: who changed what, when, from which process, with the old and the new record.

Events are written in the transaction of the change they tell of, and never changed or deleted.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from shmelim.eliminations.record import decode
from shmelim.eliminations.store.database import reading

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
    """Return at most `limit` events of a state directory, newest first, whether or not a server runs there.

    `hotkey`: of this hotkey alone. `before_id`: only events older than this one, for the next page.
    `busy_timeout`: seconds to wait where another process holds the file locked. From any thread and process;
    StoreError or DamagedStoreError if there is no store, or it cannot be read.
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
