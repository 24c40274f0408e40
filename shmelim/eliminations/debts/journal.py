"""The journal of slashes: an append-only file beside the database, which survives the loss of that.

One JSON document a line: an attempt is *begun* before the contract is called, and its end (*made*, *declined*,
*not made*) follows. A line is on disk when :meth:`Journal.append` returns. What a power cut leaves of a last line
was never on disk, and nothing was done yet on the strength of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec

from shmelim.eliminations.debts.states import DECLINED, MADE, NOT_MADE, Debt, Slash
from shmelim.system import clock
from shmelim.system.durable import read_once, sync_directory, writing

FILE_NAME: Final = "slashes.jsonl"
BEGUN: Final = "begun"
REARMED: Final = "re-armed"

Cause: TypeAlias = tuple[str, str, int]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line; times are in milliseconds since 1970, UTC."""

    what: str  # BEGUN, REARMED, or what became of the attempt
    hotkey: str
    rule: str
    registration: int
    at_ms: int
    eliminated_ms: int
    attempt: str | None = None
    reason: str | None = None
    share: float | None = None
    by: str | None = None
    answer: str | None = None

    @property
    def cause(self) -> Cause:
        """What it was for."""
        return self.hotkey, self.rule, self.registration


class Said(NamedTuple):
    """What a journal says of one cause."""

    outcome: Entry | None  # that it was made or declined, if it was not re-armed since
    begun: dict[str, Entry]  # the attempts of which no end is known


def entry_of(what: str, about: Debt | Slash, at_ms: int, **more: str | None) -> Entry:
    """Return the line about a debt, or about a slash on record."""
    return Entry(
        what=what,
        hotkey=about.hotkey,
        rule=about.rule,
        registration=about.registration,
        at_ms=at_ms,
        eliminated_ms=about.eliminated_ms,
        reason=about.reason,
        share=about.share,
        **more,
    )


def begun(debt: Debt) -> Entry:
    """Return the line that an attempt was begun."""
    return entry_of(BEGUN, debt, clock.now_ms(), attempt=debt.attempt)


def unmade(debt: Debt) -> Entry:
    """Return the line that an attempt certainly took nothing."""
    return entry_of(NOT_MADE, debt, clock.now_ms(), attempt=debt.attempt)


class Journal:
    """The file of one state directory; any thread may append."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self._lock = threading.Lock()
        self._pending: list[Entry] = []  # what could not be written yet

    def append(self, entries: Iterable[Entry]) -> None:
        """Write lines, after those that could not be written before; StoreError if they may not be on disk."""
        with self._lock:
            self._pending += entries
            if not self._pending:
                return
            with writing(f"the journal of slashes {self.path} cannot be written"):
                is_new = not self.path.exists()
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                descriptor = os.open(self.path, flags, 0o600)
                try:
                    size = os.fstat(descriptor).st_size
                    # What a power cut left of a line must not spoil this one.
                    torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
                    lines = [msgspec.json.encode(entry) + b"\n" for entry in self._pending]
                    _write(descriptor, b"\n" * bool(torn) + b"".join(lines))
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                if is_new:
                    sync_directory(self.path.parent)
            self._pending.clear()

    def read(self) -> tuple[list[Entry], int]:
        """Return the lines, and how many more there are that cannot be read; StoreError if the file cannot be."""
        with writing(f"the journal of slashes {self.path} cannot be read", "make it readable for this user"):
            found = read_once(self.path)
        *lines, torn = (b"" if found is None else found.data).split(b"\n")
        entries, unreadable = [], 0
        for line in lines:
            try:
                entries.append(msgspec.json.decode(line, type=Entry))
            except ValueError:
                unreadable += not _is_torn(line)
        with contextlib.suppress(ValueError):
            # It may be whole but for the end of its line.
            entries.append(msgspec.json.decode(torn, type=Entry))
        return entries, unreadable


def said(entries: Iterable[Entry]) -> dict[Cause, Said]:
    """Return what lines say in the end, by cause."""
    found: dict[Cause, Said] = {}
    for entry in entries:
        known = found.get(entry.cause, Said(None, {}))
        attempt = entry.attempt or ""
        if entry.what == BEGUN:
            known.begun[attempt] = entry
        elif entry.what in (MADE, DECLINED):
            known.begun.pop(attempt, None)
            known = known._replace(outcome=entry)
        elif entry.what == NOT_MADE:
            known.begun.pop(attempt, None)
        elif entry.what == REARMED:
            known = known._replace(outcome=None)
        found[entry.cause] = known
    return found


def _is_torn(line: bytes) -> bool:
    """Whether a line is the beginning of one that a power cut broke off."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(b'{"what":') and not line.endswith(b"}")
    return False


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
