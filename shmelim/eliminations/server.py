"""The one object that owns the state: its remote methods check, commit, publish and only then return.

Every method whose name ends in ``_rpc`` can be called over the command channel, and directly where the server
object lives in the caller's process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

import msgspec

from shmelim.channel import current_caller
from shmelim.eliminations.files import format as files
from shmelim.eliminations.files.mirror import ELIMINATIONS_FILE, FILES_MODES, FileMirror, FilesMode
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.record import check_hotkey, decode, generate_row, prepare
from shmelim.eliminations.runtime import StateLock
from shmelim.eliminations.starting.imports import import_departed, imported, merge_once
from shmelim.eliminations.starting.recovery import origin_record, recover
from shmelim.eliminations.state import changes
from shmelim.eliminations.state.committer import Committer
from shmelim.eliminations.state.debt_book import DebtBook
from shmelim.eliminations.state.uploads import Uploads
from shmelim.eliminations.store.history import Origin, read_events, this_process
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.eliminations.validator.environment import DEVELOPMENT_HOTKEY
from shmelim.errors import DamagedFileError, NoCollaboratorsError, StoreError
from shmelim.shm import PrivateNamespace, SharedNamespace, TableReader, TableWriter
from shmelim.system.logs import LimitedLog, log_problems
from shmelim.system.problems import Problems

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from shmelim.eliminations.rules import EliminationProcessor
    from shmelim.eliminations.state.changes import Step
    from shmelim.eliminations.store.history import Event
    from shmelim.eliminations.store.schema import Durability
    from shmelim.eliminations.validator.collaborators import PositionLocks
    from shmelim.shm import Namespace

T = TypeVar("T")

_log = logging.getLogger("shmelim.server")
_limited = LimitedLog(_log)

BEAT_INTERVAL: Final = 0.25
HISTORY_LIMIT: Final = 10_000


class EliminationManagerServer:
    """Owns store, table and files of one name.

    Parameters
    ----------
    namespace
        Where the table goes; None keeps it in this process's private memory.
    state_dir
        Where the store and the JSON files are; None keeps everything in memory and writes nothing.
    durability
        ``"power"``: an acknowledged change survives a power cut. ``"process"``: it survives the death of this
        process, at a third of the price or less.
    files
        ``"current"``: the JSON files are current when a saving call returns, and at most a second behind
        otherwise. ``"lagged"``: always the latter. ``"off"``: there are none.
    default_departed
        A departed file to start from when nothing is known of departures yet.
    imports
        Files of eliminations or departed hotkeys, merged into the state once each.
    on_progress
        Called while the state is being loaded with what is done, how far it is, and how far it will go (None
        where nobody knows).

    Attributes
    ----------
    live_price_fetcher
        In direct mode, what the processing closes positions with; may be replaced at any time.
    processor
        In direct mode, what processes eliminations; None in a server process, which has no collaborators.
    problems
        What is wrong with the state now: what the health check lists, and logs once.

    Raises
    ------
    AlreadyServingError
        Another server writes this table, or uses that state directory.
    StoreError, DamagedFileError
        The state directory cannot be used.
    SegmentFullError
        No shared memory left.

    Notes
    -----
    Thread-safe: any thread may call any method; changes that come at once share a commit. Belongs to the
    process that made it.

    """

    def __init__(
        self,
        namespace: Namespace | None = None,
        state_dir: Path | str | None = None,
        *,
        durability: Durability = "power",
        files: FilesMode = "current",
        default_departed: Path | str | None = None,
        imports: Sequence[Path | str] = (),
        on_progress: Callable[[str, int, int | None], Any] | None = None,
    ) -> None:
        tell = on_progress or _tell_nobody
        if files not in FILES_MODES:
            raise ValueError(f"files must be one of {', '.join(FILES_MODES)}, not {files!r}")
        self.namespace = PrivateNamespace() if namespace is None else namespace
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.started_ms = _now_ms()
        self.live_price_fetcher: Any = None
        self.processor: EliminationProcessor | None = None
        self.problems = Problems()
        log_problems(self.problems, _log)
        self._first_refresh_ran = False
        self._uploads = Uploads()
        self._stopped = threading.Event()
        self._lock = None if self.state_dir is None else StateLock(self.state_dir)
        if self._lock is not None:
            self._lock.acquire()
        try:
            table = TableWriter(self.namespace)
        except BaseException:
            self._unlock()
            raise
        # From here on the heartbeat tells readers that a writer is at work, however long recovery takes.
        self._beating = threading.Thread(target=self._beat, args=(table,), name="shmelim-heartbeat", daemon=True)
        self._beating.start()
        try:
            tell("opening the state", 0, None)
            store = self._open_store(durability, default_departed, use_files=files != "off")
            try:
                paths = [Path(path) for path in imports]
                merge_once(store, paths, lambda path: tell(f"importing {path}", 0, None))
                self._committer = Committer(store, table, self._after_publish, self.problems)
                self._mirror: FileMirror | None = None
                self._committer.publish_all(
                    origin_record(self.state_dir, imported(store)),
                    lambda done, total: tell("publishing", done, total),
                )
            except BaseException:
                store.close()
                raise
        except BaseException:
            self._stopped.set()
            self._beating.join()
            table.close()
            self._unlock()
            raise
        self._debts = DebtBook(self._committer, _origin, self.state_dir)
        self.reader = EliminationReader.over(self.namespace)
        if self.state_dir is not None:
            self._mirror = FileMirror(
                self.state_dir, TableReader(self.namespace), self._committer, files, self.problems
            )
            self._mirror.mark()
            self._mirror.start()

    def _open_store(
        self, durability: Durability, default_departed: Path | str | None, *, use_files: bool
    ) -> Store:
        default = None if default_departed is None else Path(default_departed)
        if self.state_dir is not None:
            return recover(
                self.state_dir,
                self.namespace,
                durability=durability,
                default_departed=default,
                use_files=use_files,
            )
        store = Store.in_memory()
        if default is not None:
            with store.transaction():
                import_departed(changes.Step(store, None), default)
        return store

    def _beat(self, table: TableWriter) -> None:
        while not self._stopped.wait(BEAT_INTERVAL):
            table.beat()
            self._uploads.expire()

    def _after_publish(self, _touched: Sequence[str]) -> None:
        if self._mirror is not None:
            self._mirror.mark()

    # ------------------------------------------------------------------ life

    def close(self) -> None:
        """Write what the files lack, and close the state; readers keep what was published. Idempotent."""
        if self._mirror is not None:
            self._mirror.stop()
        self._stopped.set()
        self._beating.join()
        self._committer.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _commit(self, change: Callable[[Step], T]) -> T:
        return self._committer.commit(change, _origin())

    def _save(self) -> None:
        """Bring the files up to date; what fails there is a named problem, since the change itself is safe."""
        if self._mirror is not None:
            with contextlib.suppress(StoreError):
                self._mirror.flush()

    # ------------------------------------------------------------------ health

    def health_check_rpc(self) -> dict[str, Any]:
        """Return ``status`` ("ok", "degraded" or "failing"), ``timestamp_ms``, the counts, and what else helps.

        ``problems`` lists what is wrong, the oldest first, as dicts with ``name``, ``subject``, ``text``,
        ``severity``, ``remedy`` and ``since_ms``; the status is that of the worst.
        """
        table = self.reader.table
        debts = self._debts.health(self.problems)
        return {
            "status": self.problems.status(),
            "timestamp_ms": _now_ms(),
            "num_eliminations": len(self.reader),
            "num_departed_hotkeys": self.reader.num_departed_hotkeys,
            "name": self.namespace.name if isinstance(self.namespace, SharedNamespace) else None,
            "pid": os.getpid(),
            "started_ms": self.started_ms,
            "state_dir": None if self.state_dir is None else str(self.state_dir),
            "store_bytes": self._store_bytes(),
            "commits": self._committer.commits,
            "changes": self._committer.changes,
            "generation": table.generation,
            "sequence": table.sequence,
            "segment_bytes": table.segment_size,
            **debts,
            "problems": [problem.as_dict() for problem in self.problems.standing()],
        }

    def _store_bytes(self) -> int:
        """Return what the store takes on disk, without waiting for a commit that is under way."""
        size = 0
        if self.state_dir is not None:
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    size += (self.state_dir / (FILE_NAME + suffix)).stat().st_size
        return size

    # ------------------------------------------------------------------ reading

    def is_hotkey_eliminated_rpc(self, hotkey: str) -> bool:
        """Tell whether a hotkey is eliminated."""
        return self.reader.is_hotkey_eliminated(hotkey)

    def get_elimination_rpc(self, hotkey: str) -> dict[str, Any] | None:
        """Return a hotkey's elimination record, or None."""
        return self.reader.get_elimination(hotkey)

    def get_eliminated_hotkeys_rpc(self) -> set[str]:
        """Return the hotkeys that are eliminated."""
        return self.reader.get_eliminated_hotkeys()

    def get_eliminations_from_memory_rpc(self) -> list[dict[str, Any]]:
        """Return all elimination records, in the order of first elimination."""
        if current_caller() is None:
            return self.reader.get_eliminations_from_memory()
        # They are msgpack in shared memory, and msgpack on their way: decoded where they arrive, and only there.
        return cast("list[dict[str, Any]]", msgspec.Raw(self.reader.pack_eliminations()))

    def get_eliminations_dict_rpc(self) -> dict[str, dict[str, Any]]:
        """Return all elimination records by hotkey, in the order of first elimination."""
        return self.reader.get_eliminations_dict()

    def get_eliminations_from_disk_rpc(self) -> list[dict[str, Any]]:
        """Return the rows of ``eliminations.json``, or of the store where there is no such file."""
        if self._mirror is not None and self._mirror.mode != "off" and self.state_dir is not None:
            try:
                found = files.read_eliminations(self.state_dir / ELIMINATIONS_FILE)
            except DamagedFileError as error:
                _limited(logging.WARNING, "file", "%s; answering from the store", error)
            else:
                if found is not None:
                    return [decode(record) for _, record in found.rows]
        return [decode(record) for record in self._committer.read(lambda s: [r for _, r in s.eliminated()])]

    def is_hotkey_re_registered_rpc(self, hotkey: str) -> bool:
        """Tell whether a hotkey that once left the metagraph is in it now."""
        return self.reader.is_hotkey_re_registered(hotkey)

    def get_departed_hotkeys_rpc(self) -> dict[str, dict[str, int]]:
        """Return ``{hotkey: {"detected_ms": …}}`` of all that left the metagraph, in the order they did."""
        return self.reader.get_departed_hotkeys()

    def get_departed_hotkey_info_rpc(self, hotkey: str) -> dict[str, int] | None:
        """Return ``{"detected_ms": …}`` of a hotkey that left the metagraph once, or None."""
        return self.reader.get_departed_hotkey_info(hotkey)

    def is_zombie_hotkey_rpc(self, hotkey: str, all_hotkeys_set: Iterable[str]) -> bool:
        """Tell whether a hotkey is missing among all hotkeys of the metagraph, the development one excepted."""
        check_hotkey(hotkey)
        own = DEVELOPMENT_HOTKEY if self.processor is None else self.processor.environment.development_hotkey
        return hotkey != own and hotkey not in all_hotkeys_set

    def get_history_rpc(
        self, hotkey: str | None = None, limit: int | None = 100, before_id: int | None = None
    ) -> list[dict[str, Any]]:
        """Return events, newest first: who changed what, when, with the old and the new record.

        Parameters
        ----------
        hotkey
            Only this hotkey's events.
        limit
            At most so many, up to 10,000; None: 10,000.
        before_id
            Only events older than the one with this ``id``; for the next page.

        Raises
        ------
        ValueError
            The limit is out of bounds.

        """
        limit = HISTORY_LIMIT if limit is None else limit
        if not 0 <= limit <= HISTORY_LIMIT:
            raise ValueError(f"limit must be 0 to {HISTORY_LIMIT:,}, not {limit!r}; go on with before_id")
        if self.state_dir is None:
            events = self._committer.read(lambda store: store.events(hotkey, limit, before_id))
        else:
            # Beside the one who commits, who may be busy with a long sync.
            events = read_events(self.state_dir, hotkey, limit, before_id)
        return [event_as_dict(event) for event in events]

    # ------------------------------------------------------------------ changing

    def add_elimination_rpc(self, hotkey: str, data: Mapping[str, Any]) -> bool:
        """Add or replace a record; True for a hotkey that was not eliminated before, False for an update.

        Raises
        ------
        ValueError
            A required field is missing, the record is of another hotkey, or larger than 1 MiB.
        TypeError
            A value cannot be stored; the message names its path.

        """
        check_hotkey(hotkey)  # which also refuses None: prepare would take the record's word for it
        return self._commit(changes.add(*prepare(data, hotkey)))

    def append_elimination_row_rpc(
        self,
        hotkey: str,
        current_dd: float | None,
        reason: str,
        t_ms: int | None = None,
        price_info: Mapping[str, Any] | None = None,
        return_info: Mapping[str, Any] | None = None,
    ) -> bool:
        """Build a record from its parts, add it and save; returns as :meth:`add_elimination_rpc` does."""
        row = generate_row(hotkey, current_dd, reason, t_ms, price_info, return_info)
        added = self.add_elimination_rpc(hotkey, row)
        self._save()
        return added

    def remove_elimination_rpc(self, hotkey: str) -> bool:
        """Remove a record; True if there was one."""
        return bool(self._commit(changes.remove(changes.check_hotkeys([hotkey]))))

    def delete_eliminations_rpc(
        self, hotkeys: Iterable[str], times_ms: Mapping[str, int] | None = None
    ) -> list[str]:
        """Remove many records in one transaction and save; returns the hotkeys whose record was removed.

        With `times_ms`, only those records that were initiated when it says for their hotkey.
        """
        removed = self._commit(changes.remove(changes.check_hotkeys(hotkeys), times_ms))
        self._save()
        return removed

    def sync_eliminations_rpc(self, eliminations: Iterable[Mapping[str, Any]]) -> list[str]:
        """Make exactly these records the eliminations, in one step, and save; returns the removed hotkeys.

        Hotkeys that stay keep their place in the order. Of a hotkey that is listed twice the last record
        counts. One record that is not fit refuses the whole list.
        """
        return self._replace(changes.prepare_all(eliminations), "sync")

    def write_eliminations_to_disk_rpc(self, eliminations: Iterable[Mapping[str, Any]]) -> None:
        """Make exactly these records the eliminations, on disk and everywhere else."""
        self._replace(changes.prepare_all(eliminations), "write")

    def clear_eliminations_rpc(self) -> None:
        """Remove all records and save."""
        self._commit(changes.clear())
        self._save()

    def save_eliminations_rpc(self) -> None:
        """Write the JSON files now; StoreError if that fails."""
        if self._mirror is not None:
            self._mirror.flush(insist=True)

    def update_metagraph_rpc(self, hotkeys: Iterable[str]) -> list[str]:
        """Say which hotkeys are in the metagraph now; returns those whose departure was recorded."""
        return self._commit(changes.update_metagraph(changes.check_hotkeys(hotkeys)))

    def get_missing_hotkeys_rpc(self) -> list[str]:
        """Return the hotkeys that the metagraph showed no more, so many at once that it was not believed."""
        return self._committer.read(changes.missing)

    def accept_loss_rpc(self, hotkeys: Iterable[str]) -> list[str]:
        """Record the departure of these hotkeys, as far as they are missing; returns those that were."""
        return self._commit(changes.accept_loss(changes.check_hotkeys(hotkeys)))

    def begin_upload_rpc(self) -> str:
        """Begin a list that is too large for one message; returns its token."""
        return self._uploads.begin()

    def upload_rpc(self, token: str, eliminations: Sequence[Mapping[str, Any]]) -> int:
        """Add records to an upload; returns how many it has."""
        return self._uploads.extend(token, eliminations)

    def abandon_upload_rpc(self, token: str) -> None:
        """Forget an upload."""
        self._uploads.abandon(token)

    def sync_uploaded_rpc(self, token: str) -> list[str]:
        """Sync to what was uploaded; as :meth:`sync_eliminations_rpc`."""
        return self._replace(self._uploads.finish(token), "sync")

    def _replace(self, records: dict[str, bytes], reason: str) -> list[str]:
        removed = self._commit(changes.replace_all(records, reason))
        self._save()
        return removed

    # ------------------------------------------------------------------ debts

    def eliminate_rpc(
        self,
        hotkey: str,
        record: Mapping[str, Any],
        owed: Iterable[str],
        replacements: int | None = None,
        slash_once_within_ms: float | None = None,
    ) -> str:
        """Eliminate a hotkey that is not eliminated yet, and record in the same transaction what that owes.

        Parameters
        ----------
        hotkey, record
            Whom, and the record.
        owed
            Kinds of debts: ``"limit_orders"``, ``"positions"``, ``"slash"``. A slash that was begun for an earlier
            elimination and is not settled stands for this one too.
        replacements
            What :meth:`get_replacements_rpc` returned when the decision was made; None: whatever it is.
        slash_once_within_ms
            No slash is owed if one was made for an elimination of this hotkey whose
            ``elimination_initiated_time_ms`` is less than this away, whatever became of that elimination; None:
            one is owed all the same.

        Returns
        -------
        str
            ``"added"``; ``"already"`` where it was eliminated, whose reason and debts stay; ``"superseded"`` where
            the list was replaced since. Only ``"added"`` changes anything.

        """
        return self._debts.eliminate(hotkey, record, owed, replacements, slash_once_within_ms)

    def get_replacements_rpc(self) -> int:
        """Return how often all eliminations were replaced: by a sync, a write, a clear, or a file at a start."""
        return self._debts.replacements()

    def get_debts_rpc(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        """Return what eliminations still owe, in their order, and of one: limit orders, positions, slash.

        Each is ``{"hotkey", "kind", "state", "due", "since_ms", "eliminated_ms", "attempts", "error", "attempt",
        "in_doubt_since_ms"}``; :class:`~shmelim.eliminations.debts.states.Debt` says what they mean.
        """
        return self._debts.debts(hotkey)

    def get_slashes_rpc(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        """Return the last slash that was made of each hotkey, or of one, oldest first.

        Each is ``{"hotkey", "made_ms", "eliminated_ms", "by"}``; ``by`` is ``"contract"``, or ``"hand"`` where a
        person said that it was made.
        """
        return self._debts.slashes(hotkey)

    def settle_debt_rpc(self, hotkey: str, kind: str, attempt: str | None = None) -> bool:
        """Say that an effect is made; a slash only by the attempt that stands. False where nothing fits."""
        return self._debts.settle(hotkey, kind, attempt)

    def fail_debt_rpc(
        self, hotkey: str, kind: str, error: str, attempt: str | None = None, in_doubt: bool = False
    ) -> bool:
        """Say that an effect could not be made; False where nothing fits.

        A slash that is attempted is owed again, or ``in_doubt`` where nobody knows whether it was made.
        """
        return self._debts.fail(hotkey, kind, error, attempt, in_doubt=in_doubt)

    def begin_slash_rpc(self, hotkey: str, attempt: str) -> bool:
        """Let an attempt have an owed slash, durable before this returns; may be repeated with the same token.

        False: the slash is not owed, or another attempt has it; it must not be made.
        """
        return self._debts.begin_slash(hotkey, attempt)

    def doubt_slash_rpc(self, hotkey: str, attempt: str, error: str) -> bool:
        """Put the slash that this very attempt has in doubt; False where it has none."""
        return self._debts.doubt_slash(hotkey, attempt, error)

    def resolve_slash_rpc(self, hotkey: str, made: bool) -> bool:
        """Say by hand whether a slash that was begun was made; False where there is none.

        If it was not, it is owed again, unless its elimination was taken back. While a running process has it,
        nobody can say so: False.
        """
        return self._debts.resolve_slash(hotkey, made)

    # ------------------------------------------------------------------ first refresh

    def get_first_refresh_ran_rpc(self) -> bool:
        """Tell whether the first refresh was made since this server started."""
        return self._first_refresh_ran

    def set_first_refresh_ran_rpc(self, value: bool) -> None:
        """Say whether the first refresh was made."""
        self._first_refresh_ran = bool(value)

    # ------------------------------------------------------------------ processing, in direct mode

    def process_eliminations_rpc(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Run one tick of the processing rules; NoCollaboratorsError in a process of the server's own."""
        self._processing("process_eliminations").process_eliminations(position_locks, iteration_epoch)

    def handle_perf_ledger_eliminations_rpc(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Eliminate whom the perf ledgers name; raises as :meth:`process_eliminations_rpc`."""
        processor = self._processing("handle_perf_ledger_eliminations")
        processor.handle_perf_ledger_eliminations(position_locks, iteration_epoch)

    def handle_mdd_eliminations_rpc(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Eliminate whose drawdown is too large; raises as :meth:`process_eliminations_rpc`."""
        self._processing("handle_mdd_eliminations").handle_mdd_eliminations(position_locks, iteration_epoch)

    def handle_first_refresh_rpc(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Close what eliminated miners still hold, once; raises as :meth:`process_eliminations_rpc`."""
        self._processing("handle_first_refresh").handle_first_refresh(position_locks, iteration_epoch)

    def _processing(self, method: str) -> EliminationProcessor:
        if self.processor is None:
            raise NoCollaboratorsError(
                f"{method} cannot run in the server's process, which has no metagraph and no positions",
                hint=f"call EliminationManager.{method} in the process that holds them",
            )
        return self.processor


def event_as_dict(event: Event) -> dict[str, Any]:
    """Return an event with its records decoded."""
    return event._asdict() | {
        "old": None if event.old is None else decode(event.old),
        "new": None if event.new is None else decode(event.new),
    }


def _origin() -> Origin:
    caller = current_caller()
    return this_process() if caller is None else Origin(caller.pid, caller.uid, caller.program)


def _tell_nobody(_what: str, _done: int, _total: int | None) -> None:
    """Stand in where nobody asked for progress."""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
