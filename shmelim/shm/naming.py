"""The names that a writer holds: its lock, its root segment, and the data segment that this one leads to.

A root segment of this store is taken over; another's is replaced, and withdrawn once something is published in the
new one. Names can be removed from ``/dev/shm`` under a writer: each heartbeat looks at them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import Final

from shmelim.errors import AlreadyServingError, NotServingError, SegmentError, ShmelimError, UntrustedSegmentError
from shmelim.shm.facts import HEARTBEAT_LIMIT, RUNNING, WriterState, monotonic_ns, this_clock
from shmelim.shm.following import Position, put_position, put_source
from shmelim.shm.layout import (
    BRANCH,
    HEARTBEAT,
    MAX_GENERATION,
    PAGE,
    ROOT_ID,
    SEQUENCE_BITS,
    SEQUENCE_MASK,
    STORE_ID,
    STORE_ID_SIZE,
    VERSION,
    WRITER_CLOCK,
    WRITER_LOCK,
    WRITER_PID,
    WRITER_STARTED,
    WRITER_STATE,
    WRITER_WAKES,
    DataHeader,
    check_root,
    pack_root_header,
    unpack_data_header,
)
from shmelim.shm.native import WAKES, release_word
from shmelim.shm.place import put_place
from shmelim.shm.segment import Lock, Namespace, Segment
from shmelim.system.clock import boottime
from shmelim.system.processes import ProcessIdentity

_LOOK_PAUSE: Final = 0.05  # seconds between two looks at a heartbeat that may be a dead writer's last

_HIGHEST: Final = SEQUENCE_MASK // 16 * 15
"""A sequence from here on is damage, or of a clock that is."""


class NameHolder:
    """The part of a :class:`~shmelim.shm.writer.TableWriter` by which it is found."""

    def __init__(
        self, namespace: Namespace, store_id: bytes, first_sequence: int, lock: Lock | None, source: str
    ) -> None:
        if len(store_id) != STORE_ID_SIZE:
            raise ValueError(f"store_id of {len(store_id)} bytes must be {STORE_ID_SIZE} bytes long")
        self._namespace = namespace
        self.store_id = store_id
        self._pid = os.getpid()
        # Why this writer is none any more.
        self._failure: ShmelimError | None = None
        # The published segment, and the one that was published before, as long as its name is there.
        self._segment: Segment | None = None
        self._left: Segment | None = None
        # The generation that was tried last.
        self._generation = 0
        # The lock ends with whoever refers to it: an interrupt on any line leaves none behind.
        self._lock = namespace.acquire() if lock is None else lock
        # The root segment to publish in, and the one that is withdrawn as soon as that has its name.
        self._former: Segment | None = None
        self._root = self._take_root(first_sequence)
        self._published = release_word(self._root, VERSION)
        self._branch = 0 if self._former is not None else self._root.words[BRANCH]
        self._place = b""
        self._source = source
        self._position: Position | None = None
        self._describe(self._root)

    def _take_root(self, sequence: int) -> Segment:
        """Open the root segment for writing, or make one in the place of one that is not ours to continue.

        A new one gets its name with what is published in it first; where nothing was published, at once.
        """
        try:
            root = self._namespace.open_root(writable=True)
        except NotServingError:
            return self._name(self._new_root(sequence))
        generation, last = divmod(root.words[VERSION], SEQUENCE_MASK + 1)
        self._generation = generation if generation < MAX_GENERATION else 0
        is_damaged = last >= _HIGHEST
        if not is_damaged:
            sequence = max(sequence, last)
        with contextlib.suppress(NotServingError, SegmentError):
            check_root(root.memory[:PAGE], root.label)
            self._refuse_another(root)
            is_own = root.memory[STORE_ID : STORE_ID + STORE_ID_SIZE] == self.store_id
            if is_own and self._generation and not is_damaged:
                # From a word that is damaged a number would come again that means another segment to readers.
                self._published_in(root)
                return root
        if not generation:
            return self._name(self._new_root(sequence))
        self._former = root
        return self._new_root(sequence)

    def _name(self, root: Segment) -> Segment:
        self._namespace.name_root(root)
        return root

    def _published_in(self, root: Segment) -> tuple[Segment, DataHeader]:
        """Open the data segment that a root segment names, and check that it is that root's."""
        version = root.words[VERSION]
        segment = self._namespace.open_data(version >> SEQUENCE_BITS, writable=True)
        memory, root_id = segment.memory[:PAGE], root.words[ROOT_ID]
        return segment, unpack_data_header(memory, segment.size, root_id, version, segment.label)

    def _new_root(self, sequence: int) -> Segment:
        root = self._namespace.make_root()
        clock = min(time.time_ns() // 1_000_000, _HIGHEST)
        # Which copy is current is as before.
        sequence = max(sequence, clock + ((clock ^ sequence) & 1))
        header = pack_root_header(secrets.randbits(64) or 1, self.store_id, sequence)
        root.memory[: len(header)] = header
        return root

    def _refuse_another(self, root: Segment) -> None:
        """Raise AlreadyServingError if a writer lives that holds another lock, since its lock file was removed.

        Whether a heartbeat is the last one of a dead writer shows within its limit.
        """
        words = root.words
        beat = words[HEARTBEAT]
        if words[WRITER_LOCK] in {0, self._lock.number} or words[WRITER_STATE] not in RUNNING:
            return
        while -1 < monotonic_ns() - beat < HEARTBEAT_LIMIT * 1e9:
            if words[HEARTBEAT] != beat:
                name, pid = self._namespace.name, words[WRITER_PID]
                raise AlreadyServingError(
                    f"{name!r} is served by process {pid}, whose lock file was removed",
                    hint="stop that one first, or serve under another --name",
                )
            time.sleep(_LOOK_PAUSE)

    def _describe(self, root: Segment) -> None:
        """Say in a root segment who writes."""
        words = root.words
        words[WRITER_STATE] = WriterState.STARTING if self._segment is None else WriterState.SERVING
        words[WRITER_PID] = self._pid
        words[WRITER_STARTED] = _started_ms()
        words[WRITER_CLOCK] = this_clock()
        words[WRITER_LOCK] = self._lock.number
        words[WRITER_WAKES] = WAKES
        words[BRANCH] = self._branch
        put_place(root, self._place)
        put_source(root, self._source)
        if self._position is not None:
            put_position(root, self._position)
        words[HEARTBEAT] = monotonic_ns()

    def beat(self) -> bool:
        """Renew the heartbeat that tells readers that the writer lives, and look at the names; any thread may.

        False: a name was removed or replaced, and the thread that owns the writer must call :meth:`renew`. A clock
        reading, a store, and three ``stat``; well within 10 µs.
        """
        self._root.words[HEARTBEAT] = monotonic_ns()
        if self._failure is not None:
            self._give_way()
            return False
        segment = self._segment
        return (
            self._namespace.holds(self._lock)
            and (self._segment is None if self._former is not None else self._namespace.leads_to(self._root))
            and (segment is None or self._namespace.leads_to(segment) or segment is not self._segment)
        )

    def say_place(self, place: bytes) -> None:
        """Leave word in the root segment, and in each that takes its place, of where the channel is found."""
        self._place = place
        put_place(self._root, place)

    def say_position(self, position: Position) -> None:
        """Leave word, in the same places, of how far it follows."""
        self._position = position
        put_position(self._root, position)

    def _give_way(self) -> None:
        """Withdraw the root segment once the other writer has published something."""
        with contextlib.suppress(NotServingError, SegmentError):
            other = self._namespace.open_root().words
            if other[VERSION] >> SEQUENCE_BITS and other[ROOT_ID] != self._root.words[ROOT_ID]:
                self._root.words[VERSION] = 0

    def _create_data(self, size: int) -> Segment:
        """Make a segment of the next generation whose name is not somebody else's; in longer and longer steps."""
        step = 1
        while True:
            self._generation += step
            step *= 2
            try:
                return self._namespace.create_data(self._generation, size)
            except UntrustedSegmentError:
                if self._generation + step > MAX_GENERATION:
                    raise

    def _leave(self) -> None:
        """Let the name lead to the root segment that has something now, and withdraw the old one; unlink old data.

        What an interrupt kept from being done here is done the next time.
        """
        if self._former is not None and self._segment is not None:
            self._namespace.name_root(self._root)
            release_word(self._former, VERSION)[0] = 0  # whoever waits there looks at the name
            self._former = None
        if self._left is not None:
            self._namespace.unlink(self._left)
            self._left = None


def _started_ms() -> int:
    """Return when this process was started: ms since 1970, UTC, by the clocks that no test stops."""
    age = boottime() - ProcessIdentity.this_process().started / os.sysconf("SC_CLK_TCK")
    return int((time.clock_gettime(time.CLOCK_REALTIME) - age) * 1000)
