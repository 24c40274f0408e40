"""A copy of a database while others go on writing to it: of one moment, whole or not there at all."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from shmelim.system.durable import sync_directory, sync_file

_PAGES = 1000  # in one step, about as many as are synced at once
# The database that is copied is only read.
_OF_THE_COPY = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR_WRITE: errno.EIO,
    sqlite3.SQLITE_IOERR_FSYNC: errno.EIO,
}


def copy(db: sqlite3.Connection, target: Path, on_progress: Callable[[int, int], Any] | None = None) -> None:
    """Write what a connection sees as one durable file (0600), which takes its name when it is complete.

    `db` must have no transaction open. `on_progress` is called with the pages that are copied, and how many there
    are. ``OSError`` and ``sqlite3.Error`` come out as they are, and what keeps the copy from being written as an
    ``OSError``; then there is no file.
    """
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def step(_status: int, remaining: int, total: int) -> None:
        os.fsync(descriptor)  # all at the end would keep the disk from those who go on writing
        if on_progress is not None:
            on_progress(total - remaining, total)

    try:
        with closing(sqlite3.connect(part, isolation_level=None)) as copied:
            # A read transaction of its own keeps every step of the copy at one and the same moment.
            db.execute("BEGIN")
            try:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
                db.backup(copied, pages=_PAGES, progress=step)
            finally:
                db.execute("ROLLBACK")
            # One file, with no log beside it that could be forgotten.
            copied.execute("PRAGMA journal_mode=DELETE")
        sync_file(part)
        part.replace(target)
        sync_directory(target.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if (number := _OF_THE_COPY.get(getattr(error, "sqlite_errorcode", 0))) is not None:
            raise OSError(number, os.strerror(number)) from error
        raise
    finally:
        os.close(descriptor)
