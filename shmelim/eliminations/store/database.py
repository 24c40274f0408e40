"""The store's database: opening, transactions, named values, and errors in the package's own words."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import msgspec

from shmelim.eliminations.store import opening, schema
from shmelim.eliminations.store.opening import closed_on_error, log_of
from shmelim.eliminations.store.schema import Durability
from shmelim.errors import DamagedStoreError, StoreError
from shmelim.system.durable import sync_file, writing

_log = logging.getLogger(__name__)

_NEXT_ORDINAL = (
    "SELECT 1 + max("
    "coalesce((SELECT max(eliminated_ordinal) FROM hotkeys WHERE eliminated_ordinal IS NOT NULL), 0),"
    " coalesce((SELECT max(departed_ordinal) FROM hotkeys WHERE departed_ordinal IS NOT NULL), 0))"
)
_FETCH = 500
_IN_MEMORY = Path(":memory:")
_GONE = (0, 0)

_HINTS = {
    sqlite3.SQLITE_FULL: "make room on that file system; the change was not applied",
    sqlite3.SQLITE_READONLY: "make the file and its directory writable for this user",
    sqlite3.SQLITE_CANTOPEN: "check that the directory exists and that this user may write to it",
    sqlite3.SQLITE_PERM: "make the file and its directory writable for this user",
    sqlite3.SQLITE_IOERR: "check the disk and the room on it; the change was not applied",
    sqlite3.SQLITE_BUSY: "another process holds a transaction open: find it with `fuser`, and end it",
    sqlite3.SQLITE_LOCKED: "another connection holds a transaction open: end it",
}
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})


class Guard:
    """Context manager that turns every ``sqlite3.Error`` into a :class:`StoreError` that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, sqlite3.Error):
            self.refuse(error)
        if isinstance(error, UnicodeDecodeError):
            # SQLite's own message quotes a damaged name.
            raise DamagedStoreError(f"{self.path} is damaged: {error}", hint=schema.DAMAGED_HINT) from error

    def refuse(self, error: sqlite3.Error) -> NoReturn:
        """Raise the package's error for SQLite's."""
        code = getattr(error, "sqlite_errorcode", None)
        primary = None if code is None else code & 0xFF
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        # The driver refuses a text column that is not UTF-8 by itself, and then gives no code.
        if primary in _DAMAGED or (code is None and "decode to UTF-8" in str(error)):
            raise DamagedStoreError(
                f"{self.path} is damaged: {error} ({name})", hint=schema.DAMAGED_HINT
            ) from error
        hint = None if primary is None else _HINTS.get(primary)
        raise StoreError(f"{self.path}: {error} ({name})", hint=hint) from error


@contextmanager
def reading(directory: str | os.PathLike[str], busy_timeout: float) -> Iterator[sqlite3.Connection]:
    """Open the database of a state directory read-only, whether or not a server runs there; from any thread."""
    path = Path(directory) / schema.FILE_NAME
    with Guard(path), closing(opening.connect_read_only(path, busy_timeout)) as db:
        yield db


class Database:
    """A connection to the store's database, in which every change stands between :meth:`begin` and :meth:`commit`.

    For one thread at a time, and not for a forked child. A stream that is read must end before the next change.
    """

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._path = path
        # Absolute, as a daemon may change its directory; None in memory.
        self._file = None if path == _IN_MEMORY else path.absolute()
        self._identity = None if self._file is None else _identity(self._file)
        self._guard = Guard(path)
        self._pid = os.getpid()
        self._closed = False
        # The next ordinal in this transaction; None until it is asked for. The rows are the only record of it, so
        # that no rollback and no crash can leave it wrong.
        self._next_ordinal: int | None = None
        self._depth = 0

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        durability: Durability = "power",
        *,
        parents: bool = False,
        busy_timeout: float = 5.0,
    ) -> Self:
        """Open the store in a state directory, creating both when they are missing (0700, 0600).

        With durability ``"power"`` a commit survives a power cut (one fsync each); with ``"process"`` it survives
        the death of this process, and may be lost with the machine. `parents`: create missing parents too.
        `busy_timeout`: seconds to wait for another process that holds a transaction open.
        """
        if durability not in ("power", "process"):
            raise ValueError(f"durability must be 'power' or 'process', not {durability!r}")
        folder = Path(directory)
        path = folder / schema.FILE_NAME
        hint = f"create {folder.parent} first, or name another state directory"
        with writing(f"the state directory {folder} cannot be used", hint), Guard(path):
            opening.make_private(path, parents=parents)
        return cls._install(path, lambda: opening.connect(path, durability, busy_timeout), path)

    @classmethod
    def in_memory(cls) -> Self:
        """Open an empty store that lives in this process's memory and writes nothing to disk."""
        return cls._install(_IN_MEMORY, lambda: opening.connect(None, "process", 0.0), None)

    @classmethod
    def _install(cls, name: Path, connect: Callable[[], sqlite3.Connection], path: Path | None) -> Self:
        with Guard(name), closed_on_error(db := connect()):
            schema.install(db, path)
        return cls(db, name)

    @property
    def path(self) -> Path:
        """The database file, or ``:memory:``."""
        return self._path

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return not self._closed and self._db.in_transaction

    def begin(self) -> None:
        """Start a transaction; waits for another process's for at most the busy timeout."""
        if self._pid != os.getpid():
            raise StoreError(
                f"{self._path} was opened by process {self._pid}; this is its child {os.getpid()}",
                hint="open the store anew after the fork",
            )
        with self._guard:
            self._db.execute("BEGIN IMMEDIATE")
        self._next_ordinal = None

    def commit(self) -> None:
        """End the transaction; when this returns, it is as durable as the store was opened for.

        After a StoreError it is rolled back. After an interrupt (``KeyboardInterrupt``) it is either committed or
        still open.
        """
        try:
            self._need_place()
            with self._guard:
                self._db.execute("COMMIT")
        except StoreError:
            # The first error is the one to tell; SQLite has nothing to add when it is asked to undo.
            with suppress(StoreError):
                self.rollback()
            raise

    def rollback(self) -> None:
        """Undo the transaction; does nothing when none is open."""
        if self.in_transaction:
            with self._guard:
                self._db.execute("ROLLBACK")

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
        self._need_transaction()
        name = f"part_{self._depth}"
        before = self._next_ordinal
        with self._guard:
            self._db.execute(f"SAVEPOINT {name}")
        self._depth += 1
        try:
            yield
        except BaseException:
            self._next_ordinal = before
            # A full disk may have undone the whole transaction by itself.
            if self.in_transaction:
                with suppress(StoreError), self._guard:
                    self._db.execute(f"ROLLBACK TO {name}")
                    self._db.execute(f"RELEASE {name}")
            raise
        else:
            with self._guard:
                self._db.execute(f"RELEASE {name}")
        finally:
            self._depth -= 1

    def sync(self) -> None:
        """Make all that was committed survive a power cut, whatever the store was opened for; from any thread.

        After a StoreError nobody knows whether it would.
        """
        if self._file is None:
            return
        # A checkpoint that takes what is committed out of the log has synced both files by itself.
        with writing(f"{self._file}: its log could not be synced", hint="check the disk"):
            sync_file(log_of(self._file))

    def meta(self, key: str, default: Any = None) -> Any:
        """Return a named value, or the default."""
        with self._guard:
            found = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            return default if found is None else self._decode_meta(key, found[0])

    def meta_items(self, prefix: str = "") -> dict[str, Any]:
        """Return all named values whose names start with `prefix`, by name."""
        with self._guard:
            found = self._db.execute("SELECT key, value FROM meta ORDER BY key").fetchall()
        return {key: self._decode_meta(key, value) for key, value in found if key.startswith(prefix)}

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a JSON-like value under a name."""
        self._need_transaction()
        encoded = msgspec.msgpack.encode(value)
        with self._guard:
            self._db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, encoded))

    def delete_meta(self, key: str) -> bool:
        """Forget a named value; says whether there was one."""
        self._need_transaction()
        with self._guard:
            return self._db.execute("DELETE FROM meta WHERE key = ?", (key,)).rowcount > 0

    def size_bytes(self) -> int:
        """Return how much room the database takes, its write-ahead log included."""
        with self._guard:
            (pages,) = self._db.execute("PRAGMA page_count").fetchone()
            (page_size,) = self._db.execute("PRAGMA page_size").fetchone()
        size = int(pages * page_size)
        with suppress(OSError):
            size += log_of(self._path).stat().st_size
        return size

    def check(self) -> None:
        """Have SQLite check the whole file, about 2 s for each GB; DamagedStoreError has what it finds first."""
        with self._guard:
            found = [str(line) for (line,) in self._db.execute("PRAGMA integrity_check(10)")]
        if found != ["ok"]:
            raise DamagedStoreError(f"{self._path} is damaged: {'; '.join(found)}", hint=schema.DAMAGED_HINT)

    def close(self) -> None:
        """Roll back what is open, fold the write-ahead log into the main file, and close; may be repeated."""
        if self._closed:
            return
        self._closed = True
        if self._pid == os.getpid():
            try:
                self._db.rollback()
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:
                # Nothing is lost: the rest stays in the log, and the next opening reads it.
                _log.warning("%s: its log was not folded in while closing: %s", self._path, error)
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _need_transaction(self) -> None:
        if self._closed or not self._db.in_transaction:
            raise StoreError(f"{self._path}: a change needs an open transaction", hint="call begin() first")

    def _need_place(self) -> None:
        """Refuse a commit to a file that was deleted or replaced, which no start would find; costs one ``stat``.

        A file that is deleted between it and the commit is noticed by the next commit.
        """
        if self._file is None:
            return
        found = _identity(self._file)
        if found is not None and found != self._identity:
            what = "deleted" if found == _GONE else "replaced by another file"
            raise StoreError(
                f"{self._file} was {what} while it was in use; the change was not applied",
                hint="put it back, or restart the server with an empty file of that name in its place:"
                " it restores the state from shared memory",
            )

    def _take_ordinals(self, count: int) -> int:
        """Reserve ordinals for this transaction; returns the first."""
        first = self._next_ordinal
        if first is None:
            (first,) = self._db.execute(_NEXT_ORDINAL).fetchone()
        self._next_ordinal = first + count
        return first

    def _decode_meta(self, key: str, value: bytes) -> Any:
        try:
            return msgspec.msgpack.decode(value)
        except (ValueError, TypeError) as error:
            raise DamagedStoreError(
                f"{self._path} is damaged: the value of {key!r} cannot be decoded", hint=schema.DAMAGED_HINT
            ) from error

    def _stream(self, sql: str) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query, a few hundred in memory at a time."""
        with self._guard:
            cursor = self._db.execute(sql)
        try:
            while True:
                with self._guard:
                    rows = cursor.fetchmany(_FETCH)
                if not rows:
                    return
                yield from rows
        finally:
            cursor.close()


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells one file from another of the same name; None where this process may not look."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return _GONE
    except OSError:
        # It need not be gone: this process may have changed its user since.
        return None
    return status.st_dev, status.st_ino
