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

import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Final, NoReturn, Self

from shmelim.errors import AlreadyServingError, NotServingError, SegmentError, ShmelimError, UntrustedSegmentError
from shmelim.shm.copy_header import Change
from shmelim.shm.facts import WriterState, monotonic_ns
from shmelim.shm.layout import (
    BRANCH,
    COMMIT,
    COUNT,
    HEARTBEAT,
    LIVE,
    MAX_GENERATION,
    MAX_KEY,
    MAX_ORDINAL,
    MAX_RECORD,
    PAGE,
    ROOT_ID,
    SEQUENCE_BITS,
    SEQUENCE_MASK,
    SLOT_SIZE,
    STORE_ID_SIZE,
    USED,
    VERSION,
    WORD,
    WRITER_LOCK,
    WRITER_STATE,
    DataHeader,
    align,
    copy_stride,
    entry_size,
    pack_data_header,
)
from shmelim.shm.naming import NameHolder
from shmelim.shm.native import READ_PATH, release_word
from shmelim.shm.segment import Lock, Namespace, Segment

if TYPE_CHECKING or READ_PATH == "pure":
    from shmelim.shm.adoption import check_copy
    from shmelim.shm.image import Image
else:
    from shmelim.shm.fast_image import NativeImage as Image
    from shmelim.shm.fast_image import check_copy

MIN_CAPACITY: Final = 8
MIN_ARENA: Final = PAGE
MAX_FLAGS: Final = 0xFF
_BYTES_PER_CHANGE: Final = 32_768 if READ_PATH == "pure" else 512
"""Bytes that are mirrored in about the time in which one change is followed."""

_ENTRY_MORE: Final = entry_size(0, 0) + WORD - 1
_SHRINK_FROM: Final = 8
"""A segment this many times too large is replaced by one that fits, when everything is replaced."""

# What the copy that nobody reads lacks: what the end of the other's log says; its slots; slots and the end of the
# log; everything. Only the last writes over what a reader of an older version may take for an append-only log.
_LOG: Final = "log"
_ROWS: Final = "rows"
_TAIL: Final = "tail"
_ALL: Final = "all"


class TableWriter(NameHolder):
    """The one writer of the table whose segments are in ``namespace``.

    ``capacity`` is the smallest number of slots per copy, rounded up to a power of two, of which half can be in
    use; ``arena_size`` the smallest number of bytes for records, per copy. ``store_id``, 16 bytes, is that of the
    store that the table is made from; a root segment of another store is replaced. A new root segment's versions
    begin above ``first_sequence``, the ms since 1970, and those of the root that it replaces. ``lock`` is that
    of the namespace where the caller has it already; this writer releases it in the end. ``source`` says whom the
    table follows.

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
        lock: Lock | None = None,
        source: str = "",
    ) -> None:
        self._min_capacity = max(MIN_CAPACITY, 1 << (capacity - 1).bit_length())
        self._min_arena = align(max(MIN_ARENA, arena_size), PAGE)
        # The two copies of what is published; what the one that nobody reads lacks of the other.
        self._images: tuple[Image, Image] | None = None
        self._behind: str | None = None
        self._open: Transaction | None = None
        super().__init__(namespace, store_id, first_sequence, lock, source)

    # ------------------------------------------------------------------ state

    @property
    def version(self) -> int:
        """The sequence of what was published last, possibly by a predecessor."""
        return self._root.words[VERSION] & SEQUENCE_MASK

    @property
    def commit(self) -> int:
        """The number of the store's commit that this writer has published, 0 before it has published anything."""
        return 0 if self._images is None else self._images[self.version & 1].head[COMMIT]

    @commit.setter
    def commit(self, number: int) -> None:
        # One store, for a commit that changed nothing in the table: no reader has to look again.
        if self._images is not None:
            self._images[self.version & 1].head[COMMIT] = number

    @property
    def branch(self) -> int:
        """The branch of the store's commits of which ``commit`` is the last, or the next one is the first."""
        return self._branch

    @branch.setter
    def branch(self, branch: int) -> None:
        self._branch = self._root.words[BRANCH] = branch

    @property
    def loaded(self) -> bool:
        """Whether this writer has published its own state yet."""
        return self._images is not None

    @property
    def entries(self) -> int:
        """How many entries this writer has published."""
        return 0 if self._images is None else self._images[self.version & 1].count

    def missing(self, keys: Iterable[bytes]) -> int:
        """Return how many of these keys this writer has not published."""
        return len(set(keys)) if self._images is None else self._images[self.version & 1]._missing(set(keys))  # noqa: SLF001

    def renew(self) -> bool:
        """Make lost names again, so that every reader is on what is served; tell whether any was lost.

        What is published is published again, under a new root segment where that one lost its name, and the old
        one is withdrawn. AlreadyServingError, now and from every later call, if another writer has the name by
        now; other errors as from :meth:`load`, and it can be tried again.
        """
        self._check_usable()
        if self.beat():
            return False
        self._keep_lock()
        self._leave()
        if self._former is None and not self._namespace.leads_to(self._root):
            self._replace_root()
        elif self._segment is not None and not self._namespace.leads_to(self._segment):
            self._publish_again(self._root)
        return True

    def _keep_lock(self) -> None:
        """Lock the name again if the lock file was removed; AlreadyServingError if another writer was faster."""
        if self._namespace.holds(self._lock):
            return
        try:
            self._lock = self._namespace.acquire()
        except (AlreadyServingError, UntrustedSegmentError) as error:
            self._superseded(error)
            raise
        self._root.words[WRITER_LOCK] = self._lock.number

    def _replace_root(self) -> None:
        """Move to a root segment with another id, and with it what is published."""
        root = self._new_root(self.version)
        self._describe(root)
        if self._images is None:
            self._namespace.name_root(root)
            self._root, self._published = root, release_word(root, VERSION)
        else:
            self._publish_again(root)

    def _publish_again(self, root: Segment) -> None:
        """Publish the same state in a new segment of this root segment."""
        assert self._images is not None
        self.abort()
        current = self._images[self.version & 1]
        header = current.header
        staged = self._new_segment(header.capacity, header.arena_size, header.seed, root)
        current.compact_into(staged.target(self.version))
        staged.target(self.version).head[COMMIT] = current.head[COMMIT]
        self._publish(staged)

    def _superseded(self, error: ShmelimError) -> None:
        """End this writer, which another has taken the name of: its calls fail, and its readers go there."""
        self._failure, self._open = error, None
        self._root.words[WRITER_STATE] = WriterState.STOPPED
        self._give_way()

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise ShmelimError("this table writer is closed, or belongs to the process that forked this one")
        if self._failure is not None:
            raise AlreadyServingError(
                f"another writer has taken the name {self._namespace.name!r}: {self._failure}",
                hint="names were removed from /dev/shm under this server; restart it once the other one has ended",
            )

    def _check_idle(self) -> None:
        self._check_usable()
        if self._open is not None:
            raise ShmelimError("a transaction is already open on this table writer")

    def close(self) -> None:
        """Say that the writer stopped, and release the lock. What is published stays readable. Idempotent."""
        if self._pid != os.getpid():
            return
        self.abort()
        self._root.words[WRITER_STATE] = WriterState.STOPPED
        self._root.words[HEARTBEAT] = monotonic_ns()
        if self._former is not None:
            self._namespace.unlink(self._root)  # which never got its name
        self._lock.release()
        self._pid = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
            segment, header = self._published_in(self._root)
            images = Image(segment, header, 0), Image(segment, header, 1)
            check_copy(images[version & 1], segment.label)
        except (NotServingError, SegmentError):
            return False
        self._segment, self._images, self._behind = segment, images, _ALL
        self._root.words[WRITER_STATE] = WriterState.SERVING
        self._namespace.tidy(header.generation)
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
        self._check_idle()
        self._open = Transaction(self, replace=replace or self._images is None)
        return self._open

    def apply(self, changes: list[Change], *, replace: bool = False) -> int:
        """Publish changes as one transaction, settle, and return the new version: quicker than one by one.

        For who has checked them already, as :meth:`Transaction.put` does. Fails as a transaction's end does, and
        nothing has happened then.
        """
        self._check_idle()
        need = 0
        for key, _, record, _ in changes:
            need += len(key) + len(record) + _ENTRY_MORE & -WORD
        try:
            version = self._publish(self._stage(changes, need, None, replace=replace or self._images is None))
        except BaseException:
            self._abort()
            raise
        self.settle()
        return version

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
        if behind == _LOG:
            spare.follow(current)
            spare.head[COMMIT] = current.head[COMMIT]
        else:
            start = {_ROWS: current.used, _TAIL: spare.used, _ALL: 0}[behind]
            current.mirror_into(spare, arena_from=start)
        self._behind = None

    # ------------------------------------------------------------------ what a transaction is made of

    def _stage(self, changes: list[Change], need: int, commit: int | None, *, replace: bool) -> _Staged:
        """Make the next state in memory that nobody reads; ``commit`` None leaves the number that it has."""
        if self._generation >= MAX_GENERATION and self._images is not None:
            self._generation = 0
            transaction, self._open = self._open, None
            self._replace_root()
            self._open = transaction
        if self._behind is not None:
            self.settle()
        fresh = replace or self._images is None
        staged = self._stage_afresh(changes, need) if fresh else self._stage_changes(changes, need)
        if commit is None and staged.segment is not self._segment:
            commit = self.commit
        if commit is not None:
            staged.target(self._root.words[VERSION]).head[COMMIT] = commit
        return staged

    def _stage_changes(self, changes: list[Change], need: int) -> _Staged:
        assert self._images is not None
        version = self._root.words[VERSION]
        current, spare = self._images[version & 1], self._images[~version & 1]
        header, head = current.header, current.head
        capacity, room = header.capacity, header.arena_size
        count = head[COUNT] + len(changes)  # at most
        if 2 * count > capacity:
            count = head[COUNT] + current._missing({key for key, flags, _, _ in changes if flags is not None})  # noqa: SLF001
        fits = 2 * count <= capacity
        if fits and head[USED] + need <= room:
            staged = _Staged(self._segment, self._images, _LOG)
            self._behind = _ROWS
        elif fits and head[LIVE] + need <= room // 4 * 3:
            staged = _Staged(self._segment, self._images, _ALL)
            self._behind = _ALL
            current.compact_into(spare)
        else:
            staged = self._new_segment(*self._room_for(count, head[LIVE] + need, capacity), header.seed)
            current.compact_into(staged.target(version))
        staged.target(version).apply(changes)
        if staged.behind == _LOG and len(changes) * _BYTES_PER_CHANGE > SLOT_SIZE * capacity + need:
            staged.behind = _TAIL
        return staged

    def _stage_afresh(self, changes: list[Change], live: int) -> _Staged:
        puts = {change[0]: change for change in changes}
        if len(puts) < len(changes) or any(flags is None for _, flags, _, _ in changes):
            puts = _left_of(changes)
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

    def _new_segment(self, capacity: int, arena: int, seed: int, root: Segment | None = None) -> _Staged:
        """Make an empty segment. Hashes and checksums that move there as they are need the seed they have."""
        self._keep_lock()
        root = root or self._root
        birth = (root.words[VERSION] & SEQUENCE_MASK) + 1
        header = DataHeader(0, seed, capacity, arena, copy_stride(capacity, arena), root.words[ROOT_ID], birth)
        segment = self._create_data(header.size)
        header = header._replace(generation=self._generation)
        packed = pack_data_header(header)
        segment.memory[: len(packed)] = packed
        return _Staged(segment, (Image(segment, header, 0), Image(segment, header, 1)), _ALL, root)

    def _publish(self, staged: _Staged) -> int:
        generation = staged.images[0].header.generation
        left, root, word, former = self._left, self._root, self._published, self._former
        first = self._segment is None
        if staged.segment is not self._segment:
            left = self._segment
        if staged.root not in {None, root}:
            root, word, former = staged.root, release_word(staged.root, VERSION), root
        version = next_version(root.words[VERSION], generation)
        # Whether or not an interrupt lets the store happen, mirroring puts the other copy right. One statement,
        # since no signal handler runs inside it: segments and version word must not disagree.
        self._behind = _ALL
        self._segment, self._images, self._left, self._root, self._published, self._former, word[0] = (
            staged.segment, staged.images, left, root, word, former, version
        )  # fmt: skip
        # Everything above is visible to whoever sees the new version; nothing below may be before that.
        self._behind = staged.behind
        self._open = None
        if former is not None or left is not None:
            self._leave()
        if first:
            self._root.words[WRITER_STATE] = WriterState.SERVING
            self._namespace.tidy(generation)
        return version & SEQUENCE_MASK

    def _abort(self) -> None:
        self._open = None
        self._leave()
        # A segment made for the next state may be there even if staging failed.
        published = (self._former or self._root).words[VERSION] >> SEQUENCE_BITS
        if self._generation > published and self._failure is None and self._namespace.holds(self._lock):
            self._namespace.remove_data(self._generation)
            if self._former is None:
                self._generation = published


@dataclass(slots=True)
class _Staged:
    """The next state, made but not published; ``behind`` is what the other copy will lack once it is."""

    segment: Segment | None
    images: tuple[Image, Image]
    behind: str
    root: Segment | None = None

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
        self.commit: int | None = None
        self._replace = replace
        self._changes: list[Change] = []
        self._need = 0
        self._staged: _Staged | None = None

    def put(self, key: bytes, flags: int, record: bytes = b"", ordinal: int | None = None) -> None:
        """Set flags (0 to 255) and record (any bytes, copied if they can change) of a key (1 to 255 bytes).

        ``ordinal``, 0 to 2**63 - 1, is its place in the order of a snapshot; None: a new key goes last, a known
        one keeps its place. ValueError or TypeError for what cannot be put, and the transaction is as before.
        """
        if (
            type(key) is not bytes
            or type(record) is not bytes
            or type(flags) is not int
            or not (ordinal is None or (type(ordinal) is int and 0 <= ordinal <= MAX_ORDINAL))
            or not 0 < len(key) <= MAX_KEY
            or not 0 <= flags <= MAX_FLAGS
            or len(record) > MAX_RECORD
        ):
            key, flags, record, ordinal = _checked(key, flags, record, ordinal)
        if self._writer._open is not self or self._staged is not None:  # noqa: SLF001
            self._refuse()
        self._changes.append((key, flags, record, ordinal))
        self._need += len(key) + len(record) + _ENTRY_MORE & -WORD  # entry_size, without a call

    def remove(self, key: bytes) -> None:
        """Remove a key; nothing happens if it is absent."""
        key, _, _, _ = _checked(key, 0, b"", None)
        if self._writer._open is not self or self._staged is not None:  # noqa: SLF001
            self._refuse()
        self._changes.append((key, None, b"", None))
        self._need += entry_size(len(key), 0)

    def extend(self, changes: list[Change]) -> None:
        """Add changes that are known to be such as :meth:`put` and :meth:`remove` take."""
        if self._writer._open is not self or self._staged is not None:  # noqa: SLF001
            self._refuse()
        for key, _, record, _ in changes:
            self._need += len(key) + len(record) + _ENTRY_MORE & -WORD
        self._changes += changes

    @property
    def staged(self) -> bool:
        """Whether the changes are made and wait for :meth:`publish`."""
        return self._staged is not None and self._writer._open is self  # noqa: SLF001

    def _check_open(self) -> None:
        self._writer._check_usable()  # noqa: SLF001
        if self._writer._open is not self:  # noqa: SLF001
            raise ShmelimError("this transaction has ended")

    def _refuse(self) -> NoReturn:
        self._check_open()
        raise ShmelimError("this transaction is staged: it takes no more changes")

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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


def next_version(version: int, generation: int) -> int:
    """Return the word that publishes the next state, in ``generation``; the sequence never starts over.

    ShmelimError where the sequence is used up, which takes a publish every microsecond for nine years.
    """
    if version & SEQUENCE_MASK == SEQUENCE_MASK:
        raise ShmelimError(
            f"sequence {SEQUENCE_MASK} is the last one",
            hint="stop the server, remove the table's segments from /dev/shm, and set the machine's clock right",
        )
    return generation << SEQUENCE_BITS | ((version + 1) & SEQUENCE_MASK)


def _checked(key: bytes, flags: int, record: bytes, ordinal: int | None) -> tuple[bytes, int, bytes, int | None]:
    """Return what is put, in plain types, and copied where its caller may change it; errors as of ``put``."""
    if not isinstance(key, bytes):
        raise TypeError(f"key must be bytes, not {type(key).__name__}")
    if not 1 <= len(key) <= MAX_KEY:
        raise ValueError(f"key of {len(key)} bytes must be 1 to {MAX_KEY} bytes long")
    if not isinstance(record, (bytes, bytearray, memoryview)):
        raise TypeError(f"record must be bytes, not {type(record).__name__}")
    flags = index(flags)
    if not 0 <= flags <= MAX_FLAGS:
        raise ValueError(f"flags {flags} must be 0 to {MAX_FLAGS}")
    if ordinal is not None and not 0 <= (ordinal := index(ordinal)) <= MAX_ORDINAL:
        raise ValueError(f"ordinal {ordinal} must be 0 to {MAX_ORDINAL}")
    own = memoryview(record).tobytes()
    if len(own) > MAX_RECORD:
        raise ValueError(f"record of {len(own):,} bytes is longer than {MAX_RECORD:,}")
    return memoryview(key).tobytes(), flags, own, ordinal


def _left_of(changes: Iterable[Change]) -> dict[bytes, Change]:
    """Return the puts that changes leave of an empty table, in order."""
    puts: dict[bytes, Change] = {}
    for key, flags, record, ordinal in changes:
        if flags is None:
            puts.pop(key, None)
        else:
            place = puts[key][3] if key in puts and ordinal is None else ordinal
            puts[key] = (key, flags, record, place)
    return puts
