"""The steps of a start: reading a store through, making one from what is left, taking over what a person put in.

Which of them a start takes is decided in :mod:`shmelim.eliminations.starting.deciding`. A damaged JSON file is
moved aside and costs nothing. Where it is all there is, starting would mean to start empty and let eliminated
miners trade: so the start is refused, and everything left as it is.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from shmelim.eliminations.files.taking import take_files, take_for_known
from shmelim.eliminations.rows import ORIGIN_KEY, PREFIX, Status, departed_in
from shmelim.eliminations.starting.imports import restore_imported
from shmelim.eliminations.state.changes import Step, record_departures, replace_all
from shmelim.eliminations.store.opening import store_bytes
from shmelim.eliminations.store.schema import Durability
from shmelim.eliminations.store.store import Store
from shmelim.errors import NotServingError, SegmentError
from shmelim.shm import Namespace, TableIdentity, TableReader
from shmelim.system.problems import Problems
from shmelim.system.text import get_logger

_log = get_logger("shmelim.recovery")
_CHECK_LIMIT = 256 << 20


class _Origin(msgspec.Struct):
    """What a table says of its origin; ``imported`` is None where that is not known."""

    state_dir: str | None
    imported: list[str] | None = None


class Published(NamedTuple):
    """What is published under a name: its identity, None where it cannot be read, and then why (``problem``)."""

    identity: TableIdentity | None = None
    state_dir: str | None = None  # None of a table whose server kept its state in memory
    imported: list[str] | None = None
    eliminated: int = 0
    departed: int = 0
    problem: str = ""
    source: str = ""  # whom the table follows, on another host

    @property
    def entries(self) -> int:
        """How many hotkeys anything is known of."""
        return 0 if self.identity is None else self.identity.entries - 1


def look(namespace: Namespace) -> Published | None:
    """Return what is published; None where nothing is."""
    try:
        reader = TableReader(namespace)
        identity, record = reader.identity(), reader.get(ORIGIN_KEY)
        eliminated, departed = reader.count_flag(0), reader.count_flag(1)
    except NotServingError:
        return None
    except SegmentError as error:
        _log.warning("what is published under %r cannot be read: %s", namespace.name, error)
        return Published(problem=error.message)
    origin = _Origin(None)
    with suppress(ValueError):
        origin = msgspec.msgpack.decode(b"" if record is None else record.data, type=_Origin)
    source = reader.source() or ""
    return Published(identity, origin.state_dir, origin.imported, eliminated, departed, source=source)


def open_whole(directory: Path, durability: Durability) -> Store:
    """Open the store, and read it through; DamagedStoreError where that shows damage."""
    store = Store.open(directory, durability)
    try:
        # SQLite's own check takes as long as all else, and a processor of its own.
        with ThreadPoolExecutor(1, "shmelim-check") as aside:
            whole = aside.submit(_check, directory)
            store.check_records()
            store.meta_items()
            whole.result()
    except BaseException:
        store.close()
        raise
    return store


def _check(directory: Path) -> None:
    if store_bytes(directory) <= _CHECK_LIMIT:
        with Store.read_only(directory) as store:
            store.check()


def say_what_is_published(
    step: Step, namespace: Namespace, published: Published, directory: Path | None, problems: Problems
) -> None:
    """Make a store say what the table says, and take its identity; SegmentError if the table is damaged."""
    assert published.identity is not None
    entries = TableReader(namespace).snapshot(verify=True).entries
    entries.pop(ORIGIN_KEY, None)
    records = {
        key.decode(): entry.record[PREFIX.size :]
        for key, entry in entries.items()
        if entry.flags & Status.ELIMINATED
    }
    departed = {hotkey: info["detected_ms"] for hotkey, info in departed_in(entries).items()}
    # New ones in the order of the table, before those stay that it does not have.
    replace_all(step, records, "recovered")
    record_departures(step, departed, "recovered")
    step.store.set_registered(key.decode() for key, entry in entries.items() if entry.flags & Status.REGISTERED)
    restore_imported(step, published.imported)
    identity = published.identity
    step.store.go_on_from(identity.commit, identity.store_id if identity.store_id.strip(b"\0") else None)
    if directory is not None:
        take_for_known(step, directory, problems)
    _log.warning("took %d eliminations and %d departed hotkeys from shared memory", len(records), len(departed))


def say_what_files_say(step: Step, directory: Path) -> None:
    """Make an empty store say what the JSON files say; DamagedFileError if they do not."""
    take_files(step, directory, Problems(), fresh=True)  # which has none to name: it refuses
    restore_imported(step, None)


def origin_record(directory: Path | None, imported: list[str] | None = None) -> bytes:
    """Return what a table says of its origin: its state directory, and the digests of what was imported there."""
    place = None if directory is None else str(directory.resolve())
    return msgspec.msgpack.encode(_Origin(place, imported))
