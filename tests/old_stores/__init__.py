"""State directories as older versions made them, from the SQL of their stores."""

import sqlite3
from pathlib import Path

from crashing import Child, kill_self

from shmelim.eliminations.store.schema import FILE_NAME

SCHEMAS = (1, 2)


def make(directory: Path, number: int) -> Path:
    """Make a directory with a store of that schema, part of which stands in its log only."""
    directory.mkdir(mode=0o700)

    def fill():
        db = sqlite3.connect(directory / FILE_NAME, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.executescript(Path(__file__).with_name(f"schema_{number}.sql").read_text())
        kill_self()

    with Child(fill) as child:
        assert child.wait() == -9
    assert (directory / f"{FILE_NAME}-wal").stat().st_size
    return directory
