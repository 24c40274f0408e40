"""Which hotkeys changed, in order, and in which run of a server: what a publisher to other hosts goes on from.

    touched   a row for each change of a row of ``hotkeys``, by triggers, whoever makes it; the newest of them
    runs      one for each time that the store was opened for writing: random bits, below the id of the change that
              it would make first. A store that was restored from a backup counts on from there in another run

They are in a store in which publishing was switched on, and in no other.
"""

from __future__ import annotations

import secrets
import sqlite3
from typing import Final

RUN_BITS: Final = 24
"""The random bits of a run."""

_KEPT: Final = 200_000
_RUNS_KEPT: Final = 1000

_TABLES = (
    "CREATE TABLE touched (id INTEGER PRIMARY KEY AUTOINCREMENT, hotkey TEXT NOT NULL)",
    "CREATE TABLE runs (number INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER NOT NULL)",
    """CREATE TRIGGER hotkeys_inserted AFTER INSERT ON hotkeys
       BEGIN INSERT INTO touched (hotkey) VALUES (NEW.hotkey); END""",
    """CREATE TRIGGER hotkeys_updated AFTER UPDATE ON hotkeys
       BEGIN INSERT INTO touched (hotkey) VALUES (NEW.hotkey); END""",
    """CREATE TRIGGER hotkeys_deleted AFTER DELETE ON hotkeys
       BEGIN INSERT INTO touched (hotkey) VALUES (OLD.hotkey); END""",
    """CREATE TRIGGER hotkeys_renamed AFTER UPDATE OF hotkey ON hotkeys WHEN OLD.hotkey != NEW.hotkey
       BEGIN INSERT INTO touched (hotkey) VALUES (OLD.hotkey); END""",
    f"""CREATE TRIGGER touched_end AFTER INSERT ON touched WHEN NEW.id % 1000 = 0
       BEGIN DELETE FROM touched WHERE id <= NEW.id - {_KEPT}; END""",  # noqa: S608
)


def is_on(db: sqlite3.Connection) -> bool:
    """Tell whether publishing is switched on."""
    found = db.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('touched', 'runs')")
    return bool(found.fetchone()[0])


def switch_on(db: sqlite3.Connection) -> None:
    """Have every change of a row of ``hotkeys`` noted from now on; about 4 µs for each."""
    db.execute("BEGIN IMMEDIATE")
    try:
        if not is_on(db):
            for statement in _TABLES:
                db.execute(statement)
            _add_run(db)
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def begin_run(db: sqlite3.Connection) -> None:
    """Begin a run, if publishing is switched on, before the first change of whoever opened the store."""
    if is_on(db):
        db.execute("BEGIN IMMEDIATE")
        _add_run(db)
        db.execute("COMMIT")


def top(db: sqlite3.Connection) -> int:
    """Return the id of the newest change, also where it is not there any more; 0 before the first one."""
    found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'touched'").fetchone()
    return int(found[0]) if found else 0


def _add_run(db: sqlite3.Connection) -> None:
    run = (top(db) + 1) << RUN_BITS | secrets.randbits(RUN_BITS)
    db.execute("INSERT INTO runs (run) VALUES (?)", (run,))
    db.execute("DELETE FROM runs WHERE number <= (SELECT max(number) FROM runs) - ?", (_RUNS_KEPT,))
