"""The tables ``debts`` and ``slashes`` of the store."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from shmelim.eliminations.debts.states import IN_DOUBT, Debt, Slash

# The columns are the fields of a Debt; the alphabetic order of the kinds is the one in which they are settled.
_SELECT = (
    "SELECT hotkey, kind, state, ordinal, due, since_ms, eliminated_ms, attempts, error, attempt,"
    " in_doubt_since_ms FROM debts"
)
_ALL = f"{_SELECT} ORDER BY ordinal, kind"
_OF_HOTKEY = f"{_SELECT} WHERE hotkey = ? ORDER BY ordinal, kind"
_ONE = f"{_SELECT} WHERE hotkey = ? AND kind = ?"
_PUT = "INSERT OR REPLACE INTO debts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_DOUBTFUL = "SELECT hotkey FROM debts WHERE state = ? ORDER BY ordinal"
_SLASHES = "SELECT hotkey, made_ms, eliminated_ms, said_by FROM slashes"
_ALL_SLASHES = f"{_SLASHES} ORDER BY made_ms, hotkey"
_SLASH = f"{_SLASHES} WHERE hotkey = ?"


class Figures(NamedTuple):
    """How much is owed, and the hotkeys whose slash is in doubt."""

    debts: int
    in_doubt: list[str]


def select(db: sqlite3.Connection, hotkey: str | None) -> list[Debt]:
    """Return the debts of one hotkey, or all, in order."""
    found = db.execute(_ALL) if hotkey is None else db.execute(_OF_HOTKEY, (hotkey,))
    return [_debt(row) for row in found]


def find(db: sqlite3.Connection, hotkey: str, kind: str) -> Debt | None:
    """Return one debt, or None."""
    row = db.execute(_ONE, (hotkey, kind)).fetchone()
    return None if row is None else _debt(row)


def put(db: sqlite3.Connection, debt: Debt) -> None:
    """Store a debt in the place of the one of its hotkey and kind."""
    db.execute(_PUT, debt)


def delete(db: sqlite3.Connection, debt: Debt) -> None:
    """Remove a debt."""
    db.execute("DELETE FROM debts WHERE hotkey = ? AND kind = ?", (debt.hotkey, debt.kind))


def next_ordinal(db: sqlite3.Connection) -> int:
    """Return an ordinal above all in use."""
    (ordinal,) = db.execute("SELECT 1 + coalesce(max(ordinal), 0) FROM debts").fetchone()
    return int(ordinal)


def figures(db: sqlite3.Connection) -> Figures:
    """Count the debts."""
    (count,) = db.execute("SELECT count(*) FROM debts").fetchone()
    doubtful = db.execute(_DOUBTFUL, (IN_DOUBT,))
    return Figures(count, [hotkey for (hotkey,) in doubtful])


def select_slashes(db: sqlite3.Connection, hotkey: str | None) -> list[Slash]:
    """Return the last slash made of one hotkey, or of each, oldest first."""
    found = db.execute(_ALL_SLASHES) if hotkey is None else db.execute(_SLASH, (hotkey,))
    return [Slash._make(row) for row in found]


def find_slash(db: sqlite3.Connection, hotkey: str) -> Slash | None:
    """Return the last slash made of a hotkey, or None."""
    row = db.execute(_SLASH, (hotkey,)).fetchone()
    return None if row is None else Slash._make(row)


def put_slash(db: sqlite3.Connection, slash: Slash) -> None:
    """Store a slash in the place of its hotkey's last one."""
    db.execute("INSERT OR REPLACE INTO slashes VALUES (?, ?, ?, ?)", slash)


def _debt(row: tuple[object, ...]) -> Debt:
    debt = Debt._make(row)
    return debt._replace(due=bool(debt.due))
