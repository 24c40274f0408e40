"""What a table says of itself: who writes and whether that lives, whose state it is, how full, how old."""

from __future__ import annotations

import functools
import os
import time
from typing import Final, NamedTuple

from shmelim.errors import StaleError
from shmelim.shm.layout import HEARTBEAT, WRITER_CLOCK, WRITER_LOCK, WRITER_PID, WRITER_STARTED, WRITER_STATE
from shmelim.shm.segment import Segment

_SECOND: Final = 1_000_000_000

HEARTBEAT_LIMIT: Final = 3.0
"""Seconds without a heartbeat after which a writer counts as dead."""

# As `system.clock` has it, which who only reads does not load: a deadline comes though a test stops the time.
monotonic: Final = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
monotonic_ns: Final = functools.partial(time.clock_gettime_ns, time.CLOCK_MONOTONIC)


def end_of(wait: float | None) -> float:
    """Return when a wait of so many seconds from now on is over, on :data:`monotonic`; None: now."""
    if wait is None:
        return monotonic()
    from shmelim.system.arguments import seconds  # noqa: PLC0415  # as few readers wait

    return monotonic() + float(seconds("wait", wait))


class WriterState:
    """The values of the writer's state word."""

    NONE = 0
    STARTING = 1
    SERVING = 2
    STOPPED = 3
    NAMES = ("none", "starting", "serving", "stopped")


RUNNING: Final = (WriterState.STARTING, WriterState.SERVING)


class WriterInfo(NamedTuple):
    """Who writes: ``alive`` is decided by state and heartbeat alone, which hold across pid namespaces.

    ``heartbeat_age`` is in seconds, ``started_ms`` in ms since 1970 (UTC). The age is None where the writer's
    clock is not this process' (another time namespace), or says what cannot be; ``alive`` is None then, unless the
    writer said that it stopped. ``lock`` is the inode of its lock file, 0 where it has none.
    """

    pid: int
    alive: bool | None
    heartbeat_age: float | None
    state: str
    started_ms: int
    lock: int = 0

    @property
    def hangs(self) -> bool:
        """Whether its process can be seen to run without a heartbeat: it hangs, or is stopped.

        By its lock: in another pid namespace its pid is somebody else's here.
        """
        if self.alive is not False or self.state == "stopped":
            return False
        from shmelim.system.processes import has_lock  # noqa: PLC0415  # seldom asked, and readers load little

        return has_lock(self.pid, self.lock)


class TableIdentity(NamedTuple):
    """Whose state a table is: what stands in it as of ``sequence``, its version.

    ``root_id`` is of the root segment; ``store_id``, ``commit`` and its ``branch`` of the store that it was made
    from, 16 zero bytes and 0 where there is none. ``heartbeat_age``, in seconds, is that of its writer.
    """

    root_id: int
    store_id: bytes
    sequence: int
    commit: int
    entries: int
    heartbeat_age: float | None
    branch: int


class TableInfo(NamedTuple):
    """How full the table is: ``capacity`` in slots, of which half can be in use, sizes in bytes per copy."""

    version: int
    generation: int
    capacity: int
    entries: int
    flag_counts: tuple[int, ...]
    arena_size: int
    arena_used: int
    arena_live: int
    segment_size: int


def writer_of(root: Segment) -> WriterInfo:
    """Return what a root segment says of its writer."""
    words = root.words
    state = words[WRITER_STATE]
    age = (monotonic_ns() - words[HEARTBEAT]) / 1e9
    known = age > -1 and words[WRITER_CLOCK] == this_clock()
    running = state in RUNNING
    return WriterInfo(
        pid=words[WRITER_PID],
        alive=(age < HEARTBEAT_LIMIT if known else None) if running else False,
        heartbeat_age=max(0.0, age) if known else None,
        state=WriterState.NAMES[state] if state < len(WriterState.NAMES) else f"unknown ({state})",
        started_ms=words[WRITER_STARTED],
        lock=words[WRITER_LOCK],
    )


def staleness_of(root: Segment) -> float | None:
    """Return how old what a root segment leads to is at most; see :meth:`TableReader.staleness`."""
    from shmelim.shm.following import position_of, source_of  # noqa: PLC0415  # for who asks

    position = position_of(root)
    if position is None and not source_of(root):
        writer = writer_of(root)
        return 0.0 if writer.alive else writer.heartbeat_age
    if position is None or not position.confirmed or root.words[WRITER_CLOCK] != this_clock():
        return None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - position.confirmed / _SECOND
    return max(0.0, age) if age > -1 else None


def check_age(root: Segment, limit: float, name: str) -> None:
    """Raise StaleError where what a root segment leads to is older than so many seconds, or may be."""
    age = staleness_of(root)
    if age is not None and age <= limit:
        return
    from shmelim.shm.following import source_of  # noqa: PLC0415  # for who asks
    from shmelim.system.text import printable  # noqa: PLC0415  # loads logging

    source = source_of(root)
    how_old = "of unknown age" if age is None else f"{age:,.1f} s old"
    if not source:
        whose, remedy = "by its last writer", f"start one: `shmelim serve --name {name}`"
    else:
        whose = f"as a copy of {printable(source)}"
        remedy = "see that its follower runs here, the publisher at the source, and both reach the engine"
    raise StaleError(
        f"{name!r} is {how_old}, and its reader allows {limit:g} s; it stands here {whose}", hint=remedy
    )


def this_clock() -> int:
    """Return which CLOCK_MONOTONIC this process has: the inode of its time namespace, 0 where there are none."""
    try:
        return os.stat("/proc/self/ns/time").st_ino  # noqa: PTH116  # pathlib is for writers
    except OSError:
        return 0
