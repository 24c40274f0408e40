"""Keeping the JSON files beside the store up to date, for the tools that read them.

One thread writes. A change makes a file stale; it is written at most a second later, together with what else
changed meanwhile, or at once where somebody waits for it (:meth:`FileMirror.flush`). After a write that took
long, the next one that nobody waits for comes ten times as long later, so that a very large state does not keep
a core busy.

Before a new file takes its name, its digest is committed to the store beside that of the file that stands there,
and alone once it has: on the next start, a file with another digest was put there by a person. One that is put
there while the server runs is not overwritten: it is moved aside, and a warning says how to apply it.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from pathlib import Path
from typing import Final, Literal

from shmelim.eliminations.files import format as files
from shmelim.eliminations.rows import PREFIX, Status, departed_in
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.state.thread import State
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.errors import StoreError
from shmelim.shm import TableReader
from shmelim.system.durable import move_aside
from shmelim.system.logs import LimitedLog
from shmelim.system.problems import Problems

FilesMode = Literal["current", "lagged", "off"]
FILES_MODES: Final = ("current", "lagged", "off")

ELIMINATIONS_FILE: Final = "eliminations.json"
DEPARTED_FILE: Final = "departed_hotkeys.json"

_COALESCE: Final = 0.3
_PATIENCE: Final = 10
_RETRY: Final = 1.0
_FLUSH_LIMIT: Final = 300.0

_BEHIND: Final = "files_behind"
_REMEDY: Final = (
    "make room, or let the server's user write there; every change is stored and published all the same"
)

_log = logging.getLogger("shmelim.files")
_limited = LimitedLog(_log)


class FileMirror:
    """Writes the two files behind the published state.

    In mode ``"current"`` :meth:`flush` writes; in ``"lagged"`` it returns at once; ``"off"`` means no files.

    ``published`` is set by whoever publishes. ``_stale``, ``_seen``, ``_asked``, ``_written`` and the flags are
    guarded by ``_changed``; the rest belongs to the thread, except that anybody may reset ``_departed_written``,
    which costs a write too many at worst.
    """

    def __init__(
        self, directory: Path, table: TableReader, state: State, mode: FilesMode, problems: Problems
    ) -> None:
        self._directory = directory
        self._table = table
        self._state = state
        self.mode = mode
        self._problems = problems
        self.published = threading.Event()  # or there is something else for the thread to do
        self._changed = threading.Condition()
        # The files that the published state is ahead of, and since when; the version that they were seen by.
        self._stale: dict[str, float] = {}
        self._seen: int | None = None
        self._asked = 0
        self._written = 0
        # Whether a write is under way: what it writes is no longer stale, and not yet written.
        self._writing = False
        self._stopping = False
        self._ended = False
        self._not_before = 0.0
        # Departures are for ever, so their number tells whether the file lacks any.
        self._departed_written = -1
        # The files as they stood when they were last known to be ours.
        self._ours: dict[str, tuple[int, ...] | None] = {}
        self._problem: StoreError | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the writing thread; nothing happens in mode ``"off"``."""
        if self.mode != "off":
            self._thread = threading.Thread(target=self._run, name="shmelim-files", daemon=True)
            self._thread.start()

    def flush(self, *, insist: bool = False) -> None:
        """Return when the files show everything published before the call; StoreError if they cannot be written.

        With `insist`, also in mode ``"lagged"``, and both files even if they are not stale.
        """
        if self.mode == "off" or self._thread is None or (self.mode == "lagged" and not insist):
            return
        with self._changed:
            if insist:
                self._departed_written = -1
                self._seen = None
            self._look()
            if not self._stale and not self._writing and self._asked == self._written:
                return
            self._asked += 1
            wanted = self._asked
            self.published.set()
            if not self._changed.wait_for(lambda: self._written >= wanted or self._ended, _FLUSH_LIMIT):
                text = f"the files in {self._directory} were not written within {_FLUSH_LIMIT:.0f} s"
                self._problems.report(_BEHIND, text)
                raise StoreError(text)
            problem = self._problem
        if problem is not None:
            raise problem

    def stop(self) -> None:
        """Write what is stale, and end the thread. Idempotent."""
        if self._thread is not None:
            with self._changed:
                self._stopping = True
            self.published.set()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._write_until_stopped()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _write_until_stopped(self) -> None:
        while True:
            stale, asked = self._wait_for_work()
            if not stale and self._stopping:
                return
            began = time.monotonic()
            problem = self._write(stale)
            took = time.monotonic() - began
            if problem is None:
                self._problems.clear(_BEHIND)
            else:
                self._problems.report(_BEHIND, problem.message, remedy=problem.hint or _REMEDY)
            with self._changed:
                if problem is None:
                    self._not_before = time.monotonic() + _PATIENCE * took
                else:
                    for name in stale:
                        self._stale.setdefault(name, began)
                    self._not_before = time.monotonic() + _RETRY
                self._problem = problem
                self._written = asked
                self._writing = False
                self._changed.notify_all()
                if problem is not None and self._stopping:
                    return

    def _look(self) -> None:
        version = self._table.version
        if version != self._seen:
            self._seen = version
            for name in (ELIMINATIONS_FILE, DEPARTED_FILE):
                self._stale.setdefault(name, time.monotonic())

    def _wait_for_work(self) -> tuple[list[str], int]:
        """Wait until something must be written now; return the stale files, and how many asked for them."""
        while True:
            self.published.clear()
            left = None
            with self._changed:
                self._look()
                if self._stale:
                    left = max(min(self._stale.values()) + _COALESCE, self._not_before) - time.monotonic()
                if self._stopping or self._asked != self._written or (left is not None and left <= 0):
                    stale, self._stale = list(self._stale), {}
                    self._writing = bool(stale)
                    return stale, self._asked
            self.published.wait(left)

    def _write(self, stale: list[str]) -> StoreError | None:
        try:
            for name in stale:
                path = self._directory / name
                confirm = partial(self._confirm, name)
                if name == DEPARTED_FILE and self._departed_written == self._table.count_flag(1):
                    continue
                entries = self._table.snapshot().entries
                if name == ELIMINATIONS_FILE:
                    records = (
                        record[PREFIX.size :] for flags, record, _ in entries.values() if flags & Status.ELIMINATED
                    )
                    digest = files.write_eliminations(path, records, before_rename=confirm)
                else:
                    departed = departed_in(entries)
                    times = ((hotkey, info["detected_ms"]) for hotkey, info in departed.items())
                    digest = files.write_departed(path, times, before_rename=confirm)
                    self._departed_written = len(departed)
                self._ours[name] = files.identity_of(path)
                # An earlier version that a person puts back is that person's work.
                self._know(name, [digest])
        except StoreError as error:
            return error
        except Exception as error:
            text = "the files in %s could not be written"
            _limited(logging.ERROR, "mistake", text, self._directory, exc_info=True)
            return StoreError(f"the files in {self._directory} could not be written: {error}")
        return None

    def _confirm(self, name: str, digest: str) -> None:
        """Make way for a file of this digest, which is about to take its place, and have it known as ours."""
        self._keep_edit(name)
        # The one that stands there stays known: a crash may come before the rename.
        standing = self._standing(name)
        if digest not in standing:
            self._know(name, [*standing, digest])

    def _keep_edit(self, name: str) -> None:
        """Move a file that is not ours aside."""
        path = self._directory / name
        found = files.identity_of(path)
        if found is None or found == self._ours.get(name):
            return
        # A file that was only touched, or copied over itself, or that stood there at the start, is as we left it.
        if files.digest_of(path) in self._known(name):
            return
        aside = move_aside(path, "edited")
        apply = (
            f"`shmelim sync {aside}` applies it"
            if name == ELIMINATIONS_FILE
            else f"the next start with `--import {aside}` applies it"
        )
        _log.warning(
            "%s was changed while the server runs, which does not read it: it is now %s; %s."
            " To edit it in place, stop the server first.",
            path,
            aside,
            apply,
        )
        text = f"{name} was changed while the server ran: not applied, moved aside to {aside.name}"
        self._state.commit(Step.record, [EventOf("edited", note=text)])

    def _known(self, name: str) -> list[str]:
        return self._state.read(lambda store: known_digests(store.meta(digest_key(name))))

    def _standing(self, name: str) -> list[str]:
        """Return the digest of the file on disk, as a list, if it is known to be ours."""
        known = self._known(name)
        if len(known) <= 1:
            return known
        # A write ended between the two steps: only the file itself can tell which of them it is.
        digest = files.digest_of(self._directory / name)
        return [digest] if digest in known else []

    def _know(self, name: str, digests: list[str]) -> None:
        """Make these the digests under which the store knows a file."""
        if self._known(name) != digests:
            self._state.commit(Step.set_meta, digest_key(name), digests)


def digest_key(name: str) -> str:
    """Return the key under which the store keeps a file's digests."""
    return f"digests:{name}"


def known_digests(value: object) -> list[str]:
    """Return the digests under which the store knows a file, oldest first."""
    return [digest for digest in value if isinstance(digest, str)] if isinstance(value, list) else []
