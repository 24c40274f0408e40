"""A follower's table in this host's shared memory: readers use it as any other, and it outlives the follower."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Final, Self

import msgspec

from shmelim.eliminations.rows import ORIGIN_KEY
from shmelim.errors import (
    AlreadyServingError,
    NotServingError,
    SegmentError,
    StateConflictError,
    UntrustedSegmentError,
)
from shmelim.fleet.follower import Applied, Table
from shmelim.fleet.messages import DIGEST_MASK, Row, row_digest
from shmelim.shm import Namespace, TableReader, TableWriter
from shmelim.shm.following import Position

_BEAT: Final = 0.5


class _Origin(msgspec.Struct):
    """The record of the one entry that is not a hotkey's: it changes with the others, in one transaction."""

    line: int
    seq: int
    run: int
    source: str = ""
    state_dir: str | None = None


class LocalTable(Table):
    """The table of a name, which ``source`` is said to be followed into.

    A table that a follower of that source left is taken over where it lies, and readers stay where they are; lines
    and terms of another source mean nothing here. The old one serves until a new one is published. A thread renews
    the heartbeat; :meth:`keep`, every few seconds, makes lost names again.

    AlreadyServingError if another process writes it, StateConflictError if it is what a server left; SegmentError
    if it cannot be made. Not thread-safe.
    """

    def __init__(self, namespace: Namespace, source: str) -> None:
        self._namespace, self._source = namespace, source
        self.digest = 0
        self._count = 0
        self._reader: TableReader | None = None
        self._writer: TableWriter | None = None
        self._stop = threading.Event()
        with self._naming():
            lock = namespace.acquire()
        try:
            self.applied, self.position = self._left()
            if self.applied is not None:
                with self._naming():
                    self._writer = TableWriter(
                        namespace, store_id=self.applied.store_id, lock=lock, source=self._source
                    )
                if self.position is not None:
                    self._writer.say_position(self.position)
                if not self._writer.adopt():
                    self.applied = None  # it is damaged: the snapshot takes its place
                else:
                    self._measure()
            else:
                lock.release()
        except BaseException:
            lock.release()
            raise
        threading.Thread(target=self._beat, name=f"shmelim-follow-{namespace.name}", daemon=True).start()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Say to a follower, not to a server, what to do about a name that is taken."""
        try:
            yield
        except (AlreadyServingError, UntrustedSegmentError) as error:
            is_served = isinstance(error, AlreadyServingError)
            remedy = f"see `shmelim status --name {self._namespace.name}`" if is_served else "run it as that user"
            raise type(error)(error.message, hint=f"{remedy}, or follow it --as another name") from error

    def _left(self) -> tuple[Applied | None, Position | None]:
        """Find what a follower left."""
        try:
            reader = TableReader(self._namespace)
            identity, origin = reader.identity(), reader.get(ORIGIN_KEY)
        except (NotServingError, SegmentError):
            return None, None  # what cannot be read is replaced
        if reader.source() is None:
            raise StateConflictError(
                f"{self._namespace.name!r} is what a server on this host has published, and left",
                hint=f"follow --as another name, or `shmelim forget --name {self._namespace.name}` first",
            )
        with contextlib.suppress(ValueError):
            found = msgspec.msgpack.decode(b"" if origin is None else origin.data, type=_Origin)
            if found.source == self._source:
                return Applied(identity.store_id, found.line, found.seq, found.run), reader.position()
        return None, None

    def _measure(self) -> None:
        self._reader = TableReader(self._namespace)
        entries = self._reader.snapshot().entries
        entries.pop(ORIGIN_KEY, None)
        self._count = len(entries)
        self.digest = DIGEST_MASK & sum(
            row_digest(key, entry.flags, entry.record, entry.ordinal) for key, entry in entries.items()
        )

    def __len__(self) -> int:
        return self._count

    # ------------------------------------------------------------------ what a follower does

    def apply(self, applied: Applied, rows: list[Row], gone: list[bytes]) -> None:  # noqa: D102  # as the protocol
        assert self._writer is not None
        digest, count = self.digest, self._count
        with self._writer.transaction() as transaction:
            for row in rows:
                digest, count = self._less(row.key, digest, count)
                digest, count = digest + row_digest(*row), count + 1
                transaction.put(*row)
            for key in gone:
                digest, count = self._less(key, digest, count)
                transaction.remove(key)
            transaction.put(*self._origin(applied))
        self.applied, self.digest, self._count = applied, digest & DIGEST_MASK, count

    def _less(self, key: bytes, digest: int, count: int) -> tuple[int, int]:
        """Take what the table has of a key out of its digest and count."""
        assert self._reader is not None
        old = self._reader.get(key)
        if old is None:
            return digest, count
        return digest - row_digest(key, old.flags, old.data, old.ordinal), count - 1

    def replace(self, applied: Applied, rows: Iterable[Row]) -> None:  # noqa: D102
        writer = self._writer
        if writer is None or writer.store_id != applied.store_id:
            self._writer = None
            if writer is not None:
                writer.close()
            with self._naming():
                self._writer = writer = TableWriter(
                    self._namespace, store_id=applied.store_id, source=self._source
                )
        digest = count = 0
        with writer.transaction(replace=True) as transaction:
            for row in rows:
                digest, count = digest + row_digest(*row), count + 1
                transaction.put(*row)
            transaction.put(*self._origin(applied))
        self.applied, self.digest, self._count = applied, digest & DIGEST_MASK, count
        self._reader = TableReader(self._namespace)

    def _origin(self, applied: Applied) -> tuple[bytes, int, bytes, int]:
        origin = _Origin(applied.line, applied.seq, applied.run, self._source)
        return ORIGIN_KEY, 0, msgspec.msgpack.encode(origin), 0

    def confirm(self, position: Position) -> None:  # noqa: D102
        self.position = position
        if self._writer is not None:
            self._writer.say_position(position)

    # ------------------------------------------------------------------ living

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            writer = self._writer
            if writer is not None:
                with contextlib.suppress(SegmentError, OSError, ValueError):
                    writer.beat()

    def keep(self) -> None:
        """Make names that were lost again."""
        if self._writer is not None and self._writer.loaded:
            self._writer.renew()

    def close(self) -> None:
        """Stop; what is published stays. Idempotent."""
        self._stop.set()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
