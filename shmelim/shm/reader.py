"""The reading side of the table, in pure Python: the reference that any faster path is held against.

What: every read runs against the copy that the version word names, and counts only if that word did not move
meanwhile. How::

    v = version                     one aligned 8-byte load
    generation of v not attached?   attach that data segment, start over
    probe copy[v & 1]
    version still v?                yes: the answer is that of version v;  no: start over

Why it is enough: the writer touches ``copy[v & 1]`` only after it has published ``v + 1``. A reader whose second
look still finds ``v`` has therefore finished before the first of those stores. x86-64 keeps loads in order, and
one bytecode's load never moves past another's; ``shared.require_store_order`` refuses other machines.

Trade-offs: a read that a publish overtakes is done again, so a read must be short against the time between two
publishes. Long reads take another way: the arena is an append-only log between two compactions of a copy, so
:meth:`TableReader.snapshot` copies a prefix that nobody changes and replays it (see there).
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, NoReturn, Self, TypeVar, cast

from shmelim.errors import CorruptSegmentError, NotServingError, ReaderClosedError, SegmentError
from shmelim.shm.counting import BATCHES, COUNTS, HITS, MISSES, RECORDS, RETRIES, SNAPSHOTS, ReadingPage, find_page
from shmelim.shm.facts import (
    HEARTBEAT_LIMIT,
    RUNNING,
    TableIdentity,
    TableInfo,
    WriterInfo,
    check_age,
    end_of,
    monotonic,
    monotonic_ns,
    staleness_of,
    writer_of,
)
from shmelim.shm.layout import (
    BRANCH,
    COMMIT,
    COUNT,
    EPOCH,
    FLAG_BITS,
    FLAG_COUNTS,
    HEARTBEAT,
    LIVE,
    MAX_ORDINAL,
    PAGE,
    ROOT_ID,
    ROOT_SIZE,
    SEQUENCE_BITS,
    SEQUENCE_MASK,
    STORE_ID,
    STORE_ID_SIZE,
    USED,
    VERSION,
    WRITER_STATE,
    WRITER_WAKES,
    check_root,
)
from shmelim.shm.native import fence, wait_word
from shmelim.shm.segment import Namespace, Segment
from shmelim.shm.view import Batch, View

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shmelim.shm.following import Position
    from shmelim.shm.replay import Entry

T = TypeVar("T")

LOADING_NUMPY: Final = threading.RLock()
"""Held while numpy is loaded, which the first question about many keys does, and by whoever forks: in a child,
nobody would unlock a module that another thread was just importing. Re-entrant for a signal handler that forks."""

_PATIENCE: Final = 4
"""How many reads may pass without a look at the clock, where they come quickly; as in table.h."""
_SECOND: Final = 1_000_000_000
_LARGE: Final = 1 << 22
"""Bytes of a segment that takes long enough to unmap for a thread of its own: 0.1 ms and more."""

_BATCH_ATTEMPTS: Final = 16
_IN_PLACE: Final = 3
"""How often a record is decoded where it stands before it is copied first."""

_SNAPSHOT_ATTEMPTS: Final = 1000
_ATTACH_PAUSE: Final = 0.01
_POLL_FIRST: Final = 20e-6
_POLL_LONGEST: Final = 2e-3
_LOOK_AT_NAME: Final = 0.5
_now = monotonic


class Record(NamedTuple):
    """One entry as a lookup returns it."""

    flags: int
    ordinal: int
    data: bytes


class TableSnapshot(NamedTuple):
    """Every entry as of one version, in the order of their ordinals."""

    version: int
    entries: dict[bytes, Entry]


class _OvertakenError(Exception):
    """Publishes came faster than a read of many keys."""


class _Closed:
    """Stands for the view that a closed reader no longer has."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, _: str) -> NoReturn:
        raise closed(self._name)


def closed(name: str) -> ReaderClosedError:
    """Return the error of every read of a reader that was closed."""
    return ReaderClosedError(f"this reader of {name!r} is closed", hint="make another one to read on")


class TableReader:
    """Lock-free reads of a shared table, whose segments are in ``namespace``.

    NotServingError where nothing has been published under that name yet; CorruptSegmentError, SegmentFormatError
    or UntrustedSegmentError where what stands there cannot be read.

    ``retries`` counts the reads that started over because a publish overtook them; not exact under threads.

    Thread-safe, and a read may interrupt another (in a signal handler, a finalizer, a trace function): attaching
    takes no lock, but makes a view and stores one reference to it. After a fork the child goes on with the same
    mappings. Memory is unmapped by the garbage collector, since a thread may be in the middle of a read.

    Where the writer is not known to live, a reader looks whether the name leads to another root segment by now,
    once a second at most, and follows it there. That is found out by every fourth read, or by each where they come
    slowly.

    With ``max_staleness``, in seconds, each read of entries first looks how old the table is, which takes some
    microseconds, and raises StaleError where that is more, or not known. ``check`` is called with the ``store_id``
    of each root segment before it is read, and raises where this reader cannot read that.
    """

    _view_type: ClassVar[type[View]] = View

    def __init__(
        self,
        namespace: Namespace,
        *,
        max_staleness: float | None = None,
        check: Callable[[bytes], Any] = lambda _: None,
    ) -> None:
        self._namespace = namespace
        self._check = check
        self._max_staleness = max_staleness
        self._guarded = max_staleness is not None
        self.retries = 0
        # Where it is counted what is read, see counting.py; found by the first read.
        self._page: ReadingPage | None = None
        self._seeks_page = namespace.readers_prefix is not None
        self._count_in(None, 0)
        # Reads until the next look at the clock, and when that leads to the next look at the writer.
        self._patience = 0
        self._next_look = 0.0
        self._looked = -1.0
        # Read and replaced as one reference: root and data segment belong together.
        self._view: View = self._view_of(self._open_root())

    @classmethod
    def attached(cls, namespace: Namespace, wait: float | None, **options: Any) -> Self:
        """Return a reader, made within so many seconds once something is published; None: at once, or not."""
        deadline = end_of(wait)
        while True:
            try:
                return cls(namespace, **options)
            except NotServingError:
                if monotonic() >= deadline:
                    raise
            time.sleep(_ATTACH_PAUSE)

    # ------------------------------------------------------------------ single lookups

    @property
    def version(self) -> int:
        """A number that grows with every publish, and never goes back: the sequence. One load."""
        if self._patience:
            self._patience -= 1
        elif _now() < self._next_look:
            self._patience = _PATIENCE - 1
        else:
            self._watch(of_entries=False)
        while True:
            view = self._view
            version = view.root_words[VERSION]
            if version >> SEQUENCE_BITS == view.generation:
                return version & SEQUENCE_MASK
            self._attach()

    def flags(self, key: bytes) -> int:
        """Return the flags of ``key``, 0 if it is absent. One probe; about a microsecond."""
        _check_keys([key])
        if self._patience:
            self._patience -= 1
        elif _now() < self._next_look:
            self._patience = _PATIENCE - 1
        else:
            self._watch()
        while True:
            view = self._view
            words = view.root_words
            version = words[VERSION]
            if version >> SEQUENCE_BITS != view.generation:
                self._attach()
                continue
            try:
                packed = view.probe(version & 1, key)
            except CorruptSegmentError:
                if words[VERSION] == version:
                    raise
            else:
                if words[VERSION] == version:
                    self._counts[HITS if packed & 1 else MISSES] += 1
                    return packed & 0xFF
            self._retry()

    def get(self, key: bytes) -> Record | None:
        """Return flags, ordinal and a copy of the record of ``key``, or None."""
        found = self._entry(key)
        return None if found is None else Record(*found)

    def read(self, key: bytes, decode: Callable[[memoryview], T]) -> T | None:
        """Run ``decode`` on the record's bytes in shared memory and return its result, or None if absent.

        ``decode`` may run several times and may see bytes that are being overwritten: its result (or its
        error) counts only if no publish overtook it. After three times it is given a copy, and that call
        counts. It must copy what it keeps; the view, which is read-only, is released afterwards.
        """

        def look(view: View, version: int) -> tuple[T] | None:
            span = self._span(view, version, key)
            if span is None:
                return None
            start, end, _, _ = span
            with view.segment.window[start:end] as window:
                return (decode(window),)

        self._tally(RECORDS)
        try:
            found = self._consistently(look, _IN_PLACE)
        except _OvertakenError:
            copied = self._copied(key)
            if copied is None:
                return None
            with memoryview(copied) as window:
                return decode(window)
        return None if found is None else found[0]

    def _entry(self, key: bytes) -> tuple[int, int, bytes] | None:
        """Return flags, ordinal and a copy of the record of ``key``; None if it is absent."""

        def look(view: View, version: int) -> tuple[int, int, bytes] | None:
            span = self._span(view, version, key)
            if span is None:
                return None
            start, end, ordinal, flags = span
            return flags, ordinal, view.memory[start:end]

        found = self._consistently(look)
        self._tally(RECORDS)
        return found

    def _copied(self, key: bytes) -> bytes | None:
        """Return a copy of a record, however fast publishes come; None if ``key`` is absent.

        What a version says of it is not written over before the epoch of its copy moves, as in :meth:`snapshot`.
        """

        def look(view: View, version: int) -> tuple[View, int, int, tuple[int, int, int, int] | None]:
            at = view.header_word[version & 1] + EPOCH
            return view, at, view.words[at], self._span(view, version, key)

        while True:
            view, at, epoch, span = self._consistently(look)
            if span is None:
                return None
            record = view.memory[span[0] : span[1]]
            fence()
            if view.words[at] == epoch:
                return record
            self._retry()

    @staticmethod
    def _span(view: View, version: int, key: bytes) -> tuple[int, int, int, int] | None:
        """Return first byte, end, ordinal and flags of the record of ``key``; None if it is absent."""
        _check_keys([key])
        packed = view.probe(version & 1, key)
        return (*view.record_span(version & 1, packed), packed & 0xFF) if packed else None

    def _consistently(self, look: Callable[[View, int], T], attempts: int = -1, *, of_entries: bool = True) -> T:
        """Return what ``look`` makes of a view at a version; start over if a publish came between.

        The frame of all reads but :meth:`flags`, where it stands unrolled. An exception counts as a result does:
        only if nothing was published meanwhile. _OvertakenError once a publish came between ``attempts`` times.
        """
        if self._patience:
            self._patience -= 1
        elif _now() < self._next_look:
            self._patience = _PATIENCE - 1
        else:
            self._watch(of_entries=of_entries)
        while attempts:
            view = self._view
            words = view.root_words
            version = words[VERSION]
            if version >> SEQUENCE_BITS != view.generation:
                self._attach()
                continue
            fence()
            try:
                result = look(view, version)
            except Exception:
                fence()
                if words[VERSION] == version:
                    raise
            else:
                fence()
                if words[VERSION] == version:
                    return result
            self._retry()
            attempts -= 1
        raise _OvertakenError

    # ------------------------------------------------------------------ many at once

    def flags_of(self, keys: Sequence[bytes]) -> NDArray[np.uint8]:
        """Return the flags of many keys as of one version, as a ``uint8`` array of the same length.

        Hashing happens before the version is looked at, so that the part that a publish can overtake stays
        short. Where publishes still come faster, the answer is taken from a snapshot, so that this ends.
        """
        with LOADING_NUMPY:
            import numpy as np  # noqa: PLC0415

        _check_keys(keys)
        batch = Batch(keys, self._view.seed)

        def look(view: View, version: int) -> NDArray[np.uint64]:
            if batch.seed != view.seed:  # that of another generation
                batch.hash_for(view.seed)
            return view.probe_many(version & 1, batch)

        try:
            packed = self._consistently(look, _BATCH_ATTEMPTS)
        except _OvertakenError:
            return self._flags_of_snapshot(keys)
        self._tally(BATCHES)
        return (packed & np.uint64(0xFF)).astype(np.uint8)

    def _flags_of_snapshot(self, keys: Sequence[bytes]) -> NDArray[np.uint8]:
        import numpy as np  # noqa: PLC0415

        entries = self.snapshot().entries
        return np.fromiter((entries[key].flags if key in entries else 0 for key in keys), np.uint8, len(keys))

    def snapshot(self, *, verify: bool = False) -> TableSnapshot:
        """Return every entry as of one version, under any rate of changes ("Long reads" in docs/architecture.md).

        What is copied is the log of a copy up to its ``used`` mark, garbage included: never more than the arena.
        ``verify`` checks every entry's checksum, too. CorruptSegmentError where the log contradicts itself;
        SegmentError where the copy was compacted during every one of a thousand attempts.
        """
        from shmelim.shm.replay import replay  # noqa: PLC0415  # for who asks

        for _ in range(_SNAPSHOT_ATTEMPTS):
            view, version, head = self._consistently(lambda view, version: (view, version, view.head(version & 1)))
            used, count = head[USED], head[COUNT]
            if used > view.arena_size:
                raise view.corrupt(f"says {used} bytes used of an arena of {view.arena_size}")
            start = view.arena[version & 1]
            log = view.memory[start : start + used]
            fence()
            if view.head(version & 1)[EPOCH] != head[EPOCH]:
                self._retry()
                continue
            entries = replay(log, view.segment.label, seed=view.seed if verify else None)
            if len(entries) != count:
                raise view.corrupt(f"says {count} entries, its log gives {len(entries)}")
            self._tally(SNAPSHOTS)
            return TableSnapshot(version & SEQUENCE_MASK, entries)
        raise SegmentError(
            f"segment {self._view.segment.label} was written anew {_SNAPSHOT_ATTEMPTS:,} times "
            "while it was copied",
            hint="read again; something replaces the whole state without a pause",
        )

    # ------------------------------------------------------------------ looking at the table itself

    def identity(self) -> TableIdentity:
        """Return whose state this is, as of one version."""

        def look(view: View, version: int) -> TableIdentity:
            head = view.head(version & 1)
            if head[COMMIT] > MAX_ORDINAL:
                raise view.corrupt(f"says commit {head[COMMIT]}, which no store has made")
            return TableIdentity(
                root_id=view.root.words[ROOT_ID],
                store_id=view.root.memory[STORE_ID : STORE_ID + STORE_ID_SIZE],
                sequence=version & SEQUENCE_MASK,
                commit=head[COMMIT],
                entries=head[COUNT],
                heartbeat_age=writer_of(view.root).heartbeat_age,
                branch=view.root.words[BRANCH],
            )

        return self._consistently(look, of_entries=False)

    def info(self) -> TableInfo:
        """Return sizes and counts as of one version."""

        def look(view: View, version: int) -> TableInfo:
            head = view.head(version & 1)
            return TableInfo(
                version=version & SEQUENCE_MASK,
                generation=view.generation,
                capacity=view.capacity,
                entries=head[COUNT],
                flag_counts=tuple(head[FLAG_COUNTS : FLAG_COUNTS + FLAG_BITS]),
                arena_size=view.arena_size,
                arena_used=head[USED],
                arena_live=head[LIVE],
                segment_size=view.segment.size,
            )

        return self._consistently(look, of_entries=False)

    def count_flag(self, bit: int) -> int:
        """Return how many entries have the flag with the value ``1 << bit``, 0 to 7. One load."""
        if not 0 <= bit < FLAG_BITS:
            raise ValueError(f"bit {bit} must be 0 to {FLAG_BITS - 1}")

        def look(view: View, version: int) -> int:
            count = view.words[view.header_word[version & 1] + FLAG_COUNTS + bit]
            if count > view.capacity:
                raise view.corrupt(f"says that {count} entries have a flag, and has {view.capacity} slots")
            return count

        return self._consistently(look)

    def writer(self) -> WriterInfo:
        """Return who writes and whether it lives; if that is not sure, look where the name leads now."""
        info = writer_of(self._view.root)
        if not info.alive:
            with contextlib.suppress(NotServingError, SegmentError):
                if self.reattach():
                    info = writer_of(self._view.root)
        return info

    def source(self) -> str | None:
        """Return whom a follower that writes this table follows; None where the writer is the source."""
        from shmelim.shm.following import source_of  # noqa: PLC0415  # for who asks

        return source_of(self._view.root) or None

    def position(self) -> Position | None:
        """Return how far a follower that writes this table is; None where the writer is the source."""
        from shmelim.shm.following import position_of  # noqa: PLC0415  # for who asks

        return position_of(self._view.root)

    def staleness(self) -> float | None:
        """Return how old the table is at most, in seconds; None where that is not known. Some microseconds.

        Of a follower's table: how long ago it was known last that its source had nothing newer. Of another: 0
        while its writer lives, and how long ago that gave its last heartbeat once it is dead.
        """
        return staleness_of(self._view.root)

    def wait_for_change(self, timeout: float | None = None, since: int | None = None) -> bool:
        """Wait until the version is another than ``since`` (default: than now); False after ``timeout`` s.

        Sleeps in the kernel, which the publish ends, and looks at the name every half second. Where writer and
        reader are not both compiled it polls, every 20 µs at first and every 2 ms later: 0.5 % of a core.
        """
        from shmelim.system.arguments import number, whole  # noqa: PLC0415  # as few readers wait

        deadline = None if timeout is None else monotonic() + number("timeout", timeout, least=-inf)
        seen = self._followed_version() if since is None else whole("since", since, least=-inf)
        pause = _POLL_FIRST
        while True:
            root = self._view.root
            word = root.words[VERSION]  # first: a publish from here on is not slept through
            if self._followed_version() != seen:
                return True
            if self._view.root is not root:
                continue
            left = _LOOK_AT_NAME if deadline is None else min(deadline - monotonic(), _LOOK_AT_NAME)
            if left <= 0:
                return False
            if not (root.words[WRITER_WAKES] and wait_word(root, VERSION, word, left)):
                time.sleep(min(pause, left))
                pause = min(pause * 1.5, _POLL_LONGEST)

    def _followed_version(self) -> int:
        """Return the version, or that of a withdrawn root segment while there is not another."""
        try:
            return self.version
        except (NotServingError, SegmentError):
            return self._view.root.words[VERSION] & SEQUENCE_MASK

    # ------------------------------------------------------------------ attaching

    def _watch(self, *, of_entries: bool = True) -> None:
        """Look whether the writer lives; if that is not sure, look at the name. Once a second at most.

        Every fourth read looks at the clock for this; where they come slowly, each of them; and each of a guarded
        table, whose age is looked at before entries are.
        """
        self._next_look = 0.0 if self._guarded else _now() + 1
        if of_entries and self._seeks_page:
            self._find_page()
        words = self._view.root_words
        age = monotonic_ns() - words[HEARTBEAT]
        if words[WRITER_STATE] not in RUNNING or not -_SECOND < age < HEARTBEAT_LIMIT * _SECOND:
            self._look_at_name()
        if of_entries and self._max_staleness is not None:
            check_age(self._view.root, self._max_staleness, self._namespace.name)

    def _find_page(self) -> None:
        find_page(self, self._namespace)

    def _count_in(self, page: Any, first: int) -> None:
        """Count in the words of a page from now on, or, with None, in this process's own; as in _native.c."""
        if page is None:
            self._counts: Any = [0] * COUNTS
        else:
            words = page[first : first + COUNTS]
            if self._page is None:
                for which, count in enumerate(self._counts):
                    words[which] += count
            self._counts = words
        self._patience, self._next_look = 0, 0.0

    def _tally(self, which: int) -> None:
        self._counts[which] += 1

    def _retry(self) -> None:
        self.retries += 1
        self._tally(RETRIES)

    def _look_at_name(self) -> None:
        """Follow the name, unless that was tried within the last second."""
        now = _now()
        if now >= self._looked + 1:
            self._looked = now
            with contextlib.suppress(NotServingError, SegmentError):
                self.reattach()

    def reattach(self) -> bool:
        """Follow the name to another root segment, if it leads to one now; tell whether it did.

        Reads do this by themselves, in a while, once the writer is dead: somebody may have removed the names, and
        another writer made them again. A name that leads nowhere, or to a root segment in which nothing is
        published, leaves the reader where it is. SegmentError where it leads to what cannot be read.
        """
        view = self._view
        try:
            root = self._open_root()
        except NotServingError:
            return False
        if root.words[ROOT_ID] == view.header.root_id or not root.words[VERSION] >> SEQUENCE_BITS:
            return False
        return self._move(view, self._view_of(root))

    def _attach(self) -> None:
        """Attach the data segment that the version word names now."""
        view = self._view
        if view.root.words[VERSION] >> SEQUENCE_BITS != view.generation:
            self._move(view, self._view_of(view.root))

    def _move(self, old: View, new: View) -> bool:
        """Go over to another view, unless a nested read or another thread has moved meanwhile; tell whether."""
        # Nothing runs between the comparison and the store: no call, no jump back.
        if self._view is old:
            self._view = new
            if new.root is not old.root:
                # Its name may have been removed together with the old root's.
                self._seeks_page = self._namespace.readers_prefix is not None
            _unmap_elsewhere(old.segment)
            return True
        return False

    def close(self) -> None:
        """Let go of the table: every later read raises ReaderClosedError. Idempotent.

        Its memory is given back once no thread is in the middle of a read any more. A read that is just attaching
        does not bring it back: it finds another view than it had, and leaves that.
        """
        self._view = cast("View", _Closed(self._namespace.name))
        self._stop_counting()

    def _stop_counting(self) -> None:
        self._count_in(None, 0)
        self._page, self._seeks_page = None, False

    def _open_root(self) -> Segment:
        root = self._namespace.open_root()
        if root.size < ROOT_SIZE:
            raise CorruptSegmentError(f"segment {root.label} is {root.size} bytes long, not {ROOT_SIZE}")
        if root.memory[:ROOT_SIZE].strip(b"\0"):
            check_root(root.memory[:PAGE], root.label)
            self._check(root.memory[STORE_ID : STORE_ID + STORE_ID_SIZE])
        return root

    def _view_of(self, root: Segment) -> View:
        """Return a view of the data segment that a root's version word names now.

        Where nothing is published in it (any more), or its segment is gone or another root's, the name decides: it
        may lead to another root segment by now.
        """
        while True:
            version = root.words[VERSION]
            failure: NotServingError | SegmentError
            try:
                if version >> SEQUENCE_BITS:
                    data = self._namespace.open_data(version >> SEQUENCE_BITS)
                    return self._view_type(data, version, root)
                failure = self._unpublished(root)
            except (NotServingError, SegmentError) as error:
                failure = error
            if root.words[VERSION] == version:
                other = self._open_root()
                if other.words[ROOT_ID] == root.words[ROOT_ID]:
                    raise failure
                root = other

    def _unpublished(self, root: Segment) -> NotServingError:
        name, writer = self._namespace.name, writer_of(root)
        if writer.alive:
            return NotServingError(
                f"{name!r} is not served yet: its writer, process {writer.pid}, is still starting",
                hint="try again in a moment, or attach with wait=seconds",
            )
        return NotServingError(
            f"nothing is served under the name {name!r}: its writer ended before it published anything",
            hint=f"start it with `shmelim serve --name {name}`",
        )


def _unmap_elsewhere(segment: Segment) -> None:
    """Give a large segment's pages back in a thread of its own: it takes a millisecond for a few megabytes.

    Not ``threading``, whose locks a read in a signal handler may find taken.
    """
    discard = getattr(segment.memory, "discard", None)
    if segment.size >= _LARGE and discard is not None:
        # No thread can be started while the interpreter ends, or at a limit: then whoever is last unmaps.
        with contextlib.suppress(RuntimeError):
            _thread.start_new_thread(discard, ())


def _check_keys(keys: Sequence[object]) -> None:
    """Raise TypeError for what is not bytes: a text must not read as absent."""
    for key in keys:
        if not isinstance(key, bytes):
            raise TypeError(f"key must be bytes, not {type(key).__name__}")


os.register_at_fork(
    before=LOADING_NUMPY.acquire, after_in_parent=LOADING_NUMPY.release, after_in_child=LOADING_NUMPY.release
)
