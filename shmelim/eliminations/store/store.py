"""The state of record: a row per hotkey that mirrors what is published about it, its debts, and the history.

A change is made in a transaction, with its events; the server publishes it after the commit::

    with store.transaction():
        old = store.put_elimination(hotkey, record)
        store.add_events([Change("add", hotkey, old)])

Records are opaque msgpack bytes here (:mod:`shmelim.eliminations.record` makes them). Eliminated and departed
hotkeys carry ordinals, which keep the order in which they first became so: a new one gets a number above all
in use, an update keeps it, a removal frees it, and a hotkey that comes again comes last. The rows are the only
record of the numbers in use, so that no rollback and no crash can leave that wrong.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, count
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from shmelim.eliminations.debts.states import IN_DOUBT, OWED, Debt, Slash
from shmelim.eliminations.rows import Row, RowFields
from shmelim.eliminations.store.history import (
    ADD_EVENT,
    MANY,
    Change,
    History,
    Origin,
    Packing,
    packed_as_one,
    this_process,
)
from shmelim.eliminations.store.opening import LOG_SUFFIXES, log_of
from shmelim.eliminations.store.schema import SCHEMA_NUMBER, damaged
from shmelim.errors import StoreError

_GONE = (0, 0)
_FULL = 2  # as SQLite's "synchronous" has it: each commit is synced
_AHEAD = 1 << 20  # bytes: some 30 changes of one record
_ROOM = 64 << 20  # bytes on the disk, without which it is left to the changes themselves
_LARGE_LOG = 256 << 20  # bytes; what no single change should leave

_FIELDS = "hotkey, eliminated_ordinal, record, departed_ordinal, detected_ms, registered"
_ROWS = f"SELECT {_FIELDS}, checksum FROM hotkeys"  # noqa: S608
# By the number of the row, so that only what changes is written: neither the index of hotkeys, nor, where a record
# changes, that of its place. The hotkey is looked at again, which costs nothing, as the row is at hand.
_WHERE = "WHERE rowid = ? AND hotkey = ?"
_INSERT = (
    "INSERT INTO hotkeys (hotkey, eliminated_ordinal, record, departed_ordinal, detected_ms, registered, checksum,"
    " rowid) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
# New ones that are eliminated and nothing else, so many at a time: most of the price is that of the statement.
_TOGETHER = 50
_INSERT_TOGETHER = (
    "INSERT INTO hotkeys (hotkey, eliminated_ordinal, record, checksum, rowid)"  # noqa: S608
    f" VALUES {', '.join(['(?, ?, ?, ?, ?)'] * _TOGETHER)}"
)
_of_new_one = itemgetter(0, 1, 2, 6, 7)
_UPDATE = f"UPDATE hotkeys SET record = ?, checksum = ? {_WHERE}"  # noqa: S608
_REPLACE = (
    "UPDATE hotkeys SET eliminated_ordinal = ?, record = ?, departed_ordinal = ?, detected_ms = ?, registered = ?,"  # noqa: S608
    f" checksum = ? {_WHERE}"
)
_DELETE = f"DELETE FROM hotkeys {_WHERE}"  # noqa: S608
_LAST_EVENT = "SELECT coalesce(max(id), 0) FROM events"
_LAST_NUMBER = "SELECT coalesce(max(rowid), 0) FROM hotkeys"
_LAST_ORDINAL = (
    "SELECT max("
    "coalesce((SELECT max(eliminated_ordinal) FROM hotkeys WHERE eliminated_ordinal IS NOT NULL), 0),"
    " coalesce((SELECT max(departed_ordinal) FROM hotkeys WHERE departed_ordinal IS NOT NULL), 0))"
)
# The columns are the fields of a Debt; the alphabetic order of the kinds is the one in which they are settled.
_DEBTS = (
    "SELECT hotkey, kind, rule, registration, state, ordinal, due, since_ms, eliminated_ms, attempts, error,"
    " attempt, in_doubt_since_ms, reason, share, share_asked FROM debts"
)
_SLASHES = (
    "SELECT hotkey, rule, registration, made_ms, eliminated_ms, said_by, outcome, reason, share, answer"
    " FROM slashes"
)

_EVER_OWED = (
    "SELECT 1 FROM debts WHERE hotkey = :hotkey"
    " UNION ALL SELECT 1 FROM events WHERE hotkey = :hotkey AND action = 'owe' LIMIT 1"
)
_PUT_DEBT = "INSERT OR REPLACE INTO debts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_PUT_SLASH = "INSERT OR REPLACE INTO slashes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


class Counts(NamedTuple):
    """How much is in the store."""

    eliminated: int
    departed: int
    registered: int
    events: int


class DebtFigures(NamedTuple):
    """How many debts are in each state, whose slash is in doubt, and when (ms since 1970) the oldest fell due."""

    by_state: dict[str, int]
    in_doubt: list[str]
    oldest_ms: int | None

    @property
    def debts(self) -> int:
        """How much is owed in all."""
        return sum(self.by_state.values())


class Store(History):
    """The state of record in SQLite; made by :meth:`open`, :meth:`read_only` or :meth:`in_memory`.

    For one thread at a time. Every method raises :class:`~shmelim.errors.StoreError` when the database cannot be
    read or written (:class:`~shmelim.errors.DamagedStoreError` when it is damaged), and when a change is made
    outside of a transaction. What a call changed before it raised is undone by the rollback of its transaction or
    savepoint, not before.
    """

    written: dict[str, Row | None]
    """The rows that the open transaction wrote, as it leaves them; None: nothing is known of it any more."""

    own_branch: int
    """The branch that the commits of this object belong to."""

    look_up: Callable[[list[str]], dict[str, Row]]
    """Where rows are looked up that the open transaction did not write; in the database, unless it is set."""

    def __init__(self, db: sqlite3.Connection, path: Path, file: Path | None = None) -> None:
        super().__init__(db, path, file)
        self.written = {}
        self.look_up = self._stored_rows
        self._log = None if file is None else os.fspath(log_of(file))
        self._log_end = 0  # as it was left by lengthen_log()
        # The files that SQLite has open, by the names under which a start would look for them.
        logs = [] if file is None else [log_of(file, suffix) for suffix in LOG_SUFFIXES]
        self._files = {} if file is None else {name: _identity(name) for name in (file, *logs)}
        self._changes_before = 0
        # The number of the open transaction, and what is known of the database until another connection commits:
        # the number of its last commit; the rowids of hotkeys, as far as they were asked for; other numbers that
        # are taken, by the question for the last of them.
        self._next_commit = 0
        self.own_branch = secrets.randbits(63) or 1
        self._is_branch_noted = False
        self._others: int | None = None
        self._last_commit = 0
        self._numbers: dict[str, int] = {}
        self._last: dict[str, int] = {}

    # ------------------------------------------------------------------ transactions

    @property
    def dirty(self) -> bool:
        """Whether the open transaction wrote anything."""
        return self._db.total_changes != self._changes_before

    @property
    def next_commit(self) -> int:
        """The number that the open transaction gets if it changes anything; its events carry it."""
        return self._next_commit

    def go_on_from(self, commit: int, store_id: bytes | None = None) -> None:
        """Give this transaction a number above that commit, and perhaps the store another's identity.

        For one that takes the place of another store, or of its own later self: no number may come twice. What
        was committed before then counts as made by this store, whoever made it.
        """
        self._next_commit = max(self._next_commit, commit + 1)
        self._is_branch_noted = False
        self._forget_branches()
        if store_id is not None:
            self._change("UPDATE identity SET store_id = ?", (store_id,))

    def begin(self) -> None:
        """Start a transaction; waits for another process's for at most 5 s."""
        if self._pid != os.getpid():
            raise StoreError(
                f"{self.path} was opened by process {self._pid}; this is its child {os.getpid()}",
                hint="open the store anew after the fork",
            )
        self._ask("BEGIN IMMEDIATE")
        try:
            others = self._ask("PRAGMA data_version")[0][0]
            if others != self._others:
                self._numbers, self._last, self._last_commit = {}, {}, self.commit_number
                self._others = others
        except BaseException:
            with suppress(StoreError):
                self.rollback()
            raise
        self.written = {}
        self._next_commit = self._last_commit + 1
        self._changes_before = self._db.total_changes

    def commit(self) -> None:
        """End the transaction; when this returns, it is as durable as the store was opened for.

        After a StoreError it is rolled back: so also where the file was deleted or replaced, and no start would
        find it (noticed by the next commit, if that happens just now). After an interrupt (``KeyboardInterrupt``)
        it is either committed or still open.
        """
        try:
            for name, mine in self._files.items():
                found = _identity(name)
                if found not in {None, mine}:
                    raise self._lost(name, found)
            if self._db.total_changes != self._changes_before:
                if not self._is_branch_noted:
                    self._begin_branch(self._next_commit, self.own_branch)
                self._change("UPDATE identity SET commit_number = ?", (self._next_commit,))
            self._change("COMMIT")
        except StoreError as error:
            # The first error is the one to tell; SQLite has nothing to add when it is asked to undo.
            with suppress(StoreError):
                self.rollback()
            if getattr(error.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_FSYNC:
                self._write_over_refused()
            raise
        if self._db.total_changes != self._changes_before:
            self._last_commit = self._next_commit
            self._is_branch_noted = True
        self.written = {}

    def _write_over_refused(self) -> None:
        """Have the next opening not find a commit in the log that is whole there, but for its sync.

        What is written next takes its place: so that is a commit that changes nothing, synced or not.
        """
        with suppress(StoreError):
            self._ask("BEGIN IMMEDIATE")
            self._ask(f"PRAGMA user_version={SCHEMA_NUMBER}")
            self._ask("COMMIT")
        with suppress(StoreError):
            self.rollback()

    def _lost(self, name: Path, found: tuple[int, int] | None) -> StoreError:
        what = "deleted" if found == _GONE else "replaced by another file"
        hint = "put it back, or restart the server with --adopt-published (adopt_published=True): the state"
        hint += " comes from shared memory"
        if name != self._file:
            # What was committed is in a file without a name: a kill would lose it, but for what is folded in now.
            with suppress(StoreError):
                self.rollback()
                self._ask("PRAGMA wal_checkpoint(PASSIVE)")
            hint = "restart the server: it folds what was committed into the database when it ends"
        return StoreError(f"{name} was {what} while it was in use; the change was not applied", hint=hint)

    def rollback(self) -> None:
        """Undo the transaction; does nothing when none is open."""
        self._forget({})
        if self.in_transaction:
            self._ask("ROLLBACK")
        else:
            self._others = None  # an interrupt may have come right after a commit

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Begin; commit at the end of the block, or roll back and re-raise what the block raised."""
        self.begin()
        try:
            yield
            self.commit()
        except BaseException:
            with suppress(StoreError):
                self.rollback()
            raise

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Make a part of a transaction undoable: what the block raises undoes the block, and is re-raised."""
        before, changed = dict(self.written), self._db.total_changes - self._changes_before
        self._change("SAVEPOINT part")
        try:
            yield
        except BaseException:
            # A full disk may have undone the whole transaction by itself.
            if self.in_transaction:
                with suppress(StoreError):
                    self._ask("ROLLBACK TO part")
                    self._ask("RELEASE part")
            self._forget(before)
            self._changes_before = self._db.total_changes - changed
            raise
        self._ask("RELEASE part")

    def close(self) -> None:  # noqa: D102  # as the base has it
        self._forget({})
        super().close()

    def held_log(self) -> int:
        """Return the bytes of a large log that cannot be folded in, since somebody reads what is older; else 0.

        One ``stat`` where the log is not large.
        """
        with suppress(FileNotFoundError):
            size = os.stat(self._log).st_size if self._log else 0  # noqa: PTH116  # after each change
            if size >= _LARGE_LOG:
                _, pages, folded = self._ask("PRAGMA wal_checkpoint(PASSIVE)")[0]
                return size if folded < pages else 0
        return 0

    def is_log_short(self) -> bool:
        """Whether commits make the log longer; one ``stat``, from any thread."""
        with suppress(OSError):
            return self._log is not None and os.stat(self._log).st_size > self._log_end  # noqa: PTH116
        return False

    def lengthen_log(self) -> None:
        """Write zeros behind the log, which SQLite takes for its end and writes over.

        Where the file need not grow, the sync of a commit writes no metadata, which is about half of its price.
        """
        if self._log is None or not self.is_log_short():
            return
        self.begin()  # in which nobody else appends to it
        try:
            with open(self._log, "ab", 0, opener=_existing) as log:
                room = os.fstatvfs(log.fileno())
                synced = self._ask("PRAGMA synchronous")[0][0] == _FULL
                if synced and room.f_bavail * room.f_frsize >= _ROOM:
                    log.write(bytes(_AHEAD))
                self._log_end = log.tell()
        except OSError:
            pass  # then it grows as it is written
        finally:
            self.rollback()

    def _forget(self, before: dict[str, Row | None]) -> None:
        """Know no more of what was written than was written before."""
        for hotkey in self.written:
            self._numbers.pop(hotkey, None)
        self._last = {}
        self.written = before

    # ------------------------------------------------------------------ hotkeys

    def get(self, hotkey: str) -> Row | None:
        """Return what is known of a hotkey, or None."""
        return self.get_many([hotkey]).get(hotkey)

    def get_many(self, hotkeys: Iterable[str]) -> dict[str, Row]:
        """Return what is known of each of these hotkeys, in their order; the unknown are left out."""
        names, written = list(hotkeys), self.written
        if written.keys().isdisjoint(names):
            return self.look_up(names)
        found = self.look_up([hotkey for hotkey in names if hotkey not in written]) | written
        return {hotkey: row for hotkey in names if (row := found.get(hotkey)) is not None}

    def _stored_rows(self, hotkeys: list[str]) -> dict[str, Row]:
        rows = {row[0]: _row(row) for row in self._ask_of(_ROWS, hotkeys)}
        return {hotkey: rows[hotkey] for hotkey in hotkeys if hotkey in rows}

    def _write(self, rows: Mapping[str, Row | None], old: Mapping[str, Row]) -> None:
        """Make these the rows of these hotkeys, and all that is known of them; ``old`` is what was."""
        updates, replacements, deletions = [], [], []
        insertions: list[tuple[Any, ...]] = []
        numbers = self._numbers_of(old) if old else self._numbers
        for hotkey, row in rows.items():
            before = old.get(hotkey)
            if row is None:
                if before is not None:
                    deletions.append((numbers.pop(hotkey), hotkey))
                continue
            checksum = None if row[2] is None else crc32(row[2])
            if before is None:
                insertions.append((*row, checksum))
            elif row[1] == before[1] and row[5] == before[5] and row[3] == before[3] and row[4] == before[4]:
                updates.append((row[2], checksum, numbers[hotkey], hotkey))
            else:
                replacements.append((*row[1:], checksum, numbers[hotkey], hotkey))
        if insertions:
            # In the order of the index, which then grows at its end.
            insertions.sort(key=itemgetter(0))
            for place, number in enumerate(self._take(_LAST_NUMBER, len(insertions))):
                numbers[insertions[place][0]] = number
                insertions[place] += (number,)
            insertions = insertions if len(insertions) < _TOGETHER else self._insert_together(insertions)
        for sql, changed in (
            (_DELETE, deletions),
            (_UPDATE, updates),
            (_REPLACE, replacements),
            (_INSERT, insertions),
        ):
            if changed and self._change(sql, changed, each=True) != len(changed):
                raise damaged(self.path, "a row is not where it was")
        self.written.update(rows)

    def _insert_together(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Insert rows, with checksums and numbers, as far as groups can be made of them; returns the others."""
        if any(row[3] is not None or row[5] for row in rows):
            return rows
        end = len(rows) // _TOGETHER * _TOGETHER
        groups = (rows[place : place + _TOGETHER] for place in range(0, end, _TOGETHER))
        arguments = (tuple(chain.from_iterable(map(_of_new_one, group))) for group in groups)
        self._change(_INSERT_TOGETHER, arguments, each=True)
        return rows[end:]

    def _take(self, last: str, count: int) -> range:
        """Take so many numbers that are free, above the last one that is taken, for which `last` asks."""
        if last not in self._last:
            self._last[last] = int(self._ask(last)[0][0])
        first = self._last[last] + 1
        self._last[last] += count
        return range(first, first + count)

    def _numbers_of(self, hotkeys: Mapping[str, Any]) -> dict[str, int]:
        """Return the numbers of rows, by hotkey: all that are known, these among them."""
        missing = [hotkey for hotkey in hotkeys if hotkey not in self._numbers]
        self._numbers.update(self._ask_of("SELECT hotkey, rowid FROM hotkeys", missing))
        return self._numbers

    def rows(self) -> Iterator[Row]:
        """Stream every row, in the order in which the rows came to be; about 2.5 s for a million of 0.5 kB."""
        return map(_row, self._stream(f"{_ROWS} ORDER BY rowid"))

    def rows_as_checked(self) -> Iterator[RowFields]:
        """Stream the same, as :meth:`check_records` has just seen it; in half the time."""
        return self._stream(f"SELECT {_FIELDS} FROM hotkeys ORDER BY rowid")  # noqa: S608

    def check_records(self) -> None:
        """Read every record, and hold it against its checksum; about 1 µs each."""
        self._db.create_function("crc32", 1, crc32, deterministic=True)
        wrong = "typeof(record) != 'blob' OR crc32(record) IS NOT checksum"
        for (hotkey,) in self._ask(f"SELECT hotkey FROM hotkeys WHERE record IS NOT NULL AND ({wrong}) LIMIT 1"):  # noqa: S608
            raise damaged(f"the stored record of hotkey {hotkey!r}")

    def eliminated(self) -> Iterator[tuple[str, bytes]]:
        """Stream the hotkeys that are eliminated with their records, in the order of their elimination."""
        rows = map(_row, self._stream(f"{_ROWS} WHERE eliminated_ordinal IS NOT NULL ORDER BY eliminated_ordinal"))
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
        (row,) = self._ask(
            "SELECT (SELECT count(*) FROM hotkeys WHERE eliminated_ordinal IS NOT NULL),"
            " (SELECT count(*) FROM hotkeys WHERE departed_ordinal IS NOT NULL),"
            " (SELECT count(*) FROM hotkeys WHERE registered = 1),"
            # Numbered without gaps but for what was rolled back, and none is ever deleted.
            " (SELECT coalesce(max(id), 0) FROM events)"
        )
        return Counts._make(row)

    def put_elimination(self, hotkey: str, record: bytes) -> bytes | None:
        """Store a hotkey's record; returns the one it replaces, or None for one newly eliminated."""
        return self.put_eliminations([(hotkey, record)]).get(hotkey)

    def put_eliminations(
        self, records: Iterable[tuple[str, bytes]], rows: Mapping[str, Row] | None = None
    ) -> dict[str, bytes]:
        """Store many records at once; returns those that they replace, by hotkey.

        ``rows`` is what is known of these hotkeys, where the caller has just looked.

        New hotkeys follow each other in the order given. Of a hotkey that is given twice the last record
        counts, at the place of the first. A record equal to the stored one costs a look and no write.
        """
        given = dict(records)
        old = self.get_many(given) if rows is None else rows
        replaced: dict[str, bytes] = {}
        written: dict[str, Row | None] = {}
        ordinals = count(self._take(_LAST_ORDINAL, 0).start)
        make, nothing = Row._make, _nothing_of("")
        for hotkey, record in given.items():
            _, ordinal, before, departed, detected, registered = old.get(hotkey, nothing)
            if before is None:
                ordinal = next(ordinals)
            else:
                replaced[hotkey] = before
            if before != record:
                written[hotkey] = make((hotkey, ordinal, record, departed, detected, registered))
        self._last[_LAST_ORDINAL] += len(given) - len(replaced)
        self._write(written, old)
        return replaced

    def remove_eliminations(self, hotkeys: Iterable[str]) -> dict[str, bytes]:
        """Remove the records of many hotkeys; returns those that were there, in the order given."""
        old = self.get_many(dict.fromkeys(hotkeys))
        removed = {hotkey: row.record for hotkey, row in old.items() if row.record is not None}
        self._write(
            {
                hotkey: _or_nothing(old[hotkey]._replace(eliminated_ordinal=None, record=None))
                for hotkey in removed
            },
            old,
        )
        return removed

    def put_departed(self, hotkey: str, detected_ms: int) -> bool:
        """Record that a hotkey departed, once and for ever; False where that, and its time, is recorded already.

        `detected_ms` is when it was seen, in milliseconds since 1970, UTC; 0 where nobody knows.
        """
        old = self.get_many([hotkey])
        row = old.get(hotkey) or _nothing_of(hotkey)
        if row.departed_ordinal is not None:
            return False
        (ordinal,) = self._take(_LAST_ORDINAL, 1)
        self._write({hotkey: row._replace(departed_ordinal=ordinal, detected_ms=detected_ms)}, old)
        return True

    def clear_departed(self, hotkeys: Iterable[str]) -> None:
        """Forget that these hotkeys departed."""
        old = self.get_many(hotkeys)
        self._write(
            {
                hotkey: _or_nothing(row._replace(departed_ordinal=None, detected_ms=None))
                for hotkey, row in old.items()
            },
            old,
        )

    def set_registered(self, hotkeys: Iterable[str]) -> set[str]:
        """Make exactly these hotkeys registered; returns those that were not, and those that no longer are."""
        before, after = self.registered(), set(hotkeys)
        changed = before ^ after
        old = self.get_many(changed)
        rows = {}
        for hotkey in changed:
            row = old.get(hotkey) or _nothing_of(hotkey)
            rows[hotkey] = _or_nothing(row._replace(registered=hotkey in after))
        self._write(rows, old)
        return changed

    # ------------------------------------------------------------------ events

    def add_events(
        self,
        changes: Iterable[Change],
        origin: Origin | None = None,
        at_ms: int | None = None,
        packing: Packing | None = None,
    ) -> None:
        """Append an event for each change, all with the same origin (None: this process) and time (None: now).

        ``packing`` is of these changes, where the caller has begun it.
        """
        listed = list(changes)
        who = this_process() if origin is None else origin
        now = time.time_ns() // 1_000_000 if at_ms is None else at_ms
        ids = self._take(_LAST_EVENT, len(listed))
        rows: list[tuple[Any, ...]]
        if len(listed) > MANY and all(change.hotkey is not None for change in listed):
            events, hashes = packed_as_one(listed) if packing is None else packing.row()
            rows = [(ids[-1], now, "many", None, *who, None, events, self._next_commit, hashes)]
        else:
            rows = [
                (number, now, action, hotkey, *who, note, old, self._next_commit, None)
                for number, (action, hotkey, old, note) in zip(ids, listed, strict=True)
            ]
        self._change(ADD_EVENT, rows, each=True)

    @property
    def last_event(self) -> int:
        """The number of the newest event; 0 where there is none."""
        return self._take(_LAST_EVENT, 0).start - 1

    # ------------------------------------------------------------------ debts and slashes

    def ever_owed(self, hotkey: str) -> bool:
        """Whether a hotkey owes anything, or did by an elimination of the rules."""
        return bool(self._ask(_EVER_OWED, {"hotkey": hotkey}))

    def debts(self, hotkey: str | None = None) -> list[Debt]:
        """Return what is owed, by one hotkey or by all, in the order of the eliminations that owe it."""
        found = self._ask_whose(_DEBTS, hotkey, "ordinal, kind")
        return [
            debt._replace(due=bool(debt.due), share_asked=bool(debt.share_asked))
            for debt in map(Debt._make, found)
        ]

    def debtors(self) -> set[str]:
        """Return the hotkeys that owe anything."""
        return {hotkey for (hotkey,) in self._ask("SELECT DISTINCT hotkey FROM debts")}

    def debt_figures(self) -> DebtFigures:
        """Count the debts."""
        by_state = dict(self._ask("SELECT state, count(*) FROM debts GROUP BY state"))
        in_doubt = self._ask("SELECT hotkey FROM debts WHERE state = ? ORDER BY ordinal", (IN_DOUBT,))
        ((oldest,),) = self._ask("SELECT min(since_ms) FROM debts WHERE state = ? AND due = 1", (OWED,))
        return DebtFigures(by_state, [hotkey for (hotkey,) in in_doubt], oldest)

    def next_debt_ordinal(self) -> int:
        """Return the ordinal for the debts of the next elimination."""
        return int(self._ask("SELECT 1 + coalesce(max(ordinal), 0) FROM debts")[0][0])

    def put_debt(self, debt: Debt) -> None:
        """Store a debt; it replaces the one of this hotkey, kind and cause."""
        self._change(_PUT_DEBT, debt)

    def remove_debt(self, debt: Debt) -> None:
        """Remove a debt."""
        self._change("DELETE FROM debts WHERE hotkey = ? AND kind = ? AND rule = ? AND registration = ?", debt[:4])

    def slashes(self, hotkey: str | None = None) -> list[Slash]:
        """Return the slashes of one hotkey, or of all, that were made or declined, oldest first."""
        return [Slash._make(row) for row in self._ask_whose(_SLASHES, hotkey, "made_ms, hotkey")]

    def knows_slashes(self) -> bool:
        """Whether any slash was made or begun of which this store knows."""
        begun = (
            "SELECT 1 FROM slashes UNION ALL SELECT 1 FROM debts WHERE kind = 'slash' AND state != 'owed' LIMIT 1"
        )
        return bool(self._ask(begun))

    def put_slash(self, slash: Slash) -> None:
        """Store a slash that was made or declined; it replaces the one of its cause."""
        self._change(_PUT_SLASH, slash)

    def remove_slash(self, slash: Slash) -> None:
        """Forget a slash, so that its cause may owe another."""
        self._change("DELETE FROM slashes WHERE hotkey = ? AND rule = ? AND registration = ?", slash[:3])

    def registration(self, hotkey: str) -> int:
        """Return how often a hotkey came back after a departure."""
        found = self._ask("SELECT number FROM registrations WHERE hotkey = ?", (hotkey,))
        return int(found[0][0]) if found else 0

    def put_registration(self, hotkey: str, number: int) -> None:
        """Say how often a hotkey came back after a departure."""
        self._change("INSERT OR REPLACE INTO registrations VALUES (?, ?)", (hotkey, number))

    # ------------------------------------------------------------------ questions

    def _ask_whose(self, select: str, hotkey: str | None, order: str) -> list[tuple[Any, ...]]:
        """Ask of one hotkey or of all."""
        if hotkey is None:
            return self._ask(f"{select} ORDER BY {order}")
        return self._ask(f"{select} WHERE hotkey = ? ORDER BY {order}", (hotkey,))


def _nothing_of(hotkey: str) -> Row:
    """Return the row of a hotkey of which nothing is known."""
    return Row(hotkey, None, None, None, None, registered=False)


def _or_nothing(row: Row) -> Row | None:
    """Return a row if it says anything."""
    return row if row.registered or row[1] is not None or row[3] is not None else None


def _row(row: tuple[Any, ...]) -> Row:
    hotkey, eliminated_ordinal, record, departed_ordinal, detected_ms, registered, checksum = row
    if record is not None and (type(record) is not bytes or crc32(record) != checksum):
        raise damaged(f"the stored record of hotkey {hotkey!r}")
    return Row(hotkey, eliminated_ordinal, record, departed_ordinal, detected_ms, registered == 1)


def _existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT | os.O_CLOEXEC)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells one file from another of the same name; None where this process may not look.

    Which it could when it opened the file; it may have changed its user since.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  # at each commit
    except (FileNotFoundError, NotADirectoryError):
        return _GONE
    except OSError:
        return None
    return status.st_dev, status.st_ino
