"""Keeping the JSON files up to date, for the tools that read them: they follow the published state.

Whoever needs them current writes them (:meth:`FileMirror.flush`), and waits for a write that is under way; what
nobody waits for is written by a thread, at most a second after it was published. After a write that took long, the
next one comes ten times as long later, so that a very large state does not keep a core busy.

Before a new file takes its name, what it is was written down beside it (:mod:`.sidecar`), and by that a file that
somebody else put there is told. It is not overwritten: it is moved aside, and is a named problem.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from shmelim.eliminations.comparing import unpacked
from shmelim.eliminations.files import format as files
from shmelim.eliminations.files.format import DEPARTED_FILE, ELIMINATIONS_FILE, Summary
from shmelim.eliminations.files.sidecar import Written, announce, read_sidecars, settle
from shmelim.eliminations.files.taking import KNOWN, NAMES, Read, meaning_of, set_aside
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.state.thread import Published, State
from shmelim.errors import DamagedFileError, ShmelimError, StoreError
from shmelim.system.durable import identity_of
from shmelim.system.logs import LimitedLog
from shmelim.system.problems import Problems
from shmelim.system.text import get_logger

FilesMode = Literal["current", "lagged", "off"]
FILES_MODES: Final = ("current", "lagged", "off")
FILES_MODE: Final = 0o600

_COALESCE: Final = 0.3
_PATIENCE: Final = 10
_RETRY: Final = 1.0
_FLUSH_LIMIT: Final = 300.0

_BEHIND: Final = "files_behind"
_REMEDY: Final = (
    "make room, or let the server's user write there; every change is stored and published all the same"
)

_log = get_logger("shmelim.files")
_limited = LimitedLog(_log)


def check_files(files: str, mode: int) -> None:
    """Raise ValueError for an unknown word, and for permissions with which their owner could not use the files."""
    if files not in FILES_MODES:
        raise ValueError(f"files must be one of {', '.join(FILES_MODES)}, not {files!r}")
    if type(mode) is not int or mode & ~0o777 or mode & FILES_MODE != FILES_MODE:
        shown = f"{mode:#o}" if type(mode) is int else repr(mode)
        raise ValueError(f"files_mode must be permissions with at least 0o600, such as 0o640, not {shown}")


class FileMirror:
    """Writes the two files behind the published state.

    One writes at a time, under ``_writing``, which guards what is known of the files. Those of which `read` tells
    what they say are for other managers to write as well: nothing is kept beside them, nobody's work is moved
    aside, and a file that shows what this manager last wrote or read there is not written over.
    """

    def __init__(
        self,
        directory: Path,
        published: Published,
        state: State,
        problems: Problems,
        *,
        mode: int = 0o600,
        read: Read | None = None,
    ) -> None:
        self.directory = directory
        self._published = published
        self._state = state
        self._problems = problems
        self._mode = mode
        self._plain = read is not None
        self._ending = threading.Event()
        self._writing = threading.Lock()
        # The `rows_version` that both files show at least; what was read before that is no change.
        self._shown = state.rows_version if self._plain else None
        # As they were written last; the former of files of others only.
        self._eliminated: list[bytes] | None = None
        self._departed: dict[str, dict[str, int]] | None = None
        # The files as they stood when they were last known to be ours.
        self._ours: dict[str, tuple[int, ...]] = {}
        self._not_before = 0.0
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        if read is not None:
            self.know(read)

    def start(self) -> None:
        """Start the thread that writes what nobody waits for."""
        self._thread = threading.Thread(target=self._run, name="shmelim-files", daemon=True)
        self._thread.start()

    def flush(self, *, look: bool = False) -> None:
        """Return when the files show everything published before the call; StoreError if they cannot be written.

        With `look`, also a file that is not as it was left (gone, edited) is written.
        """
        if self._pid != os.getpid():
            return  # a forked child has no part in them
        if not self._writing.acquire(timeout=_FLUSH_LIMIT):
            text = f"the files in {self.directory} were not written within {_FLUSH_LIMIT:.0f} s"
            self._problems.report(_BEHIND, text)
            raise StoreError(text)
        try:
            problem = self._write(look=look)
        finally:
            self._writing.release()
        if problem is not None:
            raise problem

    def follow(self) -> None:
        """Move to where the table is published by now."""
        self._published.follow()

    @contextmanager
    def at_rest(self) -> Iterator[Path]:
        """Keep the files from being written while they are read; then they are written anew.

        Those of others are not: what they say is to be told by :meth:`know`.
        """
        with self._writing:
            try:
                yield self.directory
            finally:
                if not self._plain:
                    self._shown = self._departed = None

    def know(self, read: Read) -> None:
        """Note what the files of others say, while they are at rest."""
        self._eliminated, departed = read
        self._departed = {hotkey: {"detected_ms": ms} for hotkey, ms in departed.items()}

    def stop(self) -> None:
        """Write what is stale, and end the thread. Idempotent."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        if self._pid == os.getpid():
            with self._writing:
                self._write()

    def _run(self) -> None:
        while not self._ending.wait(_COALESCE):
            if self._state.rows_version != self._shown and time.monotonic() >= self._not_before:
                with self._writing:
                    self._write()

    def _write(self, *, look: bool = False) -> StoreError | None:
        """Write what is behind; returns why that is not possible, which is a named problem too."""
        began = time.monotonic()
        problem = None
        try:
            version = self._state.rows_version
            changed = look and any(map(self._is_changed, NAMES))
            if changed or version != self._shown:
                self._write_both(look=look)
                self._shown = version
        except StoreError as error:
            problem = error
        except ShmelimError as error:  # of the table
            problem = StoreError(f"the files in {self.directory} could not be written: {error}")
        except Exception as error:
            text = "the files in %s could not be written"
            _limited(logging.ERROR, "mistake", text, self.directory, exc_info=True)
            problem = StoreError(f"the files in {self.directory} could not be written: {error}")
        now = time.monotonic()
        if problem is None:
            self._not_before = now + _PATIENCE * (now - began)
            self._problems.clear(_BEHIND)
        else:
            self._not_before = now + _RETRY
            self._problems.report(_BEHIND, problem.message, remedy=problem.hint or _REMEDY)
        return problem

    def _write_both(self, *, look: bool) -> None:
        # Asked before the table is: what stands there then is of this commit, or of a later one.
        store_id, commit = self._state.read(lambda store: (store.store_id, store.commit_number))
        records: Iterable[bytes] = map(bytes, unpacked(self._published.pack_eliminations()))
        if self._plain:
            records = list(records)
        departed = self._published.get_departed_hotkeys()

        def confirm(name: str, summary: Summary) -> None:
            if not self._plain:
                announce(self.directory / name, Written(summary.digest, store_id or b"", commit, summary.rows))
                # Right before the file is replaced: what comes in while something is synced is not lost.
                self._keep_edit(name)

        times = ((hotkey, info["detected_ms"]) for hotkey, info in departed.items())
        both: tuple[tuple[str, Callable[..., Summary], Iterable[Any], bool], ...] = (
            (ELIMINATIONS_FILE, files.write_eliminations, records, records == self._eliminated),
            (DEPARTED_FILE, files.write_departed, times, departed == self._departed),
        )
        for name, write, rows, is_known in both:
            path = self.directory / name
            if not (is_known and path.exists()) or (look and self._is_changed(name)):
                self._know(path, write(path, rows, mode=self._mode, before_rename=partial(confirm, name)))
        self._eliminated, self._departed = records if isinstance(records, list) else None, departed

    def _is_changed(self, name: str) -> bool:
        """Whether a file is not as it was left, or not there."""
        found = identity_of(self.directory / name)
        return found is None or found != self._ours.get(name)

    def _know(self, path: Path, written: Summary) -> None:
        # Not what stands there by now, which may be an edit already.
        self._ours[path.name] = written.identity
        if not self._plain:
            settle(path)

    def _keep_edit(self, name: str) -> None:
        """Move a file that is not ours aside."""
        path = self.directory / name
        found = identity_of(path)
        if found is None or found == self._ours.get(name):
            return
        # A file that was only touched, or copied over itself, or that stood there at the start, is as we left it.
        try:
            file = files.read_file(path)
        except DamagedFileError:
            file = None
        if file is not None:
            digest, sidecars = file.digest, read_sidecars(path)
            if self._state.read(lambda store: meaning_of(store, name, digest, sidecars)) in KNOWN:
                return
        text = f"{name} was changed while the server ran, which does not read it"
        self._state.commit(Step.record, [set_aside(path, text, self._problems)])
