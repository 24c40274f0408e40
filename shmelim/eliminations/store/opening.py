"""The file of the store's database: how it is made, and how a connection to it is opened.

``OSError`` and ``sqlite3.Error`` come out of here as they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from shmelim.eliminations.store import schema
from shmelim.eliminations.store.schema import FILE_NAME, Durability, damaged
from shmelim.errors import StoreError
from shmelim.system.durable import reading, sync_directory, writing

LOG_SUFFIXES = ("-wal", "-shm")
BUSY_TIMEOUT = 5.0  # seconds to wait for another process that holds a transaction open

_SYNCHRONOUS = {"power": "FULL", "process": "NORMAL"}
_SMALLEST = 512
_PART = 1 << 20
# Enough for the state, of which only what is read or written is held: rows are then changed without reading any.
_CACHE_KIB = 256 * 1024
_LARGEST_IDLE_WAL = 64 << 20
# 16 MB: four times SQLite's default, so that a stream of small changes is folded in less often.
_CHECKPOINT_PAGES = 4000


def make_private(path: Path) -> None:
    """Make the database's directory (0700) and file (0600) where missing.

    A new database takes its name when it is whole, so that a start that is killed leaves nothing that the next
    one could take for a damaged store.
    """
    folder = path.parent
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_directory(folder.parent)
    if not path.exists():
        _make_file(path)
        return
    # Never opened here: closing it would drop the locks of every connection of this process to it.
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise damaged(path, "it is not a file")
    if status.st_size < _SMALLEST:
        # SQLite would take a file without content for a new database, and the state for empty.
        raise damaged(path, f"it has only {status.st_size} bytes")
    if status.st_mode & 0o077:
        path.chmod(0o600)
    _need_files_as_logs(path)


def _need_files_as_logs(path: Path) -> None:
    """Raise StoreError where something else has the name of a log: SQLite would wait for a pipe."""
    for log in [log_of(path, suffix) for suffix in ("-journal", *LOG_SUFFIXES)]:
        if os.path.lexists(log) and not stat.S_ISREG(log.lstat().st_mode):
            raise StoreError(f"{log} is not a file, as the log of the store is to be", hint="move it away")


def remove_log(path: Path) -> None:
    """Remove the log that a database which is gone left behind: SQLite would replay it onto the next one."""
    for suffix in LOG_SUFFIXES:
        log_of(path, suffix).unlink(missing_ok=True)


def need_folded(path: Path) -> None:
    """Raise StoreError where a closed database is not whole without its log: closing tells nobody."""
    log = log_of(path)
    if log.exists() and log.stat().st_size:
        raise StoreError(f"{log} could not be folded into its database", hint="make room on that file system")


def need_readable(path: Path) -> None:
    """Raise StoreError where the disk does not give what is in a database, which SQLite calls damaged."""
    for file in (path, log_of(path)):
        if file.is_file():
            with (
                writing(f"{file} cannot be read", hint="make it readable for this user"),
                reading(file) as content,
            ):
                while content.read(_PART):
                    pass


def store_bytes(directory: Path) -> int:
    """Return what the store takes on disk, its write-ahead log included; waits for no commit."""
    size = 0
    for file in (directory / FILE_NAME, log_of(directory / FILE_NAME)):
        with contextlib.suppress(OSError):  # what is gone is another problem's business
            size += file.stat().st_size
    return size


def _make_file(path: Path) -> None:
    """Make an empty database under another name, private before SQLite opens it, and link it into place.

    One process at a time in one directory, so that none removes what another one has just begun.
    """
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not path.exists():
            _make_file_alone(path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_file_alone(path: Path) -> None:
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)
    # Of a database that was deleted or moved without them.
    remove_log(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        with closing(connect(temporary, "power")) as db:
            schema.install(db, temporary)
        need_folded(temporary)
        path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)
        remove_log(temporary)  # which stays where the disk is full


def connect(path: Path | None, durability: Durability) -> sqlite3.Connection:
    """Open or create a database for writing; None opens one in memory."""
    db = _connect(":memory:" if path is None else os.fspath(path))
    with closed_on_error(db):
        for pragma in (
            f"synchronous={_SYNCHRONOUS[durability]}",
            "fullfsync=ON",  # macOS only: there, fsync alone does not reach the disk
            "checkpoint_fullfsync=ON",
            "cell_size_check=ON",
            "trusted_schema=OFF",
            "temp_store=MEMORY",
            f"cache_size=-{_CACHE_KIB}",
            f"wal_autocheckpoint={_CHECKPOINT_PAGES}",
            f"journal_size_limit={_LARGEST_IDLE_WAL}",
        ):
            db.execute(f"PRAGMA {pragma}")
    return db


def _connect(database: str, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(database, uri=uri, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)


@contextmanager
def closed_on_error(db: sqlite3.Connection) -> Iterator[None]:
    """Close a connection if the block raises."""
    try:
        yield
    except BaseException:
        db.close()
        raise


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Open an existing database for reading, with or without a writer."""
    if path.exists() and not path.is_file():
        raise damaged(path, "it is not a file")  # a pipe would be waited for
    _need_files_as_logs(path)
    location = f"file:{quote(os.fspath(path.absolute()))}?mode=ro"
    try:
        return _read_only(location, path)
    except sqlite3.OperationalError:
        # A reader needs the index of the write-ahead log, and may be unable to make one (in a directory that it
        # may not write). Where nothing stands in the log, the main file alone is the whole truth. Where there is
        # no index, nobody has the database, and a reader that locks it for himself keeps one in memory.
        wal = log_of(path)
        is_logged = wal.exists() and wal.stat().st_size > 0
        if os.access(path.parent, os.W_OK) or (is_logged and log_of(path, LOG_SUFFIXES[1]).exists()):
            raise
        if is_logged:
            return _read_only(f"{location}&vfs=unix-none", path, "EXCLUSIVE")
        return _read_only(f"{location}&immutable=1", path)


def _read_only(location: str, path: Path, locking: str = "NORMAL") -> sqlite3.Connection:
    db = _connect(location, uri=True)
    with closed_on_error(db):
        db.execute(f"PRAGMA locking_mode={locking}")
        found = schema.identify(db, path)
        if not found:
            raise StoreError(f"{path} holds no tables yet", hint="nothing was ever stored there")
        schema.lend_missing(db, found)
    return db


def log_of(path: Path, suffix: str = LOG_SUFFIXES[0]) -> Path:
    """Return the path of a database's write-ahead log, or of its index: beside the file that a link leads to."""
    return Path(f"{os.path.realpath(path)}{suffix}")
