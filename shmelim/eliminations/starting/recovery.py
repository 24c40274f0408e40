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

from shmelim.eliminations.files import format as files
from shmelim.eliminations.files.mirror import DEPARTED_FILE, ELIMINATIONS_FILE, digest_key, known_digests
from shmelim.eliminations.rows import ORIGIN_KEY, PREFIX, Status, departed_in
from shmelim.eliminations.starting import replacement
from shmelim.eliminations.starting.imports import import_departed, restore_imported
from shmelim.eliminations.state.changes import Step, merge, record_departures, replace_all
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.opening import LOG_SUFFIXES, store_bytes
from shmelim.eliminations.store.schema import FILE_NAME, RESTORE_HINT, Durability
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedFileError, DamagedStoreError, NotServingError, SegmentError
from shmelim.shm import Entry, Namespace, TableReader
from shmelim.system.durable import move_aside

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
    *,
    use_files: bool,
) -> Store:
    """Open the store of a state directory, made if missing, with the state to serve in it.

    `namespace` is where the last writer's table may still be; `default_departed` is a departed file to use where
    nobody has departed yet; without `use_files` the JSON files do not count. Raises DamagedStoreError or
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
            if use_files:
                fresh = not any(store.counts()) and not store.meta_items()
                take_files(step, directory, fresh=fresh)
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
    if directory is not None and files.read_eliminations(directory / ELIMINATIONS_FILE) is not None:
        files.read_departed(directory / DEPARTED_FILE)
        return
    raise DamagedStoreError(
        f"{damage.message}, and there is no other record of the state",
        hint=f"{RESTORE_HINT}; or move every {FILE_NAME}* out of the directory to start empty",
    ) from damage


def origin_record(directory: Path | None, imported: list[str] | None = None) -> bytes:
    """Return what a table says of its origin: its state directory, and the digests of what was imported there."""
    place = None if directory is None else str(directory.resolve())
    return msgspec.msgpack.encode(_Origin(place, imported))


def take_files(step: Step, directory: Path, *, fresh: bool) -> None:
    """Take over the files that somebody else put there; a damaged one is moved aside, or refused if `fresh`."""
    for name in (ELIMINATIONS_FILE, DEPARTED_FILE):
        path = directory / name
        digest = files.digest_of(path)
        if digest is None or digest in known_digests(step.store.meta(digest_key(name))):
            continue
        try:
            if name == ELIMINATIONS_FILE:
                _take_eliminations(step, path)
            else:
                import_departed(step, path, f"file {name}")
        except DamagedFileError as error:
            if fresh:
                raise DamagedFileError(
                    f"{error.message}, and there is no other record of the state",
                    hint="repair the file, or move it away to start empty",
                ) from None
            aside = move_aside(path)
            _log.error("%s; it is now %s, the state comes from the store", error.message, aside)
            step.record([EventOf("damaged", note=f"{name} was damaged: moved aside to {aside.name}")])
        else:
            _log.info("%s was not written by this server: taken over", path)
            step.record([EventOf("import", note=f"{name} was put there by somebody else: taken over")])
            step.store.set_meta(digest_key(name), [digest])


def _take_eliminations(step: Step, path: Path) -> None:
    found = files.read_eliminations(path)
    if found is None:
        return
    # A row that cannot be taken says nothing against what the store knows of its hotkey.
    unsure = [bad.row.get("hotkey") for bad in found.bad if isinstance(bad.row, dict)]
    keep = [hotkey for hotkey in unsure if isinstance(hotkey, str)]
    replace_all(step, found.taken, f"file {path.name}", keep)
    files.quarantine(path, found.bad)


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
    for name in (ELIMINATIONS_FILE, DEPARTED_FILE):
        digest = files.digest_of(directory / name)
        if digest is not None:
            step.store.set_meta(digest_key(name), [digest])
    _log.warning(
        "restored %d eliminations and %d departed hotkeys from shared memory; the history starts anew, and what"
        " eliminations still owed is in the damaged store alone",
        len(records),
        len(departed),
    )


def _restore_from_files(step: Step, directory: Path) -> None:
    step.record([EventOf("recover", note="the store was damaged: restored from the JSON files")])
    take_files(step, directory, fresh=True)
    restore_imported(step, None)
    _log.warning("the history starts anew, and what eliminations still owed is in the damaged store alone")
