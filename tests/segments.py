"""Which segments a table has in shared memory."""

from __future__ import annotations

from pathlib import Path

SHM = Path("/dev/shm")


def segments_of(name: str) -> list[str]:
    """Return the names of the segments of a table, root first; its lock file is none."""
    found = sorted(path.name for path in SHM.glob(f"shmelim.{name}*") if path.name.split(".")[1] == name)
    return [name for name in found if not name.endswith(".lock")]
