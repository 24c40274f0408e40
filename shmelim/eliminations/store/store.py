"""The state of record: a row per hotkey that mirrors what is published about it, and the history of changes.

A change is made in a transaction, with its events; the server publishes it after the commit::

    with store.transaction():
        old = store.put_elimination(hotkey, record)
        store.add_events([Change("add", hotkey, old, record)])

Records are opaque msgpack bytes here (:mod:`shmelim.eliminations.record` makes them). Eliminated and departed
hotkeys carry ordinals, which keep the order in which they first became so: a new one gets a number above all
in use, an update keeps it, a removal frees it, and a hotkey that comes again comes last.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple
from zlib import crc32

from shmelim.eliminations.debts import tables as debt_table
from shmelim.eliminations.debts.states import Debt, Slash
from shmelim.eliminations.rows import Row
from shmelim.eliminations.store import history
from shmelim.eliminations.store.database import Database
from shmelim.eliminations.store.history import Change, Event, Origin
from shmelim.eliminations.store.schema import DAMAGED_HINT
from shmelim.errors import DamagedStoreError

# Hotkeys in one question: below the 999 that an old SQLite allows, and nearly all chunks share one statement.
_CHUNK = 500
_ALL = (
    "SELECT hotkey, eliminated_ordinal, record, departed_ordinal, detected_ms, registered, checksum FROM hotkeys"
)
_GET = f"{_ALL} WHERE hotkey = ?"
_PUT = (
    "INSERT INTO hotkeys (hotkey, eliminated_ordinal, record, checksum) VALUES (?, ?, ?, ?)"
    " ON CONFLICT (hotkey) DO UPDATE"
    " SET eliminated_ordinal = excluded.eliminated_ordinal, record = excluded.record, checksum = excluded.checksum"
)
_UPDATE = "UPDATE hotkeys SET record = ?, checksum = ? WHERE hotkey = ?"
_RECORDS = "SELECT hotkey, record FROM hotkeys WHERE record IS NOT NULL AND hotkey IN"
_REMOVE = "UPDATE hotkeys SET eliminated_ordinal = NULL, record = NULL, checksum = NULL WHERE hotkey = ?"
_DELETE_EMPTY = (
    "DELETE FROM hotkeys WHERE hotkey = ?"
    " AND eliminated_ordinal IS NULL AND departed_ordinal IS NULL AND registered = 0"
)


class Counts(NamedTuple):
    """How much is in the store."""

    eliminated: int
    departed: int
    registered: int
    events: int


class Store(Database):
    """The state of record in SQLite; open it with :meth:`open` or :meth:`in_memory`.

    For one thread at a time. Every method raises :class:`~shmelim.errors.StoreError` when the database cannot be
    read or written (:class:`~shmelim.errors.DamagedStoreError` when it is damaged), and when a change is made
    outside of a transaction. What a call changed before it raised is undone by the rollback of its transaction or
    savepoint, not before.
    """

    def get(self, hotkey: str) -> Row | None:
        """Return what is known of a hotkey, or None; about 7 µs."""
        with self._guard:
            row = self._db.execute(_GET, (hotkey,)).fetchone()
        return None if row is None else _row(row)

    def get_many(self, hotkeys: Iterable[str]) -> dict[str, Row]:
        """Return what is known of each of these hotkeys; the unknown are left out."""
        found: dict[str, Row] = {}
        remaining = iter(hotkeys)
        while chunk := list(islice(remaining, _CHUNK)):
            with self._guard:
                rows = self._db.execute(f"{_ALL} WHERE hotkey IN ({','.join('?' * len(chunk))})", chunk).fetchall()
            for row in rows:
                found[row[0]] = _row(row)
        return found

    def rows(self) -> Iterator[Row]:
        """Stream every row, in the order in which the rows came to be; about 2.5 s for a million of 0.5 kB."""
        return map(_row, self._stream(f"{_ALL} ORDER BY rowid"))

    def eliminated(self) -> Iterator[tuple[str, bytes]]:
        """Stream the hotkeys that are eliminated with their records, in the order of their elimination."""
        rows = map(_row, self._stream(f"{_ALL} WHERE eliminated_ordinal IS NOT NULL ORDER BY eliminated_ordinal"))
        return ((row.hotkey, row.record) for row in rows if row.record is not None)

    def departed(self) -> Iterator[tuple[str, int]]:
        """Stream the hotkeys that departed with the time it was seen (ms since 1970, UTC), in that order."""
        return self._stream(
            "SELECT hotkey, detected_ms FROM hotkeys WHERE departed_ordinal IS NOT NULL ORDER BY departed_ordinal"
        )

    def registered(self) -> set[str]:
        """Return the hotkeys that are registered."""
        return {hotkey for (hotkey,) in self._stream("SELECT hotkey FROM hotkeys WHERE registered = 1")}

    def counts(self) -> Counts:
        """Count; a few ms for each million."""
        with self._guard:
            row = self._db.execute(
                "SELECT (SELECT count(*) FROM hotkeys WHERE eliminated_ordinal IS NOT NULL),"
                " (SELECT count(*) FROM hotkeys WHERE departed_ordinal IS NOT NULL),"
                " (SELECT count(*) FROM hotkeys WHERE registered = 1),"
                # Numbered without gaps but for what was rolled back, and none is ever deleted.
                " (SELECT coalesce(max(id), 0) FROM events)"
            ).fetchone()
        return Counts._make(row)

    def put_elimination(self, hotkey: str, record: bytes) -> bytes | None:
        """Store a hotkey's record; returns the one it replaces, or None for one newly eliminated."""
        self._need_transaction()
        with self._guard:
            row = self._db.execute("SELECT record FROM hotkeys WHERE hotkey = ?", (hotkey,)).fetchone()
            if row is None or row[0] is None:
                self._db.execute(_PUT, (hotkey, self._take_ordinals(1), record, crc32(record)))
                return None
            old: bytes = row[0]
            if old != record:
                self._db.execute(_UPDATE, (record, crc32(record), hotkey))
            return old

    def put_eliminations(self, records: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
        """Store many records at once; returns those that they replace, by hotkey.

        New hotkeys follow each other in the order given. Of a hotkey that is given twice the last record
        counts, at the place of the first. A record equal to the stored one costs a look and no write.
        """
        self._need_transaction()
        given = dict(records)
        old = self._records_of(given)
        new = [(hotkey, record) for hotkey, record in given.items() if hotkey not in old]
        first = self._take_ordinals(len(new))
        with self._guard:
            self._db.executemany(
                _UPDATE,
                [
                    (given[hotkey], crc32(given[hotkey]), hotkey)
                    for hotkey, record in old.items()
                    if given[hotkey] != record
                ],
            )
            self._db.executemany(
                _PUT, ((hotkey, first + n, record, crc32(record)) for n, (hotkey, record) in enumerate(new))
            )
        return old

    def remove_eliminations(self, hotkeys: Iterable[str]) -> dict[str, bytes]:
        """Remove the records of many hotkeys; returns those that were there, in the order given."""
        self._need_transaction()
        old = self._records_of(dict.fromkeys(hotkeys))
        names = [(hotkey,) for hotkey in old]
        with self._guard:
            self._db.executemany(_REMOVE, names)
            self._db.executemany(_DELETE_EMPTY, names)
        return old

    def clear_eliminations(self) -> int:
        """Remove every record; returns how many there were."""
        self._need_transaction()
        with self._guard:
            deleted = self._db.execute(
                "DELETE FROM hotkeys"
                " WHERE eliminated_ordinal IS NOT NULL AND departed_ordinal IS NULL AND registered = 0"
            ).rowcount
            emptied = self._db.execute(
                "UPDATE hotkeys SET eliminated_ordinal = NULL, record = NULL, checksum = NULL"
                " WHERE eliminated_ordinal IS NOT NULL"
            ).rowcount
        return deleted + emptied

    def put_departed(self, hotkey: str, detected_ms: int) -> bool:
        """Record that a hotkey departed, once and for ever; False where that, and its time, is recorded already.

        `detected_ms` is when it was seen, in milliseconds since 1970, UTC; 0 where nobody knows.
        """
        self._need_transaction()
        with self._guard:
            row = self._db.execute("SELECT departed_ordinal FROM hotkeys WHERE hotkey = ?", (hotkey,)).fetchone()
            if row is not None and row[0] is not None:
                return False
            self._db.execute(
                "INSERT INTO hotkeys (hotkey, departed_ordinal, detected_ms) VALUES (?, ?, ?)"
                " ON CONFLICT (hotkey) DO UPDATE SET"
                " departed_ordinal = excluded.departed_ordinal, detected_ms = excluded.detected_ms",
                (hotkey, self._take_ordinals(1), detected_ms),
            )
        return True

    def clear_departed(self) -> None:
        """Forget every departure."""
        self._need_transaction()
        with self._guard:
            self._db.execute(
                "DELETE FROM hotkeys"
                " WHERE departed_ordinal IS NOT NULL AND eliminated_ordinal IS NULL AND registered = 0"
            )
            self._db.execute(
                "UPDATE hotkeys SET departed_ordinal = NULL, detected_ms = NULL WHERE departed_ordinal IS NOT NULL"
            )

    def set_registered(self, hotkeys: Iterable[str]) -> set[str]:
        """Make exactly these hotkeys registered; returns those that were not, and those that no longer are."""
        self._need_transaction()
        before, after = self.registered(), set(hotkeys)
        gone = [(hotkey,) for hotkey in before - after]
        with self._guard:
            self._db.executemany(
                "INSERT INTO hotkeys (hotkey, registered) VALUES (?, 1)"
                " ON CONFLICT (hotkey) DO UPDATE SET registered = 1",
                [(hotkey,) for hotkey in after - before],
            )
            self._db.executemany("UPDATE hotkeys SET registered = 0 WHERE hotkey = ?", gone)
            self._db.executemany(_DELETE_EMPTY, gone)
        return before ^ after

    def add_events(
        self, changes: Iterable[Change], origin: Origin | None = None, at_ms: int | None = None
    ) -> None:
        """Append an event for each change, all with the same origin (None: this process) and time (None: now)."""
        self._need_transaction()
        pid, uid, program = history.this_process() if origin is None else origin
        now = time.time_ns() // 1_000_000 if at_ms is None else at_ms
        rows = [
            (now, action, hotkey, pid, uid, program, note, old, new) for action, hotkey, old, new, note in changes
        ]
        with self._guard:
            self._db.executemany(history.INSERT, rows)

    def events(
        self, hotkey: str | None = None, limit: int | None = 100, before_id: int | None = None
    ) -> list[Event]:
        """Return events, newest first, as :func:`~shmelim.eliminations.store.history.read_events`."""
        with self._guard:
            return history.select(self._db, hotkey, limit, before_id)

    def debts(self, hotkey: str | None = None) -> list[Debt]:
        """Return what is owed, by one hotkey or by all, in the order of the eliminations that owe it."""
        with self._guard:
            return debt_table.select(self._db, hotkey)

    def debt(self, hotkey: str, kind: str) -> Debt | None:
        """Return one debt, or None."""
        with self._guard:
            return debt_table.find(self._db, hotkey, kind)

    def debtors(self) -> set[str]:
        """Return the hotkeys that owe anything."""
        return {hotkey for (hotkey,) in self._stream("SELECT DISTINCT hotkey FROM debts")}

    def put_debt(self, debt: Debt) -> None:
        """Store a debt; it replaces the one of this hotkey and kind."""
        self._need_transaction()
        with self._guard:
            debt_table.put(self._db, debt)

    def remove_debt(self, debt: Debt) -> None:
        """Remove a debt."""
        self._need_transaction()
        with self._guard:
            debt_table.delete(self._db, debt)

    def next_debt_ordinal(self) -> int:
        """Return the ordinal for the debts of the next elimination."""
        with self._guard:
            return debt_table.next_ordinal(self._db)

    def debt_figures(self) -> debt_table.Figures:
        """Count the debts."""
        with self._guard:
            return debt_table.figures(self._db)

    def slash(self, hotkey: str) -> Slash | None:
        """Return the last slash that was made of a hotkey, or None."""
        with self._guard:
            return debt_table.find_slash(self._db, hotkey)

    def slashes(self, hotkey: str | None = None) -> list[Slash]:
        """Return the last slash that was made of one hotkey, or of each, oldest first."""
        with self._guard:
            return debt_table.select_slashes(self._db, hotkey)

    def put_slash(self, slash: Slash) -> None:
        """Store a slash that was made; it replaces the last one of this hotkey."""
        self._need_transaction()
        with self._guard:
            debt_table.put_slash(self._db, slash)

    def _records_of(self, hotkeys: Iterable[str]) -> dict[str, bytes]:
        """Return the stored records of these hotkeys, in their order."""
        names = list(hotkeys)
        found: dict[str, bytes] = {}
        for start in range(0, len(names), _CHUNK):
            chunk = names[start : start + _CHUNK]
            with self._guard:
                found.update(self._db.execute(f"{_RECORDS} ({','.join('?' * len(chunk))})", chunk))
        return {hotkey: found[hotkey] for hotkey in names if hotkey in found}


def _row(row: tuple[str, int | None, bytes | None, int | None, int | None, int, int | None]) -> Row:
    hotkey, eliminated_ordinal, record, departed_ordinal, detected_ms, registered, checksum = row
    if record is not None and crc32(record) != checksum:
        raise DamagedStoreError(f"the stored record of hotkey {hotkey!r} is damaged", hint=DAMAGED_HINT)
    return Row(hotkey, eliminated_ordinal, record, departed_ordinal, detected_ms, registered == 1)
