"""Making a new store in the place of a damaged one, so that death at any moment leaves enough to start from.

The new store is made whole in a directory of its own. Only then does the damaged one leave its place, and the
new one take it; between those two renames there is no store, but a finished replacement::

    shmelim.sqlite               damaged          damaged       -             whole
    .rebuilding/shmelim.sqlite   half or none     finished      finished      -
    shmelim.sqlite.damaged-*     -                -             damaged       damaged

All functions need the lock on the state directory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.store.opening import LOG_SUFFIXES, remove_log
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedStoreError, StoreError
from shmelim.system.durable import move_aside, sync_directory, writing

_PLACE = ".rebuilding"


def need_finished_recovery(directory: Path) -> None:
    """Raise DamagedStoreError where a damaged store was moved aside and none put in its place."""
    path = directory / FILE_NAME
    aside = sorted(directory.glob(f"{path.name}.damaged-*"))
    if not path.exists() and (aside or is_finished(directory)):
        raise DamagedStoreError(
            f"{path} is missing beside {aside[-1] if aside else _PLACE}: a recovery did not end"
        )


def is_finished(directory: Path) -> bool:
    """Whether a replacement stands there that was committed whole."""
    place = directory / _PLACE
    if not (place / FILE_NAME).exists():
        return False
    try:
        with Store.open(place) as store:
            # Filled in one transaction, which tells of itself in the history.
            return store.counts().events > 0
    except DamagedStoreError:
        return False


def build(directory: Path, fill: Callable[[Step], None]) -> None:
    """Make a replacement; `fill` fills it, and must write an event. The damaged store stays in its place."""
    discard(directory)
    try:
        # Always as durable as can be: it takes the place of a file that is then no longer looked at.
        with Store.open(directory / _PLACE, "power") as store, store.transaction():
            fill(Step(store, None))
    except BaseException:
        discard(directory)
        raise


def put_in_place(directory: Path) -> Path | None:
    """Put the finished replacement in its place; the damaged store that may stand there is moved aside.

    Returns where that is now, if this call moved it. After a StoreError the next start goes on from there.
    """
    path, place = directory / FILE_NAME, directory / _PLACE
    log = place / f"{FILE_NAME}-wal"
    if log.exists() and log.stat().st_size:
        raise StoreError(f"{log} could not be folded into its database", hint="make room on that file system")
    # Its log after it: in its place without the log, the file might pass for a whole one, and would be an old one.
    aside = move_aside(path, "damaged", LOG_SUFFIXES) if path.exists() else None
    with writing(f"the restored store cannot be put in place as {path}", hint="start again"):
        # A kill may have come after the damaged file was moved and before its log was.
        remove_log(path)
        (place / FILE_NAME).replace(path)
        sync_directory(directory)
    discard(directory)
    return aside


def discard(directory: Path) -> None:
    """Remove a replacement, finished or not, that is not needed."""
    shutil.rmtree(directory / _PLACE, ignore_errors=True)
