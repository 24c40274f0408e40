"""Finding the state to start from: the store, files that a person put there, or what is left when it is damaged.

In this order:

1. The store, if it is whole. A JSON file beside it that is not the one we wrote last was put there by a person:
   it is taken over as it stands, and the history says so.
2. If the store is damaged a new one is made from what the last writer published in shared memory (everything that
   was acknowledged), or else from the JSON files (at most a second behind); then the damaged one is moved aside.
   A damaged store that was moved aside with none in its place is a recovery that did not end: it is ended first.
3. With no store at all, the JSON files are the state: that is how a validator migrates. A default departed file
   stands in where there is none.

A damaged JSON file is moved aside and costs nothing. Where it is all there is, or a damaged store is, starting
would mean to start empty and let eliminated miners trade: so the start is refused, and everything left as it is.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import msgspec

from shmelim.eliminations.files.format import (
    DEPARTED_FILE,
    ELIMINATIONS_FILE,
    departures_in,
    eliminations_in,
    read_file,
)
from shmelim.eliminations.files.sidecar import read_sidecars
from shmelim.eliminations.files.taking import NAMES, mark_taken, take_files
from shmelim.eliminations.rows import ORIGIN_KEY, PREFIX, Status, departed_in
from shmelim.eliminations.starting import replacement
from shmelim.eliminations.starting.imports import import_departed, restore_imported
from shmelim.eliminations.state.changes import Step, merge, record_departures
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.opening import LOG_SUFFIXES, store_bytes
from shmelim.eliminations.store.schema import FILE_NAME, RESTORE_HINT, Durability
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedStoreError, NotServingError, SegmentError
from shmelim.shm import Entry, Namespace, TableReader
from shmelim.system.problems import Problems

_log = logging.getLogger("shmelim.recovery")
_CHECK_LIMIT = 256 << 20
Entries: TypeAlias = dict[bytes, Entry]


class _Origin(msgspec.Struct):
    """What a table says of its origin; ``imported`` is None where that is not known."""

    state_dir: str | None
    imported: list[str] | None = None


def recover(
    directory: Path,
    namespace: Namespace,
    durability: Durability,
    default_departed: Path | None,
    problems: Problems,
    *,
    use_files: bool,
) -> Store:
    """Open the store of a state directory, made if missing, with the state to serve in it.

    `namespace` is where the last writer's table may still be; `default_departed` is a departed file to use where
    nobody has departed yet; without `use_files` the JSON files count only where there is no store yet: later they
    would be older than it. What is wrong with a file becomes one of the `problems`. Raises DamagedStoreError or
    DamagedFileError if the only record of the state is damaged, StoreError if something cannot be read or written.
    """
    made = not (directory / FILE_NAME).exists()
    try:
        replacement.need_finished_recovery(directory)
        store = _open_whole(directory, durability)
    except DamagedStoreError as error:
        _replace(directory, namespace, error, use_files=use_files)
        store, made = _open_whole(directory, durability), False
    else:
        replacement.discard(directory)
    try:
        with store.transaction():
            step = Step(store, None)
            fresh = not any(store.counts()) and not store.meta_items()
            if use_files or fresh:
                take_files(step, directory, problems, fresh=fresh)
            if default_departed is not None and not store.counts().departed:
                import_departed(step, default_departed, "default departed file")
    except BaseException:
        store.close()
        if made:
            # The next start must not take an empty store for the state.
            for suffix in ("", *LOG_SUFFIXES):
                (directory / (FILE_NAME + suffix)).unlink(missing_ok=True)
        raise
    return store


def _open_whole(directory: Path, durability: Durability) -> Store:
    """Open the store, and read it through; DamagedStoreError where that shows damage."""
    store = Store.open(directory, durability)
    try:
        if store_bytes(directory) <= _CHECK_LIMIT:
            store.check()
        for _ in store.rows():
            pass
        store.meta_items()
    except BaseException:
        store.close()
        raise
    return store


def _replace(directory: Path, namespace: Namespace, damage: DamagedStoreError, *, use_files: bool) -> None:
    """Put a whole store in the place of the damaged one; DamagedStoreError if nothing is left to make it from."""
    finished = replacement.is_finished(directory)
    between = finished and not (directory / FILE_NAME).exists()
    # Nothing was published since the replacement was finished: only its two renames are missing.
    published = None if between else _last_published(namespace, directory)
    if published is not None:
        replacement.build(directory, lambda step: _restore(step, *published, directory))
    elif not finished:
        _need_files(directory if use_files else None, damage)
        replacement.build(directory, lambda step: _restore_from_files(step, directory))
    aside = replacement.put_in_place(directory)
    _log.error("%s%s", damage.message, "" if aside is None else f"; it is now {aside}")


def _need_files(directory: Path | None, damage: DamagedStoreError) -> None:
    """Refuse to go on without the damaged store unless the files are there, and whole; nothing is touched."""
    if directory is not None and (file := read_file(directory / ELIMINATIONS_FILE)) is not None:
        eliminations_in(file)
        if (file := read_file(directory / DEPARTED_FILE)) is not None:
            departures_in(file)
        return
    raise DamagedStoreError(
        f"{damage.message}, and there is no other record of the state",
        hint=f"{RESTORE_HINT}; or move every {FILE_NAME}* out of the directory to start empty",
    ) from damage


def origin_record(directory: Path | None, imported: list[str] | None = None) -> bytes:
    """Return what a table says of its origin: its state directory, and the digests of what was imported there."""
    place = None if directory is None else str(directory.resolve())
    return msgspec.msgpack.encode(_Origin(place, imported))


def _last_published(namespace: Namespace, directory: Path) -> tuple[_Origin, Entries] | None:
    """Return what stands in shared memory, if it was made from this state directory and is whole."""
    try:
        entries = TableReader(namespace).snapshot(verify=True).entries
    except (NotServingError, SegmentError) as error:
        _log.warning("shared memory does not help: %s", error)
        return None
    with suppress(KeyError, msgspec.DecodeError):
        origin = msgspec.msgpack.decode(entries.pop(ORIGIN_KEY).record, type=_Origin)
        if origin.state_dir == str(directory.resolve()):
            return origin, entries
    _log.warning("shared memory does not help: what stands there is the state of another directory")
    return None


def _restore(step: Step, origin: _Origin, entries: Entries, directory: Path) -> None:
    step.record([EventOf("recover", note="the store was damaged: restored from shared memory")])
    records = {
        key.decode(): entry.record[PREFIX.size :]
        for key, entry in entries.items()
        if entry.flags & Status.ELIMINATED
    }
    departed = {hotkey: info["detected_ms"] for hotkey, info in departed_in(entries).items()}
    merge(step, records, "recovered")
    record_departures(step, departed, "recovered")
    step.store.set_registered(key.decode() for key, entry in entries.items() if entry.flags & Status.REGISTERED)
    restore_imported(step, origin.imported)
    # What stands in the files is at most as new: no start must take it for a person's work.
    for path in (directory / name for name in NAMES):
        if (file := read_file(path)) is not None:
            mark_taken(step, file, read_sidecars(path))
    _log.warning(
        "restored %d eliminations and %d departed hotkeys from shared memory; the history starts anew, and what"
        " eliminations still owed is in the damaged store alone",
        len(records),
        len(departed),
    )


def _restore_from_files(step: Step, directory: Path) -> None:
    step.record([EventOf("recover", note="the store was damaged: restored from the JSON files")])
    take_files(step, directory, Problems(), fresh=True)  # which has no problem: it refuses
    restore_imported(step, None)
    _log.warning("the history starts anew, and what eliminations still owed is in the damaged store alone")
