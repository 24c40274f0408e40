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
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from shmelim.eliminations.record import DEPARTED_HOTKEYS_KEY, ELIMINATIONS_KEY, check_hotkey, decode, prepare
from shmelim.errors import DamagedFileError, StoreError
from shmelim.system.durable import write_aside, write_whole, writing

T = TypeVar("T")
R = TypeVar("R")

_CHUNK = 1000  # rows in memory at once, and in one write
_LATEST_MS = (1 << 63) - 1
_SHOWN = 20  # bad rows in the log

_json_encoder = msgspec.json.Encoder()
_log = logging.getLogger("shmelim.files")


class BadRow(msgspec.Struct, frozen=True):
    """A row that could not be taken: its place in the file, what stood there, and what is wrong with it."""

    index: int
    row: Any
    problem: str


class Content(NamedTuple, Generic[T]):
    """What a file holds: a msgpack record, or ``detected_ms``, of each hotkey in order, and the rows left out."""

    taken: dict[str, T]
    bad: list[BadRow]


def write_eliminations(
    path: Path, records: Iterable[bytes], *, before_rename: Callable[[str], object] = lambda _: None
) -> str:
    """Replace the eliminations file by one of these msgpack records, in order; returns its digest.

    `before_rename` is called with the digest when the new file is complete and about to take its place; what it
    raises cancels that. About 4 s for a million records of 0.5 kB, of which a thousand are in memory at a time.
    """
    return _write(path, ELIMINATIONS_KEY, "[]", map(_row_as_json, records), before_rename)


def write_departed(
    path: Path, times: Iterable[tuple[str, int]], *, before_rename: Callable[[str], object] = lambda _: None
) -> str:
    """Write the departed file from (hotkey, ``detected_ms``); otherwise as :func:`write_eliminations`."""
    encode = _json_encoder.encode
    rows = (encode(hotkey) + b":" + encode({"detected_ms": ms}) for hotkey, ms in times)
    return _write(path, DEPARTED_HOTKEYS_KEY, "{}", rows, before_rename)


def read_eliminations(path: Path) -> Content[bytes] | None:
    """Read an eliminations file, also a bare list of rows or a dict of rows by hotkey; None where there is none.

    A row that breaks a rule of :func:`~shmelim.eliminations.record.normalise` is in ``bad``. Of two rows of one
    hotkey the last counts, at the place of the first. DamagedFileError if the file is empty, not UTF-8, not JSON,
    or not of that shape.
    """
    return _read(path, ELIMINATIONS_KEY, lambda name, row: prepare(row, name))


def read_departed(path: Path) -> Content[int] | None:
    """Read a departed file, also the older list of hotkeys, whose ``detected_ms`` reads as 0.

    Otherwise as :func:`read_eliminations`.
    """
    return _read(path, DEPARTED_HOTKEYS_KEY, _departure)


def digest_of(path: Path) -> str | None:
    """Return the SHA-256 of a file in hexadecimal, or None where there is no file."""
    return _if_there(path, _sha256)


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Return what tells a file from every other, and from itself after it was written to; None where it is not."""
    status = _if_there(path, Path.stat)
    return None if status is None else (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def quarantine(path: Path, bad_rows: list[BadRow]) -> Path | None:
    """Keep the rows that could not be taken from a file, with what is wrong with each, and log that.

    They go to ``<name>.quarantine-<UTC time>.json`` beside it (0600), whose path is returned; None if there are
    no such rows.
    """
    if not bad_rows:
        return None
    text = json.dumps({"file": str(path), "rows": msgspec.to_builtins(bad_rows)}, indent=1, default=repr)
    with writing(f"the bad rows of {path} could not be set aside", hint=f"check that {path.parent} exists"):
        target = write_aside(path, "quarantine", text.encode("ascii"), ".json")
    _log.warning("%d rows of %s cannot be taken and are set aside in %s:", len(bad_rows), path, target)
    for bad in bad_rows[:_SHOWN]:
        _log.warning("  row %d: %s", bad.index, bad.problem)
    return target


def _write(
    path: Path, key: str, brackets: str, rows: Iterator[bytes], before_rename: Callable[[str], object]
) -> str:
    digest = hashlib.sha256()

    def parts() -> Iterator[bytes]:
        yield f'{{"{key}": {brackets[0]}'.encode()
        separator = b"\n"
        while chunk := list(islice(rows, _CHUNK)):
            yield separator + b",\n".join(chunk)
            separator = b",\n"
        yield f"\n{brackets[1]}}}\n".encode()

    def digested() -> Iterator[bytes]:
        for part in parts():
            digest.update(part)
            yield part

    with writing(f"{path} could not be written", hint=f"check that {path.parent} exists and has room"):
        write_whole(path, digested(), before_rename=lambda: before_rename(digest.hexdigest()))
    return digest.hexdigest()


def _row_as_json(record: bytes) -> bytes:
    row = decode(record)
    encoded = _json_encoder.encode(row)
    # msgspec writes NaN and infinities as null. A row without any null has none of them.
    if b"null" in encoded:
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
    return encoded


def _read(path: Path, key: str, take: Callable[[str | None, Any], tuple[str, T]]) -> Content[T] | None:
    """Read a file, each row of which ``take(name, row)`` takes; the name is None where the rows are a list."""
    data = _if_there(path, Path.read_bytes)
    if data is None:
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
    found = Content[T]({}, [])
    named = rows.items() if isinstance(rows, dict) else ((None, row) for row in rows)
    for index, (name, row) in enumerate(named):
        try:
            hotkey, taken = take(name, row)
        except (ValueError, TypeError) as error:
            found.bad.append(BadRow(index, row, str(error)))
        else:
            found.taken[hotkey] = taken
    return found


def _departure(name: str | None, row: Any) -> tuple[str, int]:
    hotkey, info = (row, {"detected_ms": 0}) if name is None else (name, row)
    check_hotkey(hotkey)
    ms = info.get("detected_ms") if isinstance(info, dict) else None
    if isinstance(ms, float) and ms.is_integer():
        ms = int(ms)
    if type(ms) is not int or not 0 <= ms <= _LATEST_MS:
        raise ValueError(f"departed hotkey {hotkey!r} has no valid 'detected_ms': {str(info)[:60]}")
    return hotkey, ms


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _if_there(path: Path, look: Callable[[Path], R]) -> R | None:
    """Return what `look` sees of a file, or None where there is none."""
    try:
        return look(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror}", hint="make it readable for this user"
        ) from error
