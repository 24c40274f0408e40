"""The reading side of the table, in pure Python: the reference that any faster path is held against.

What: every read runs against the copy that the version word names, and counts only if that word did not move
meanwhile. How::

    v = version                     one aligned 8-byte load
    generation of v not attached?   attach that data segment, start over
    probe copy[v & 1]
    version still v?                yes: the answer is that of version v;  no: start over

Why it is enough: the writer touches ``copy[v & 1]`` only after it has published ``v + 1``. A reader whose second
look still finds ``v`` has therefore finished before the first of those stores. x86-64 keeps loads in order, and
one bytecode's load never moves past another's; ``segment.require_store_order`` refuses other machines.

Trade-offs: a read that a publish overtakes is done again, so a read must be short against the time between two
publishes. Long reads take another way: the arena is an append-only log between two compactions of a copy, so
:meth:`TableReader.snapshot` copies a prefix that nobody changes and replays it (see there).

Everything read from shared memory is checked against the reader's own mapping before it is used as an offset or
a length: bad bytes give :class:`CorruptSegmentError`, never a crash.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np
import xxhash

from shmelim.errors import CorruptSegmentError, NotServingError, SegmentError
from shmelim.shm.layout import (
    ARENA_ENTRY,
    COPY_HEADER_SIZE,
    COUNT,
    ENTRY_HEADER,
    EPOCH,
    FLAG_COUNTS,
    HEARTBEAT,
    INLINE_KEY,
    KEY_LENGTH_SHIFT,
    LIVE,
    OFFSET_SHIFT,
    PACKED,
    PAGE,
    ROOT_SIZE,
    SEQUENCE_BITS,
    SLOT_WORDS,
    USED,
    VERSION,
    WORD,
    WRITER_PID,
    WRITER_STARTED,
    WRITER_STATE,
    DataHeader,
    check_root,
    unpack_data_header,
)
from shmelim.shm.replay import Entry, replay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from shmelim.shm.segment import Namespace, Segment

__all__ = ["Record", "TableInfo", "TableReader", "TableSnapshot", "WriterInfo", "WriterState"]

T = TypeVar("T")

HEARTBEAT_LIMIT: Final = 3.0
"""Seconds without a heartbeat after which a writer counts as dead."""

_BATCH_ATTEMPTS: Final = 16
_POLL_FIRST: Final = 20e-6
_POLL_LONGEST: Final = 2e-3


class WriterState:
    """The values of the writer's state word."""

    NONE = 0
    STARTING = 1
    SERVING = 2
    STOPPED = 3
    NAMES = ("none", "starting", "serving", "stopped")


class Record(NamedTuple):
    """One entry as a lookup returns it."""

    flags: int
    ordinal: int
    data: bytes


class WriterInfo(NamedTuple):
    """Who writes: ``alive`` is decided by state and heartbeat alone, which hold across pid namespaces.

    ``heartbeat_age`` is in seconds, ``started_ms`` in ms since 1970 (UTC).
    """

    pid: int
    alive: bool
    heartbeat_age: float
    state: str
    started_ms: int


class TableInfo(NamedTuple):
    """How full the table is; sizes in bytes, ``capacity`` and ``count`` in entries."""

    version: int
    generation: int
    sequence: int
    capacity: int
    count: int
    flag_counts: tuple[int, ...]
    arena_size: int
    arena_used: int
    arena_live: int
    segment_size: int


class TableSnapshot(NamedTuple):
    """Every entry as of one version, in the order of their ordinals."""

    version: int
    entries: dict[bytes, Entry]


class _View:
    """An attached data segment: immutable once made, so that one reference read is a consistent set."""

    __slots__ = ("arena", "arena_size", "capacity", "generation", "header", "mask", "memory", "seed")
    __slots__ += ("segment", "slot_rows", "slot_words", "slots", "words")

    def __init__(self, segment: Segment, header: DataHeader) -> None:
        self.segment = segment
        self.memory = segment.memory
        self.words = segment.words
        self.generation = header.generation
        self.seed = header.seed
        self.capacity = header.capacity
        self.mask = header.capacity - 1
        self.arena_size = header.arena_size
        self.header = tuple(header.copy_base(copy) // WORD for copy in (0, 1))
        self.slots = tuple(header.slots_base(copy) for copy in (0, 1))
        self.slot_words = tuple(base // WORD for base in self.slots)
        self.arena = tuple(header.arena_base(copy) for copy in (0, 1))
        count = header.capacity * SLOT_WORDS
        self.slot_rows = tuple(
            np.frombuffer(segment.memory, np.uint64, count, base).reshape(-1, SLOT_WORDS)
            for base in self.slots
        )


class TableReader:
    """Lock-free reads of a shared table.

    Parameters
    ----------
    namespace
        Where its segments are.

    Attributes
    ----------
    retries : int
        How often a read started over because a publish overtook it; a statistic, not exact under threads.

    Raises
    ------
    NotServingError
        Nothing has been published under that name yet.
    CorruptSegmentError, SegmentFormatError, UntrustedSegmentError
        What stands there cannot be read.

    Notes
    -----
    Thread-safe: the attached view is replaced by a single reference store; attaching is serialised by a lock.
    After a fork the child goes on with the same mappings. Closing is left to the garbage collector, since a
    thread may be in the middle of a read.

    """

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._attaching = threading.Lock()
        self.retries = 0
        # Both are replaced under `_attaching` and read without it, each as one reference.
        self._root: Segment = self._open_root()
        self._view: _View = self._attach(self._root.words[VERSION])

    # ------------------------------------------------------------------ single lookups

    @property
    def version(self) -> int:
        """The version word: generation << 48 | sequence. It moves with every publish."""
        return self._current(self._root.words[VERSION])[0]

    def flags(self, key: bytes) -> int:
        """Return the flags of ``key``, 0 if it is absent. One probe; about a microsecond."""
        while True:
            root = self._root
            version = root.words[VERSION]
            view = self._view
            if version >> SEQUENCE_BITS != view.generation:
                self._attach(version)
                continue
            try:
                packed = _probe(view, version & 1, key)
            except CorruptSegmentError:
                if root.words[VERSION] == version:
                    raise
            else:
                if root.words[VERSION] == version:
                    return packed & 0xFF
            self.retries += 1

    def get(self, key: bytes) -> Record | None:
        """Return flags, ordinal and a copy of the record of ``key``, or None."""
        return self._locate(key, lambda view, start, end: view.memory[start:end], Record)

    def read(self, key: bytes, decode: Callable[[memoryview], T]) -> T | None:
        """Run ``decode`` on the record's bytes in shared memory and return its result, or None if absent.

        ``decode`` may run several times and may see bytes that are being overwritten: its result (or its
        error) counts only if no publish overtook it. It must copy what it keeps; the view is released
        afterwards.
        """

        def run(view: _View, start: int, end: int) -> T:
            with memoryview(view.memory) as whole, whole[start:end] as window:
                return decode(window)

        return self._locate(key, run, lambda _flags, _ordinal, result: result)

    def _locate(
        self,
        key: bytes,
        take: Callable[[_View, int, int], Any],
        build: Callable[[int, int, Any], Any],
    ) -> Any:
        """Find ``key``, take something from its record's bytes, and start over if a publish came between."""
        while True:
            root = self._root
            version = root.words[VERSION]
            view = self._view
            if version >> SEQUENCE_BITS != view.generation:
                self._attach(version)
                continue
            copy = version & 1
            try:
                packed = _probe(view, copy, key)
                if packed:
                    start, end, ordinal = _record_span(view, copy, packed)
                    result = take(view, start, end)
            except Exception:
                if root.words[VERSION] == version:
                    raise
                self.retries += 1
                continue
            if root.words[VERSION] == version:
                return build(packed & 0xFF, ordinal, result) if packed else None
            self.retries += 1

    # ------------------------------------------------------------------ many at once

    def flags_of(self, keys: Sequence[bytes]) -> NDArray[np.uint8]:
        """Return the flags of many keys as of one version, as a ``uint8`` array of the same length.

        Hashing happens before the version is looked at, so that the part that a publish can overtake stays
        short. Where publishes still come faster, the answer is taken from a snapshot, so that this ends.
        """
        if not keys:
            return np.zeros(0, np.uint8)
        lengths = np.fromiter(map(len, keys), np.uint64, len(keys))
        inline = b"".join([key[:INLINE_KEY].ljust(INLINE_KEY, b"\0") for key in keys])
        wanted = np.frombuffer(inline, np.uint64).reshape(-1, INLINE_KEY // WORD)
        seed, hashes = None, lengths
        for _ in range(_BATCH_ATTEMPTS):
            root = self._root
            version = root.words[VERSION]
            view = self._view
            if version >> SEQUENCE_BITS != view.generation:
                self._attach(version)
                continue
            if seed != view.seed:
                seed = view.seed
                hashes = np.fromiter(
                    (xxhash.xxh64_intdigest(key, seed) for key in keys), np.uint64, len(keys)
                )
                continue
            try:
                packed = _probe_many(view, version & 1, keys, lengths, wanted, hashes)
            except CorruptSegmentError:
                if root.words[VERSION] == version:
                    raise
            else:
                if root.words[VERSION] == version:
                    return (packed & np.uint64(0xFF)).astype(np.uint8)
            self.retries += 1
        entries = self.snapshot().entries
        return np.fromiter((entries[key].flags if key in entries else 0 for key in keys), np.uint8, len(keys))

    def snapshot(self, *, verify: bool = False) -> TableSnapshot:
        """Return every entry as of one version.

        The arena of a copy is a log: until the copy is compacted (which first moves its epoch word), what
        stands below the ``used`` mark of a version is never written again. So one copy of that prefix,
        taken while the epoch stood still, holds the state of that version however many publishes happened
        meanwhile; replaying it gives the entries. That makes the whole table readable under any rate of
        mutations, at the price of reading the garbage too (never more than the arena).

        Parameters
        ----------
        verify
            Also check every entry's checksum.

        Raises
        ------
        CorruptSegmentError
            The log contradicts itself.

        """
        while True:
            root = self._root
            version = root.words[VERSION]
            view = self._view
            if version >> SEQUENCE_BITS != view.generation:
                self._attach(version)
                continue
            copy = version & 1
            header = view.header[copy]
            epoch, used, count = (view.words[header + field] for field in (EPOCH, USED, COUNT))
            if root.words[VERSION] != version:
                self.retries += 1
                continue
            if used > view.arena_size:
                raise CorruptSegmentError(
                    f"segment {view.segment.label} says {used} bytes used of an arena of {view.arena_size}"
                )
            start = view.arena[copy]
            log = view.memory[start : start + used]
            if view.words[header + EPOCH] != epoch:
                self.retries += 1
                continue
            entries = replay(log, view.segment.label, seed=view.seed if verify else None)
            if len(entries) != count:
                raise CorruptSegmentError(
                    f"segment {view.segment.label} says {count} entries, its log gives {len(entries)}"
                )
            return TableSnapshot(version, entries)

    # ------------------------------------------------------------------ looking at the table itself

    def info(self) -> TableInfo:
        """Return sizes and counts as of one version."""
        while True:
            root = self._root
            version = root.words[VERSION]
            view = self._view
            if version >> SEQUENCE_BITS != view.generation:
                self._attach(version)
                continue
            base = view.header[version & 1]
            words = view.words[base : base + COPY_HEADER_SIZE // WORD].tolist()
            if root.words[VERSION] == version:
                return TableInfo(
                    version=version,
                    generation=view.generation,
                    sequence=version & ((1 << SEQUENCE_BITS) - 1),
                    capacity=view.capacity,
                    count=words[COUNT],
                    flag_counts=tuple(words[FLAG_COUNTS : FLAG_COUNTS + 8]),
                    arena_size=view.arena_size,
                    arena_used=words[USED],
                    arena_live=words[LIVE],
                    segment_size=view.segment.size,
                )
            self.retries += 1

    def count_flag(self, bit: int) -> int:
        """Return how many entries have the flag with the value ``1 << bit``. One load."""
        while True:
            root = self._root
            version = root.words[VERSION]
            view = self._view
            if version >> SEQUENCE_BITS != view.generation:
                self._attach(version)
                continue
            count = view.words[view.header[version & 1] + FLAG_COUNTS + bit]
            if root.words[VERSION] == version:
                return count
            self.retries += 1

    def writer(self) -> WriterInfo:
        """Return who writes and whether it lives. Looks whether the root segment was replaced meanwhile."""
        info = self._writer_of(self._root)
        if not info.alive and self.reattach():
            info = self._writer_of(self._root)
        return info

    def reattach(self) -> bool:
        """Follow the name to another root segment, if it leads to one now; tell whether it did.

        Needed only after somebody removed the root segment behind a dead writer's back: a living writer
        tells its readers by itself.
        """
        if not self._namespace.root_replaced(self._root):
            return False
        with self._attaching:
            self._root = self._open_root()
        self._current(self._root.words[VERSION])
        return True

    def wait_for_change(self, timeout: float | None = None, since: int | None = None) -> bool:
        """Wait until the version is another than ``since`` (default: than now); False after ``timeout`` s.

        Polls the version word, every 20 µs at first and every 2 ms later: readers own no memory that a
        writer could use to wake them. Costs about 0.5 % of a core while waiting long.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        seen = self._root.words[VERSION] if since is None else since
        pause = _POLL_FIRST
        while self._root.words[VERSION] == seen:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                pause = min(pause, left)
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_LONGEST)
        return True

    @staticmethod
    def _writer_of(root: Segment) -> WriterInfo:
        words = root.words
        state = words[WRITER_STATE]
        age = max(0, time.monotonic_ns() - words[HEARTBEAT]) / 1e9
        return WriterInfo(
            pid=words[WRITER_PID],
            alive=state in (WriterState.STARTING, WriterState.SERVING) and age < HEARTBEAT_LIMIT,
            heartbeat_age=age,
            state=WriterState.NAMES[state] if state < len(WriterState.NAMES) else f"unknown ({state})",
            started_ms=words[WRITER_STARTED],
        )

    # ------------------------------------------------------------------ attaching

    def _open_root(self) -> Segment:
        root = self._namespace.open_root()
        if root.size < ROOT_SIZE:
            raise CorruptSegmentError(f"segment {root.label} is {root.size} bytes long, not {ROOT_SIZE}")
        if root.memory[:ROOT_SIZE].strip(b"\0"):
            check_root(root.memory[:PAGE], root.label)
        return root

    def _current(self, version: int) -> tuple[int, _View]:
        """Return the version word and its attached view, as of one moment."""
        while True:
            view = self._view
            if version >> SEQUENCE_BITS == view.generation:
                return version, view
            self._attach(version)
            version = self._root.words[VERSION]

    def _attach(self, version: int) -> _View:
        """Make the data segment of ``version``'s generation the attached one.

        A segment that is gone although the version word still names it was removed by somebody else.
        """
        with self._attaching:
            while True:
                version = self._root.words[VERSION]
                generation = version >> SEQUENCE_BITS
                view: _View | None = getattr(self, "_view", None)
                if view is not None and view.generation == generation:
                    return view
                if generation == 0:
                    # Never published, or the writer withdrew this root because its name leads elsewhere.
                    if not self._namespace.root_replaced(self._root):
                        raise NotServingError(
                            f"the writer of {self._namespace.name!r} has not published anything yet",
                            hint=f"see `shmelim status --name {self._namespace.name}`",
                        )
                    self._root = self._open_root()
                    continue
                try:
                    segment = self._namespace.open_data(generation)
                    header = unpack_data_header(
                        segment.memory[:PAGE], segment.size, generation, segment.label
                    )
                except (NotServingError, SegmentError):
                    if self._root.words[VERSION] != version:
                        continue
                    raise
                self._view = _View(segment, header)
                return self._view


def _probe(view: _View, copy: int, key: bytes) -> int:
    """Return the packed word of ``key``'s slot, 0 if it is absent. Linear probing from the hash."""
    digest = xxhash.xxh64_intdigest(key, view.seed)
    words = view.words
    mask = view.mask
    length = len(key)
    inline = key[:INLINE_KEY]
    base = view.slot_words[copy]
    index = digest & mask
    for _ in range(view.capacity):
        slot = base + index * SLOT_WORDS
        packed: int = words[slot + PACKED]
        if not packed:
            return 0
        if words[slot] == digest and packed >> KEY_LENGTH_SHIFT & 0xFF == length:
            start = (slot + 1) * WORD
            if view.memory[start : start + len(inline)] == inline and (
                length <= INLINE_KEY or _arena_key(view, copy, packed) == key
            ):
                return packed
        index = (index + 1) & mask
    raise CorruptSegmentError(f"segment {view.segment.label} has no empty slot: a lookup cannot end")


def _arena_key(view: _View, copy: int, packed: int) -> bytes:
    """Return a long key in full; a slice that a bad offset sends beyond the mapping is just shorter."""
    start = view.arena[copy] + (packed >> OFFSET_SHIFT) + ENTRY_HEADER
    return view.memory[start : start + (packed >> KEY_LENGTH_SHIFT & 0xFF)]


def _record_span(view: _View, copy: int, packed: int) -> tuple[int, int, int]:
    """Return first and last byte of a record, and its ordinal, after checking that they lie in the arena."""
    offset = packed >> OFFSET_SHIFT
    if offset + ENTRY_HEADER > view.arena_size:
        raise CorruptSegmentError(f"segment {view.segment.label} has a record at {offset}, outside its arena")
    at = view.arena[copy] + offset
    ordinal, _, length, key_length, _, _ = ARENA_ENTRY.unpack_from(view.memory, at)
    start = at + ENTRY_HEADER + key_length
    end = start + length
    if end > view.arena[copy] + view.arena_size or key_length != packed >> KEY_LENGTH_SHIFT & 0xFF:
        raise CorruptSegmentError(
            f"segment {view.segment.label} has a record of {length} bytes at {offset} that does not fit"
        )
    return start, end, ordinal


def _probe_many(
    view: _View,
    copy: int,
    keys: Sequence[bytes],
    lengths: NDArray[np.uint64],
    wanted: NDArray[np.uint64],
    hashes: NDArray[np.uint64],
) -> NDArray[np.uint64]:
    """Probe for many keys at once: every round looks at one slot of each key that is not settled yet."""
    rows = view.slot_rows[copy]
    result = np.zeros(len(keys), np.uint64)
    mask = np.uint64(view.mask)
    index = hashes & mask
    open_ = np.arange(len(keys))
    for _ in range(view.capacity):
        slots = rows[index]
        packed = slots[:, PACKED]
        hit = (
            (slots[:, 0] == hashes[open_])
            & (packed >> np.uint64(KEY_LENGTH_SHIFT) & np.uint64(0xFF) == lengths[open_])
            & (slots[:, 1:PACKED] == wanted[open_]).all(axis=1)
            & (packed != 0)
        )
        for position in np.nonzero(hit & (lengths[open_] > INLINE_KEY))[0]:
            hit[position] = _arena_key(view, copy, int(packed[position])) == keys[open_[position]]
        result[open_[hit]] = packed[hit]
        left = ~hit & (packed != 0)
        if not left.any():
            return result
        open_ = open_[left]
        index = (index[left] + np.uint64(1)) & mask
    raise CorruptSegmentError(f"segment {view.segment.label} has no empty slot: a lookup cannot end")
