"""Which segments a table has in shared memory, and what stands in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shmelim.shm.image import Image

if TYPE_CHECKING:
    from shmelim.shm import TableWriter

SHM = Path("/dev/shm")


def copies_of(writer: TableWriter) -> tuple[Image, Image]:
    """Return both copies of a writer's table as the reference sees them, whoever writes them."""
    segment, header = writer._segment, writer._images[0].header
    return Image(segment, header, 0), Image(segment, header, 1)


def segments_of(name: str) -> list[str]:
    """Return the names of the segments of a table, root first; its lock file is none."""
    return _segments("shmelim", name)


def published_segments_of(name: str) -> list[str]:
    """Return the same of a table that ``shmelim.table`` made."""
    return _segments("shmelim-table", name)


def _segments(kind: str, name: str) -> list[str]:
    found = sorted(path.name for path in SHM.glob(f"{kind}.{name}*") if path.name.split(".")[1] == name)
    return [name for name in found if not name.endswith(".lock")]
