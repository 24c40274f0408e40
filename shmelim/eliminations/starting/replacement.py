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
from typing import TYPE_CHECKING

from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.store import schema
from shmelim.eliminations.store.database import move_aside
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedStoreError, StoreError
from shmelim.system.durable import sync_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
    """Tell whether a replacement stands there that was committed whole."""
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
    """Make a replacement; `fill` fills it, and must write an event.

    Raises
    ------
    StoreError
        It could not be written; the damaged store is still in its place.

    """
    discard(directory)
    try:
        # Always as durable as can be: it takes the place of a file that is then no longer looked at.
        with Store.open(directory / _PLACE, "power") as store, store.transaction():
            fill(Step(store, None))
    except BaseException:
        discard(directory)
        raise


def put_in_place(directory: Path) -> Path | None:
    """Move the damaged store aside, if it still stands there, and put the finished one in its place.

    Returns
    -------
    Path or None
        Where the damaged store is now, if this call moved it.

    Raises
    ------
    StoreError
        A rename failed; the next start goes on from there.

    """
    path, place = directory / FILE_NAME, directory / _PLACE
    log = place / f"{FILE_NAME}-wal"
    if log.exists() and log.stat().st_size:
        raise StoreError(f"{log} could not be folded into its database", hint="make room on that file system")
    aside = move_aside(directory) if path.exists() else None
    try:
        # A kill may have come after the damaged file was moved and before its log was.
        schema.remove_log(path)
        (place / FILE_NAME).replace(path)
        sync_directory(directory)
    except OSError as error:
        raise StoreError(
            f"the restored store cannot be put in place as {path}: {error.strerror}",
            hint="make the directory writable and start again",
        ) from error
    discard(directory)
    return aside


def discard(directory: Path) -> None:
    """Remove a replacement, finished or not, that is not needed."""
    shutil.rmtree(directory / _PLACE, ignore_errors=True)
