"""The store as a publisher sees it: read-only, while its server changes it, each answer from one transaction."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import starmap
from pathlib import Path

from shmelim.eliminations.rows import row_entry
from shmelim.eliminations.state.guard import notices
from shmelim.eliminations.store import opening, touched
from shmelim.eliminations.store.database import store_error
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import StoreError
from shmelim.fleet.cuts import Cut, Facts, Outbox, Whole
from shmelim.fleet.messages import DIGEST_MASK, Row, row_digest

_ROW = "h.hotkey, h.eliminated_ordinal, h.record, h.departed_ordinal, h.detected_ms, h.registered"
_CHANGED = (
    f"SELECT t.hotkey, {_ROW} FROM (SELECT DISTINCT hotkey FROM touched WHERE id > ?) t"  # noqa: S608
    " LEFT JOIN hotkeys h ON h.hotkey = t.hotkey"
)
_SMALL = "SELECT count(*) FROM (SELECT 1 FROM hotkeys LIMIT ?)"
_EVERY = f"SELECT {_ROW} FROM hotkeys h ORDER BY rowid"  # noqa: S608


class StoreOutbox(Outbox):
    """The outbox of the store in a state directory; switches publishing on in it where it is not yet.

    A file that took the store's place meanwhile (a restore) is noticed at the next question. Every method raises
    :class:`~shmelim.errors.StoreError`. Not thread-safe.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._path = (Path(directory) / FILE_NAME).absolute()
        self._file: tuple[int, int] | None = None
        self._store: Store | None = None
        self._db: sqlite3.Connection
        with self._asking():
            pass

    def facts(self) -> Facts:  # noqa: D102  # as the protocol has it
        with self._asking() as store:
            return self._facts(store)

    def cut(self, after: int, *, digest_rows: int = 0) -> Cut:  # noqa: D102
        with self._asking() as store:
            rows, gone = [], []
            for hotkey, *row in self._db.execute(_CHANGED, (after,)):
                if row[0] is None:
                    gone.append(hotkey.encode())
                else:
                    rows.append(_row(*row))
            digest = None
            if digest_rows > 0 and self._db.execute(_SMALL, (digest_rows + 1,)).fetchone()[0] <= digest_rows:
                every = starmap(_row, self._db.execute(_EVERY))
                digest = sum(starmap(row_digest, every)) & DIGEST_MASK
            return Cut(self._facts(store), rows, gone, digest)

    @contextmanager
    def whole(self) -> Iterator[Whole]:  # noqa: D102
        with self._asking() as store, closing(self._db.execute(_EVERY)) as cursor:
            yield Whole(self._facts(store), starmap(_row, cursor))

    def close(self) -> None:
        """Close the store; idempotent."""
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def _facts(self, store: Store) -> Facts:
        store_id = store.store_id
        if store_id is None:
            raise StoreError(f"{self._path} has an older schema", hint="start its server once, which upgrades it")
        top = touched.top(self._db)
        oldest = self._db.execute("SELECT min(id) FROM touched").fetchone()[0]
        runs = tuple(run for (run,) in self._db.execute("SELECT run FROM runs ORDER BY number"))
        found = notices(store)
        notice = None if not found else f"event {found[-1].event}: {found[-1].text}"
        return Facts(store_id, runs, top, top + 1 if oldest is None else oldest, notice)

    @contextmanager
    def _asking(self) -> Iterator[Store]:
        """Open a read transaction on the file that has the store's name now."""
        try:
            status = self._path.stat()
            if (status.st_dev, status.st_ino) != self._file:
                self._open()
                self._file = status.st_dev, status.st_ino
            assert self._store is not None
            self._db.execute("BEGIN")
            try:
                yield self._store
            finally:
                self._db.execute("ROLLBACK")
        except FileNotFoundError as error:
            raise StoreError(
                f"there is no store at {self._path}", hint="name its --state-dir, or start its server first"
            ) from error
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise store_error(self._path, error) from error

    def _open(self) -> None:
        self.close()
        self._file = None
        db = opening.connect_read_only(self._path)
        with opening.closed_on_error(db):
            if not touched.is_on(db):
                with closing(opening.connect(self._path, "process")) as writing:
                    touched.switch_on(writing)
        self._db, self._store = db, Store(db, self._path)


def _row(*row: object) -> Row:
    return Row._make(row_entry(row))  # type: ignore[arg-type]
