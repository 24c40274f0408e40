"""The two JSON files that other tools read: written whole or not at all, read without trust in them.

``eliminations.json`` is ``{"eliminations": [row, …]}``, ``departed_hotkeys.json`` is
``{"departed_hotkeys": {hotkey: {"detected_ms": ms}}}``; one row stands on one line, for diff and grep. The store
is the state of record; these are copies of it, and what a person puts in their place is imported.

All functions work on a path alone and share nothing: any thread may call them, for one path one at a time. What
cannot be read or written is a :class:`~shmelim.errors.StoreError`, and a file that says nothing that could be
believed a :class:`~shmelim.errors.DamagedFileError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from shmelim.eliminations.record import (
    DEPARTED_HOTKEYS_KEY,
    ELIMINATIONS_KEY,
    check_hotkey,
    decode,
    encode,
    prepare,
)
from shmelim.eliminations.salvage import salvage
from shmelim.errors import DamagedFileError, StoreError
from shmelim.system import clock
from shmelim.system.containers import finite
from shmelim.system.durable import hint_of, read_once, reading, write_aside, write_whole, writing
from shmelim.system.text import get_logger

T = TypeVar("T")

ELIMINATIONS_FILE: Final = "eliminations.json"
DEPARTED_FILE: Final = "departed_hotkeys.json"

_CHUNK: Final = 50  # rows in memory at once, and in one write
_PAUSE: Final = 50e-6  # seconds after each: a change that waits for the interpreter soon has it
_LATEST_MS: Final = (1 << 63) - 1
_SHOWN: Final = 20  # bad rows in the log
_HASH: Final = 8  # bytes
_UNREADABLE: Final = "make it readable for this user"
_HINT: Final = "repair it (its end is often cut off), or use a backup"

_json_encoder = msgspec.json.Encoder()
_log = get_logger("shmelim.files")


class File:
    """A JSON file as one open found it."""

    def __init__(self, path: Path, data: bytes, identity: tuple[int, ...] = ()) -> None:
        self.path = path
        self.identity = identity
        self.data = data

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of what stands in it, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def content(self) -> Any:
        """What it says; DamagedFileError if that is not JSON."""
        if not self.data:
            raise DamagedFileError(f"{self.path} is damaged: it has 0 bytes", hint=_HINT)
        try:
            # An editor may have put a byte-order mark in front.
            text = self.data.decode("utf-8-sig")
            try:
                return json.loads(text, object_pairs_hook=_unambiguous)
            except (json.JSONDecodeError, _AmbiguousError):
                raise
            except ValueError:  # a number of more digits than Python reads is its row's fault alone
                return json.loads(text, object_pairs_hook=_unambiguous, parse_int=_number)
        except (ValueError, RecursionError) as error:
            what = str(error) if isinstance(error, _AmbiguousError) else f"it is not JSON ({error})"
            raise DamagedFileError(f"{self.path} is damaged: {what}", hint=_HINT) from error

    def holds(self) -> list[str]:
        """Return the keys under which it has eliminations, departed hotkeys or both, by its shape."""
        content = self.content
        if isinstance(content, dict):
            return [key for key in (ELIMINATIONS_KEY, DEPARTED_HOTKEYS_KEY) if key in content] or [
                ELIMINATIONS_KEY
            ]
        are_texts = isinstance(content, list) and content and all(isinstance(row, str) for row in content)
        return [DEPARTED_HOTKEYS_KEY if are_texts else ELIMINATIONS_KEY]


class _AmbiguousError(ValueError):
    """One of two values would be taken in silence: of two lists of eliminations, say, the empty one."""


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _AmbiguousError(f"the name {twice[:60]!r} stands twice in one object")
    return read


class _LongNumber:
    """A number of more digits than Python reads; nothing can be stored that holds one."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __repr__(self) -> str:
        return self._digits


def _number(digits: str) -> int | _LongNumber:
    try:
        return int(digits)
    except ValueError:
        return _LongNumber(digits)


class Summary(NamedTuple):
    """What tells what is written: the file's digest, a hash of each row's hotkey and of the row, its identity."""

    digest: str
    rows: bytes
    identity: tuple[int, ...]


class BadRow(msgspec.Struct, frozen=True):
    """A row that could not be taken: its place in the file, what stood there, and what is wrong with it."""

    index: int
    row: Any
    problem: str


class Content(NamedTuple, Generic[T]):
    """What a file holds: a msgpack record, or ``detected_ms``, of each hotkey in order, and the rows left out.

    ``salvaged`` are the hotkeys of those of them of which what can be stored is taken all the same: no elimination
    is lost for a side field.
    """

    taken: dict[str, T]
    bad: list[BadRow]
    salvaged: set[str]


def read_file(path: Path, *, stream: bool = False) -> File | None:
    """Read a file, which is opened once; None where there is none. With `stream` also a pipe, to its end."""
    try:
        found = read_once(path, stream=stream)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}", hint=hint_of(error, _UNREADABLE)) from error
    return None if found is None else File(path, *found)


def digest_of(path: Path) -> str | None:
    """Return the SHA-256 of a file in hexadecimal, or None where there is none; a large one, too."""
    try:
        with reading(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}", hint=hint_of(error, _UNREADABLE)) from error


def write_eliminations(
    path: Path,
    records: Iterable[bytes],
    *,
    mode: int = 0o600,
    before_rename: Callable[[Summary], object] = lambda _: None,
) -> Summary:
    """Replace the eliminations file by one of these msgpack records, in order.

    A file that is new gets `mode`. `before_rename` is called with the summary when the new file is complete and
    about to take its place; what it raises cancels that. About 6 s for a million records of 0.5 kB, of which
    few are in memory at a time.
    """
    return _write(path, ELIMINATIONS_KEY, "[]", map(elimination_row, records), mode, before_rename)


def write_departed(
    path: Path,
    times: Iterable[tuple[str, int]],
    *,
    mode: int = 0o600,
    before_rename: Callable[[Summary], object] = lambda _: None,
) -> Summary:
    """Write the departed file from (hotkey, ``detected_ms``); otherwise as :func:`write_eliminations`."""
    rows = ((hotkey, departed_row(ms)) for hotkey, ms in times)
    return _write(path, DEPARTED_HOTKEYS_KEY, "{}", rows, mode, before_rename)


def elimination_row(record: bytes) -> tuple[str, bytes]:
    """Return the hotkey of a record, and how it stands in the file: NaN and infinities as null."""
    row = decode(record)
    return row["hotkey"], _json_encoder.encode(row)


def departed_row(ms: int) -> bytes:
    """Return how a departure stands in the file."""
    return _json_encoder.encode({"detected_ms": ms})


def hash_of(text: str | bytes) -> bytes:
    """Return the hash under which a summary has a hotkey or a row."""
    return hashlib.blake2b(text.encode() if isinstance(text, str) else text, digest_size=_HASH).digest()


def hashes_in(rows: bytes) -> dict[bytes, bytes]:
    """Return the hashes of rows by those of their hotkeys, from a summary."""
    parts = [rows[at : at + _HASH] for at in range(0, len(rows), _HASH)]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def read_eliminations(path: Path, *, stream: bool = False) -> Content[bytes] | None:
    """Read a file as :func:`read_file` does, and parse it as eliminations."""
    file = read_file(path, stream=stream)
    return None if file is None else eliminations_in(file)


def read_departed(path: Path) -> Content[int] | None:
    """Read a file as :func:`read_file` does, and parse it as departures."""
    file = read_file(path)
    return None if file is None else departures_in(file)


def eliminations_in(file: File) -> Content[bytes]:
    """Return what a file of eliminations holds; also a bare list of rows, or a dict of rows by hotkey.

    A row that breaks a rule of :func:`~shmelim.eliminations.record.normalise` is in ``bad``. Of two rows of one
    hotkey the last counts, at the place of the first. DamagedFileError if the file is empty, not UTF-8, not JSON,
    not of that shape, or has rows of which none can be taken: that is no list that somebody emptied.
    """
    return _parse(file, ELIMINATIONS_KEY, lambda name, row: prepare(row, name), _salvage)


def departures_in(file: File) -> Content[int]:
    """Return what a file of departed hotkeys holds; a time that is missing, as in the older list, is 0.

    So is one that is no time, with a warning. Otherwise as :func:`eliminations_in`.
    """
    unusable: list[str] = []
    found = _parse(file, DEPARTED_HOTKEYS_KEY, lambda name, row: _departure(name, row, unusable))
    if unusable:
        text = "%d departed hotkeys of %s have no valid 'detected_ms', which reads as 0: %s"
        _log.warning(text, len(unusable), file.path, ", ".join(unusable[:_SHOWN]))
    return found


def quarantine(path: Path, bad_rows: list[BadRow], beside: Path | None = None) -> Path | None:
    """Keep the rows that could not be taken from a file, with what is wrong with each, and log that.

    They go to ``<name>.quarantine-<UTC time>.json`` beside it (0600), or `beside` another one where it is a pipe.
    Returns the path; None if there are no such rows.
    """
    if not bad_rows:
        return None
    rows = [{"index": bad.index, "row": _writable(bad.row), "problem": bad.problem} for bad in bad_rows]
    content = json.dumps({"file": str(path), "rows": rows}, indent=1, default=repr)
    with writing(f"the bad rows of {path} could not be set aside", hint=f"check that {path.parent} exists"):
        target = write_aside(beside or path, "quarantine", content.encode("ascii"), ".json")
    text = "%d rows of %s cannot be taken, or not whole, and are set aside in %s:"
    _log.warning(text, len(bad_rows), path, target)
    for bad in bad_rows[:_SHOWN]:
        _log.warning("  row %d: %s", bad.index, bad.problem)
    return target


def _writable(row: Any) -> Any:
    """Return a row as it can be written, with its fields; as one text where it is nested too deep for that."""
    try:
        json.dumps(row := finite(row), indent=1, default=repr)
    except RecursionError:
        with suppress(RecursionError):
            return json.dumps(row, default=repr)
        return "a row that is nested too deep to be written"
    return row


def _write(
    path: Path,
    key: str,
    brackets: str,
    rows: Iterator[tuple[str, bytes]],
    mode: int,
    before_rename: Callable[[Summary], object],
) -> Summary:
    digest = hashlib.sha256()
    hashes = bytearray()
    encode = _json_encoder.encode
    named = brackets == "{}"

    def line(hotkey: str, row: bytes) -> bytes:
        hashes.extend(hash_of(hotkey) + hash_of(row))
        return encode(hotkey) + b":" + row if named else row

    def parts() -> Iterator[bytes]:
        yield f'{{"{key}": {brackets[0]}'.encode()
        separator = b"\n"
        while chunk := list(islice(rows, _CHUNK)):
            yield separator + b",\n".join(line(*row) for row in chunk)
            separator = b",\n"
            if len(chunk) == _CHUNK:
                time.sleep(_PAUSE)
        yield f"\n{brackets[1]}}}\n".encode()

    def digested(part: bytes) -> bytes:
        digest.update(part)
        return part

    def summary(identity: tuple[int, ...]) -> Summary:
        return Summary(digest.hexdigest(), bytes(hashes), identity)

    place = Path(os.path.realpath(path)).parent
    with writing(f"{path} could not be written", hint=f"check that {place} exists and has room"):
        identity = write_whole(
            path, map(digested, parts()), mode=mode, before_rename=lambda it: before_rename(summary(it))
        )
    return summary(identity)


def _parse(
    file: File,
    key: str,
    take: Callable[[str | None, Any], tuple[str, T]],
    keep: Callable[[str | None, Any], tuple[str, T]] | None = None,
) -> Content[T]:
    """Parse a file, each row of which ``take(name, row)`` takes; the name is None where the rows are a list.

    ``keep(name, row)`` is what is kept of one that it refuses.
    """
    content = file.content
    rows = content.get(key) if isinstance(content, dict) else content
    if not isinstance(rows, (dict, list)):
        text = f"{file.path} is damaged: it holds neither {{{key!r}: …}} nor a list, but {str(content)[:60]!r}"
        raise DamagedFileError(text, hint=_HINT)
    found = Content[T]({}, [], set())
    named = rows.items() if isinstance(rows, dict) else ((None, row) for row in rows)
    for index, (name, row) in enumerate(named):
        try:
            hotkey, taken = take(name, row)
        except (ValueError, TypeError) as error:
            found.bad.append(BadRow(index, row, str(error)))
            if keep is not None:
                with suppress(ValueError, TypeError):
                    hotkey, taken = keep(name, row)
                    found.taken[hotkey] = taken
                    found.salvaged.add(hotkey)
        else:
            found.taken[hotkey] = taken
    if found.bad and not found.taken:
        first = found.bad[0]
        text = f"{file.path} is damaged: none of its {len(found.bad)} rows can be taken; row {first.index}:"
        raise DamagedFileError(f"{text} {first.problem}", hint=_HINT)
    return found


def _salvage(name: str | None, row: Any) -> tuple[str, bytes]:
    """Return the hotkey of a row, and what can be stored of the rest; ValueError or TypeError if it names none."""
    if name is not None and isinstance(row, dict) and row.setdefault("hotkey", name) != name:
        raise ValueError(f"the row of {name!r} names another hotkey")
    record, _ = salvage(row, clock.now_ms())
    return record["hotkey"], encode(record)


def _departure(name: str | None, row: Any, unusable: list[str]) -> tuple[str, int]:
    """Return hotkey and time; a hotkey whose time is not one is named among the unusable."""
    hotkey, info = (row, {}) if name is None else (name, row)
    check_hotkey(hotkey)
    ms = info.get("detected_ms") if isinstance(info, dict) else None
    if isinstance(ms, float) and ms.is_integer():
        ms = int(ms)
    if type(ms) is int and 0 <= ms <= _LATEST_MS:
        return hotkey, ms
    if ms is not None or not isinstance(info, (dict, type(None))):
        unusable.append(hotkey)
    return hotkey, 0
