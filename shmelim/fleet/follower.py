"""The follower: keeps a local table equal to what a publisher sends, and knows how old that is.

In a line, a message of ``(prev, seq]`` is skipped where ``seq`` was applied, applied where it joins on, and needs
the snapshot where something is missing between. A higher line begins with its snapshot; a lower one, and what a
publisher with a lower term says, is ignored. The old table serves until the new one is published.

*Lost* is a follower whose table cannot come from what its line says now (it has changes that the store never made,
as its history was cut off, or another digest): it keeps its table, confirms nothing, and reports that.

The age is timed by the engine's clock alone. A beat says that nothing was newer when that stood at ``as_of``; this
host's CLOCK_BOOTTIME at that moment is at least ``as_of`` plus the least distance of the two clocks that was seen
from a second before the beat was there until after it (the clock here is read before the engine's). What was there
already when this process looked first says nothing. So an age is never too young, also where the engine's clock is
set, if it is not set twice within seconds.

Does no I/O of its own: a turn asks an :class:`~shmelim.fleet.engine.Engine` and changes a :class:`Table`, and may
be broken off at any of their calls.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, Protocol

from shmelim.errors import FleetDataError
from shmelim.fleet.engine import START, Engine, Id, Look
from shmelim.fleet.messages import (
    DIGEST_MASK,
    FORMAT,
    Head,
    Message,
    Report,
    Row,
    Snapshot,
    first_of,
    pack,
    row_digest,
    unpack_chunk,
    unpack_head,
    unpack_message,
)
from shmelim.shm.following import Position

_MESSAGES: Final = 256
"""So many are merged into one transaction, if they are there."""
_WINDOW: Final = 5_000_000_000
"""Nanoseconds for which the distance of the clocks is remembered."""
_MARGIN: Final = 1_000_000_000
"""A publisher appends its beat within these nanoseconds of having read the engine's clock."""
_REPORT_TTL: Final = 15.0
_REPORT_EVERY: Final = 1_000_000_000
_PATIENCE: Final = 5_000_000_000
"""Nanoseconds after which what is missing is not waited for any more."""


class _GoneError(FleetDataError):
    """A snapshot was dropped while it was read."""


class Applied(NamedTuple):
    """What stands in a local table: which store's, and up to where; it changes with the data, in one step."""

    store_id: bytes
    line: int
    seq: int
    run: int


class Table(Protocol):
    """A follower's local table."""

    applied: Applied | None
    """None where nothing was ever applied."""
    digest: int
    """The sum of its entries' digests."""

    def __len__(self) -> int: ...

    def apply(self, applied: Applied, rows: list[Row], gone: list[bytes]) -> None:
        """Publish these changes, and where they lead, as one transaction."""

    def replace(self, applied: Applied, rows: Iterable[Row]) -> None:
        """Publish these rows in the place of all others; if the iterable raises, nothing has happened."""

    def confirm(self, position: Position) -> None:
        """Say how far the table is, and when that was confirmed."""


class Follower:
    """Follows one name into a local table.

    ``who`` names it in its reports, ``host`` says where it runs. ``boottime`` is this host's CLOCK_BOOTTIME in ns.
    ``loading`` is told how many of how many rows of a snapshot are there.

    ``problems`` are what an operator must know, by name. Not thread-safe.
    """

    def __init__(
        self,
        engine: Engine,
        table: Table,
        *,
        who: str,
        host: str = "",
        position: Position | None = None,
        boottime: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        loading: Callable[[int, int], object] = lambda _done, _rows: None,
    ) -> None:
        self.problems: dict[str, str] = {}
        self.held: str | None = None
        self._engine, self._table = engine, table
        self._who, self._host = who, host
        self._boottime, self._loading = boottime, loading
        self._cursor, self._last, self._again = START, START, False  # read up to, the head's last, read it again
        self._term = 0 if position is None else position.term
        self._confirmed, self._as_of = (0, 0) if position is None else (position.confirmed, position.as_of)
        self._parts: list[Message] = []
        self._beats: deque[tuple[Id, Message]] = deque(maxlen=64)  # not confirmed yet
        self._clocks: deque[tuple[int, int, Id]] = deque()  # local ns, then the engine's ms, and its newest entry
        self._newest = START  # of all that were seen
        self._lost = False
        self._unusable = 0  # the line whose snapshot is damaged
        self._missing_since: int | None = None
        self._ahead_since: int | None = None
        self._reports_next = 0

    def turn(self, wait: float = 0.0) -> None:
        """Take what the engine has, waiting ``wait`` seconds for it at most, and publish it.

        After an EngineError or a SegmentError the next turn goes on.
        """
        asked = self._boottime()
        look = self._engine.look(self._cursor, _MESSAGES, wait)
        self.held = look.held
        head = self._read_head(look)
        self._time(asked, look, head)
        self._confirm()
        if head is None or head.term < self._term:
            # Nothing counts. It is passed over, as an engine that has something does not wait; and read later.
            self._pass_over(look)
            self._again = True
        elif self._again or head.last < self._last:
            # It does now, or the engine went back: what comes next may be below this cursor.
            self._cursor, self._parts, self._again = START, [], False
        else:
            self._take(look.entries, asked)
            self._pass_over(look)
            applied = self._table.applied
            if applied is None or head.line > applied.line or self._missing_since is not None:
                self._load(head, asked)
            else:
                self._compare(head, applied, asked)
        self._last = START if head is None else head.last
        self._report(asked)

    def _pass_over(self, look: Look) -> None:
        if look.entries:
            self._cursor = look.entries[-1][0]
        elif look.first is None:
            self._cursor = START

    def _compare(self, head: Head, applied: Applied, now: int) -> None:
        """Be lost where the source stays behind this table, or level with it in another run of its server."""
        here = applied.line == head.line and applied.seq >= head.seq
        if not here or (applied.seq, applied.run) == (head.seq, head.run):
            self._ahead_since = None
        elif self._ahead_since is None:
            self._ahead_since = now
        elif now > self._ahead_since + _PATIENCE and not self._lost:
            self._lose(
                f"the source is at change {head.seq}, and this table is at {applied.seq} of another history"
            )

    def stop(self) -> None:
        """Take back the report."""
        self._engine.report(self._who, None, 0.0)

    def _read_head(self, look: Look) -> Head | None:
        self.problems.pop("engine_data", None)
        try:
            return None if look.head is None else unpack_head(look.head)
        except FleetDataError as error:
            self.problems["engine_data"] = str(error)
            return None

    # ------------------------------------------------------------------ messages

    def _take(self, entries: list[tuple[Id, bytes]], now: int) -> None:
        """Apply entries in one transaction."""
        applied = self._table.applied
        if applied is None:
            return
        changed: dict[bytes, Row | None] = {}
        digest: int | None = None
        for number, message in self._messages(entries, applied.line):
            if self._is_another_history(message, applied):
                self._lose(f"change {applied.seq} was made in another history of the store")
                return
            if message.as_of and (message.seq, message.run) == (applied.seq, applied.run):
                self._beats.append((number, message))
            if message.prev > applied.seq:
                self._missing_since = self._missing_since or now
            elif message.seq > applied.seq:
                for part in self._whole(message):
                    changed.update((row.key, row) for row in part.rows)
                    changed.update(dict.fromkeys(part.gone))
                    if part is message:
                        applied, digest = applied._replace(seq=part.seq, run=part.run), part.digest
                        self._missing_since = None
            elif message.seq == applied.seq and message.digest is not None:
                digest = message.digest
        self._publish(applied, changed, digest)

    def _messages(self, entries: list[tuple[Id, bytes]], line: int) -> Iterator[tuple[Id, Message]]:
        """Read the entries of this line, but those of a publisher that another one has followed."""
        for number, raw in entries:
            try:
                message = unpack_message(raw)
            except FleetDataError as error:
                # What it said is missing now, which the next message shows.
                self.problems["engine_data"] = str(error)
                continue
            if message.term != number.term:
                self.problems["engine_data"] = (
                    f"entry {number.term} of the log says that its term is {message.term}"
                )
            elif message.line == line and message.term >= self._term and not self._lost:
                self._term = message.term
                yield number, message

    @staticmethod
    def _is_another_history(message: Message, applied: Applied) -> bool:
        """Tell whether message and table come from stores that went different ways since a backup or a move."""
        theirs, ours = first_of(message.run), first_of(applied.run)
        if message.run == applied.run:
            return False
        return applied.seq >= theirs if theirs >= ours else message.seq >= ours

    def _whole(self, message: Message) -> list[Message]:
        """Collect the parts of a change; return them once all are there."""
        span = (message.term, message.prev, message.seq, message.run, message.parts)
        before = [(p.term, p.prev, p.seq, p.run, p.parts) for p in self._parts[:1]]
        if message.part == 0 or before != [span]:
            self._parts = []
        if message.part == len(self._parts):
            self._parts.append(message)
        if len(self._parts) < message.parts:
            return []
        whole, self._parts = self._parts, []
        return whole

    def _publish(self, applied: Applied, changed: dict[bytes, Row | None], digest: int | None) -> None:
        if applied != self._table.applied:
            rows = [row for row in changed.values() if row is not None]
            try:
                self._table.apply(applied, rows, [key for key, row in changed.items() if row is None])
            except BaseException:
                self._cursor, self._parts = START, []  # parts of it may have been read by an earlier turn
                raise
        if digest is not None and digest != self._table.digest:
            self._lose(
                f"the table at change {applied.seq} is not the source's: {self._table.digest:x}, not {digest:x}"
            )

    def _lose(self, why: str) -> None:
        self._lost = True
        self._beats.clear()
        self.problems["lost"] = why
        self._reports_next = 0

    # ------------------------------------------------------------------ snapshots

    def _load(self, head: Head, now: int) -> None:
        """Put the head's snapshot in the place of the table, if it is of a higher line, or newer."""
        snapshot, applied = head.snapshot, self._table.applied
        if snapshot is None or snapshot.line != head.line:
            return
        if applied is not None and (applied.line, applied.seq) >= (snapshot.line, snapshot.seq):
            if self._missing_since is not None and now > self._missing_since + _PATIENCE and not self._lost:
                self._lose(f"the engine has lost what came after change {applied.seq}")
            return
        self._term = head.term  # first: what is published then is this publisher's, whatever happens here
        try:
            self._table.replace(
                Applied(head.store_id, snapshot.line, snapshot.seq, snapshot.run), self._rows_of(snapshot)
            )
        except FleetDataError as error:
            self.problems["engine_data"] = str(error)
            if not isinstance(error, _GoneError):
                self._unusable, self._reports_next = snapshot.line, 0
            return
        self.problems.pop("lost", None)
        self._lost, self._missing_since, self._unusable, self._parts = False, None, 0, []
        self._beats.clear()
        self._cursor = snapshot.after

    def _rows_of(self, snapshot: Snapshot) -> Iterator[Row]:
        """Fetch a snapshot chunk by chunk; FleetDataError if it is not whole, after the last row at the latest."""
        digest = rows = 0
        for number in range(snapshot.chunks):
            chunk = self._engine.fetch(snapshot.id, number)
            if chunk is None:
                raise _GoneError(f"chunk {number} of snapshot {snapshot.id} is gone; a newer one follows")
            for row in unpack_chunk(chunk):
                digest = (digest + row_digest(*row)) & DIGEST_MASK
                rows += 1
                yield row
            self._loading(rows, snapshot.rows)
        if (rows, digest) != (snapshot.rows, snapshot.digest):
            raise FleetDataError(
                f"snapshot {snapshot.id} has {rows} rows with the digest {digest:x}, "
                f"and should have {snapshot.rows} with {snapshot.digest:x}"
            )

    # ------------------------------------------------------------------ age

    def _time(self, asked: int, look: Look, head: Head | None) -> None:
        """Remember how far the clocks are apart, and what was there then."""
        if head is None or head.last < self._newest:
            # The engine has lost something, and an older copy may take its place: what comes next may be old.
            self._clocks.clear()
            return
        self._newest = head.last
        self._clocks.append((asked, look.time, head.last))
        while self._clocks[0][0] < asked - _WINDOW:
            self._clocks.popleft()

    def _confirm(self) -> None:
        """Confirm with the newest beat that the table covers, now that the clocks were read after it, too."""
        applied = self._table.applied
        if applied is None:
            return
        while self._beats and self._beats[0][1].seq <= applied.seq:
            number, beat = self._beats.popleft()
            moment = self._moment_of(number, beat.as_of)
            if beat.line == applied.line and moment is not None and moment > self._confirmed:
                self._confirmed, self._as_of = moment, beat.as_of
        self._table.confirm(Position(self._term, applied.line, applied.seq, self._confirmed, self._as_of))

    def _moment_of(self, number: Id, as_of: int) -> int | None:
        """Return this host's clock when the engine's stood at ``as_of``, or an earlier moment; None: not known."""
        without = max((asked for asked, _, last in self._clocks if last < number), default=0)
        before = max((asked for asked, _, _ in self._clocks if asked <= without - _MARGIN), default=None)
        if before is None or as_of > self._clocks[-1][1]:
            return None
        # The engine's clock says whole ms, and so may be one later than it says.
        distance = min(asked - (ms + 1) * 1_000_000 for asked, ms, _ in self._clocks if asked >= before)
        return min(as_of * 1_000_000 + distance, self._clocks[-1][0])

    def _report(self, now: int) -> None:
        if now < self._reports_next:
            return
        applied = self._table.applied
        line, seq, lost = (0, 0, False) if applied is None else (applied.line, applied.seq, self._lost)
        if self._unusable:
            line, seq, lost = self._unusable, 0, True
        age = (self._boottime() - self._confirmed) // 1_000_000 if self._confirmed else -1
        digest, rows = self._table.digest, len(self._table)
        report = Report(FORMAT, self._host, os.getpid(), self._term, line, seq, lost, age, rows, digest)
        self._engine.report(self._who, pack(report), _REPORT_TTL)
        self._reports_next = now + _REPORT_EVERY
