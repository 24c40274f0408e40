"""Reading debts, slashes and the size of a state directory, whether or not a server runs there: any thread may."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shmelim.eliminations.debts import tables
from shmelim.eliminations.debts.states import Debt, Slash
from shmelim.eliminations.debts.tables import Figures
from shmelim.eliminations.store.database import reading
from shmelim.eliminations.store.schema import FILE_NAME

T = TypeVar("T")


def read_debts(
    directory: str | os.PathLike[str], hotkey: str | None = None, *, busy_timeout: float = 5.0
) -> list[Debt]:
    """Return what is owed, by one hotkey or by all, as :func:`~shmelim.eliminations.store.history.read_events`."""
    return _ask(directory, busy_timeout, lambda db: tables.select(db, hotkey), [])


def store_bytes(directory: Path) -> int:
    """Return what the store takes on disk, its write-ahead log included; waits for no commit."""
    size = 0
    for suffix in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            size += (directory / (FILE_NAME + suffix)).stat().st_size
    return size


def read_debt_figures(directory: str | os.PathLike[str], *, busy_timeout: float = 5.0) -> Figures:
    """Count the debts."""
    return _ask(directory, busy_timeout, tables.figures, Figures(0, []))


def read_slashes(
    directory: str | os.PathLike[str], hotkey: str | None = None, *, busy_timeout: float = 5.0
) -> list[Slash]:
    """Return the last slash made of one hotkey, or of each."""
    return _ask(directory, busy_timeout, lambda db: tables.select_slashes(db, hotkey), [])


def _ask(
    directory: str | os.PathLike[str], busy_timeout: float, question: Callable[[sqlite3.Connection], T], nothing: T
) -> T:
    with reading(directory, busy_timeout) as db:
        # The schema that has debts has slashes.
        known = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'debts'").fetchone()
        return nothing if known is None else question(db)
