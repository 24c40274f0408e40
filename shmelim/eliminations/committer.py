"""Group commit: changes from many threads, each durable and published before its caller goes on.

The order is stage, commit, publish, acknowledge. Staging does all that can fail for want of shared memory, and
nobody sees it; so a change that is committed is published by one store that cannot fail, and readers never see
what is not durable.

There is no committing thread. Callers queue their change and take the lock; whoever gets it commits all that is
queued, in one transaction with one fsync, and the others find theirs done when the lock comes to them. A lone
caller pays for no hand-over between threads, and a hundred callers share one commit.

Shared variables: ``_queue`` is appended to by any thread (``deque.append`` is atomic) and emptied under
``_leading``; a request's outcome is written by the leader under ``_leading`` and read by its caller after it
held that lock too. Store and table are used under ``_leading`` alone.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from shmelim.eliminations.changes import Step
from shmelim.eliminations.entry import ORIGIN_KEY, row_entry
from shmelim.errors import ShmelimError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmelim.eliminations.history import Origin
    from shmelim.eliminations.store import Store
    from shmelim.shm import TableWriter, Transaction

__all__ = ["Committer"]

T = TypeVar("T")

_Outcome = tuple[Any, BaseException | None]

MAX_GROUP: Final = 1024
_REBUILD_FROM: Final = 1000
_REPORT_EVERY: Final = 10_000


class _Request(Generic[T]):
    """One change on its way: what to do, for whom, and how it ended."""

    def __init__(self, change: Callable[[Step], T], origin: Origin | None) -> None:
        self.change = change
        self.origin = origin
        self.done = False
        self.result: T | None = None
        self.error: BaseException | None = None

    def outcome(self) -> T:
        if self.error is not None:
            raise self.error
        return cast("T", self.result)


class Committer:
    """Commits changes to the store and publishes them in the table.

    Parameters
    ----------
    store
        The state of record; from now on only used through this object.
    table
        The table's writer; loaded by :meth:`publish_all`.
    published
        Called after each publish, still before the callers go on, with the hotkeys that changed.

    """

    def __init__(self, store: Store, table: TableWriter, published: Callable[[Sequence[str]], None]) -> None:
        self._store = store
        self._table = table
        self._published = published
        self._queue: deque[_Request[Any]] = deque()
        self._leading = threading.Lock()
        self._closed = False
        # For statistics; written under `_leading`.
        self.commits = 0
        self.changes = 0

    def commit(self, change: Callable[[Step], T], origin: Origin | None = None) -> T:
        """Carry out a change; when this returns it is durable, and every later read anywhere sees it.

        Parameters
        ----------
        change
            Run inside a transaction, perhaps together with others; what it raises undoes it alone.
        origin
            The process that asked for it, for the history.

        Returns
        -------
        What ``change`` returned.

        Raises
        ------
        StoreError
            It could not be committed; nothing of it was applied.
        SegmentFullError
            Shared memory has no room for it; nothing of it was applied.

        """
        request = _Request(change, origin)
        self._queue.append(request)
        with self._leading:
            if not request.done:
                if self._closed:
                    raise StoreError("the state is closed: the server has been shut down")
                self._commit_group(request)
        return request.outcome()

    def publish_all(self, origin_record: bytes, on_progress: Callable[[int, int], Any] | None = None) -> None:
        """Publish the whole store as the next generation of the table.

        Parameters
        ----------
        origin_record
            Kept under :data:`ORIGIN_KEY`: tells a successor where this table came from.
        on_progress
            Called now and then with how many rows are read, and how many there are at most.

        """
        with self._leading, self._table.transaction(replace=True) as transaction:
            transaction.put(ORIGIN_KEY, 0, origin_record, 0)
            self._origin_record = origin_record
            total = sum(self._store.counts()[:3]) if on_progress else 0
            for done, row in enumerate(self._store.rows()):
                transaction.put(*row_entry(row))
                if on_progress is not None and done % _REPORT_EVERY == 0:
                    on_progress(done, total)

    def read(self, question: Callable[[Store], T]) -> T:
        """Ask the store something between two commits."""
        with self._leading:
            return question(self._store)

    def close(self) -> None:
        """Close store and table; changes that come later are refused. Idempotent."""
        with self._leading:
            if not self._closed:
                self._closed = True
                self._store.close()
                self._table.close()

    # ------------------------------------------------------------------ under the lock

    def _commit_group(self, own: _Request[Any]) -> None:
        group: list[_Request[Any]] = []
        while self._queue and len(group) < MAX_GROUP:
            group.append(self._queue.popleft())
        if own not in group:
            # More were queued before it than one group takes.
            self._queue.remove(own)
            group.append(own)
        try:
            self._run(group)
        except ShmelimError as error:
            if len(group) == 1:
                own.error, own.done = error, True
                return
            # One change that does not fit must not take the others with it.
            for request in group:
                try:
                    self._run([request])
                except ShmelimError as lone_error:
                    request.error, request.done = lone_error, True
        except BaseException as error:
            for request in group:
                request.error, request.done = error, True
            raise

    def _run(self, group: list[_Request[Any]]) -> None:
        """Commit and publish a group; on an exception nothing of it is applied."""
        store = self._store
        transaction: Transaction | None = None
        store.begin()
        try:
            outcomes, touched, wrote = self._apply(group)
            if touched:
                transaction = self._stage(touched)
            if wrote:
                store.commit()
        except BaseException:
            if transaction is not None:
                transaction.abort()
            raise
        finally:
            if store.in_transaction:
                store.rollback()
        if transaction is not None:
            transaction.publish()
        self.commits += wrote
        self.changes += len(group)
        for request, (result, error) in zip(group, outcomes, strict=True):
            request.result, request.error, request.done = result, error, True
        if touched:
            self._published(touched)

    def _apply(self, group: list[_Request[Any]]) -> tuple[list[_Outcome], list[str], bool]:
        """Run each change in a savepoint of its own; return outcomes, touched hotkeys, whether to commit.

        A change that is alone needs none: if it raises, nothing is committed.
        """
        touched: dict[str, None] = {}
        outcomes: list[_Outcome] = []
        wrote = False
        for request in group:
            step = Step(self._store, request.origin)
            try:
                with self._store.savepoint() if len(group) > 1 else nullcontext():
                    result = request.change(step)
            except StoreError:
                raise
            except Exception as error:
                outcomes.append((None, error))
            else:
                outcomes.append((result, None))
                touched.update(step.touched)
                wrote = wrote or step.wrote
        return outcomes, list(touched), wrote

    def _stage(self, touched: list[str]) -> Transaction:
        """Stage what the store now says of the touched hotkeys, or of all when most of them are touched."""
        rebuild = len(touched) >= _REBUILD_FROM and 2 * len(touched) >= self._table.entries
        transaction = self._table.transaction(replace=rebuild)
        try:
            if rebuild:
                transaction.put(ORIGIN_KEY, 0, self._origin_record, 0)
                for row in self._store.rows():
                    transaction.put(*row_entry(row))
            else:
                rows = self._store.get_many(touched)
                for hotkey in touched:
                    if hotkey in rows:
                        transaction.put(*row_entry(rows[hotkey]))
                    else:
                        transaction.remove(hotkey.encode())
            transaction.stage()
        except BaseException:
            transaction.abort()
            raise
        return transaction
