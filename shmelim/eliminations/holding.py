"""The state of a name in the process that owns it: taken, published, kept where readers find it, and closed."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeAlias, TypeVar, get_args

from shmelim.eliminations.epochs import Teller
from shmelim.eliminations.files.mirror import FILES_MODE, FileMirror, FilesMode, check_files
from shmelim.eliminations.files.taking import Read, read_state
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.runtime import SERVICE_NAME, STATE_LOCK, lock_state, secure_state
from shmelim.eliminations.starting.beginning import Choices, adopt, begin
from shmelim.eliminations.starting.imports import import_departed, imported, merge_once
from shmelim.eliminations.starting.keeping import memory_of
from shmelim.eliminations.starting.recovery import origin_record
from shmelim.eliminations.starting.registry import Memory, Registry, Remembering, registry_base, report_behind
from shmelim.eliminations.state import changes
from shmelim.eliminations.state.debt_book import held_money
from shmelim.eliminations.state.guard import Guard, GuardMode, notices, tell_noticed
from shmelim.eliminations.state.leases import LEASE_S, Leases
from shmelim.eliminations.state.slash_journal import open_journal
from shmelim.eliminations.state.thread import Published, State
from shmelim.eliminations.state.uploads import Uploads
from shmelim.eliminations.store.history import Origin, this_process
from shmelim.eliminations.store.schema import FILE_NAME, Durability
from shmelim.eliminations.store.store import Store
from shmelim.eliminations.ticks import Ticks
from shmelim.errors import AlreadyServingError, NotServingError, SegmentError, ShmelimError, StoreError
from shmelim.service.lease import let_end
from shmelim.shm import Namespace, PrivateNamespace, SharedNamespace, TableWriter, WriterInfo
from shmelim.system import clock
from shmelim.system.arguments import flags
from shmelim.system.durable import make_private_directory, writing
from shmelim.system.locks import Lease
from shmelim.system.logs import log_problems
from shmelim.system.places import place, place_or_none, places
from shmelim.system.problems import Problems
from shmelim.system.text import get_logger

_log = get_logger("shmelim.server")

BEAT_INTERVAL: Final = 0.25
_CONTESTED: Final = "state_dir_contested"
_MEMORY_LOST: Final = "shared_memory_lost"
_KEEP_NAMES: Final = "keep others from removing them: `RemoveIPC=no` in logind.conf"

_Lock = TypeVar("_Lock")
Progress: TypeAlias = Callable[[str, int, int | None], Any]


class Holding:
    """Store, table, files and their locks, of the server that inherits it and says what its arguments are."""

    # Of the server.
    _tell_held: Callable[[Mapping[str, Any] | None], None]
    _caller: Callable[[], Origin]

    _mirror: FileMirror | None = None
    _lease: Lease | None = None
    _remembering: Remembering | None = None
    _interval_ms: float | None = None  # of whoever ticks, as the store knows it

    def __init__(
        self,
        namespace: Namespace | None = None,
        state_dir: Path | str | None = None,
        *,
        durability: Durability = "power",
        files: FilesMode = "current",
        files_mode: int = FILES_MODE,
        files_dir: Path | str | None = None,
        default_departed: Path | str | None = None,
        imports: Sequence[Path | str] = (),
        adopt_published: bool = False,
        replace_published: bool = False,
        must_exist: bool = False,
        registry: Path | str | bool | None = True,
        epoch: str = "",
        sync_guard: GuardMode | Guard = "tell",
        slash_lease_s: float = LEASE_S,
        on_progress: Progress | None = None,
    ) -> None:
        tell = on_progress or (lambda _what, _done, _total: None)
        given = {"adopt_published": adopt_published, "replace_published": replace_published}
        check_choices(durability, files, files_mode, **given, must_exist=must_exist)
        if files_dir is not None and (state_dir is not None or imports or files != "current"):
            raise ValueError("with files_dir the files are the state: leave state_dir, imports and files out")
        self.namespace = PrivateNamespace() if namespace is None else _checked(namespace)
        # Wherever this process goes, and whatever a link leads to later.
        self.state_dir = None if state_dir is None else Path(os.path.realpath(place("state_dir", state_dir)))
        self._files_dir = None if files_dir is None else Path(os.path.realpath(place("files_dir", files_dir)))
        default, imported, registered = (
            place_or_none("default_departed", default_departed),
            places("imports", imports),
            registry_base(registry),
        )
        self.started_ms = clock.now_ms()
        self.problems = Problems()
        log_problems(self.problems, _log)
        self._ticks = Ticks(self.problems)
        self._origin = this_process()
        self._teller = Teller(epoch)
        self._guard = self._make_guard(sync_guard)
        # In private memory there is no other process that an attempt found here could live in.
        is_alone = isinstance(self.namespace, PrivateNamespace)
        self._leases = Leases(slash_lease_s, grace_s=0 if is_alone else slash_lease_s)
        self._uploads = Uploads()
        self._stopped = threading.Event()
        self._renewing = threading.Lock()  # held while names that were lost are made again
        self._waits_for_files = files == "current"
        what = "the state in memory" if self.state_dir is None else f"the state directory {self.state_dir}"
        with writing(f"{what} cannot be used"), contextlib.ExitStack() as undo:
            if self.state_dir is not None:
                lock = functools.partial(lock_state, self.state_dir, FILE_NAME)
                self._lease = _patiently(lock, Lease(self.state_dir / STATE_LOCK).holder, tell)
                undo.callback(self._lease.release)
            tell("opening the state", 0, None)
            choices = Choices(
                durability,
                use_files=files != "off",
                default_departed=None if default is None or files_dir else default,
                adopt_published=adopt_published,
                replace_published=replace_published,
                must_exist=must_exist,
                judge=self._guard.judge,
            )
            remembered = self._registry(registered)
            store, table = self._begin(choices, remembered, tell)
            undo.callback(store.close)
            undo.callback(table.close)
            # From here on the heartbeat tells readers that a writer is at work.
            self._beating = threading.Thread(
                target=self._beat, args=(table,), name="shmelim-heartbeat", daemon=True
            )
            self._beating.start()
            undo.callback(self._beating.join)
            undo.callback(self._stopped.set)
            read = self._secure(store)
            self._journal = None if self.state_dir is None else open_journal(self.state_dir, store)
            merge_once(store, imported, lambda path: tell(f"importing {path}", 0, None))
            self._state = State(
                store,
                table,
                self.namespace,
                self._caller,
                self.problems,
                # In direct mode, where nobody else sees the table, callers take their turns themselves.
                threaded=not isinstance(self.namespace, PrivateNamespace),
            )
            self._publish(store, table, tell)
            if remembered is not None:
                self._remembering = self._remember(remembered)
                undo.callback(self._remembering.stop)
            self.reader = EliminationReader.over(self.namespace)
            self._mirror = None if files == "off" else self._start_mirror(files_mode, default, read)
            self._undo = undo.pop_all()

    def _make_guard(self, given: GuardMode | Guard) -> Guard:
        guard = given if isinstance(given, Guard) else Guard(given)
        is_exempt = self.state_dir is None or isinstance(self.namespace, PrivateNamespace)
        return Guard("off") if is_exempt else guard

    def _registry(self, base: Path | None) -> Registry | None:
        if base is None or self.state_dir is None or not isinstance(self.namespace, SharedNamespace):
            return None
        return Registry(base, self.namespace.name)

    def _begin(self, choices: Choices, registry: Registry | None, tell: Progress) -> tuple[Store, TableWriter]:
        """Take the name, and return the store to serve from with the writer of its table."""
        lock = _patiently(self.namespace.acquire, lambda: living_writer(self.namespace.name), tell)
        with contextlib.ExitStack() as undo:
            undo.callback(lock.release)
            memory = self._recall(registry)
            known = registry is not None
            store = begin(self.state_dir, self.namespace, memory, choices, self.problems, has_registry=known)
            undo.callback(store.close)
            table = TableWriter(self.namespace, store_id=store.store_id or b"", lock=lock)
            undo.pop_all()
        return store, table

    def _publish(self, store: Store, table: TableWriter, tell: Progress) -> None:
        """Have readers see what the store says; they move nowhere where the published table is its own."""
        origin = origin_record(self.state_dir, imported(store))
        self._tell_held(held_money(store))
        if adopt(store, table, self.namespace, origin):
            self._state.go_on(origin)
        else:
            self._state.publish_all(origin, lambda done, total: tell("publishing", done, total))
        tell_noticed(self.problems, notices(store))
        self._interval_ms = changes.noted_interval(store)
        if self._interval_ms is not None:
            self._ticks.expect(self._interval_ms)
        self._epoch_number = self._state.commit(changes.take_epoch, self._teller.epoch)

    def _recall(self, registry: Registry | None) -> Memory | None:
        """Return what is remembered of the name; what keeps it from being read is a named problem."""
        try:
            return None if registry is None else registry.recall()
        except StoreError as error:
            report_behind(self.problems, error)
            return None

    def _remember(self, registry: Registry) -> Remembering:
        state = self._state
        remembering = Remembering(registry, self._memory, lambda: state.commits, state.sync, self.problems)
        remembering.start()
        return remembering

    def _memory(self) -> Memory:
        """Return what the registry is to remember."""
        return self._state.read(lambda store: memory_of(store, self.state_dir or Path()))

    def _secure(self, store: Store) -> Read | None:
        """Make the lock proof against its removal; or have a store in memory say what files do; return that."""
        directory = self._files_dir
        if self._lease is not None:
            secure_state(self._lease)
        if directory is None:
            return None
        with writing(f"{directory} cannot be used"):
            make_private_directory(directory)
        with store.transaction():
            return read_state(changes.Step(store, None), directory)

    def _start_mirror(self, mode: int, default: Path | None, read: Read | None) -> FileMirror | None:
        directory = self._files_dir or self.state_dir
        if directory is None:
            return None
        published = Published(self.namespace)
        mirror = FileMirror(directory, published, self._state, self.problems, mode=mode, read=read)
        if read is None:
            mirror.start()
        elif default is not None and not self._state.read(Store.counts).departed:
            self._state.commit(import_departed, default)  # which the files do not have
        return mirror

    def _beat(self, table: TableWriter) -> None:
        while not self._stopped.wait(BEAT_INTERVAL):
            lost = not table.beat() or self.problems.stands(_MEMORY_LOST)
            self._uploads.expire()
            with contextlib.suppress(RuntimeError):  # no thread is to be had: the next beat tries again
                # Not before the state is published; in a thread that may wait for others.
                if lost and not self._renewing.locked() and hasattr(self, "_undo"):
                    threading.Thread(target=self._renew, name="shmelim-renewal", daemon=True).start()
                if hasattr(self, "_state"):
                    self._state.tend_log()
            if self._lease is not None:
                self._look_at_lock(self._lease)

    def _renew(self) -> None:
        """Have names made again that were removed from ``/dev/shm``."""
        with self._renewing:
            self._tell_lost("names were removed from /dev/shm under this server: readers may be on an old state")
            try:
                self._state.renew()
                # Its own readers move while the names are there, which may be lost again before they read next.
                _ = self.reader.version
                if self._mirror is not None:
                    self._mirror.follow()
            except (ShmelimError, OSError) as error:
                hint = error.hint if isinstance(error, ShmelimError) else None
                self._tell_lost(f"names were removed from /dev/shm, and are not made again: {error}", hint)
            else:
                self.problems.clear(_MEMORY_LOST)

    def _tell_lost(self, text: str, hint: str | None = None) -> None:
        self.problems.report(_MEMORY_LOST, text, severity="failing", remedy=hint or _KEEP_NAMES)

    def _look_at_lock(self, lease: Lease) -> None:
        if lease.keep():
            self.problems.clear(_CONTESTED)
            return
        text = f"another process has taken the lock of the state directory {self.state_dir}"
        self.problems.report(_CONTESTED, text, remedy="stop one of the two: what one stores, the other overwrites")

    def say_where(self, directory: Path) -> None:
        """Leave word in the table of the runtime directory, for clients that would look for it elsewhere."""
        self._state.say_place(os.fsencode(directory))

    def close(self) -> None:
        """Write what the files lack, and close the state; readers keep what was published. Idempotent."""
        if self._mirror is not None:
            self._mirror.stop()
        if self._remembering is not None:
            self._remembering.stop()
        self._stopped.set()
        self._beating.join()
        self._state.close()
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_choices(durability: str, files: str, files_mode: int, **yes_or_no: bool) -> None:
    """Raise TypeError or ValueError for what no server can be told."""
    flags(**yes_or_no)
    if durability not in get_args(Durability):
        raise ValueError(f"durability must be one of {', '.join(get_args(Durability))}, not {durability!r}")
    check_files(files, files_mode)
    if yes_or_no["adopt_published"] and yes_or_no["replace_published"]:
        raise ValueError("adopt_published and replace_published contradict each other: give one of them")


def _patiently(take: Callable[[], _Lock], holder: Callable[[], int | None], tell: Progress) -> _Lock:
    """Take a lock, if need be from a server that is ending since its owner has died."""
    try:
        return take()
    except AlreadyServingError:
        if (pid := holder()) is None:
            raise
        text = f"waiting for the end of process {pid}, whose owner has died"
        if not let_end(pid, SERVICE_NAME, lambda: tell(text, 0, None)):
            raise
    return take()


def living_writer(name: str) -> int | None:
    """Return the process that serves a name; None if there is none that lives, as far as can be known here."""
    writer = writer_of(name)
    return writer.pid if writer is not None and writer.alive is not False else None


def writer_of(name: str) -> WriterInfo | None:
    """Return who writes a name's table; None if nothing can be read under it."""
    with contextlib.suppress(NotServingError, SegmentError):
        return EliminationReader(name).writer
    return None


def _checked(namespace: Namespace) -> Namespace:
    if not hasattr(namespace, "acquire"):
        raise TypeError(f"namespace must be one, as SharedNamespace('name') is, or None: not {namespace!r:.100}")
    return namespace
