"""Group commit: changes from many threads, each durable and published before its caller goes on.

The order is stage, commit, publish, acknowledge. Staging does all that can fail for want of shared memory, and
nobody sees it; so a change that is committed is published by one store that cannot fail, and readers never see
what is not durable.

There is no committing thread. Callers queue their change and take the lock; whoever gets it commits all that is
queued, in one transaction with one fsync, and the others find theirs done when the lock comes to them. A lone
caller pays for no hand-over between threads, and a hundred callers share one commit.

A change that cannot be made takes no other with it: its group is undone and each change tried alone. A caller that
is interrupted (Ctrl-C, where the server object lives in the caller's process) leaves its own change whole or
undone, and those of others to be carried out.

Shared variables: ``_queue`` is appended to by any thread (``deque.append`` is atomic) and emptied under
``_leading``; a request's outcome is written by the leader under ``_leading`` and read by its caller after it
held that lock too. Store and table are used under ``_leading`` alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Concatenate, Final, Generic, ParamSpec, TypeVar, cast

from shmelim.eliminations.rows import ORIGIN_KEY, PREFIX, Row, Status
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.store.history import Origin
from shmelim.eliminations.store.store import Store
from shmelim.errors import SegmentFullError, StoreError
from shmelim.shm import TableWriter, Transaction
from shmelim.system.problems import Problems

P = ParamSpec("P")
T = TypeVar("T")

MAX_GROUP: Final = 1024
_REBUILD_FROM: Final = 1000
_REPORT_EVERY: Final = 10_000

_COMMIT_FAILED: Final = "commit_failed"
_MEMORY_FULL: Final = "shared_memory_full"


class _Round:
    """One attempt to commit a group; ``finished`` acknowledges all of it in one store."""

    finished = False


_NONE_YET: Final = _Round()
_FAILED: Final = _Round()
_FAILED.finished = True


@dataclass(slots=True, eq=False)
class _Request(Generic[T]):
    """One change on its way: what to do, for whom, and how it ended."""

    change: Callable[..., T]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: Origin | None
    wanted: bool = True
    round: _Round = _NONE_YET
    result: T | None = None
    error: BaseException | None = None


class Committer:
    """Commits changes to the store, which is from now on used through this object only, and publishes them.

    ``origin`` tells who asks for the change that a thread makes. ``published`` is called after each publish, still
    before the callers go on. ``commits`` and ``changes`` count.
    """

    def __init__(
        self,
        store: Store,
        table: TableWriter,
        origin: Callable[[], Origin | None],
        problems: Problems | None = None,
    ) -> None:
        self._store = store
        self._table = table
        self._origin = origin
        self._problems = problems or Problems()
        self.published: Callable[[], None] | None = None
        self._queue: deque[_Request[Any]] = deque()
        self._leading = threading.Lock()
        self._closed = False
        # Hotkeys with which the store may be ahead of the table; more than none only after an interrupt.
        self._owed: dict[str, None] = {}
        # Written under `_leading`.
        self._raised: set[str] = set()  # the problems that the next commit clears
        self.commits = 0
        self.changes = 0

    def commit(self, change: Callable[Concatenate[Step, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Carry out a change with these arguments, perhaps together with others, and return what it returns.

        Then it is durable, and every later read anywhere sees it. What the change raises undoes it alone. After
        StoreError (not committed) and SegmentFullError (no room in shared memory) nothing of it was applied.
        """
        request = _Request(change, args, kwargs, self._origin())
        self._queue.append(request)
        try:
            with self._leading:
                if not request.round.finished:
                    self._lead(request)
        except BaseException:
            request.wanted = False
            raise
        if request.error is not None:
            raise request.error
        return cast("T", request.result)

    def go_on(self, origin_record: bytes) -> None:
        """Take changes of a table that shows the whole store already, and this record."""
        self._origin_record = origin_record

    def publish_all(self, origin_record: bytes, on_progress: Callable[[int, int], Any] | None = None) -> None:
        """Publish the whole store as the next generation, with a record that tells where it came from."""
        with self._leading, self._table.transaction(replace=True) as transaction:
            self._origin_record = origin_record
            transaction.commit = self._store.commit_number
            self._put_all(transaction, on_progress)

    def _put_all(self, transaction: Transaction, on_progress: Callable[[int, int], Any] | None = None) -> None:
        transaction.put(ORIGIN_KEY, 0, self._origin_record, 0)
        total = sum(self._store.counts()[:3]) if on_progress else 0
        for done, row in enumerate(self._store.rows()):
            transaction.put(*row_entry(row))
            if on_progress is not None and done % _REPORT_EVERY == 0:
                on_progress(done, total)

    def sync(self) -> None:
        """Make all that was committed survive a power cut, whatever the store was opened for."""
        self._store.sync()

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

    def _lead(self, own: _Request[Any]) -> None:
        """Carry out what is queued, ``own`` in any case. What is done leaves the queue, and nothing else does."""
        if self._closed:
            raise StoreError("the state is closed: the server has been shut down")
        waiting = self._queue.copy()  # which others go on appending to
        group = [request for request in waiting if request.wanted and not request.round.finished][:MAX_GROUP]
        if own not in group:
            # More were queued before it than one group takes.
            group.append(own)
        try:
            self._run(group)
        except Exception as error:
            if len(group) == 1 and not own.round.finished:
                own.error, own.round = error, _FAILED
            # One change that cannot be made must not take the others with it.
            for request in group:
                if not request.round.finished:
                    try:
                        self._run([request])
                    except Exception as its_own:
                        if not request.round.finished:
                            request.error, request.round = its_own, _FAILED
        finally:
            while self._queue and (self._queue[0].round.finished or not self._queue[0].wanted):
                self._queue.popleft()

    def _run(self, group: list[_Request[Any]]) -> None:
        """Commit and publish a group; on an ``Exception`` nothing of it is applied.

        An interrupt (``KeyboardInterrupt``, say) may come between any two steps. Before the commit it undoes the
        group; after it, the group is published and acknowledged first.
        """
        store, owed = self._store, self._owed
        this_round = _Round()
        touched: dict[str, None] = {}
        wrote = committed = False
        try:
            self._clean_up()
            store.begin()
            touched, wrote = self._apply(group, this_round)
            if not wrote:
                store.rollback()
            transaction = self._stage([*{**owed, **touched}]) if touched or owed else None
            if wrote:
                self._owed = {**owed, **touched}
                store.commit()
            committed = True
            if transaction is not None:
                transaction.publish()
            self._owed = {}
            this_round.finished = True
        except BaseException as error:
            # A commit that fails says so; one that was interrupted has ended its transaction, or has not.
            committed = committed or (wrote and not isinstance(error, Exception) and not store.in_transaction)
            self._clean_up()
            if not committed:
                self._owed = owed
                self._report(error)
            elif not this_round.finished:
                if self._owed:
                    self._stage([*self._owed]).publish()
                self._owed = {}
                this_round.finished = True
            raise
        finally:
            if touched and this_round.finished and self.published is not None:
                self.published()
        self.commits += wrote
        self.changes += len(group)
        while wrote and self._raised:
            self._problems.clear(self._raised.pop())

    def _report(self, error: BaseException) -> None:
        """Name what keeps changes from being made, where that is not the change itself."""
        if isinstance(error, SegmentFullError):
            self._raised.add(_MEMORY_FULL)
            self._problems.report(_MEMORY_FULL, f"a change was refused: {error.message}", remedy=error.hint)
        elif isinstance(error, StoreError):
            # Not "failing", which a service answers with a restart: that makes no room on a disk, and the start
            # with a damaged store makes a new one without its debts and slashes, which is a person's decision.
            text = f"the last change could not be committed: {error.message}"
            self._raised.add(_COMMIT_FAILED)
            self._problems.report(_COMMIT_FAILED, text, remedy=error.hint)

    def _clean_up(self) -> None:
        """End what an interrupt, or a failure, left open."""
        self._table.abort()
        if self._store.in_transaction:
            self._store.rollback()

    def _apply(self, group: list[_Request[Any]], this_round: _Round) -> tuple[dict[str, None], bool]:
        """Run each change in a savepoint of its own; return the touched hotkeys, and whether to commit.

        A change that is alone needs none: if it raises, nothing is committed.
        """
        touched: dict[str, None] = {}
        wrote = False
        for request in group:
            step = Step(self._store, request.origin)
            request.round, request.result, request.error = this_round, None, None
            try:
                with self._store.savepoint() if len(group) > 1 else nullcontext():
                    request.result = request.change(step, *request.args, **request.kwargs)
            except StoreError:
                raise
            except Exception as error:
                request.error = error
            else:
                touched.update(step.touched)
                wrote = wrote or step.wrote
        return touched, wrote

    def _stage(self, touched: list[str]) -> Transaction:
        """Stage what the store now says of the touched hotkeys, or of all when most of them are touched."""
        rebuild = len(touched) >= _REBUILD_FROM and 2 * len(touched) >= self._table.entries
        transaction = self._table.transaction(replace=rebuild)
        transaction.commit = self._store.next_commit
        try:
            if rebuild:
                self._put_all(transaction)
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


def row_entry(row: Row) -> tuple[bytes, int, bytes, int]:
    """Return key, flags, record and ordinal under which a row is published."""
    flags = 0
    if row.record is not None:
        flags |= Status.ELIMINATED
    if row.departed_ordinal is not None:
        flags |= Status.DEPARTED
    if row.registered:
        flags |= Status.REGISTERED
    prefix = PREFIX.pack(row.detected_ms or 0, row.departed_ordinal or 0)
    ordinal = row.eliminated_ordinal or row.departed_ordinal or 0
    return row.hotkey.encode(), int(flags), prefix + (row.record or b""), ordinal
