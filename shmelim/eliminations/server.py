"""The one object that owns the state: its remote methods check, commit, publish and only then return.

Every method whose name ends in ``_rpc`` can be called over the command channel, and directly where the server
object lives in the caller's process. What it does is documented where it is declared, in ``calls.py``, or with the
reader's method of that name.
"""

# ruff: noqa: D102

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeAlias, cast

import msgspec

from shmelim.channel import current_caller
from shmelim.eliminations.calls import Calls, ProcessingCalls, implements
from shmelim.eliminations.comparing import Comparison, changed_records
from shmelim.eliminations.files import format as files
from shmelim.eliminations.files.mirror import ELIMINATIONS_FILE, FILES_MODES, FileMirror, FilesMode
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.reading import Reading
from shmelim.eliminations.record import check_hotkey, check_hotkeys, decode, generate_row, prepare
from shmelim.eliminations.rules import EliminationProcessor, processed
from shmelim.eliminations.runtime import lock_state
from shmelim.eliminations.starting.imports import import_departed, imported, merge_once
from shmelim.eliminations.starting.recovery import origin_record, recover, take_files
from shmelim.eliminations.state import changes
from shmelim.eliminations.state.debt_book import DebtMethods
from shmelim.eliminations.state.thread import State
from shmelim.eliminations.state.uploads import Uploads
from shmelim.eliminations.store.history import Origin, this_process
from shmelim.eliminations.store.opening import store_bytes
from shmelim.eliminations.store.schema import Durability
from shmelim.eliminations.store.store import Store
from shmelim.eliminations.ticks import Ticks
from shmelim.eliminations.validator.environment import DEVELOPMENT_HOTKEY
from shmelim.errors import DamagedFileError, StoreError
from shmelim.shm import Namespace, PrivateNamespace, SharedNamespace, TableReader, TableWriter
from shmelim.system import clock
from shmelim.system.logs import LimitedLog, log_problems
from shmelim.system.problems import Problems, worst

_log = logging.getLogger("shmelim.server")
_limited = LimitedLog(_log)

BEAT_INTERVAL: Final = 0.25
HISTORY_LIMIT: Final = 10_000

Progress: TypeAlias = Callable[[str, int, int | None], Any]


@implements(Calls, ProcessingCalls, Reading)
class EliminationManagerServer(DebtMethods):
    """Owns store, table and files of one name.

    Any thread may call any method; changes that come at once share a commit. Belongs to the process that made it.
    ``live_price_fetcher`` is what the processing closes positions with in direct mode, and may be replaced at any
    time; ``problems`` are what is wrong with the state now.

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

    Raises
    ------
    AlreadyServingError
        Another server writes this table, or uses that state directory.
    StoreError, DamagedFileError
        The state directory cannot be used.
    SegmentFullError
        No shared memory left.

    Examples
    --------
    Without a namespace and a directory all is in this process' private memory:

    >>> with EliminationManagerServer() as server:
    ...     server.append_elimination_row_rpc("5C4…", 0.11, "MAX_TOTAL_DRAWDOWN", t_ms=1_700_000_000_000)
    ...     server.is_hotkey_eliminated_rpc("5C4…")
    ...     server.sync_eliminations_rpc([])
    ...     [event["action"] for event in server.get_history_rpc("5C4…")]
    True
    True
    ['5C4…']
    ['remove', 'add']

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
        on_progress: Progress | None = None,
    ) -> None:
        tell = on_progress or (lambda _what, _done, _total: None)
        if files not in FILES_MODES:
            raise ValueError(f"files must be one of {', '.join(FILES_MODES)}, not {files!r}")
        self.namespace = PrivateNamespace() if namespace is None else namespace
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.started_ms = clock.now_ms()
        self.live_price_fetcher: Any = None
        self.problems = Problems()
        log_problems(self.problems, _log)
        self._ticks = Ticks(self.problems)
        # In direct mode the manager sets it; a server process has no collaborators.
        self._processor: EliminationProcessor | None = None
        self._origin = this_process()
        self._first_refresh_ran = False
        self._uploads = Uploads()
        self._stopped = threading.Event()
        self._mirror: FileMirror | None = None
        with contextlib.ExitStack() as undo:
            if self.state_dir is not None:
                undo.callback(lock_state(self.state_dir).release)
            table = TableWriter(self.namespace)
            undo.callback(table.close)
            # From here on the heartbeat tells readers that a writer is at work, however long recovery takes.
            self._beating = threading.Thread(
                target=self._beat, args=(table,), name="shmelim-heartbeat", daemon=True
            )
            self._beating.start()
            undo.callback(self._beating.join)
            undo.callback(self._stopped.set)
            tell("opening the state", 0, None)
            default = None if default_departed is None else Path(default_departed)
            store = self._open_store(durability, default, use_files=files != "off")
            undo.callback(store.close)
            paths = [Path(path) for path in imports]
            merge_once(store, paths, lambda path: tell(f"importing {path}", 0, None))
            self._state = State(
                store,
                table,
                self.namespace,
                self._caller,
                self.problems,
                # In direct mode, where nobody else sees the table, callers take their turns themselves.
                threaded=not isinstance(self.namespace, PrivateNamespace),
            )
            self._state.publish_all(
                origin_record(self.state_dir, imported(store)),
                lambda done, total: tell("publishing", done, total),
            )
            self.reader = EliminationReader.over(self.namespace)
            if self.state_dir is not None and files != "off":
                self._mirror = FileMirror(
                    self.state_dir, TableReader(self.namespace), self._state, files, self.problems
                )
                self._state.published = self._mirror.published.set
                self._mirror.start()
            self._undo = undo.pop_all()

    def _open_store(self, durability: Durability, default: Path | None, *, use_files: bool) -> Store:
        if self.state_dir is not None:
            return recover(self.state_dir, self.namespace, durability, default, use_files=use_files)
        store = Store.in_memory()
        if default is not None:
            with store.transaction():
                import_departed(changes.Step(store, None), default)
        return store

    def _beat(self, table: TableWriter) -> None:
        while not self._stopped.wait(BEAT_INTERVAL):
            table.beat()
            self._uploads.expire()

    # ------------------------------------------------------------------ life

    def close(self) -> None:
        """Write what the files lack, and close the state; readers keep what was published. Idempotent."""
        if self._mirror is not None:
            self._mirror.stop()
        self._stopped.set()
        self._beating.join()
        self._state.close()
        self._undo.close()

    def _caller(self) -> Origin:
        """Return who asks for the change that this thread makes."""
        caller = current_caller()
        return self._origin if caller is None else Origin(caller.pid, caller.uid, caller.program)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ health

    def health_check_rpc(self) -> dict[str, Any]:
        """Return what the server says of itself, as ``EliminationClient.health_check`` describes."""
        table = self.reader.table
        debts = self._debt_health(self.problems)
        processing = self._ticks.health()
        problems = [problem.as_dict() for problem in self.problems.standing()] + processing.pop("problems")
        return {
            "status": worst(problem["severity"] for problem in problems),
            "timestamp_ms": clock.now_ms(),
            "num_eliminations": len(self.reader),
            "num_departed_hotkeys": self.reader.num_departed_hotkeys,
            "name": self.namespace.name if isinstance(self.namespace, SharedNamespace) else None,
            "pid": os.getpid(),
            "started_ms": self.started_ms,
            "state_dir": None if self.state_dir is None else str(self.state_dir),
            "store_bytes": 0 if self.state_dir is None else store_bytes(self.state_dir),
            "commits": self._state.commits,
            "changes": self._state.changes,
            "generation": table.generation,
            "sequence": table.version,
            "segment_bytes": table.segment_size,
            **debts,
            **processing,
            "problems": problems,
        }

    def report_processing_rpc(
        self, whole_ms: int | None, interval_ms: float, problems: list[dict[str, Any]]
    ) -> None:
        self._ticks.report(whole_ms, interval_ms, problems)

    # ------------------------------------------------------------------ reading

    def is_hotkey_eliminated_rpc(self, hotkey: str) -> bool:
        return self.reader.is_hotkey_eliminated(hotkey)

    def get_elimination_rpc(self, hotkey: str) -> dict[str, Any] | None:
        return self.reader.get_elimination(hotkey)

    def get_eliminated_hotkeys_rpc(self) -> set[str]:
        return self.reader.get_eliminated_hotkeys()

    def get_eliminations_from_memory_rpc(self) -> list[dict[str, Any]]:
        if current_caller() is None:
            return self.reader.get_eliminations_from_memory()
        # They are msgpack in shared memory, and msgpack on their way: decoded where they arrive, and only there.
        return cast("list[dict[str, Any]]", msgspec.Raw(self.reader.pack_eliminations()))

    def get_eliminations_dict_rpc(self) -> dict[str, dict[str, Any]]:
        return self.reader.get_eliminations_dict()

    def is_hotkey_re_registered_rpc(self, hotkey: str) -> bool:
        return self.reader.is_hotkey_re_registered(hotkey)

    def get_departed_hotkeys_rpc(self) -> dict[str, dict[str, int]]:
        return self.reader.get_departed_hotkeys()

    def get_departed_hotkey_info_rpc(self, hotkey: str) -> dict[str, int] | None:
        return self.reader.get_departed_hotkey_info(hotkey)

    def is_zombie_hotkey_rpc(self, hotkey: str, all_hotkeys_set: Container[str]) -> bool:
        """Tell whether a hotkey is missing among all hotkeys of the metagraph, the development one excepted."""
        check_hotkey(hotkey)
        processor = self._processor
        own = DEVELOPMENT_HOTKEY if processor is None else processor.context.environment.development_hotkey
        return hotkey != own and hotkey not in all_hotkeys_set

    def get_history_rpc(
        self, hotkey: str | None = None, limit: int | None = 100, before_id: int | None = None
    ) -> list[dict[str, Any]]:
        limit = HISTORY_LIMIT if limit is None else limit
        if not 0 <= limit <= HISTORY_LIMIT:
            raise ValueError(f"limit must be 0 to {HISTORY_LIMIT:,}, not {limit!r}; go on with before_id")
        return [event.as_dict() for event in self._ask(lambda store: store.events(hotkey, limit, before_id))]

    # ------------------------------------------------------------------ changing

    def add_elimination_rpc(self, hotkey: str, data: Mapping[str, Any]) -> bool:
        check_hotkey(hotkey)  # which also refuses None: prepare would take the record's word for it
        return self._state.commit(changes.add, *prepare(data, hotkey))

    def append_elimination_row_rpc(
        self,
        hotkey: str,
        current_dd: float | None,
        reason: str,
        t_ms: int | None = None,
        price_info: Mapping[str, Any] | None = None,
        return_info: Mapping[str, Any] | None = None,
    ) -> bool:
        row = generate_row(hotkey, current_dd, reason, t_ms, price_info, return_info)
        added = self.add_elimination_rpc(hotkey, row)
        self._save()
        return added

    def remove_elimination_rpc(self, hotkey: str) -> bool:
        check_hotkey(hotkey)
        return bool(self._state.commit(changes.remove, [hotkey]))

    def delete_eliminations_rpc(
        self, hotkeys: Iterable[str], times_ms: Mapping[str, int] | None = None
    ) -> list[str]:
        removed = self._state.commit(changes.remove, check_hotkeys(hotkeys), times_ms)
        self._save()
        return removed

    def sync_eliminations_rpc(self, eliminations: Iterable[Mapping[str, Any]]) -> list[str]:
        return self._replace(eliminations, "sync")

    def write_eliminations_to_disk_rpc(self, eliminations: Iterable[Mapping[str, Any]]) -> None:
        self._replace(eliminations, "write")

    def begin_upload_rpc(self) -> str:
        """Begin a list that is too large for one message; returns its token."""
        return self._uploads.begin(Comparison(self.reader))

    def upload_rpc(self, token: str, eliminations: Sequence[Mapping[str, Any]]) -> int:
        """Add records to an upload; returns how many it has."""
        return self._uploads.extend(token, eliminations)

    def abandon_upload_rpc(self, token: str) -> None:
        """Forget an upload."""
        self._uploads.abandon(token)

    def sync_uploaded_rpc(self, token: str) -> list[str]:
        """Sync to what was uploaded; as :meth:`sync_eliminations_rpc`."""
        return self._sync(self._uploads.finish(token), "sync")

    def sync_difference_rpc(
        self, root_id: int, version: int, changed: Iterable[Mapping[str, Any]], gone: Iterable[str]
    ) -> list[str] | None:
        """Sync to a list of which a client found this to differ from a version; None where that may not be all."""
        if root_id != self.reader.root_id:
            return None
        records = changed_records(self.reader, changed)
        removed = self._state.commit(changes.sync_difference, version, records, check_hotkeys(gone))
        if removed is not None:
            self._save()
        return removed

    def _replace(self, eliminations: Iterable[Mapping[str, Any]], reason: str) -> list[str]:
        comparison = Comparison(self.reader)
        comparison.extend(eliminations)
        return self._sync(comparison, reason)

    def _sync(self, comparison: Comparison, reason: str) -> list[str]:
        removed = self._state.commit(changes.sync, comparison, reason)
        self._save()
        return removed

    def clear_eliminations_rpc(self) -> None:
        self._replace((), "clear")

    def update_metagraph_rpc(self, hotkeys: Iterable[str]) -> list[str]:
        return self._state.commit(changes.update_metagraph, check_hotkeys(hotkeys))

    def get_missing_hotkeys_rpc(self) -> list[str]:
        return self._state.read(changes.missing)

    def accept_loss_rpc(self, hotkeys: Iterable[str]) -> list[str]:
        return self._state.commit(changes.accept_loss, check_hotkeys(hotkeys))

    def clear_departed_hotkeys_rpc(self) -> None:
        self._state.commit(changes.clear_departed)
        self._save()

    # ------------------------------------------------------------------ files

    def save_eliminations_rpc(self) -> None:
        if self._mirror is not None:
            self._mirror.flush(insist=True)

    def _save(self) -> None:
        """Bring the files up to date; what fails there is a named problem, since the change itself is safe."""
        if self._mirror is not None:
            with contextlib.suppress(StoreError):
                self._mirror.flush()

    def get_eliminations_from_disk_rpc(self) -> list[dict[str, Any]]:
        if self._mirror is not None and self.state_dir is not None:
            try:
                found = files.read_eliminations(self.state_dir / ELIMINATIONS_FILE)
            except DamagedFileError as error:
                _limited(logging.WARNING, "file", "%s; answering from the store", error)
            else:
                if found is not None:
                    return [decode(record) for record in found.taken.values()]
        return [decode(record) for record in self._state.read(lambda s: [r for _, r in s.eliminated()])]

    def load_eliminations_from_disk_rpc(self) -> None:
        if self._mirror is not None and self.state_dir is not None:
            self._state.commit(take_files, self.state_dir, fresh=False)

    # ------------------------------------------------------------------ first refresh, and processing

    def get_first_refresh_ran_rpc(self) -> bool:
        return self._first_refresh_ran

    def set_first_refresh_ran_rpc(self, value: bool) -> None:
        self._first_refresh_ran = bool(value)

    process_eliminations_rpc = processed(EliminationProcessor.process_eliminations)
    handle_perf_ledger_eliminations_rpc = processed(EliminationProcessor.handle_perf_ledger_eliminations)
    handle_mdd_eliminations_rpc = processed(EliminationProcessor.handle_mdd_eliminations)
    handle_first_refresh_rpc = processed(EliminationProcessor.handle_first_refresh)
