"""The two JSON files that other tools read: written whole or not at all, read without trust in them.

``eliminations.json`` is ``{"eliminations": [row, …]}``, ``departed_hotkeys.json`` is
``{"departed_hotkeys": {hotkey: {"detected_ms": ms}}}``; one row stands on one line, for diff and grep. The store
is the state of record; these are copies of it, and what a person puts in their place is imported.

All functions work on a path alone and share nothing: any thread may call them, for one path one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from shmelim.eliminations.record import (
    DEPARTED_HOTKEYS_KEY,
    ELIMINATIONS_KEY,
    check_hotkey,
    decode,
    prepare,
)
from shmelim.errors import DamagedFileError, StoreError
from shmelim.system.durable import sync_directory, unused_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Rows in memory at once, and in one write.
_CHUNK = 1000
_LATEST_MS = (1 << 63) - 1

_json_encoder = msgspec.json.Encoder()


class BadRow(msgspec.Struct, frozen=True):
    """A row that could not be taken: its place in the file, what stood there, and what is wrong with it."""

    index: int
    row: Any
    problem: str


class EliminationsFile(NamedTuple):
    """What an eliminations file holds: (hotkey, msgpack record) in order, the rows set aside, its digest."""

    rows: list[tuple[str, bytes]]
    bad: list[BadRow]
    digest: str


class Identity(NamedTuple):
    """What tells a file from every other, and from itself after it was written to."""

    device: int
    inode: int
    changed_ns: int
    size: int


class DepartedFile(NamedTuple):
    """What a departed file holds: hotkey → ``detected_ms`` in order, the rows set aside, its digest."""

    items: dict[str, int]
    bad: list[BadRow]
    digest: str


def write_eliminations(
    path: str | os.PathLike[str],
    records: Iterable[bytes],
    *,
    before_rename: Callable[[str], None] | None = None,
    mode: int = 0o600,
) -> str:
    """Write the eliminations file; about 4 s for a million records of 0.5 kB, a thousand at a time in memory.

    Parameters
    ----------
    path
        The file; it is replaced in one step, and durable when this returns.
    records
        The records as msgpack, in order.
    before_rename
        Called with the digest when the new file is complete and about to take its place; what it raises
        cancels that.
    mode
        Permissions of the file.

    Returns
    -------
    str
        The digest of the content, as :func:`digest_of` would return it.

    Raises
    ------
    StoreError
        It could not be written (disk full, for instance): the old file stands as it was.

    """
    return _write(Path(path), ELIMINATIONS_KEY, "[]", map(_row_as_json, records), before_rename, mode)


def write_departed(
    path: str | os.PathLike[str],
    items: Iterable[tuple[str, int]],
    *,
    before_rename: Callable[[str], None] | None = None,
    mode: int = 0o600,
) -> str:
    """Write the departed file from (hotkey, ``detected_ms``); otherwise as :func:`write_eliminations`."""
    rows = (
        _json_encoder.encode(hotkey) + b":" + _json_encoder.encode({"detected_ms": ms}) for hotkey, ms in items
    )
    return _write(Path(path), DEPARTED_HOTKEYS_KEY, "{}", rows, before_rename, mode)


def read_eliminations(path: str | os.PathLike[str]) -> EliminationsFile | None:
    """Read an eliminations file, also a bare list of rows or a dict of rows by hotkey.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    EliminationsFile or None
        None where there is no file. A row that breaks a rule of
        :func:`~shmelim.eliminations.record.normalise` is in ``bad``. Of two rows of one hotkey the last counts,
        at the place of the first.

    Raises
    ------
    DamagedFileError
        It is empty, not UTF-8, not JSON, or not of that shape.
    StoreError
        It cannot be read.

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
            detected_ms = _detected_ms(hotkey, info)
        except (ValueError, TypeError) as error:
            bad.append(BadRow(index, row, str(error)))
        else:
            items[hotkey] = detected_ms
    return DepartedFile(items, bad, digest)


def digest_of(path: str | os.PathLike[str]) -> str | None:
    """Return the SHA-256 of a file in hexadecimal, or None where there is none; StoreError if unreadable."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def identity_of(path: str | os.PathLike[str]) -> Identity | None:
    """Return what identifies a file and its content, or None where there is none; StoreError if unreadable."""
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    return Identity(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def quarantine(path: str | os.PathLike[str], bad_rows: Iterable[BadRow]) -> Path:
    """Keep the rows that could not be taken from a file, with what is wrong with each; returns where.

    They go to ``<name>.quarantine-<UTC time>.json`` beside it (0600); no earlier one is overwritten.

    Raises
    ------
    StoreError
        It could not be written.

    """
    rows = [{"index": bad.index, "problem": bad.problem, "row": bad.row} for bad in bad_rows]
    text = json.dumps({"file": os.fspath(path), "rows": rows}, indent=1, default=repr)
    try:
        target = unused_name(Path(path), "quarantine", ".json")
        try:
            with target.open("w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            target.unlink()
            raise
        sync_directory(target.parent)
    except OSError as error:
        raise StoreError(
            f"the bad rows of {path} could not be set aside: {error.strerror}",
            hint="make room and the directory writable",
        ) from error
    return target


def move_aside(path: str | os.PathLike[str], what: str = "damaged") -> Path:
    """Rename a file to ``<name>.<what>-<UTC time>``, never over an earlier one; returns the new path.

    Raises
    ------
    StoreError
        There is none, or it cannot be renamed.

    """
    old = Path(path)
    try:
        old.stat()  # that there is one, before a name is taken for it
        aside = unused_name(old, what)
        old.replace(aside)
        sync_directory(old.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be moved aside: {error.strerror}", hint="move it by hand") from error
    return aside


def _write(
    path: Path,
    key: str,
    brackets: str,
    rows: Iterator[bytes],
    before_rename: Callable[[str], None] | None,
    mode: int,
) -> str:
    digest = hashlib.sha256()
    temporary: Path | None = None
    try:
        _remove_leftovers(path)
        descriptor, name = tempfile.mkstemp(".tmp", f".{path.name}.{os.getpid()}.", path.parent)
        temporary = Path(name)
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - it opens a descriptor
            os.fchmod(descriptor, mode)
            for part in _document(key, brackets, rows):
                digest.update(part)
                # A raw write may take less than it is given, as on a disk that fills up.
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(descriptor)
        content_digest = digest.hexdigest()
        if before_rename is not None:
            before_rename(content_digest)
        temporary.replace(path)
        temporary = None
        sync_directory(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path} could not be written: {error.strerror or error}",
            hint="make room and the directory writable; the state itself is not affected",
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
    return content_digest


def _document(key: str, brackets: str, rows: Iterator[bytes]) -> Iterator[bytes]:
    opening, closing = brackets[0], brackets[1]
    yield f'{{"{key}": {opening}'.encode()
    separator = b"\n"
    while chunk := list(islice(rows, _CHUNK)):
        yield separator + b",\n".join(chunk)
        separator = b",\n"
    yield f"\n{closing}}}\n".encode()


def _row_as_json(record: bytes) -> bytes:
    row = decode(record)
    encoded = _json_encoder.encode(row)
    # msgspec writes NaN and infinities as null. A row without any null has none of them.
    if b"null" in encoded:
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
    return encoded


def _remove_leftovers(path: Path) -> None:
    """Remove what writers of this file left behind when they were killed."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        owner = leftover.name.removeprefix(f".{path.name}.").split(".")[0]
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):
            continue


def _load(path: Path, key: str) -> tuple[dict[str, Any] | list[Any], str] | None:
    """Return the rows in a file, still unchecked, and its digest."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
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


def _unreadable(path: str | os.PathLike[str], error: OSError) -> StoreError:
    return StoreError(f"{path} cannot be read: {error.strerror}", hint="make it readable for this user")
