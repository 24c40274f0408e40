"""The one object that owns the state: its remote methods check, commit, publish and only then return.

Every method whose name ends in ``_rpc`` can be called over the command channel, and directly where the server
object lives in the caller's process. What it does is documented where it is declared, in ``calls.py``, or with the
reader's method of that name.
"""

# ruff: noqa: D102

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

import msgspec

from shmelim.channel import Caller, current_caller
from shmelim.eliminations.calls import Calls, ProcessingCalls, implements
from shmelim.eliminations.comparing import Comparison, packed, unpacked
from shmelim.eliminations.files.format import ELIMINATIONS_FILE, read_eliminations
from shmelim.eliminations.files.taking import clear_gone, read_state, take_files
from shmelim.eliminations.holding import Holding
from shmelim.eliminations.moments import Moment
from shmelim.eliminations.reading import Reading
from shmelim.eliminations.record import (
    SINCE_2020_MS,
    check_hotkey,
    check_hotkeys,
    check_record,
    complete,
    decode,
    generate_row,
    plausible_times,
    refuse_hotkey,
)
from shmelim.eliminations.rows import collector_at_rest
from shmelim.eliminations.rules import Context, EliminationProcessor, processed
from shmelim.eliminations.rules.membership import is_zombie
from shmelim.eliminations.state import changes
from shmelim.eliminations.state.debt_book import DebtMethods
from shmelim.eliminations.state.guard import acknowledge, expire, notices, tell_noticed
from shmelim.eliminations.state.room import look_at_room
from shmelim.eliminations.store.history import LARGEST_ID, Origin
from shmelim.eliminations.store.opening import store_bytes
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.environment import DEVELOPMENT_HOTKEY, ValidatorEnvironment
from shmelim.errors import StoreError
from shmelim.shm import SharedNamespace
from shmelim.system import clock
from shmelim.system.arguments import whole
from shmelim.system.logs import LimitedLog
from shmelim.system.problems import worst
from shmelim.system.text import get_logger

P = ParamSpec("P")
T = TypeVar("T")

_log = get_logger("shmelim.server")
_limited = LimitedLog(_log)

HISTORY_LIMIT: Final = 10_000


@functools.cache
def _found_version() -> str:
    from importlib.metadata import version  # noqa: PLC0415  # takes tens of milliseconds

    return version("shmelim")


def _version() -> str:
    try:
        return _found_version()
    except (ImportError, OSError):  # where this process may open no more files
        return "unknown"


def _rows(records: list[bytes]) -> list[dict[str, Any]]:
    """Return records as a call's answer: for a caller elsewhere as they are, to be decoded where they arrive."""
    if current_caller() is None:
        return [decode(record) for record in records]
    return cast("list[dict[str, Any]]", msgspec.Raw(packed([msgspec.Raw(record) for record in records])))


@implements(Calls, ProcessingCalls, Reading)
class EliminationManagerServer(Holding, DebtMethods):
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
        ``"current"``: the JSON files are current when a call that changes something returns. ``"lagged"``: no
        change waits for them, and they are at most a second behind, with a very large state ten times as long as
        the last write took. ``"off"``: there are none.
    files_mode
        The permissions of a file that is new, with at least 0600; one that exists keeps its own.
    files_dir
        A directory whose JSON files are the state: read now, written by every change. There is no store and no
        lock; others may write there too, and :meth:`load_eliminations_from_disk_rpc` reads what they wrote.
    default_departed
        A departed file to start from when nothing is known of departures yet.
    imports
        Files of eliminations or departed hotkeys, merged into the state once each.
    adopt_published, replace_published
        What is the truth where the name is known for another state than this directory's, or a later one: the
        published table, or this directory. With neither, such a start is refused.
    must_exist
        Refuse to make a new store.
    registry
        A directory in which what is served under a name is remembered, so that an empty directory or an older
        store is noticed also after a reboot; True: what ``SHMELIM_REGISTRY`` says, else one of the user's; None:
        nowhere. Nothing is remembered of a state that is in memory, or of a table in private memory.
    epoch
        That of the manager which starts it: nobody else tells it of the metagraph, or begins slashes.
    sync_guard
        What becomes of a change that takes back at least 10 and a quarter of the eliminations, or doubles them:
        ``"tell"``: it is carried out, and a notice in the health for a day or until :meth:`acknowledge_rpc`;
        ``"refuse"``: GuardedChangeError, unless the call says ``force=True``; ``"off"``: nothing. A :class:`Guard`
        has other figures. Without a namespace or a state directory there is none.
    slash_lease_s
        Seconds after which a slash may be put in doubt whose process did not renew its lease.
    on_progress
        Called while the state is being loaded with what is done, how far it is, and how far it will go (None
        where nobody knows).

    Raises
    ------
    AlreadyServingError
        Another server writes this table, or uses that state directory.
    StateConflictError
        The name is known for another state than this directory's, or a later one; nothing was touched.
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

    _first_refresh_ran = False
    # In direct mode the manager sets both, else `process_with` the first; most servers have no collaborators.
    _processor: EliminationProcessor | None = None
    live_price_fetcher: Any = None

    # ------------------------------------------------------------------ every change

    def _change(self, change: Callable[Concatenate[changes.Step, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        result = self._state.commit(change, *args, **kwargs)
        self._follow()
        return result

    def _follow(self) -> None:
        """Have what the guard noticed stand in the health; and the files follow, where callers wait for them.

        What fails there is a named problem, since the change is stored; StoreError where the files are the state.
        """
        if self._guard.has_noticed:
            self._guard.has_noticed = False
            tell_noticed(self.problems, self._state.read(notices))
        if self._mirror is not None and self._waits_for_files:
            with contextlib.nullcontext() if self._files_dir is not None else contextlib.suppress(StoreError):
                self._mirror.flush()

    def _caller(self) -> Origin:
        """Return who asks for the change that this thread makes; EpochError if it is not his to make."""
        return self._origin_of(self._teller.check())

    def _whose_call(self) -> Origin:
        return self._origin_of(current_caller())

    def _origin_of(self, caller: Caller | None) -> Origin:
        return self._origin if caller is None else Origin(caller.pid, caller.uid, caller.program)

    # ------------------------------------------------------------------ health

    def health_check_rpc(self) -> dict[str, Any]:
        """Return what the server says of itself, as ``EliminationClient.health_check`` describes."""
        table = self.reader.table
        size = 0 if self.state_dir is None else store_bytes(self.state_dir)
        is_shared = isinstance(self.namespace, SharedNamespace)
        look_at_room(self.problems, self.state_dir, size, table.segment_size if is_shared else None)
        debts = self._debt_health(self.problems)
        clear_gone(self.problems)
        expire(self.problems)
        processing = self._ticks.health()
        problems = [problem._asdict() for problem in self.problems.standing()] + processing.pop("problems")
        return {
            "status": worst(problem["severity"] for problem in problems),
            "timestamp_ms": clock.now_ms(),
            "num_eliminations": len(self.reader),
            "num_departed_hotkeys": self.reader.num_departed_hotkeys,
            "name": self.namespace.name if is_shared else None,
            "pid": os.getpid(),
            "package_version": _version(),
            "started_ms": self.started_ms,
            "epoch": self._epoch_number,
            "teller": self._teller.epoch or None,
            "state_dir": None if self.state_dir is None else str(self.state_dir),
            "store_bytes": size,
            "commits": self._state.commits,
            "changes": self._state.changes,
            "published_ms": self._state.published_ms,
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
        self._teller.check()
        self._ticks.report(whole_ms, interval_ms, problems)
        if interval_ms != self._interval_ms:
            with contextlib.suppress(StoreError):  # which is a problem by itself; the next report comes
                self._interval_ms = self._state.commit(changes.note_interval, interval_ms)

    # ------------------------------------------------------------------ reading

    def is_hotkey_eliminated_rpc(self, hotkey: str | None) -> bool:
        return self.reader.is_hotkey_eliminated(hotkey)

    def get_elimination_rpc(self, hotkey: str | None) -> dict[str, Any] | None:
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

    def is_hotkey_re_registered_rpc(self, hotkey: str | None) -> bool:
        return self.reader.is_hotkey_re_registered(hotkey)

    def get_departed_hotkeys_rpc(self) -> dict[str, dict[str, int]]:
        return self.reader.get_departed_hotkeys()

    def get_departed_hotkey_info_rpc(self, hotkey: str | None) -> dict[str, int] | None:
        return self.reader.get_departed_hotkey_info(hotkey)

    def is_zombie_hotkey_rpc(self, hotkey: str | None, all_hotkeys_set: Container[str]) -> bool:
        """Tell whether a hotkey is missing among all hotkeys of the metagraph, the development one excepted."""
        processor = self._processor
        own = DEVELOPMENT_HOTKEY if processor is None else processor.context.environment.development_hotkey
        return is_zombie(hotkey, all_hotkeys_set, own)

    def get_history_rpc(
        self, hotkey: str | None = None, limit: int | None = 100, before_id: int | None = None
    ) -> list[dict[str, Any]]:
        if hotkey is not None and not isinstance(hotkey, str):
            refuse_hotkey(hotkey)
        limit = whole("limit", HISTORY_LIMIT if limit is None else limit, least=0)
        if limit > HISTORY_LIMIT:
            raise ValueError(f"limit must be 0 to {HISTORY_LIMIT:,}, not {limit!r}; go on with before_id")
        if before_id is not None:
            whole("before_id", before_id, least=-LARGEST_ID, most=LARGEST_ID)
        try:
            return [event.as_dict() for event in self._ask(lambda store: store.events(hotkey, limit, before_id))]
        except UnicodeEncodeError:  # a text that is no UTF-8 is nobody's hotkey
            return []

    # ------------------------------------------------------------------ changing

    def add_elimination_rpc(self, hotkey: str, data: Mapping[str, Any]) -> bool:
        if hotkey is None:
            refuse_hotkey(hotkey)  # check_record would take the record's word for it
        checked = check_record(data, hotkey, plausible_times(self._since_ms()))
        record, note = complete(checked, self.reader.encoded_elimination(hotkey) if checked.lacks else None)
        if note is not None:
            self._warn({hotkey: note})
        return self._change(changes.add, hotkey, record, note)

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
        return self.add_elimination_rpc(hotkey, row)

    def remove_elimination_rpc(self, hotkey: str) -> bool:
        check_hotkey(hotkey)
        return bool(self._change(changes.remove, [hotkey]))

    def delete_eliminations_rpc(
        self, hotkeys: Iterable[str], times_ms: Mapping[str, int] | None = None, force: bool = False
    ) -> list[str]:
        # With times the rules ask, for what has expired.
        judge = self._judge(force=force) if times_ms is None else changes.no_judge
        return self._change(changes.remove, check_hotkeys(hotkeys), times_ms, judge=judge)

    def sync_eliminations_rpc(
        self, eliminations: Iterable[Mapping[str, Any]], *, force: bool = False
    ) -> list[str]:
        return self._replace(eliminations, "sync", force=force)

    def write_eliminations_to_disk_rpc(
        self, eliminations: Iterable[Mapping[str, Any]], *, force: bool = False
    ) -> None:
        self._replace(eliminations, "write", force=force)
        self.save_eliminations_rpc()

    def begin_upload_rpc(self) -> str:
        """Begin a list that is too large for one message; returns its token."""
        return self._uploads.begin(Comparison(self.reader, self._since_ms()))

    def upload_rpc(self, token: str, eliminations: Sequence[Mapping[str, Any]] | bytes) -> int:
        """Add records to an upload; returns how many it has."""
        return self._uploads.extend(token, unpacked(eliminations))

    def abandon_upload_rpc(self, token: str) -> None:
        """Forget an upload."""
        self._uploads.abandon(token)

    def sync_uploaded_rpc(
        self,
        token: str,
        *,
        force: bool = False,
        root_id: int | None = None,
        version: int = 0,
        gone: Iterable[str] = (),
    ) -> list[str] | None:
        """Sync to what was uploaded: that is the whole list or, with a root, what differs from a version."""
        comparison = self._uploads.finish(token)
        if root_id is None:
            return self._sync(comparison, "sync", force=force)
        return self._sync_difference(root_id, version, comparison, gone, force=force)

    def sync_difference_rpc(
        self,
        root_id: int,
        version: int,
        changed: Iterable[Mapping[str, Any]] | bytes,
        gone: Iterable[str],
        *,
        force: bool = False,
    ) -> list[str] | None:
        """Sync to a list of which a client found this to differ from a version; None where that is not known."""
        comparison = Comparison(self.reader, self._since_ms())
        comparison.extend(unpacked(changed))
        return self._sync_difference(root_id, version, comparison, gone, force=force)

    def _sync_difference(
        self, root_id: int, version: int, comparison: Comparison, gone: Iterable[str], *, force: bool
    ) -> list[str] | None:
        if root_id != self.reader.root_id:
            return None
        self._warn(comparison.notes)
        with collector_at_rest(comparison.size):
            return self._change(
                changes.sync_difference, version, comparison, check_hotkeys(gone), judge=self._judge(force=force)
            )

    def _replace(self, eliminations: Iterable[Mapping[str, Any]], reason: str, *, force: bool) -> list[str]:
        comparison = Comparison(self.reader, self._since_ms())
        comparison.extend(eliminations)
        return self._sync(comparison, reason, force=force)

    def _sync(self, comparison: Comparison, reason: str, *, force: bool) -> list[str]:
        self._warn(comparison.notes)
        with collector_at_rest(comparison.size):
            return self._change(changes.sync, comparison.finish(), reason, self._judge(force=force))

    def _judge(self, *, force: bool) -> changes.Judge:
        """Return who looks at a change; one that is meant is told of all the same."""
        return functools.partial(self._guard.judge, is_meant=force)

    def _since_ms(self) -> int:
        """Return from when on the time of an elimination is plausible."""
        processor = self._processor
        return SINCE_2020_MS if processor is None else processor.context.environment.plausible_since_ms

    @staticmethod
    def _warn(notes: Mapping[str, str]) -> None:
        """Say once a call that records were not as they should be."""
        if notes:
            hotkey, note = next(iter(notes.items()))
            text = "%d eliminations are not as they should be, and were taken; the first, of %r: %s"
            _limited(logging.WARNING, "odd", text, len(notes), hotkey, note)

    def clear_eliminations_rpc(self, *, force: bool = False) -> None:
        self._replace((), "clear", force=force)

    def acknowledge_rpc(self) -> list[str]:
        found = self._state.commit(acknowledge)
        tell_noticed(self.problems, ())
        return found

    def update_metagraph_rpc(
        self, hotkeys: Iterable[str], now_ms: int | None = None, believe_empty: bool = False
    ) -> list[str]:
        self._teller.check_tells("say who is registered")
        return self._change(changes.update_metagraph, check_hotkeys(hotkeys), now_ms, believe_empty)

    def get_missing_hotkeys_rpc(self) -> list[str]:
        return self._state.read(changes.missing)

    def accept_loss_rpc(self, hotkeys: Iterable[str]) -> list[str]:
        return self._change(changes.accept_loss, check_hotkeys(hotkeys))

    def clear_departed_hotkeys_rpc(self) -> None:
        self._change(changes.clear_departed)

    def undo_departures_rpc(self, hotkeys: Iterable[str]) -> list[str]:
        return self._change(changes.undo_departures, check_hotkeys(hotkeys))

    # ------------------------------------------------------------------ the past

    def changes_rpc(self, since: int) -> dict[str, Any]:
        if type(since) is not int:
            raise TypeError(f"since must be a version, which is a whole number, not {since!r:.100}")
        version, events = self._state.changes_since(since)
        return {"version": version, "events": [event.as_dict() for event in events]}

    def as_of_rpc(self, when: int | str | datetime) -> dict[str, dict[str, Any]]:
        moment = Moment.of(when)
        found = self._ask(lambda store: changes.state_at(store, moment))
        return {hotkey: decode(record) for hotkey, record in found.items()}

    def rollback_rpc(self, when: int | str | datetime) -> int:
        return self._change(changes.rollback, Moment.of(when))

    def prune_history_rpc(self, before: int | str | datetime, *, dry_run: bool = False) -> int:
        moment = Moment.of(before)
        if dry_run:
            return self._ask(lambda store: changes.prunable(store, moment))
        count = self._change(changes.prune, moment)
        tell_noticed(self.problems, self._ask(notices))  # what undoes one may be forgotten
        return count

    # ------------------------------------------------------------------ files

    def save_eliminations_rpc(self) -> None:
        if self._mirror is not None:
            self._mirror.flush(look=True)

    def get_eliminations_from_disk_rpc(self) -> list[dict[str, Any]]:
        if self._mirror is not None:
            try:
                self._mirror.flush(look=self._files_dir is None)  # else the files may be of another manager
                found = read_eliminations(self._mirror.directory / ELIMINATIONS_FILE)
            except StoreError as error:
                _limited(logging.WARNING, "file", "%s; answering from the store", error)
            else:
                if found is not None:
                    return _rows(list(found.taken.values()))
        return _rows(self._state.read(lambda s: [r for _, r in s.eliminated()]))

    def load_eliminations_from_disk_rpc(self) -> None:
        if self._mirror is None:
            return
        with self._mirror.at_rest() as directory:
            if self._files_dir is not None:
                self._mirror.know(self._state.commit(read_state, directory))
            else:
                self._state.commit(take_files, directory, self.problems, fresh=False, judge=self._guard.judge)
        self._follow()

    # ------------------------------------------------------------------ first refresh, and processing

    def get_first_refresh_ran_rpc(self) -> bool:
        return self._first_refresh_ran

    def set_first_refresh_ran_rpc(self, value: bool) -> None:
        self._teller.check()
        self._first_refresh_ran = bool(value)

    def process_with(self, collaborators: Collaborators, environment: ValidatorEnvironment | None = None) -> None:
        """Process eliminations on request, with objects that live in this server's process.

        From now on ``process_eliminations_rpc`` and its kin work, in whichever thread calls them, with the
        deadlines of the environment (None: the defaults). For a server that has a validator's managers beside it;
        where a manager's process has them, that processes. Any collaborator may be None, and replaced at any
        time; what is missing or contradicts itself is logged by name. May be called again: the next tick uses the
        new ones.
        """
        environment = ValidatorEnvironment.given(environment)
        self._own_calls = _OwnCalls(self)
        calls = ProcessingCalls(self._own_calls)
        self._processor = EliminationProcessor(Context(collaborators, environment, self.reader, calls))
        for gap in environment.gaps(collaborators):
            _log.warning("%s", gap)

    process_eliminations_rpc = processed(EliminationProcessor.process_eliminations)
    handle_perf_ledger_eliminations_rpc = processed(EliminationProcessor.handle_perf_ledger_eliminations)
    handle_mdd_eliminations_rpc = processed(EliminationProcessor.handle_mdd_eliminations)
    handle_first_refresh_rpc = processed(EliminationProcessor.handle_first_refresh)


class _OwnCalls(Calls):
    """The calls of a processing that runs in the server's own process."""

    def __init__(self, server: EliminationManagerServer) -> None:
        self._server = server

    def _call(self, method: str, args: tuple[Any, ...] = (), kwargs: Any = None, **_options: Any) -> Any:
        return getattr(self._server, method)(*args, **(kwargs or {}))

    def _long(self) -> float:
        return 0.0  # nothing is waited for
