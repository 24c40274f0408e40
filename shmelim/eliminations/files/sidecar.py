"""What we wrote into a JSON file, kept beside it in a hidden file: by that a person's edit is told from our own.

``.eliminations.json.written`` speaks of the file that took its place; ``.eliminations.json.next`` of one that is
about to. The latter is durable before the file takes its place, and takes the former's name after that. So a death
between the two leaves both, and the file's digest tells which of them it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from shmelim.eliminations.files.format import read_file
from shmelim.errors import DamagedFileError
from shmelim.system.durable import read_once, write_whole, writing
from shmelim.system.text import get_logger

_log = get_logger("shmelim.files")


class Written(msgspec.Struct, frozen=True, array_like=True):
    """A state that we wrote into a file: of which store, not before which of its commits, and its rows' hashes."""

    digest: str
    store_id: bytes
    commit_number: int
    rows: bytes = b""


class Sidecars(NamedTuple):
    """What is known of a file; None where nothing is."""

    written: Written | None = None
    next: Written | None = None

    def of(self, digest: str) -> Written | None:
        """Return what we wrote that has this digest."""
        return next((each for each in self if each is not None and each.digest == digest), None)

    @property
    def base(self) -> Written | None:
        """What a file that is not ours was made from; None where that is not known."""
        return None if self.next is not None else self.written


def read_sidecars(path: Path) -> Sidecars:
    """Return what is known of a file."""
    return Sidecars(_read(_written(path)), _read(_next(path)))


def announce(path: Path, written: Written) -> None:
    """Make durable what is about to stand in a file; StoreError if that cannot be."""
    left = _read(_next(path))  # by a writer that died
    if left is not None:
        file = read_file(path)
        if file is not None and file.digest == left.digest:
            settle(path)
    with writing(f"{_next(path)} could not be written", hint=f"check that {path.parent} exists and has room"):
        write_whole(_next(path), [msgspec.msgpack.encode(written)])


def settle(path: Path) -> None:
    """Say that what was announced stands there now; StoreError if that cannot be."""
    with writing(f"{_written(path)} could not be written", hint=f"check that {path.parent} exists and has room"):
        _next(path).replace(_written(path))


def _read(path: Path) -> Written | None:
    try:
        found = read_once(path)
        return None if found is None else msgspec.msgpack.decode(found.data, type=Written)
    except (OSError, DamagedFileError, ValueError) as error:
        _log.warning("%s cannot be read, so a file that was edited cannot be merged: %s", path, error)
        return None


def _written(path: Path) -> Path:
    return path.with_name(f".{path.name}.written")


def _next(path: Path) -> Path:
    return path.with_name(f".{path.name}.next")
