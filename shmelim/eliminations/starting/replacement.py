"""Making a new store in the place of a damaged one, so that death at any moment leaves enough to start from.

The new store is made whole in a directory of its own, which takes its name only then. Only then does the damaged
one leave its place, and the new one take it; between those two renames there is no store, but a replacement::

    shmelim.sqlite               damaged          damaged       -             whole
    .rebuilding.part/            half             -             -             -
    .rebuilding/                 -                whole         whole         -
    shmelim.sqlite.damaged-*     -                -             damaged       damaged

A backup takes the place of a store in the same way (``shmelim.sqlite.replaced-*``).

All functions need the lock on the state directory.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.store.opening import LOG_SUFFIXES, need_folded, remove_log
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedStoreError, StoreError
from shmelim.system.durable import move_aside, sync_directory, writing

_PLACE = ".rebuilding"
_MAKING = ".rebuilding.part"


def need_finished_recovery(directory: Path) -> None:
    """Raise DamagedStoreError where a store was moved aside and none put in its place."""
    path = directory / FILE_NAME
    aside = sorted(found for what in ("replaced", "damaged") for found in directory.glob(f"{path.name}.{what}-*"))
    if not path.exists() and (aside or is_finished(directory)):
        raise DamagedStoreError(
            f"{path} is missing beside {aside[-1] if aside else _PLACE}: a recovery did not end"
        )


def is_finished(directory: Path) -> bool:
    """Whether a replacement stands there that was made whole."""
    return (directory / _PLACE / FILE_NAME).exists() and not (directory / _PLACE).is_symlink()


def build(directory: Path, fill: Callable[[Step], None], *, begin_with: Path | None = None) -> None:
    """Make a replacement, which `fill` fills; the store stays in its place.

    `begin_with` is a directory with a store, of which a copy is what `fill` begins with. StoreError where a link
    stands in the place of the store.
    """
    if (path := directory / FILE_NAME).is_symlink():
        raise StoreError(
            f"{path} is a link to {os.path.realpath(path)}, and the new store would take the link's place",
            hint="remove the link to have it made in the directory itself; or link the whole directory instead",
        )
    discard(directory)
    making = directory / _MAKING
    try:
        with writing(f"{making} cannot be made"):
            making.mkdir(mode=0o700)
        if begin_with is not None:
            with Store.read_only(begin_with) as backup:
                backup.copy_to(making / FILE_NAME)
        # Always as durable as can be: it takes the place of a file that is then no longer looked at.
        with Store.open(making, "power") as store, store.transaction():
            fill(Step(store, None))
        need_folded(making / FILE_NAME)
        with writing(f"{making} cannot be renamed"):
            making.replace(directory / _PLACE)
            sync_directory(directory)
    except BaseException:
        with suppress(StoreError):
            discard(directory)
        raise


def put_in_place(directory: Path, what: str = "damaged") -> Path | None:
    """Put the finished replacement in its place; the store that may stand there is moved aside, named as `what`.

    Returns where that is now, if this call moved it. After a StoreError the next start goes on from there.
    """
    path, place = directory / FILE_NAME, directory / _PLACE
    # Its log after it: in its place without the log, the file might pass for a whole one, and would be an old one.
    aside = move_aside(path, what, LOG_SUFFIXES) if path.exists() else None
    with writing(f"the restored store cannot be put in place as {path}", hint="start again"):
        # A kill may have come after the damaged file was moved and before its log was.
        remove_log(path)
        (place / FILE_NAME).replace(path)
        sync_directory(directory)
    discard(directory)
    return aside


def discard(directory: Path) -> None:
    """Remove a replacement, finished or not, that is not needed.

    StoreError if that cannot be: left there, it would take the place of a later state that is damaged.
    """
    for place in (directory / _PLACE, directory / _MAKING):
        with writing(f"{place} cannot be removed", hint="remove it by hand"), suppress(FileNotFoundError):
            if not stat.S_ISDIR(place.lstat().st_mode):
                raise StoreError(f"{place} is not a directory, as a new store needs there", hint="move it away")
            shutil.rmtree(place)
