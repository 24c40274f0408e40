"""Keeping a state: backing it up while it is served, checking it, putting a backup in its place.

A backup is a directory with the store as of one moment (``shmelim.sqlite``: current state, history, debts,
slashes) and ``backup.json``, which says of what and when, with the SHA-256 of the store. It takes its name when it
is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from shmelim.eliminations.files import format as files
from shmelim.eliminations.files.format import DEPARTED_FILE, ELIMINATIONS_FILE
from shmelim.eliminations.files.taking import take_for_known
from shmelim.eliminations.runtime import lock_state
from shmelim.eliminations.starting import replacement
from shmelim.eliminations.starting.registry import Memory, Registry
from shmelim.eliminations.state.changes import Step, owe_again
from shmelim.eliminations.state.debt_book import hold_money
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.opening import log_of
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import ShmelimError, StoreError
from shmelim.system import clock
from shmelim.system.durable import (
    make_aside,
    make_private_directory,
    reading,
    sync_directory,
    write_whole,
    writing,
)
from shmelim.system.owner import whose
from shmelim.system.problems import Problems

MANIFEST: Final = "backup.json"

Progress = Callable[[str, int, int | None], Any]


class Manifest(msgspec.Struct, frozen=True):
    """What a backup says of itself."""

    store_id: str | None  # in hexadecimal digits; None of a store of a schema that had none
    commit: int
    eliminated: int
    departed: int
    events: int
    at_ms: int  # when it was made: ms since 1970, UTC
    directory: str  # what it is a backup of
    sha256: str


class Finding(NamedTuple):
    """What came of looking at one thing: ``problem`` says what is wrong with it, None that nothing is."""

    what: str  # "backup", "store", "file", "table" or "registry"
    place: str
    said: str
    problem: str | None = None


class Restored(NamedTuple):
    """What a restore did: what is there now, and where what was there before is."""

    commit: int
    eliminated: int
    departed: int
    kept: Path | None


def back_up(directory: Path, target: Path, on_progress: Progress = lambda *_: None) -> Manifest:
    """Write a backup of the store of a state directory to a new directory, as of one moment.

    Others may change the store meanwhile. StoreError if there is none, `target` is there already and not empty, or
    it cannot be written; then nothing of it is there.
    """
    target = Path(os.path.realpath(target))
    with Store.read_only(directory) as store:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise StoreError(f"{target} exists already", hint="name a directory that is not there, or is empty")
        if target.is_mount():  # whose name nothing can take
            raise StoreError(f"{target} is a file system of its own", hint="name a directory in it")
        with writing(f"the backup {target} cannot be written", hint="name another place"):
            make_private_directory(target.parent)
            making = make_aside(target, ".part", directory=True)
        try:
            copy = making / FILE_NAME
            store.copy_to(copy, lambda done, total: on_progress("copying", done, total))
            # What the copy says, which may be older than what the store says by now.
            with Store.read_only(making) as copied:
                manifest = _describe(copied, directory, files.digest_of(copy) or "")
            with writing(f"the backup {target} cannot be written", hint="name another place"):
                write_whole(making / MANIFEST, [msgspec.json.encode(manifest)])
                making.replace(target)
                sync_directory(target.parent)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    return manifest


def _describe(store: Store, directory: Path, sha256: str) -> Manifest:
    counts, store_id = store.counts(), None if store.store_id is None else store.store_id.hex()
    held = counts.eliminated, counts.departed, counts.events
    return Manifest(store_id, store.commit_number, *held, clock.now_ms(), str(directory.resolve()), sha256)


def read_manifest(backup: Path) -> Manifest:
    """Return what a backup says of itself; StoreError if it is none, or does not."""
    try:
        with reading(backup / MANIFEST) as file:
            return msgspec.json.decode(file.read(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{backup} is not a backup: {MANIFEST}: {error.strerror}",
            hint="name a directory that `shmelim backup` made",
        ) from error
    except OSError as error:
        text = f"the backup {backup} cannot be read: {error.strerror}; {whose(backup / MANIFEST)}"
        raise StoreError(text, hint="let this user read it, or run as its owner") from error
    except ValueError as error:
        raise StoreError(f"{backup / MANIFEST} is damaged: {error}", hint="use another backup") from error


def check_backup(backup: Path) -> list[Finding]:
    """Look at a backup: whether it is as it was made, and its store is whole."""

    def manifest() -> str:
        said = read_manifest(backup)
        if files.digest_of(backup / FILE_NAME) != said.sha256:
            raise StoreError(f"{backup / FILE_NAME} is not the file that was backed up")
        if (log := log_of(backup / FILE_NAME)).exists() and log.stat().st_size:
            raise StoreError(f"{log} was not backed up, and changes what the store says")
        return f"commit {said.commit}, {said.eliminated} eliminated, {said.departed} departed"

    return [_finding("backup", backup, manifest), check_store(backup)]


def check_store(directory: Path) -> Finding:
    """Read the store of a directory through: structure, checksums, debts, slashes and history."""

    def whole() -> str:
        with Store.read_only(directory) as store:
            store.check()
            rows = sum(1 for _ in store.rows())
            store.meta_items()
            store.debts(), store.slashes()
            return f"commit {store.commit_number}, {rows} rows, {store.counts().events} events"

    return _finding("store", directory / FILE_NAME, whole)


def check_files(directory: Path) -> list[Finding]:
    """Read the JSON files of a state directory; those that are not there are left out."""

    def read(path: Path, reading: Callable[[Path], Any]) -> Callable[[], str]:
        def whole() -> str:
            found = reading(path)
            if found.bad:
                raise StoreError(f"{len(found.bad)} of its rows cannot be taken: {found.bad[0].problem}")
            return f"{len(found.taken)} rows"

        return whole

    readings: dict[str, Callable[[Path], Any]] = {
        ELIMINATIONS_FILE: files.read_eliminations,
        DEPARTED_FILE: files.read_departed,
    }
    there = [(directory / name, reading) for name, reading in readings.items() if (directory / name).exists()]
    return [_finding("file", path, read(path, reading)) for path, reading in there]


def check_registry(registry: Registry, directory: Path) -> Finding:
    """Compare what is remembered of a name with the store in its directory."""

    def same() -> str:
        memory = registry.recall()
        if memory is None:
            raise StoreError("nothing is remembered of this name")
        with Store.read_only(directory) as store:
            store_id, commit = store.store_id, store.commit_number
            is_known = store.has_made(min(memory.commit, commit), memory.branch)
        if store_id is None or store_id.hex() != memory.store_id:
            raise StoreError(f"another store is remembered, of {memory.directory}")
        if commit < memory.commit:
            raise StoreError(f"the store is an older copy: commit {memory.commit} is remembered, it has {commit}")
        if not is_known:
            raise StoreError(f"commit {memory.commit} is remembered of another copy of the store")
        return f"commit {memory.commit}, {memory.eliminated} eliminated"

    return _finding("registry", registry.path, same)


def _finding(what: str, place: Path | str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, str(place), look())
    except ShmelimError as error:
        return Finding(what, str(place), "", error.message)


def restore(backup: Path, directory: Path, registry: Registry | None, acknowledged: int = 0) -> Restored:
    """Put a backup in the place of the store of a state directory, which no server may be using.

    The store that was there is kept beside it (``shmelim.sqlite.replaced-<time>``), the JSON files are written
    anew by the next start. Commits go on above every one that is known of (`acknowledged`: of others than the
    store and the registry), and no slash is begun until a person releases them. StoreError if the backup is not
    whole, and AlreadyServingError if a server has the directory; nothing is changed then. Dying at any line leaves
    the one store or the other.
    """
    backup = backup.absolute()  # as the history is to name it
    if os.path.realpath(backup) == os.path.realpath(directory):
        text = f"{backup} is the backup, which must not become the state"
        raise StoreError(text, hint="name the state directory (--state-dir)")
    bad = [finding for finding in check_backup(backup) if finding.problem]
    if bad:
        raise StoreError(f"the backup {backup} is not whole: {bad[0].problem}", hint="use another backup")
    lease = lock_state(directory, FILE_NAME)
    try:
        known = _known_commit(directory)
        memory = None if registry is None else registry.recall()
        above = max(known, acknowledged, 0 if memory is None else memory.commit)
        replacement.build(
            directory, lambda step: _mark_restored(step, backup, directory, above), begin_with=backup
        )
        kept = replacement.put_in_place(directory, "replaced")
        with Store.read_only(directory) as store:
            memory = memory_of(store, directory)
        try:
            if registry is not None:
                registry.remember(memory)
        except StoreError as error:
            raise StoreError(f"{directory} is restored, but {error.message}", hint=error.hint) from error
        return Restored(memory.commit, memory.eliminated, memory.departed, kept)
    finally:
        lease.release()


def memory_of(store: Store, directory: Path) -> Memory:
    """Return what a registry is to remember of a store, now."""
    eliminated, departed, *_ = store.counts()
    whose = (store.store_id or b"").hex(), str(directory.resolve())
    return Memory(*whose, store.commit_number, eliminated, departed, clock.now_ms(), store.branch)


def _known_commit(directory: Path) -> int:
    """Return the last commit of the store that is there; 0 where there is none, or none that can be read."""
    try:
        with Store.read_only(directory) as store:
            return store.commit_number
    except StoreError:
        return 0


def _mark_restored(step: Step, backup: Path, directory: Path, above: int) -> None:
    step.store.go_on_from(above)
    step.record([EventOf("restore", note=f"restored from the backup {backup}")])
    hold_money(step, f"the state was restored from the backup {backup}")
    owe_again(step, dict(step.store.eliminated()))
    # What stands in the files is not of this store, and no start must take it for a person's work.
    take_for_known(step, directory, Problems())  # those that there are, the next start names
