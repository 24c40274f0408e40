"""Room that runs out, named before a change has to be refused: on the disk, and in shared memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from shmelim.system.problems import Problems

_DISK: Final = "disk_nearly_full"
_MEMORY: Final = "shared_memory_nearly_full"
_MIB: Final = 1 << 20
_LEAST: Final = 32 * _MIB  # on the disk, however small the state is
_SEGMENTS: Final = Path("/dev/shm")  # noqa: S108  # where Linux keeps POSIX shared memory


def look_at_room(problems: Problems, state_dir: Path | None, store_bytes: int, segment_bytes: int | None) -> None:
    """Raise and clear the problems that there is little room left; `segment_bytes` is None for private memory.

    The disk should have room for the log of a large sync and for the files: twice the store. Shared memory should
    have room for the segment that a table moves to when it grows: twice its own.
    """
    if state_dir is not None:
        needed = max(2 * store_bytes, _LEAST)
        _judge(problems, _DISK, state_dir, needed, "changes will be refused", "make room on that file system")
    if segment_bytes is not None:
        remedy = "enlarge /dev/shm (Docker: --shm-size), or remove what fills it"
        _judge(problems, _MEMORY, _SEGMENTS, 2 * segment_bytes, "the table cannot grow", remedy)


def _judge(problems: Problems, name: str, where: Path, needed: int, then: str, remedy: str) -> None:
    with suppress(OSError):  # what is gone is another problem's business
        status = os.statvfs(where)
        free = status.f_bavail * status.f_frsize
        if free >= needed:
            problems.clear(name)
            return
        text = f"{where} has {free / _MIB:,.1f} MiB left, less than {needed / _MIB:,.1f}: {then} soon"
        problems.report(name, text, remedy=remedy)
