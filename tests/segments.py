"""Which segments a table has in shared memory."""

from __future__ import annotations

from pathlib import Path

SHM = Path("/dev/shm")


def segments_of(name: str) -> list[str]:
    """Return the names of the segments of a table, root first; its lock file is none."""
    return _segments("shmelim", name)


def published_segments_of(name: str) -> list[str]:
    """Return the same of a table that ``shmelim.table`` made."""
    return _segments("shmelim-table", name)


def _segments(kind: str, name: str) -> list[str]:
    found = sorted(path.name for path in SHM.glob(f"{kind}.{name}*") if path.name.split(".")[1] == name)
    return [name for name in found if not name.endswith(".lock")]
