"""The store's database: opening, questions, named values, and errors in the package's own words."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, Self, get_args

import msgspec

from shmelim.eliminations.store import opening, schema, touched
from shmelim.eliminations.store.copying import copy
from shmelim.eliminations.store.opening import closed_on_error, log_of
from shmelim.eliminations.store.schema import Durability, damaged
from shmelim.errors import StoreError
from shmelim.system.durable import sync_file, writing
from shmelim.system.owner import whose
from shmelim.system.text import get_logger

_log = get_logger(__name__)

_FETCH = 500
_BRANCHES: Final = "branches"  # the first commit of each that is known, and its number
_BRANCHES_KEPT: Final = 1000
_IN_MEMORY = Path(":memory:")

_HINTS = {
    sqlite3.SQLITE_FULL: "make room on that file system; the change was not applied",
    sqlite3.SQLITE_READONLY: "make the file and its directory writable for this user",
    sqlite3.SQLITE_CANTOPEN: "check that the directory exists, that this user may write to it, "
    "and that this process may open more files (ulimit -n)",
    sqlite3.SQLITE_PERM: "make the file and its directory writable for this user",
    sqlite3.SQLITE_IOERR: "check the disk and the room on it; the change was not applied",
    sqlite3.SQLITE_BUSY: "another process holds a transaction open: find it with `fuser`, and end it",
    sqlite3.SQLITE_LOCKED: "another connection holds a transaction open: end it",
}
_UNREAD = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})
# What the driver raises; a UnicodeDecodeError where SQLite's own message quotes a damaged name.
_ERRORS = (sqlite3.Error, UnicodeDecodeError)


def store_error(path: Path, error: Exception) -> StoreError:
    """Return the package's error, which names the file, for one of the driver's."""
    if not isinstance(error, sqlite3.Error):
        return damaged(path, str(error))
    code = getattr(error, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    text = f"{error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"
    # The driver refuses a text column that is not UTF-8 by itself, and then gives no code.
    if primary in _DAMAGED or (code is None and "decode to UTF-8" in text):
        return damaged(path, text)
    return StoreError(f"{path}: {text}", hint=None if primary is None else _HINTS.get(primary))


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        raise store_error(path, error) from error


class Database:
    """A connection to the store's database, in which every change stands in a transaction.

    For one thread at a time, and not for a forked child. A stream that is read must end before the next change.
    """

    def __init__(self, db: sqlite3.Connection, path: Path, file: Path | None = None) -> None:
        self._db = db
        self.path = path  # ":memory:" in memory
        # What is written to; None in memory, and where it is only read.
        self._file = file
        self._pid = os.getpid()
        self._closed = False

    @classmethod
    def open(cls, directory: str | os.PathLike[str], durability: Durability = "power") -> Self:
        """Open the store in a state directory, creating both when they are missing (0700, 0600).

        With durability ``"power"`` a commit survives a power cut (one fsync each); with ``"process"`` it survives
        the death of this process, and may be lost with the machine.
        """
        if durability not in get_args(Durability):
            raise ValueError(f"durability must be 'power' or 'process', not {durability!r}")
        path = Path(directory) / schema.FILE_NAME
        with writing(f"the state directory {path.parent} cannot be used", "name another"), _guard(path):
            opening.make_private(path)
        with _guard(path), closed_on_error(db := opening.connect(path, durability)):
            schema.install(db, path)
            touched.begin_run(db)
        # Absolute, as a daemon may change its directory.
        return cls(db, path, path.absolute())

    @classmethod
    def read_only(cls, directory: str | os.PathLike[str]) -> Self:
        """Open the store of a state directory for reading, whether or not a server runs there; from any thread."""
        path = Path(directory) / schema.FILE_NAME
        try:
            path.stat()  # it is not opened: closing it would drop the locks of this process
            why = None if os.access(path, os.R_OK, effective_ids=True) else os.strerror(errno.EACCES)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"there is no store {path}", hint="name the state directory (--state-dir)") from None
        except OSError as error:
            why = error.strerror
        if why is not None:
            raise StoreError(f"the store {path} cannot be read: {why}; {whose(path)}", hint="run as its owner")
        with _guard(path):
            return cls(opening.connect_read_only(path), path)

    @classmethod
    def in_memory(cls) -> Self:
        """Open an empty store that lives in this process's memory and writes nothing to disk."""
        db = opening.connect(None, "process")
        schema.install(db, None)
        return cls(db, _IN_MEMORY)

    @property
    def store_id(self) -> bytes | None:
        """The 16 random bytes that tell this store, its copies and backups from every other one.

        None where a store of an older schema is only read: it gets them when it is first opened for writing.
        """
        found = self._ask("SELECT store_id FROM identity")
        return bytes(found[0][0]) if found else None

    @property
    def commit_number(self) -> int:
        """How many transactions that changed anything were committed, in all the life of the store."""
        found = self._ask("SELECT commit_number FROM identity")
        return int(found[0][0]) if found else 0

    @property
    def branch(self) -> int:
        """The random number of the branch that the last commit belongs to; 0 where it is not known.

        Whoever opens the store begins one with his first commit. So a commit is told from one of the same number
        that was made in a copy of the store.
        """
        branches = self._branches()
        return branches[-1][1] if branches else 0

    def has_made(self, commit: int, branch: int) -> bool:
        """Tell whether this is a commit of this very store, or not known to be a copy's."""
        if commit > self.commit_number:
            return False
        branches = self._branches()
        if not branch or (branches and commit < branches[0][0]):
            return True
        numbers = [number for _, number in branches]
        if branch not in numbers:
            return False
        later = branches[numbers.index(branch) + 1 :]
        return not later or commit < later[0][0]

    def _branches(self) -> list[tuple[int, int]]:
        return [(first, number) for first, number in self.meta(_BRANCHES, [])]

    def _begin_branch(self, commit: int, number: int) -> None:
        """Note that a commit is the first one of a branch, unless that was noted."""
        if number != self.branch:
            self.set_meta(_BRANCHES, [*self._branches(), (commit, number)][-_BRANCHES_KEPT:])

    def _forget_branches(self) -> None:
        self.set_meta(_BRANCHES, [])

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return not self._closed and self._db.in_transaction

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
        found = self._ask("SELECT value FROM meta WHERE key = ?", (key,))
        return self._decode_meta(key, found[0][0]) if found else default

    def meta_items(self, prefix: str = "") -> dict[str, Any]:
        """Return all named values whose names start with `prefix`, by name."""
        found = self._ask("SELECT key, value FROM meta ORDER BY key")
        return {key: self._decode_meta(key, value) for key, value in found if key.startswith(prefix)}

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a JSON-like value under a name."""
        self._change(
            "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, msgspec.msgpack.encode(value))
        )

    def copy_to(self, target: Path, on_progress: Callable[[int, int], Any] | None = None) -> None:
        """Write a copy of the store as of one moment, one durable file (0600) that is there when it is complete.

        Others may go on changing the store. `on_progress` is called with the pages copied, and how many there are.
        """
        with writing(f"{self.path} cannot be copied to {target}", hint="name another place"), _guard(self.path):
            copy(self._db, target, on_progress)

    def check(self) -> None:
        """Have SQLite check the whole file, about 2 s for each GB; DamagedStoreError has what it finds first."""
        found = [str(line) for (line,) in self._ask("PRAGMA integrity_check(10)")]
        if found == ["ok"]:
            return
        text = "; ".join(found)
        # What the disk, or the memory, did not give for a moment says nothing of the file.
        if not _UNREAD.isdisjoint(int(code) & 0xFF for code in re.findall(r"error code=(\d+)", text)):
            raise StoreError(
                f"{self.path} cannot be read through: {text}",
                hint="check the disk and the memory, and start again",
            )
        raise damaged(self.path, text)

    def close(self) -> None:
        """Roll back what is open, fold the write-ahead log into the main file, and close; may be repeated."""
        if self._closed:
            return
        self._closed = True
        if self._file is not None and self._pid == os.getpid():
            try:
                self._db.rollback()
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:
                # Nothing is lost: the rest stays in the log, and the next opening reads it.
                _log.warning("%s: its log was not folded in while closing: %s", self.path, error)
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decode_meta(self, key: str, value: bytes) -> Any:
        try:
            return msgspec.msgpack.decode(value)
        except (ValueError, TypeError) as error:
            raise damaged(self.path, f"the value of {key!r} cannot be decoded") from error

    def _ask(self, sql: str, arguments: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of an answer."""
        try:
            return self._db.execute(sql, arguments).fetchall()
        except _ERRORS as error:
            raise store_error(self.path, error) from error

    def _change(self, sql: str, arguments: Iterable[Any] = (), *, each: bool = False) -> int:
        """Run a statement of a transaction, once or for each of many arguments; return how many rows changed."""
        try:
            if self._db.in_transaction:
                run: Any = self._db.executemany if each else self._db.execute
                return int(run(sql, arguments).rowcount)
        except _ERRORS as error:
            raise store_error(self.path, error) from error
        raise StoreError(f"{self.path}: a change needs an open transaction", hint="call begin() first")

    def _stream(self, sql: str, arguments: Mapping[str, Any] | None = None) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query, a few hundred in memory at a time."""
        with _guard(self.path), closing(self._db.execute(sql, arguments or {})) as cursor:
            while rows := cursor.fetchmany(_FETCH):
                yield from rows
