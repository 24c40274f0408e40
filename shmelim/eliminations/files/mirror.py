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
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final, Literal

from shmelim.eliminations.files import format as files
from shmelim.eliminations.rows import PREFIX, Status, departed_in
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.state.committer import Committer
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

    In mode ``"current"`` :meth:`flush` writes; in ``"lagged"`` it returns at once.

    The condition guards what follows it in the constructor; the rest belongs to the thread, except that anybody
    may reset ``_departed_written``, which costs a write too many at worst.
    """

    def __init__(
        self, directory: Path, table: TableReader, committer: Committer, mode: FilesMode, problems: Problems
    ) -> None:
        self._directory = directory
        self._table = table
        self._committer = committer
        self._mode = mode
        self._problems = problems
        # Departures are for ever, so their number tells whether the file lacks any.
        self._departed_written = -1
        # The files as they stood when they were last known to be ours.
        self._ours: dict[str, tuple[int, ...] | None] = {}
        self._thread = threading.Thread(target=self._run, name="shmelim-files", daemon=True)
        self._changed = threading.Condition()
        self._stale_since: float | None = None
        # How many asked for a write, and how many of them have it.
        self._asked = self._written = 0
        # While a write is under way, what it writes is no longer stale, and not yet written.
        self._writing = self._stopping = self._ended = False
        self._not_before = 0.0
        self._problem: StoreError | None = None

    def start(self) -> None:
        """Start the writing thread, which soon writes what the files lack."""
        self.mark()
        self._thread.start()

    def mark(self) -> None:
        """Say that the published state is ahead of the files. Cheap, from any thread."""
        with self._changed:
            if self._stale_since is None:
                self._stale_since = time.monotonic()
            self._changed.notify_all()

    def flush(self, *, insist: bool = False) -> None:
        """Return when the files show everything published before the call; StoreError if they cannot be written.

        With `insist`, also in mode ``"lagged"``, and both files even if they are not stale.
        """
        if self._mode == "lagged" and not insist:
            return
        if insist:
            self._departed_written = -1
            self.mark()
        with self._changed:
            if self._stale_since is None and not self._writing and self._asked == self._written:
                return
            self._asked += 1
            wanted = self._asked
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._written >= wanted or self._ended, _FLUSH_LIMIT):
                text = f"the files in {self._directory} were not written within {_FLUSH_LIMIT:.0f} s"
                self._problems.report(_BEHIND, text)
                raise StoreError(text)
            problem = self._problem
        if problem is not None:
            raise problem

    def stop(self) -> None:
        """Write what is stale, and end the thread. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._write_what_is_due():
                pass
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _write_what_is_due(self) -> bool:
        """Wait until something must be written, and write it; False once the thread is to end."""
        with self._changed:
            self._wait_for_work()
            is_stale, asked = self._stale_since is not None, self._asked
            if self._stopping and not is_stale:
                return False
            self._stale_since, self._writing = None, True
        began = time.monotonic()
        problem = self._write() if is_stale else None
        pause = _PATIENCE * (time.monotonic() - began) if problem is None else _RETRY
        if problem is None:
            self._problems.clear(_BEHIND)
        else:
            self._problems.report(_BEHIND, problem.message, remedy=problem.hint or _REMEDY)
        with self._changed:
            if problem is not None:
                self._stale_since = began
            self._not_before = time.monotonic() + pause
            self._problem, self._written, self._writing = problem, asked, False
            self._changed.notify_all()
            return problem is None or not self._stopping

    def _wait_for_work(self) -> None:
        """Wait until something must be written now."""
        while not self._stopping and self._asked == self._written:
            if self._stale_since is None:
                self._changed.wait()
            elif (left := max(self._stale_since + _COALESCE, self._not_before) - time.monotonic()) > 0:
                self._changed.wait(left)
            else:
                return

    def _write(self) -> StoreError | None:
        try:
            entries = self._table.snapshot().entries
            rows = (entry for entry in entries.values() if entry.flags & Status.ELIMINATED)
            records = (entry.record[PREFIX.size :] for entry in rows)
            self._write_one(ELIMINATIONS_FILE, files.write_eliminations, records)
            if self._departed_written != self._table.count_flag(1):
                departed = departed_in(entries)
                times = ((hotkey, info["detected_ms"]) for hotkey, info in departed.items())
                self._write_one(DEPARTED_FILE, files.write_departed, times)
                self._departed_written = len(departed)
        except StoreError as error:
            return error
        except Exception as error:
            text = "the files in %s could not be written"
            _limited(logging.ERROR, "mistake", text, self._directory, exc_info=True)
            return StoreError(f"the files in {self._directory} could not be written: {error}")
        return None

    def _write_one(self, name: str, write: Callable[..., str], rows: Iterable[object]) -> None:
        path = self._directory / name
        digest = write(path, rows, before_rename=partial(self._confirm, name))
        self._ours[name] = files.identity_of(path)
        # An earlier version that a person puts back is that person's work.
        self._know(name, [digest])

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
        applies = (
            f"shmelim sync {aside}` applies"
            if name == ELIMINATIONS_FILE
            else f"--import {aside}` at the next start applies"
        )
        _log.warning(
            "%s was changed while the server runs, which does not read it: it is now %s; `%s it."
            " To edit it in place, stop the server first.",
            path,
            aside,
            applies,
        )
        text = f"{name} was changed while the server ran: not applied, moved aside to {aside.name}"
        self._committer.commit(Step.record, [EventOf("edited", note=text)])

    def _known(self, name: str) -> list[str]:
        return self._committer.read(lambda store: known_digests(store.meta(digest_key(name))))

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
            self._committer.commit(Step.set_meta, digest_key(name), digests)


def digest_key(name: str) -> str:
    """Return the key under which the store keeps a file's digests."""
    return f"digests:{name}"


def known_digests(value: object) -> list[str]:
    """Return the digests in such a value, oldest first."""
    return [digest for digest in value if isinstance(digest, str)] if isinstance(value, list) else []
