"""The state is changed in turns, one at a time: each stores, publishes and acknowledges.

A turn answers questions, makes changes in one transaction, stages the rows that they wrote, commits once,
publishes, and lets the callers go home; then it settles the other copy of the table. Staging does all that can
fail for want of shared memory, and nobody sees it; so what is committed is published by one store that cannot
fail, and readers never see what is not durable.

Who comes alone takes a turn himself, which spares two changes of threads. Who comes while there is one waits in a
queue, and a thread takes all that wait there as the next turn, so that a hundred changes share one fsync.

A change that cannot be made takes no other with it. A failure of the store is everybody's: it is told once to all
that wait for it, and not tried again for each.

A signal handler may interrupt the main thread at any line, which therefore takes no turn where there is a thread
for it. In direct mode, where there is none, an interrupted turn makes the table anew from the store, so that the
change is whole or undone.

Shared variables: a request is the caller's until it is queued, and again when ``done`` is released. Store, table
and the counts belong to who holds ``_turns``.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar, cast

from shmelim.eliminations.reading import Reading
from shmelim.eliminations.rows import ORIGIN_KEY, Row, Status, decode_hotkeys, entry_row, row_entry
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.store.history import Event, Origin
from shmelim.eliminations.store.store import Store
from shmelim.errors import ChangesUnknownError, DamagedFileError, SegmentFullError, ShmelimError, StoreError
from shmelim.shm import KEYS, Namespace, TableReader, TableWriter, Transaction
from shmelim.system.problems import Problems

P = ParamSpec("P")
T = TypeVar("T")

_REBUILD_FROM: Final = 1000
_REPORT_EVERY: Final = 10_000
_VERSIONS: Final = 50_000  # of which it is known what they showed: a few minutes under any load, days otherwise

_COMMIT_FAILED: Final = "commit_failed"
_MEMORY_FULL: Final = "shared_memory_full"
_LOG_LARGE: Final = "wal_large"


@dataclass(slots=True, eq=False)
class _Request:
    """What a caller wants: a change, of which somebody is the origin, or a question."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: Origin | None
    is_question: bool
    seen: int  # how often the store had failed when it was made
    done: threading.Lock = field(default_factory=threading.Lock)  # held until nothing more is to be waited for
    wanted: bool = True
    result: Any = None
    error: BaseException | None = None


class Published(Reading):
    """What is published; for who takes a turn, and for who writes the files."""

    def __init__(self, namespace: Namespace) -> None:
        self._table = TableReader(namespace)

    def follow(self) -> None:
        """Move to where the table is published by now: from the last place nothing leads there but the name."""
        _ = self._table.version

    def rows_of(self, hotkeys: list[str]) -> dict[str, Row]:
        """Return the rows of these hotkeys, texts in UTF-8; the unknown are left out."""
        rows = {}
        for hotkey in hotkeys:
            found = self._table._entry(hotkey.encode())  # noqa: SLF001  # row(), without a call for each
            if found is not None:
                rows[hotkey] = entry_row(hotkey, *found)
        return rows

    def hotkeys(self) -> set[str]:
        """Return every hotkey that anything is known of."""
        return {hotkey for flag in Status for hotkey in decode_hotkeys(self.packed_with_version(flag, KEYS)[1])}


class State:
    """Store and table, which are from now on used through this object only; thread-safe.

    Belongs to the process that made it. With ``threaded`` it has a thread of its own, until it is closed.
    ``origin`` tells who asks for the change that a thread makes. ``commits`` and ``changes`` count;
    ``published_ms`` is when a version was published last, or was taken over as it was, in ms since 1970 (UTC);
    ``rows_version`` is the last one that changed a row.
    """

    def __init__(
        self,
        store: Store,
        table: TableWriter,
        namespace: Namespace,
        origin: Callable[[], Origin | None],
        problems: Problems | None = None,
        *,
        threaded: bool = False,
    ) -> None:
        self._store = store
        self._table = table
        self._namespace = namespace
        self._origin = origin
        self._problems = problems or Problems()
        self.commits = 0
        self.changes = 0
        self.published_ms = 0
        self.rows_version = 0
        self._pid = os.getpid()
        # The store's failures so far, the last one, and the last commit that was none (ms since 1970).
        self._failures = 0
        self._failure = StoreError("the store never failed")
        self._committed_ms: int | None = None
        self._shown: dict[int, int] = {}  # the commit that each version showed, the oldest first
        self._raised: set[str] = set()  # the problems that the next commit clears
        self._log_is_held = False
        self._tending = threading.Lock()  # held while the log is made longer
        # Whether a turn has begun and not ended, after which the table may lack what the store has.
        self._torn = False
        self._turns = threading.Lock()
        self._in_turn = 0  # the thread that takes a turn; 0: none does
        self._queue: deque[_Request] = deque()
        self._wake: SimpleQueue[Literal["turn", "end"]] = SimpleQueue()  # what the thread is to do
        self._main_thread = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="shmelim-state", daemon=True) if threaded else None
        self._ended = False  # no turn begins any more

    def commit(self, change: Callable[Concatenate[Step, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Carry out a change with these arguments, perhaps together with others, and return what it returns.

        Then it is durable, and every later read anywhere sees it. What the change raises undoes it alone. After
        StoreError (not committed) and SegmentFullError (no room in shared memory) nothing of it was applied; after
        an interrupt (``KeyboardInterrupt``) all of it or nothing.
        """
        return cast("T", self._have(change, args, kwargs, self._origin()))

    def commit_by(
        self, origin: Origin | None, change: Callable[Concatenate[Step, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do the same for somebody who is known, and may change this."""
        return cast("T", self._have(change, args, kwargs, origin))

    def read(self, question: Callable[[Store], T]) -> T:
        """Ask the store something between two commits."""
        return cast("T", self._have(question, (), {}, None, is_question=True))

    def publish_all(self, origin_record: bytes, on_progress: Callable[[int, int], Any] | None = None) -> None:
        """Publish the whole store, with a record that tells where it came from, and take changes from now on."""
        self._origin_record = origin_record
        with self._table.transaction(replace=True) as transaction:
            self._put_all(transaction, on_progress)
        self.go_on(origin_record)

    def go_on(self, origin_record: bytes) -> None:
        """Take changes from now on: the table shows the whole store already, and this record."""
        self._origin_record = origin_record
        self._published = Published(self._namespace)
        self._store.look_up = self._published.rows_of
        self._note_shown(self._table.version, self._table.commit)
        if self._thread is not None:
            self._thread.start()

    def renew(self) -> None:
        """Make names again that were lost from ``/dev/shm``; errors as of the table's. Once changes are taken."""
        self.read(self._renew)

    def _renew(self, _store: Store) -> None:
        try:
            self._table.renew()
        finally:
            # What is published then is what was, under another version.
            self._note_moved()
        self._published.follow()

    def say_place(self, place: bytes) -> None:
        """Leave word in the table of where the channel is found."""
        self.read(lambda _store: self._table.say_place(place))

    def changes_since(self, since: int) -> tuple[int, list[Event]]:
        """Return the version that is published, and the events between it and an earlier one, oldest first.

        ChangesUnknownError: nobody knows any more what that version showed.
        """
        return self.read(partial(self._changes_since, since))

    def _changes_since(self, since: int, store: Store) -> tuple[int, list[Event]]:
        version = self._table.version
        shown = self._shown
        if since not in shown or shown[since] < store.pruned.commit:
            oldest = next(iter(shown))
            known = f"those of {oldest} to {version} are"
            raise ChangesUnknownError(
                f"what changed since version {since} is not known, {known}",
                hint="take a snapshot, and go on from its version",
            )
        return version, store.events_between(shown[since], shown[version])

    def sync(self) -> None:
        """Make all that was committed survive a power cut, whatever the store was opened for."""
        self._store.sync()

    def tend_log(self) -> None:
        """Start a thread that makes the store's log longer, if that is short; for who may wait for nobody."""
        if not self._tending.locked() and self._store.is_log_short():
            threading.Thread(target=self._lengthen_log, name="shmelim-log", daemon=True).start()

    def _lengthen_log(self) -> None:
        with self._tending, suppress(StoreError):
            self.read(Store.lengthen_log)
            self._store.sync()

    def close(self) -> None:
        """Close store and table; changes that come later are refused. Idempotent; nothing happens in a child."""
        if self._pid != os.getpid():
            return
        if self._thread is not None and self._thread.is_alive():
            self._wake.put("end")
            self._thread.join()
        self._ended = True
        self._refuse_waiting()
        with self._turns:
            self._store.close()
            self._table.close()

    # ------------------------------------------------------------------ callers

    def _have(
        self, call: Callable[..., Any], args: Any, kwargs: Any, origin: Any, *, is_question: bool = False
    ) -> Any:
        me = threading.get_ident()
        if self._pid != os.getpid():
            raise StoreError(
                f"the state belongs to process {self._pid}; this is its child {os.getpid()}, with a copy of it",
                hint="which reads as of the fork; to change the state, ask the process that has it",
            )
        if self._in_turn == me and self._turns.locked():
            raise ShmelimError(
                "the state was asked for a change while this thread is in the middle of another one",
                hint="let the signal handler or finalizer that asked set a flag, and change the state later",
            )
        request = _Request(call, args, kwargs, origin, is_question, self._failures)
        request.done.acquire()
        if self._thread is None:
            with self._turns:
                self._take([request])
        elif not self._queue and me != self._main_thread and self._turns.acquire(blocking=False):
            try:
                self._take([request])
            finally:
                self._turns.release()
        else:
            self._queue.append(request)
            self._wake.put("turn")
            if self._ended:
                self._refuse_waiting()
            try:
                request.done.acquire()
            except BaseException:
                request.wanted = False
                raise
        if request.error is not None:
            raise request.error
        return request.result

    def _refuse_waiting(self) -> None:
        with suppress(IndexError):
            while True:
                self._refuse(self._queue.popleft())

    def _refuse(self, request: _Request) -> None:
        request.error = StoreError("the state is closed: the server has been shut down")
        request.done.release()

    def _run(self) -> None:
        """Take turns for those who wait, until the thread is told to end."""
        while self._wake.get() == "turn":
            with self._turns:
                self._take_waiting()

    def _take_waiting(self) -> None:
        """Take all that wait as one turn. Nothing of it is kept."""
        requests = [self._queue.popleft() for _ in range(len(self._queue))]
        try:
            self._take(requests)
        except BaseException as error:
            # Whatever it was, the next turn begins with the store.
            for request in requests:
                if request.done.locked():
                    request.error = error
                    request.done.release()

    # ------------------------------------------------------------------ a turn

    def _take(self, requests: list[_Request]) -> None:
        """Take a turn: have these requests done; what interrupts it is raised once the table is whole again."""
        if self._ended:
            self._refuse(requests[0])
            return
        self._in_turn = threading.get_ident()
        try:
            if self._torn:
                self._rebuild()
            self._torn = True
            changes = []
            for request in requests:
                if request.is_question:
                    self._answer(request)
                elif self._is_due(request):
                    changes.append(request)
            if changes:
                self._make(changes)
                self._table.settle()
                self._look_at_log()
            self._torn = False
        except BaseException:
            self._rebuild()
            raise
        finally:
            self._in_turn = 0

    def _answer(self, request: _Request) -> None:
        try:
            request.result = request.call(self._store)
        except Exception as error:
            request.error = error
        request.done.release()

    def _is_due(self, request: _Request) -> bool:
        """Tell whether a change is to be made; one that waited while the store failed is told so."""
        if request.seen != self._failures:
            request.error = self._failure
            request.done.release()
        return request.wanted and request.error is None

    def _make(self, group: list[_Request]) -> None:
        """Make changes, all of them or as many as can be made, and let their callers go."""
        try:
            self._commit(group)
        except Exception as error:
            self._undo()
            self._report(error)
            if isinstance(error, StoreError):
                self._failures += 1
                self._failure = error
            elif len(group) > 1:
                # One change that cannot be published must not take the others with it.
                for request in group:
                    request.error = None
                    if self._is_due(request):
                        self._make([request])
                return
            for request in group:
                request.error = error
        for request in group:
            request.done.release()

    def _commit(self, group: list[_Request]) -> None:
        """Make changes in one transaction and publish them; on an ``Exception`` nothing is applied."""
        store, recorded = self._store, 0
        store.begin()
        for request in group:
            request.error = None
            step = Step(store, request.origin, self._shown.get)
            try:
                # A change that is alone needs no savepoint: if it raises, nothing is committed.
                with store.savepoint() if len(group) > 1 else nullcontext():
                    request.result = request.call(step, *request.args, **request.kwargs)
                recorded += step.recorded
            except Exception as error:
                if not store.in_transaction:
                    raise  # a full disk may undo the whole transaction by itself
                self._report(error)
                request.error = error
        if not store.dirty or (len(group) == 1 and group[0].error is not None):
            store.rollback()
        else:
            written = store.written
            # Also what changes no row has a version, if it is on record: changes(since) goes by versions.
            transaction = self._stage(written) if written or recorded else None
            store.commit()
            self._table.branch = store.own_branch
            if transaction is None:
                # Readers have nothing new to look at; a start does.
                self._table.commit = store.next_commit
            else:
                version = transaction.publish()
                self._note_shown(version, store.next_commit)
                if written:
                    self.rows_version = version
            self.commits += 1
            self._committed_ms = time.time_ns() // 1_000_000
            while self._raised:
                self._problems.clear(self._raised.pop())
        self.changes += len(group)

    def _note_shown(self, version: int, commit: int) -> None:
        """Note of which commit the version is that is published from now on."""
        self.published_ms = time.time_ns() // 1_000_000
        self._shown[version] = commit
        if len(self._shown) > _VERSIONS:
            del self._shown[next(iter(self._shown))]

    def _note_moved(self) -> None:
        """Note the version that is published, if none is noted of it: the same state in another segment."""
        if self._table.version not in self._shown:
            self._note_shown(self._table.version, self._table.commit)

    def _undo(self) -> None:
        """End what a failure, or an interrupt, left open."""
        self._table.abort()
        with suppress(StoreError):
            self._store.rollback()

    def _rebuild(self) -> None:
        """Publish what the store has, which an interrupted turn may have left ahead of the table."""
        self._undo()
        with self._table.transaction(replace=True) as transaction:
            self._put_all(transaction)
        self._torn, self.rows_version = False, self._table.version
        self._note_shown(self._table.version, self._table.commit)

    def _report(self, error: Exception) -> None:
        """Name what keeps changes from being made, where that is not the change itself."""
        if isinstance(error, SegmentFullError):
            self._raised.add(_MEMORY_FULL)
            self._problems.report(_MEMORY_FULL, f"a change was refused: {error.message}", remedy=error.hint)
        elif isinstance(error, StoreError) and not isinstance(error, DamagedFileError):
            # Not "failing", which a service answers with a restart: that makes no room on a disk, and the start
            # with a damaged store makes a new one without its debts and slashes, which is a person's decision.
            last = "there was none since the start"
            if self._committed_ms is not None:
                last = f"it was at {datetime.fromtimestamp(self._committed_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
            text = f"the last change could not be committed: {error.message} (the last good commit: {last})"
            self._raised.add(_COMMIT_FAILED)
            self._problems.report(_COMMIT_FAILED, text, remedy=error.hint)

    def _look_at_log(self) -> None:
        """Name a log that grows since somebody keeps reading what is long gone."""
        held = 0
        with suppress(StoreError, OSError):
            held = self._store.held_log()
        was_held, self._log_is_held = self._log_is_held, held > 0
        if held:
            text = f"the log of {self._store.path} has {held:,} bytes: somebody holds a read transaction open"
            remedy = f"`fuser {self._store.path}` names the processes that have it open: end the one that reads"
            self._problems.report(_LOG_LARGE, text, remedy=remedy)
        elif was_held:
            self._problems.clear(_LOG_LARGE)

    # ------------------------------------------------------------------ the table

    def _stage(self, written: dict[str, Row | None]) -> Transaction:
        """Stage the rows that were written, in a new table where that is less work."""
        rebuild = len(written) >= _REBUILD_FROM and 2 * len(written) >= self._table.entries
        transaction = self._table.transaction(replace=rebuild)
        if rebuild:
            transaction.put(ORIGIN_KEY, 0, self._origin_record, 0)
            known = len(written) - self._table.missing(map(str.encode, written))
            if self._table.entries > known + 1:
                others = self._published.hotkeys() - written.keys()
                written = {**self._published.rows_of(list(others)), **written}
        entries: list[tuple[bytes, int | None, bytes, int | None]] = []
        for hotkey, row in written.items():
            if row is not None:
                entries.append(row_entry(row))
            elif not rebuild:
                entries.append((hotkey.encode(), None, b"", None))
        transaction.extend(entries)
        transaction.commit = self._store.next_commit
        try:
            transaction.stage()
        finally:
            self._note_moved()  # where generations are used up
        return transaction

    def _put_all(self, transaction: Transaction, on_progress: Callable[[int, int], Any] | None = None) -> None:
        transaction.commit = self._store.commit_number
        self._table.branch = self._store.branch
        transaction.put(ORIGIN_KEY, 0, self._origin_record, 0)
        total = sum(self._store.counts()[:3]) if on_progress else 0
        for done, row in enumerate(self._store.rows()):
            transaction.put(*row_entry(row))
            if on_progress is not None and done % _REPORT_EVERY == 0:
                on_progress(done, total)
