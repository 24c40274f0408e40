"""The two JSON files that other tools read: written whole or not at all, read without trust in them.

``eliminations.json`` is ``{"eliminations": [row, …]}``, ``departed_hotkeys.json`` is
``{"departed_hotkeys": {hotkey: {"detected_ms": ms}}}``; one row stands on one line, for diff and grep. The store
is the state of record; these are copies of it, and what a person puts in their place is imported.

All functions work on a path alone and share nothing: any thread may call them, for one path one at a time. What
cannot be read or written is a :class:`~shmelim.errors.StoreError`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shmelim.eliminations.record import DEPARTED_HOTKEYS_KEY, ELIMINATIONS_KEY, check_hotkey, decode, prepare
from shmelim.errors import DamagedFileError, StoreError
from shmelim.system.durable import write_aside, write_whole, writing

# Rows in memory at once, and in one write.
_CHUNK = 1000
_LATEST_MS = (1 << 63) - 1
_SHOWN = 20  # bad rows in the log

_json_encoder = msgspec.json.Encoder()
_log = logging.getLogger("shmelim.files")


class BadRow(msgspec.Struct, frozen=True):
    """A row that could not be taken: its place in the file, what stood there, and what is wrong with it."""

    index: int
    row: Any
    problem: str


class EliminationsFile(NamedTuple):
    """What an eliminations file holds: (hotkey, msgpack record) in order, the rows left out, its digest."""

    rows: list[tuple[str, bytes]]
    bad: list[BadRow]
    digest: str


class DepartedFile(NamedTuple):
    """What a departed file holds: hotkey → ``detected_ms`` in order, the rows left out, its digest."""

    items: dict[str, int]
    bad: list[BadRow]
    digest: str


class Identity(NamedTuple):
    """What tells a file from every other, and from itself after it was written to."""

    device: int
    inode: int
    changed_ns: int
    size: int


def write_eliminations(
    path: str | os.PathLike[str],
    records: Iterable[bytes],
    *,
    before_rename: Callable[[str], object] | None = None,
    mode: int = 0o600,
) -> str:
    """Replace the eliminations file by one of these msgpack records, in order; returns its digest.

    `before_rename` is called with the digest when the new file is complete and about to take its place; what it
    raises cancels that. `mode` is for a file that does not exist yet. About 4 s for a million records of 0.5 kB,
    of which a thousand are in memory at a time.
    """
    return _write(Path(path), ELIMINATIONS_KEY, "[]", map(_row_as_json, records), before_rename, mode)


def write_departed(
    path: str | os.PathLike[str],
    items: Iterable[tuple[str, int]],
    *,
    before_rename: Callable[[str], object] | None = None,
    mode: int = 0o600,
) -> str:
    """Write the departed file from (hotkey, ``detected_ms``); otherwise as :func:`write_eliminations`."""
    rows = (
        _json_encoder.encode(hotkey) + b":" + _json_encoder.encode({"detected_ms": ms}) for hotkey, ms in items
    )
    return _write(Path(path), DEPARTED_HOTKEYS_KEY, "{}", rows, before_rename, mode)


def read_eliminations(path: str | os.PathLike[str]) -> EliminationsFile | None:
    """Read an eliminations file, also a bare list of rows or a dict of rows by hotkey; None where there is none.

    A row that breaks a rule of :func:`~shmelim.eliminations.record.normalise` is in ``bad``. Of two rows of one
    hotkey the last counts, at the place of the first. DamagedFileError if the file is empty, not UTF-8, not JSON,
    or not of that shape.
    """
    loaded = _load(Path(path), ELIMINATIONS_KEY)
    if loaded is None:
        return None
    content, digest = loaded
    named: Iterable[tuple[str | None, Any]] = (
        content.items() if isinstance(content, dict) else ((None, row) for row in content)
    )
    rows: dict[str, bytes] = {}
    bad = []
    for index, (name, row) in enumerate(named):
        try:
            hotkey, record = prepare(row, name)
        except (ValueError, TypeError) as error:
            bad.append(BadRow(index, row, str(error)))
        else:
            rows[hotkey] = record
    return EliminationsFile(list(rows.items()), bad, digest)


def read_departed(path: str | os.PathLike[str]) -> DepartedFile | None:
    """Read a departed file, also the older list of hotkeys, whose ``detected_ms`` reads as 0.

    Returns None where there is no file; raises what :func:`read_eliminations` raises.
    """
    loaded = _load(Path(path), DEPARTED_HOTKEYS_KEY)
    if loaded is None:
        return None
    content, digest = loaded
    items: dict[str, int] = {}
    bad = []
    for index, row in enumerate(content.items() if isinstance(content, dict) else content):
        hotkey, info = row if isinstance(content, dict) else (row, {"detected_ms": 0})
        try:
            check_hotkey(hotkey)
            items[hotkey] = _detected_ms(hotkey, info)
        except (ValueError, TypeError) as error:
            bad.append(BadRow(index, row, str(error)))
    return DepartedFile(items, bad, digest)


def digest_of(path: str | os.PathLike[str]) -> str | None:
    """Return the SHA-256 of a file in hexadecimal, or None where there is no file."""
    with _reading(path):
        try:
            with Path(path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None


def identity_of(path: str | os.PathLike[str]) -> Identity | None:
    """Return what identifies a file and its content, or None where there is no file."""
    with _reading(path):
        try:
            status = Path(path).stat()
        except FileNotFoundError:
            return None
        return Identity(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def quarantine(path: str | os.PathLike[str], bad_rows: list[BadRow]) -> Path | None:
    """Keep the rows that could not be taken from a file, with what is wrong with each, and log that.

    They go to ``<name>.quarantine-<UTC time>.json`` beside it (0600), whose path is returned; None if there are
    no such rows.
    """
    if not bad_rows:
        return None
    rows = [{"index": bad.index, "problem": bad.problem, "row": bad.row} for bad in bad_rows]
    text = json.dumps({"file": os.fspath(path), "rows": rows}, indent=1, default=repr)
    with writing(f"the bad rows of {path} could not be set aside", hint=f"check that {Path(path).parent} exists"):
        target = write_aside(Path(path), "quarantine", text.encode("ascii"), ".json")
    _log.warning("%d rows of %s cannot be taken and are set aside in %s:", len(bad_rows), path, target)
    for bad in bad_rows[:_SHOWN]:
        _log.warning("  row %d: %s", bad.index, bad.problem)
    return target


def _write(
    path: Path,
    key: str,
    brackets: str,
    rows: Iterator[bytes],
    before_rename: Callable[[str], object] | None,
    mode: int,
) -> str:
    digest = hashlib.sha256()

    def digested() -> Iterator[bytes]:
        for part in _document(key, brackets, rows):
            digest.update(part)
            yield part

    def confirm() -> None:
        if before_rename is not None:
            before_rename(digest.hexdigest())

    with writing(f"{path} could not be written", hint=f"check that {path.parent} exists and has room"):
        write_whole(path, digested(), mode=mode, before_rename=confirm)
    return digest.hexdigest()


def _document(key: str, brackets: str, rows: Iterator[bytes]) -> Iterator[bytes]:
    yield f'{{"{key}": {brackets[0]}'.encode()
    separator = b"\n"
    while chunk := list(islice(rows, _CHUNK)):
        yield separator + b",\n".join(chunk)
        separator = b",\n"
    yield f"\n{brackets[1]}}}\n".encode()


def _row_as_json(record: bytes) -> bytes:
    row = decode(record)
    encoded = _json_encoder.encode(row)
    # msgspec writes NaN and infinities as null. A row without any null has none of them.
    if b"null" in encoded:
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
    return encoded


def _load(path: Path, key: str) -> tuple[dict[str, Any] | list[Any], str] | None:
    """Return the rows in a file, still unchecked, and its digest."""
    with _reading(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
    hint = "repair it (its end is often cut off), or use a backup"
    if not data:
        raise DamagedFileError(f"{path} is damaged: it has 0 bytes", hint=hint)
    try:
        # An editor may have put a byte-order mark in front.
        content = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: it is not JSON ({error})", hint=hint) from error
    rows = content.get(key) if isinstance(content, dict) else content
    if not isinstance(rows, (dict, list)):
        raise DamagedFileError(
            f"{path} is damaged: it holds neither {{{key!r}: …}} nor a list, but {str(content)[:60]!r}", hint=hint
        )
    return rows, hashlib.sha256(data).hexdigest()


def _detected_ms(hotkey: str, info: Any) -> int:
    ms = info.get("detected_ms") if isinstance(info, dict) else None
    if isinstance(ms, float) and ms.is_integer():
        ms = int(ms)
    if type(ms) is not int or not 0 <= ms <= _LATEST_MS:
        raise ValueError(f"departed hotkey {hotkey!r} has no valid 'detected_ms': {str(info)[:60]}")
    return ms


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror}", hint="make it readable for this user"
        ) from error
