"""Merging files into the state, each content once: a restart must not undo what was changed since.

The digests of what was merged stand in the store, and in the table's origin entry too, so that they survive a
damaged store as the state does. The JSON files do not hold them: after a state was restored from those, the files
named at the next start are taken for merged.

What cannot be read raises StoreError or DamagedFileError, and nothing of it is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from shmelim.eliminations.files.format import BadRow, File, departures_in, eliminations_in, quarantine, read_file
from shmelim.eliminations.files.taking import news_of
from shmelim.eliminations.record import DEPARTED_HOTKEYS_KEY, ELIMINATIONS_KEY
from shmelim.eliminations.state.changes import Step, merge, record_departures
from shmelim.eliminations.store.store import Store
from shmelim.errors import StoreError
from shmelim.system.text import get_logger

_log = get_logger("shmelim.recovery")

_DONE: Final = "imported:"
_UNKNOWN: Final = "imports-unknown"


def merge_once(store: Store, paths: Sequence[Path], before_each: Callable[[Path], Any]) -> None:
    """Merge files into the state, unless their very content was merged before; no transaction is open.

    `before_each` is called with each file before it is looked at. One that cannot be read ends it; those before
    it are applied.
    """
    unknown = store.meta(_UNKNOWN, default=False)
    for path in paths:
        before_each(path)
        file = _read(path)
        if store.meta(f"{_DONE}{file.digest}"):
            _log.info("%s was imported before", path)
            continue
        with store.transaction():
            if unknown:
                _log.warning(
                    "%s is not imported: the state was restored from the JSON files, which do not tell whether it"
                    " was imported before. If it was not, add a blank line to it and start again.",
                    path,
                )
            else:
                taken, bad = _import(Step(store, None), file)
                _log.info("imported %d rows of %s, set %d aside", taken, path, bad)
            store.set_meta(f"{_DONE}{file.digest}", value=True)
    if unknown and paths:
        with store.transaction():
            store.set_meta(_UNKNOWN, value=False)


def imported(store: Store) -> list[str] | None:
    """Return the digests of what was merged; None where they are not known."""
    if store.meta(_UNKNOWN, default=False):
        return None
    return [key.removeprefix(_DONE) for key in store.meta_items(_DONE)]


def restore_imported(step: Step, digests: Iterable[str] | None) -> None:
    """Put back what :func:`imported` returned; None says that it is not known."""
    if digests is None:
        step.store.set_meta(_UNKNOWN, value=True)
        return
    for digest in digests:
        step.store.set_meta(f"{_DONE}{digest}", value=True)


def import_departed(step: Step, path: Path, reason: str | None = None) -> None:
    """Merge a file of departed hotkeys."""
    _import_departed(step, _read(path), reason or f"import of {path}")


def _read(path: Path) -> File:
    """Read a file that somebody named, and so perhaps a pipe, which can be opened only once."""
    file = read_file(path, stream=True)
    if file is None:
        raise StoreError(f"{path} does not exist", hint="name a JSON file of eliminations or departed hotkeys")
    return file


def _import(step: Step, file: File) -> tuple[int, int]:
    """Merge a file of eliminations, departed hotkeys or both; returns how many rows were taken and set aside."""
    done = [_MERGES[key](step, file, f"import of {file.path}") for key in file.holds()]
    return sum(taken for taken, _ in done), sum(bad for _, bad in done)


def _import_eliminations(step: Step, file: File, reason: str) -> tuple[int, int]:
    found = eliminations_in(file)
    merge(step, news_of(step.store, found), reason)
    _set_aside(step, file, found.bad)
    return len(found.taken), len(found.bad)


def _import_departed(step: Step, file: File, reason: str) -> tuple[int, int]:
    found = departures_in(file)
    record_departures(step, found.taken, reason)
    _set_aside(step, file, found.bad)
    return len(found.taken), len(found.bad)


_MERGES: Final = {ELIMINATIONS_KEY: _import_eliminations, DEPARTED_HOTKEYS_KEY: _import_departed}


def _set_aside(step: Step, file: File, bad: list[BadRow]) -> None:
    """Keep rows that could not be taken: beside the file, or beside the store where that is a pipe."""
    quarantine(file.path, bad, None if file.identity else step.store.path.with_name("import"))
