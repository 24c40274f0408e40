"""The tables of the store, and how an older schema is brought up to date.

    hotkeys   one row for each hotkey about which anything is known: what is published about it, and the CRC-32
              of its record (SQLite checks its own structure, not the bytes of a value)
    events    who changed what, when; append-only, which two triggers enforce
    meta      named values: digests of the files, and whatever else the server must remember
    debts     what eliminations still owe, see :mod:`shmelim.eliminations.debts.states`; since schema 2, by cause
              since schema 3
    slashes   for each cause the slash that was made or declined, whatever became of its elimination; likewise
    registrations  how often each hotkey came back after a departure, of those that did; since schema 3
    identity  one row: what tells this store from every other, and the number of its last commit; since schema 3

``PRAGMA application_id`` says that a file is ours, ``PRAGMA user_version`` which schema it has. A database of an
older schema is brought up to date when it is opened for writing: in one transaction, and after a copy of it was
laid beside it (``shmelim.sqlite.schema-2``).

``sqlite3.Error`` comes out of here as it is.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import chain, count
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

import msgspec

from shmelim.eliminations.debts.states import ANY_RULE, rule_of
from shmelim.eliminations.store.copying import copy
from shmelim.errors import DamagedStoreError, StoreError
from shmelim.system import clock
from shmelim.system.durable import writing

FILE_NAME = "shmelim.sqlite"

Durability = Literal["power", "process"]

_APPLICATION_ID = 0x73686D65

_DAMAGED_HINT = (
    "start the server again: it moves the file aside, and restores the state from shared memory or the JSON files"
)
# What the log of an earlier file holds would be replayed onto the one that takes its place.
RESTORE_HINT = f"remove {FILE_NAME}-wal and -shm first, then put a backup in its place"

# events needs no AUTOINCREMENT: where nothing is ever deleted, no number comes twice without it.
# hotkeys keeps its rowid: with records of 0.5 kB, WITHOUT ROWID puts the records into the pages that a search
# for a hotkey walks through, and every insert into the middle of them.
_FIRST = (
    """CREATE TABLE hotkeys (
        hotkey             TEXT PRIMARY KEY NOT NULL,
        eliminated_ordinal INTEGER,
        record             BLOB,
        checksum           INTEGER,
        departed_ordinal   INTEGER,
        detected_ms        INTEGER,
        registered         INTEGER NOT NULL DEFAULT 0,
        CHECK (typeof(hotkey) = 'text'),
        CHECK (typeof(record) = iif(eliminated_ordinal IS NULL, 'null', 'blob')),
        CHECK ((record IS NULL) = (checksum IS NULL)),
        CHECK ((departed_ordinal IS NULL) = (detected_ms IS NULL)),
        CHECK (registered IN (0, 1)))""",
    "CREATE INDEX eliminated ON hotkeys (eliminated_ordinal) WHERE eliminated_ordinal IS NOT NULL",
    "CREATE INDEX departed ON hotkeys (departed_ordinal) WHERE departed_ordinal IS NOT NULL",
    "CREATE INDEX registered ON hotkeys (hotkey) WHERE registered = 1",
    """CREATE TABLE events (
        id      INTEGER PRIMARY KEY,
        at_ms   INTEGER NOT NULL,
        action  TEXT NOT NULL,
        hotkey  TEXT,
        pid     INTEGER NOT NULL,
        uid     INTEGER,
        program TEXT NOT NULL,
        note    TEXT,
        old     BLOB,
        new     BLOB)""",
    "CREATE INDEX events_of_hotkey ON events (hotkey, id) WHERE hotkey IS NOT NULL",
    """CREATE TRIGGER events_are_not_changed BEFORE UPDATE ON events
       BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
    """CREATE TRIGGER events_are_not_deleted BEFORE DELETE ON events
       BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
    "CREATE TABLE meta (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL) WITHOUT ROWID",
)
# A debt has its own ordinal, for it may outlive the row of its hotkey.
_SECOND = (
    """CREATE TABLE debts (
        hotkey            TEXT NOT NULL,
        kind              TEXT NOT NULL,
        state             TEXT NOT NULL,
        ordinal           INTEGER NOT NULL,
        due               INTEGER NOT NULL,
        since_ms          INTEGER NOT NULL,
        eliminated_ms     INTEGER NOT NULL,
        attempts          INTEGER NOT NULL,
        error             TEXT,
        attempt           TEXT,
        in_doubt_since_ms INTEGER,
        PRIMARY KEY (hotkey, kind),
        CHECK (kind IN ('limit_orders', 'positions', 'slash')),
        CHECK (state IN ('owed', 'attempting', 'in_doubt')),
        CHECK (state = 'owed' OR (kind = 'slash' AND attempt IS NOT NULL)),
        CHECK (due = 1 OR (due = 0 AND state != 'owed')),
        CHECK ((state = 'in_doubt') = (in_doubt_since_ms IS NOT NULL))) WITHOUT ROWID""",
    """CREATE TABLE slashes (
        hotkey        TEXT PRIMARY KEY NOT NULL,
        made_ms       INTEGER NOT NULL,
        eliminated_ms INTEGER NOT NULL,
        said_by       TEXT NOT NULL,
        CHECK (said_by IN ('contract', 'hand'))) WITHOUT ROWID""",
)


# Where a cause is known: a slash is owed, and made, for a rule and a registration.
_CAUSES = (
    """CREATE TABLE debts (
        hotkey            TEXT NOT NULL,
        kind              TEXT NOT NULL,
        rule              TEXT NOT NULL,
        registration      INTEGER NOT NULL,
        state             TEXT NOT NULL,
        ordinal           INTEGER NOT NULL,
        due               INTEGER NOT NULL,
        since_ms          INTEGER NOT NULL,
        eliminated_ms     INTEGER NOT NULL,
        attempts          INTEGER NOT NULL,
        error             TEXT,
        attempt           TEXT,
        in_doubt_since_ms INTEGER,
        reason            TEXT,
        share             REAL,
        share_asked       INTEGER NOT NULL,
        PRIMARY KEY (hotkey, kind, rule, registration),
        CHECK (kind IN ('limit_orders', 'positions', 'slash')),
        CHECK (kind = 'slash' OR (rule = '' AND registration = 0)),
        CHECK (state IN ('owed', 'attempting', 'in_doubt')),
        CHECK (state = 'owed' OR (kind = 'slash' AND attempt IS NOT NULL)),
        CHECK (due IN (0, 1)),
        CHECK (share IS NULL OR share BETWEEN 0 AND 1),
        CHECK (share_asked IN (0, 1)),
        CHECK ((state = 'in_doubt') = (in_doubt_since_ms IS NOT NULL))) WITHOUT ROWID""",
    """CREATE TABLE slashes (
        hotkey        TEXT NOT NULL,
        rule          TEXT NOT NULL,
        registration  INTEGER NOT NULL,
        made_ms       INTEGER NOT NULL,
        eliminated_ms INTEGER NOT NULL,
        said_by       TEXT NOT NULL,
        outcome       TEXT NOT NULL,
        reason        TEXT,
        share         REAL,
        answer        TEXT,
        PRIMARY KEY (hotkey, rule, registration),
        CHECK (said_by IN ('contract', 'hand')),
        CHECK (outcome IN ('made', 'declined'))) WITHOUT ROWID""",
    """CREATE TABLE registrations (
        hotkey TEXT PRIMARY KEY NOT NULL,
        number INTEGER NOT NULL) WITHOUT ROWID""",
)


class _Schema(NamedTuple):
    """How a store gets a schema from the one before, and what one that is only read is lent instead, in memory."""

    statements: tuple[str, ...]
    lent: tuple[str, ...] = ()
    fill: tuple[Callable[[sqlite3.Connection], object], ...] = ()  # after the statements, in this order


def _lent(statements: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tables of these statements, as empty ones in memory."""
    return tuple(statement.replace("CREATE TABLE", "CREATE TEMP TABLE", 1) for statement in statements)


def _give_identity(db: sqlite3.Connection) -> None:
    # Not SQLite's randomblob, whose generator a forked child shares with its parent.
    db.execute("INSERT INTO identity VALUES (1, ?, 0)", (os.urandom(16),))


_IDENTITY = (
    """CREATE TABLE identity (
        one           INTEGER PRIMARY KEY,
        store_id      BLOB NOT NULL,
        commit_number INTEGER NOT NULL,
        CHECK (one = 1),
        CHECK (typeof(store_id) = 'blob' AND length(store_id) = 16),
        CHECK (typeof(commit_number) = 'integer' AND commit_number >= 0))""",
)
_OLD_DEBT = (
    "hotkey, kind, '' AS rule, 0 AS registration, state, ordinal, due, since_ms, eliminated_ms, attempts, error,"
    " attempt, in_doubt_since_ms, NULL AS reason, NULL AS share, 0 AS share_asked"
)
_OLD_SLASH = (
    "hotkey, '' AS rule, 0 AS registration, made_ms, eliminated_ms, said_by, 'made' AS outcome, NULL AS reason,"
    " NULL AS share, NULL AS answer"
)


def _give_causes(db: sqlite3.Connection) -> None:
    """Fill the tables of causes from the old ones.

    A slash counts for every rule until a departure after it was followed by a return, as one was already of a
    hotkey that departed after it and is registered now. A debt takes the rule of its elimination's event; where
    that does not tell, money is held.
    """
    db.execute(f"INSERT INTO debts SELECT {_OLD_DEBT} FROM old_debts")  # noqa: S608
    db.execute(f"INSERT INTO slashes SELECT {_OLD_SLASH} FROM old_slashes")  # noqa: S608
    db.execute(
        "INSERT INTO registrations SELECT hotkey, 1 FROM hotkeys JOIN old_slashes USING (hotkey)"
        " WHERE registered = 1 AND detected_ms > made_ms"
    )
    owed = db.execute("SELECT hotkey, eliminated_ms FROM old_debts WHERE kind = 'slash'").fetchall()
    unknown = []
    for hotkey, eliminated_ms in owed:
        reason = _reason_of(db, hotkey, eliminated_ms)
        db.execute(
            "UPDATE debts SET rule = ?, reason = ?, registration ="
            " coalesce((SELECT number FROM registrations WHERE registrations.hotkey = debts.hotkey), 0)"
            " WHERE hotkey = ? AND kind = 'slash'",
            (rule_of(reason), reason, hotkey),
        )
        if rule_of(reason) == ANY_RULE:
            unknown.append(hotkey)
    if unknown:
        why = f"an older version left slashes of which the rule is not known: {', '.join(unknown[:20])}"
        value = msgspec.msgpack.encode({"since_ms": clock.now_ms(), "why": why})
        db.execute("INSERT OR REPLACE INTO meta VALUES ('money_held', ?)", (value,))
    db.execute("DROP TABLE old_debts")
    db.execute("DROP TABLE old_slashes")


def _reason_of(db: sqlite3.Connection, hotkey: str, eliminated_ms: int) -> str | None:
    """Return the reason of the elimination of that time, as its event has it."""
    events = db.execute(
        "SELECT new FROM events WHERE hotkey = ? AND action = 'add' AND new IS NOT NULL ORDER BY id DESC",
        (hotkey,),
    )
    for (record,) in events:
        try:
            row = msgspec.msgpack.decode(record)
            if row["elimination_initiated_time_ms"] == eliminated_ms:
                return str(row["reason"])
        except (ValueError, KeyError, TypeError):
            continue  # it is not for an upgrade to refuse what was readable before
    return None


_GIVE_CAUSES = ("ALTER TABLE debts RENAME TO old_debts", "ALTER TABLE slashes RENAME TO old_slashes", *_CAUSES)
# NULL in an event that an older version wrote.
_COMMIT_OF_EVENT = "ALTER TABLE events ADD COLUMN commit_number INTEGER"

# NULL but in a row that stands for many events, see history.py.
_EVENTS_OF_MANY = (
    "ALTER TABLE events ADD COLUMN hashes BLOB",
    "CREATE INDEX events_of_many ON events (id, hashes) WHERE hashes IS NOT NULL",
)

# Schema 1 is the first of these. A schema grows until its version of shmelim is released, and never after that.
_SCHEMAS = (
    _Schema(_FIRST),
    _Schema(_SECOND, _lent(_CAUSES[:2])),
    _Schema(
        (*_IDENTITY, _COMMIT_OF_EVENT, *_EVENTS_OF_MANY, *_GIVE_CAUSES),
        (
            *_lent(_IDENTITY),
            *_lent(_CAUSES[2:]),
            # Of the first schema, which has neither, they are lent already.
            f"CREATE TEMP VIEW IF NOT EXISTS debts AS SELECT {_OLD_DEBT} FROM main.debts",  # noqa: S608
            f"CREATE TEMP VIEW IF NOT EXISTS slashes AS SELECT {_OLD_SLASH} FROM main.slashes",  # noqa: S608
            "CREATE TEMP VIEW events AS SELECT *, NULL AS commit_number, NULL AS hashes FROM main.events",
        ),
        (_give_identity, _give_causes),
    ),
)
SCHEMA_NUMBER = len(_SCHEMAS)


def damaged(what: object, how: str = "") -> DamagedStoreError:
    """Return the error for a damaged database, or for what stands in it."""
    return DamagedStoreError(f"{what} is damaged{f': {how}' if how else ''}", hint=_DAMAGED_HINT)


def install(db: sqlite3.Connection, path: Path | None) -> None:
    """Make sure that the database is ours and has the tables, those of an older schema in one transaction.

    An older schema is copied before. A StoreError says that it is another program's, a newer shmelim's, on a file
    system that keeps no log, or that there is no room for the copy.
    """
    found = identify(db, path)
    if path is not None:
        (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise StoreError(
                f"{path} cannot keep a write-ahead log (journal mode {mode!r})",
                hint="put the state directory on a local file system",
            )
    if found == SCHEMA_NUMBER:
        return
    db.execute("BEGIN IMMEDIATE")
    # Looked at again: another process may have been quicker.
    found = identify(db, path)
    if path is not None and 0 < found < SCHEMA_NUMBER:
        _keep_copy(path, found)
    for schema in _SCHEMAS[found:]:
        for statement in schema.statements:
            db.execute(statement)
        for fill in schema.fill:
            fill(db)
    db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
    db.execute(f"PRAGMA user_version={SCHEMA_NUMBER}")
    db.execute("COMMIT")


def _keep_copy(path: Path, number: int) -> None:
    """Lay a copy of a database beside it, under a name that tells its schema and that none has yet."""
    names = (path.with_name(f"{path.name}.schema-{number}{f'-{n}' if n else ''}") for n in count())
    target = next(name for name in names if not name.exists())
    with (
        writing(f"{path} has schema {number}, and a copy of it cannot be kept as {target}"),
        closing(sqlite3.connect(f"file:{quote(os.fspath(path.absolute()))}?mode=ro", uri=True)) as db,
    ):
        copy(db, target)


def lend_missing(db: sqlite3.Connection, number: int) -> None:
    """Give a connection that only reads an older schema what that lacks, in memory."""
    db.execute("PRAGMA temp_store=MEMORY")
    for statement in chain.from_iterable(schema.lent for schema in _SCHEMAS[number:]):
        db.execute(statement)


def identify(db: sqlite3.Connection, path: Path | None) -> int:
    """Return the schema number of a database of ours, 0 of an empty one; refuse every other."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (schema,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == 0 and schema == 0 and tables == 0:
        return 0
    if application != _APPLICATION_ID:
        raise StoreError(
            f"{path} is the database of another program (application id {application:#x})",
            hint="move it out of the state directory, or name another state directory",
        )
    if schema > SCHEMA_NUMBER:
        raise StoreError(
            f"{path} has schema {schema}; this version of shmelim knows schemas up to {SCHEMA_NUMBER}",
            hint="a newer shmelim wrote it: upgrade this one",
        )
    if schema < 1 or not tables:
        raise DamagedStoreError(f"{path} says that it has schema {schema} and holds {tables} tables and indexes")
    return int(schema)
