"""The writing side of the table: transactions, publishing, growth, and taking over from a dead writer.

What: Linux's *seqcount latch* (``seqcount_latch_t``). There are two copies of the table, the lowest bit of the
version word names the one that readers use, and the writer works on the other. How a transaction goes::

    stage    apply the changes to the copy that nobody reads           (may fail: nothing has happened)
    publish  version = version + 1                                     (one aligned 8-byte store, cannot fail)
    settle   apply the same changes to the copy that readers just left

Whoever commits the changes elsewhere does so between *stage* and *publish*: what could fail for want of memory
has been done by then, and what readers see was durable first.

Order: the publishing store must come after every store of *stage* and before every store of *settle*. With the
extension it is a release store with a release fence behind it (a release store alone does not hold back later
stores). Without it, the order of the statements must do, which is enough on x86-64; other machines are refused.

Killed anywhere, the writer leaves the version word naming a copy that is whole:

1. in *stage*: the copy named by the word has not been touched;
2. between *stage* and *publish*: the same, the staged changes are lost unseen;
3. in *settle*: the word names the copy that *stage* completed.

A successor never trusts the table it finds: it makes the next generation from what its caller gives it,
publishes that with the same single store, and removes the old segment, which readers keep until they move.
A growth is the same, made from the current copy.

Trade-offs: every change is applied twice and memory is taken twice; a large transaction mirrors the staged copy
instead. In return no reader ever waits, and none sees a batch half done.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import psutil

from shmelim.errors import (
    CorruptSegmentError,
    NotServingError,
    SegmentError,
    SegmentFormatError,
    ShmelimError,
)
from shmelim.shm.adoption import check_copy
from shmelim.shm.image import Change, Image
from shmelim.shm.layout import (
    HEARTBEAT,
    MAX_KEY,
    MAX_ORDINAL,
    MAX_RECORD,
    PAGE,
    ROOT_ID,
    ROOT_SIZE,
    SEQUENCE_BITS,
    SEQUENCE_MASK,
    SLOT_SIZE,
    STORE_ID,
    STORE_ID_SIZE,
    VERSION,
    WRITER_PID,
    WRITER_STARTED,
    WRITER_STATE,
    DataHeader,
    align,
    check_root,
    copy_stride,
    entry_size,
    next_generation,
    next_version,
    pack_data_header,
    pack_root_header,
    unpack_data_header,
)
from shmelim.shm.native import release_word
from shmelim.shm.reader import WriterState
from shmelim.shm.segment import Namespace, Segment

MIN_CAPACITY: Final = 8
MIN_ARENA: Final = PAGE
_BYTES_PER_APPLY: Final = 32_768
"""Bytes that are mirrored in about the time in which one change is applied."""

_SHRINK_FROM: Final = 8
"""A segment this many times too large is replaced by one that fits, when everything is replaced."""

# What the copy that nobody reads lacks, other than a list of changes: its slots; slots and the end of the arena;
# everything. Only the last writes over what a reader of an older version may be taking for an append-only log.
_ROWS: Final = "rows"
_TAIL: Final = "tail"
_ALL: Final = "all"


class TableWriter:
    """The one writer of the table whose segments are in ``namespace``.

    ``capacity`` is the smallest number of slots per copy, rounded up to a power of two, of which half can be in
    use; ``arena_size`` the smallest number of bytes for records, per copy. ``store_id``, 16 bytes, is that of the
    store that the table is made from; a root segment of another store is replaced. A new root segment's versions
    begin above ``first_sequence``, the ms since 1970, and those of the root that it replaces. ``acquired``: the
    caller has acquired the namespace already; this writer releases it in the end.

    AlreadyServingError if another process writes this table; SegmentFullError if no shared memory is left;
    UntrustedSegmentError if the name is taken by another user.

    Nothing is published before :meth:`load`; until then readers go on with what a predecessor left. Not
    thread-safe: one thread owns it; :meth:`beat` alone may come from another. A forked child must not use it.

    >>> from shmelim.shm import PrivateNamespace, TableReader
    >>> namespace = PrivateNamespace()
    >>> with TableWriter(namespace) as writer:
    ...     writer.load([(b"key", 1, b"record", None)])
    ...     with writer.transaction() as transaction:
    ...         transaction.put(b"key", 3, b"another")
    >>> TableReader(namespace).get(b"key")
    Record(flags=3, ordinal=0, data=b'another')
    """

    def __init__(
        self,
        namespace: Namespace,
        *,
        capacity: int = 1024,
        arena_size: int = 1 << 18,
        store_id: bytes = bytes(STORE_ID_SIZE),
        first_sequence: int = 0,
        acquired: bool = False,
    ) -> None:
        if len(store_id) != STORE_ID_SIZE:
            raise ValueError(f"store_id of {len(store_id)} bytes must be {STORE_ID_SIZE} bytes long")
        self._namespace = namespace
        self.store_id = store_id
        self._min_capacity = max(MIN_CAPACITY, 1 << (capacity - 1).bit_length())
        self._min_arena = align(max(MIN_ARENA, arena_size), PAGE)
        self._pid = os.getpid()
        if not acquired:
            namespace.acquire()
        try:
            self._root = self._take_root(first_sequence)
            self._published = release_word(self._root, VERSION)
            started = int(psutil.Process().create_time() * 1000)
        except BaseException:
            namespace.release()
            raise
        # The published segment and its two copies; what the one that nobody reads lacks of the other.
        self._segment: Segment | None = None
        self._images: tuple[Image, Image] | None = None
        self._behind: list[Change] | str | None = None
        self._open: Transaction | None = None
        words = self._root.words
        words[WRITER_STATE] = WriterState.STARTING
        words[WRITER_PID] = self._pid
        words[WRITER_STARTED] = started
        self.beat()

    def _take_root(self, sequence: int) -> Segment:
        """Open the root segment for writing; one that is not ours to continue is withdrawn and replaced.

        A new one begins behind ``sequence``, the clock, and where the old one ended.
        """
        root = self._namespace.open_root(writable=True)
        empty = root.size < ROOT_SIZE or not root.memory[:ROOT_SIZE].strip(b"\0")
        if not empty:
            with contextlib.suppress(CorruptSegmentError, SegmentFormatError):
                check_root(root.memory[:PAGE], root.label)
                if root.memory[STORE_ID : STORE_ID + STORE_ID_SIZE] == self.store_id:
                    return root
                sequence = max(sequence, root.words[VERSION] & SEQUENCE_MASK)
            # Generation 0 sends whoever has this root mapped back to the name.
            root.words[VERSION] = 0
        if not empty or root.size < ROOT_SIZE:
            root.close()
            root = self._namespace.create_root()
        sequence = max(sequence, time.time_ns() // 1_000_000)
        header = pack_root_header(secrets.randbits(64) or 1, self.store_id, sequence)
        root.memory[: len(header)] = header
        return root

    # ------------------------------------------------------------------ state

    @property
    def version(self) -> int:
        """The sequence of what was published last, possibly by a predecessor."""
        return self._root.words[VERSION] & SEQUENCE_MASK

    @property
    def commit(self) -> int:
        """The number of the store's commit that this writer has published, 0 before it has published anything."""
        return 0 if self._images is None else self._images[self.version & 1].commit

    @commit.setter
    def commit(self, number: int) -> None:
        # One store, for a commit that changed nothing in the table: no reader has to look again.
        if self._images is not None:
            self._images[self.version & 1].commit = number

    @property
    def _generation(self) -> int:
        return self._root.words[VERSION] >> SEQUENCE_BITS

    @property
    def loaded(self) -> bool:
        """Whether this writer has published its own state yet."""
        return self._images is not None

    @property
    def entries(self) -> int:
        """How many entries this writer has published."""
        return 0 if self._images is None else self._images[self.version & 1].count

    def beat(self) -> None:
        """Renew the heartbeat that tells readers that the writer lives. One clock reading and one store."""
        self._root.words[HEARTBEAT] = time.monotonic_ns()

    def close(self) -> None:
        """Say that the writer stopped, and release the lock. What is published stays readable. Idempotent."""
        if self._pid != os.getpid() or self._root.size == 0:
            return
        self.abort()
        self._root.words[WRITER_STATE] = WriterState.STOPPED
        self.beat()
        self._namespace.release()
        self._pid = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ transactions

    def adopt(self) -> bool:
        """Take the published table for this writer's own where it lies; tell whether that could be done.

        True: it is whole, and of this writer's ``store_id``; readers stay where they are, and the next change
        first makes the other copy anew. False: it is damaged, of another store, or there is none; nothing has
        happened, and :meth:`load` is what is left. Whether it is the state that it should be is for the caller to
        say, who has read it. Reads every byte of the current copy: about 2.5 µs an entry.
        """
        version = self._root.words[VERSION]
        if self._images is not None or self._open is not None or not version >> SEQUENCE_BITS:
            return False
        try:
            segment = self._namespace.open_data(version >> SEQUENCE_BITS, writable=True)
            header = unpack_data_header(
                segment.memory[:PAGE], segment.size, self._root.words[ROOT_ID], version, segment.label
            )
            images = Image(segment, header, 0), Image(segment, header, 1)
            check_copy(images[version & 1], segment.label)
        except (NotServingError, SegmentError):
            return False
        self._segment, self._images, self._behind = segment, images, _ALL
        self._root.words[WRITER_STATE] = WriterState.SERVING
        self._namespace.remove_data(keep=header.generation)
        return True

    def load(self, entries: Iterable[tuple[bytes, int, bytes, int | None]], commit: int = 0) -> None:
        """Publish a whole table as the next generation: (key, flags, record, ordinal) with distinct keys.

        ``commit`` is the number of the store's commit that it is the state of. ValueError as in
        :meth:`Transaction.put`; SegmentFullError if no shared memory is left, and what was published stays.
        """
        with self.transaction(replace=True) as transaction:
            transaction.commit = commit
            for key, flags, record, ordinal in entries:
                transaction.put(key, flags, record, ordinal)

    def transaction(self, *, replace: bool = False) -> Transaction:
        """Begin a transaction, of which one can be open at a time; ``replace`` starts it from an empty table."""
        if self._pid != os.getpid():
            raise ShmelimError("this table writer is closed, or belongs to the process that forked this one")
        if self._open is not None:
            raise ShmelimError("a transaction is already open on this table writer")
        self._open = Transaction(self, replace=replace or self._images is None)
        return self._open

    def abort(self) -> None:
        """Forget the open transaction, if there is one: for who was interrupted before it had hold of it."""
        if self._open is not None:
            self._open.abort()

    def settle(self) -> None:
        """Bring the copy that nobody reads up to date. Done by the next transaction if not before.

        Nothing happens while a transaction is staged: what it stages is in that copy.
        """
        if self._images is None or self._behind is None or (self._open is not None and self._open.staged):
            return
        now = self._root.words[VERSION] & 1
        current, spare = self._images[now], self._images[1 - now]
        behind, self._behind = self._behind, _ALL
        if isinstance(behind, list):
            spare.apply(behind)
            spare.commit = current.commit
        else:
            start = {_ROWS: current.used, _TAIL: spare.used, _ALL: 0}[behind]
            current.mirror_into(spare, arena_from=start)
        self._behind = None

    # ------------------------------------------------------------------ what a transaction is made of

    def _stage(self, changes: list[Change], need: int, commit: int, *, replace: bool) -> _Staged:
        """Make the next state in memory that nobody reads."""
        self.settle()
        fresh = replace or self._images is None
        staged = self._stage_afresh(changes, need) if fresh else self._stage_changes(changes, need)
        staged.target(self.version).commit = commit
        return staged

    def _stage_changes(self, changes: list[Change], need: int) -> _Staged:
        assert self._images is not None
        version = self._root.words[VERSION]
        current, spare = self._images[version & 1], self._images[~version & 1]
        header = current.header
        count = current.count + len(changes)  # at most
        if 2 * count > header.capacity:
            count = current.count + current.count_new(changes)
        fits = 2 * count <= header.capacity
        if fits and current.used + need <= header.arena_size:
            staged = _Staged(self._segment, self._images, changes)
            self._behind = _ROWS
        elif fits and current.live + need <= header.arena_size // 4 * 3:
            staged = _Staged(self._segment, self._images, _ALL)
            self._behind = _ALL
            current.compact_into(spare)
        else:
            capacity, arena = self._room_for(count, current.live + need, header.capacity)
            staged = self._new_segment(capacity, arena, header.seed)
            current.compact_into(staged.target(version))
        staged.target(version).apply(changes)
        if staged.behind is changes and len(changes) * _BYTES_PER_APPLY > SLOT_SIZE * header.capacity + need:
            staged.behind = _TAIL
        return staged

    def _stage_afresh(self, changes: list[Change], live: int) -> _Staged:
        puts: dict[bytes, Change] = {}
        for change in changes:
            if change.flags is None:
                puts.pop(change.key, None)
            elif change.key in puts and change.ordinal is None:
                puts[change.key] = change._replace(ordinal=puts[change.key].ordinal)
            else:
                puts[change.key] = change
        capacity, arena = self._room_for(len(puts), live, self._min_capacity)
        if self._images is not None and self._fits(capacity, live):
            staged = _Staged(self._segment, self._images, _ALL)
            self._behind = _ALL
            staged.target(self.version).clear()
        else:
            staged = self._new_segment(capacity, arena, secrets.randbits(64))
        staged.target(self.version).fill(list(puts.values()))
        return staged

    def _fits(self, capacity: int, live: int) -> bool:
        """Tell whether the present segment has room, and not far too much of it."""
        assert self._images is not None
        header = self._images[0].header
        return (
            capacity <= header.capacity <= _SHRINK_FROM * capacity
            and live <= header.arena_size // 4 * 3
            and header.arena_size <= max(self._min_arena, _SHRINK_FROM * live)
        )

    def _room_for(self, count: int, live: int, capacity: int) -> tuple[int, int]:
        while capacity < 2 * count:
            capacity *= 2
        return capacity, align(max(self._min_arena, live + live // 2), PAGE)

    def _new_segment(self, capacity: int, arena: int, seed: int) -> _Staged:
        """Make an empty segment. Hashes and checksums that move there as they are need the seed they have."""
        generation = next_generation(self._generation)
        stride = copy_stride(capacity, arena)
        header = DataHeader(generation, seed, capacity, arena, stride, self._root.words[ROOT_ID], self.version + 1)
        segment = self._namespace.create_data(generation, header.size)
        packed = pack_data_header(header)
        segment.memory[: len(packed)] = packed
        return _Staged(segment, (Image(segment, header, 0), Image(segment, header, 1)), _ALL)

    def _publish(self, staged: _Staged) -> int:
        generation = staged.images[0].header.generation
        grown = staged.segment is not self._segment
        version = next_version(self._root.words[VERSION], generation)
        # Whether or not an interrupt lets the store happen, mirroring puts the other copy right. One statement,
        # since no signal handler runs inside it: segment and version word must not disagree.
        self._behind = _ALL
        self._segment, self._images, self._published[0] = staged.segment, staged.images, version
        # Everything above is visible to whoever sees the new version; nothing below may be before that.
        self._behind = staged.behind
        self._open = None
        if grown:
            self._root.words[WRITER_STATE] = WriterState.SERVING
            self._namespace.remove_data(keep=generation)
        return version & SEQUENCE_MASK

    def _abort(self) -> None:
        self._open = None
        # A segment made for the next state may be there even if staging failed; the version word knows.
        self._namespace.remove_data(keep=self._generation or None)


@dataclass(slots=True)
class _Staged:
    """The next state, made but not published; ``behind`` is what the other copy will lack once it is."""

    segment: Segment | None
    images: tuple[Image, Image]
    behind: list[Change] | str

    def target(self, version: int) -> Image:
        """Return the copy that the version after this one will name."""
        return self.images[~version & 1]


class Transaction:
    """Changes that become visible together, or not at all.

    As a context manager it publishes at the end of the block, and aborts if the block raises. By hand:
    :meth:`stage`, then :meth:`publish` or :meth:`abort`. ``commit`` is the number of the store's commit that these
    changes are; left alone, the table keeps the one that it has. Staging writes it.
    """

    def __init__(self, writer: TableWriter, *, replace: bool) -> None:
        self._writer = writer
        self.commit = writer.commit
        self._replace = replace
        self._changes: list[Change] = []
        self._need = 0
        self._staged: _Staged | None = None

    def put(self, key: bytes, flags: int, record: bytes = b"", ordinal: int | None = None) -> None:
        """Set flags (0 to 255) and record (any bytes) of a key (1 to 255 bytes).

        ``ordinal``, 0 to 2**63 - 1, is its place in the order of a snapshot; None: a new key goes last, a known
        one keeps its place. ValueError if something is out of bounds, and the transaction is as before.
        """
        check_key(key)
        if not 0 <= flags <= 0xFF:  # noqa: PLR2004
            raise ValueError(f"flags {flags} must be 0 to 255")
        if ordinal is not None and not 0 <= ordinal <= MAX_ORDINAL:
            raise ValueError(f"ordinal {ordinal} must be 0 to {MAX_ORDINAL}")
        if len(record) > MAX_RECORD:
            raise ValueError(f"record of {len(record):,} bytes is longer than {MAX_RECORD:,}")
        self._set(Change(key, flags, record, ordinal))

    def remove(self, key: bytes) -> None:
        """Remove a key; nothing happens if it is absent."""
        check_key(key)
        self._set(Change(key, None, b"", None))

    @property
    def staged(self) -> bool:
        """Whether the changes are made and wait for :meth:`publish`."""
        return self._staged is not None and self._writer._open is self  # noqa: SLF001

    def _set(self, change: Change) -> None:
        if self._writer._open is not self:  # noqa: SLF001
            raise ShmelimError("this transaction has ended")
        if self._staged is not None:
            raise ShmelimError("this transaction is staged: it takes no more changes")
        self._changes.append(change)
        self._need += entry_size(len(change.key), len(change.record))

    def stage(self) -> None:
        """Do everything that can fail, out of sight of readers.

        SegmentFullError if there is no room to grow; the transaction is aborted and the published state stands.
        """
        self._check_open()
        if self._staged is not None:
            return
        try:
            self._staged = self._writer._stage(  # noqa: SLF001
                self._changes, self._need, self.commit, replace=self._replace
            )
        except BaseException:
            self.abort()
            raise

    def publish(self) -> int:
        """Make the staged changes visible and return the new version. Cannot fail for want of anything."""
        self._check_open()
        if self._staged is None:
            raise ShmelimError("this transaction must be staged before it is published")
        try:
            return self._writer._publish(self._staged)  # noqa: SLF001
        except BaseException:
            # An interrupt; the version word tells whether it came before or after.
            self._writer._abort()  # noqa: SLF001
            raise
        finally:
            self._staged = None

    def abort(self) -> None:
        """Forget the changes. Idempotent."""
        if self._writer._open is self and self._writer._pid == os.getpid():  # noqa: SLF001
            self._staged = None
            self._writer._abort()  # noqa: SLF001

    def _check_open(self) -> None:
        if self._writer._open is not self or self._writer._pid != os.getpid():  # noqa: SLF001
            raise ShmelimError("this transaction has ended, or belongs to the process that forked this one")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            if self._staged is None:
                self.stage()
            self.publish()
        except BaseException:
            # An interrupt between the two; after publishing there is nothing left to abort.
            self.abort()
            raise
        self._writer.settle()


def check_key(key: bytes) -> None:
    """Raise TypeError or ValueError unless ``key`` is 1 to 255 bytes."""
    if not isinstance(key, bytes):
        raise TypeError(f"key must be bytes, not {type(key).__name__}")
    if not 1 <= len(key) <= MAX_KEY:
        raise ValueError(f"key of {len(key)} bytes must be 1 to {MAX_KEY} bytes long")
