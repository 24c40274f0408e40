"""The history of the store: who changed what, when, from which process, with the old and the new record.

Events are written in the transaction of the change they tell of, and never changed, nor deleted but by
:meth:`History.prune`. They keep what was replaced; what replaced it stands in the next event of that hotkey, or in
its row.

A change of many hotkeys is one row. Its id is that of the last of its events; the others have the ids below, which
are no other row's. It holds the events, compressed, and the sorted hashes of their hotkeys, so that the history of
one hotkey opens few such rows.
"""

from __future__ import annotations

import os
import sys
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice, takewhile
from pathlib import Path
from threading import Thread
from typing import Any, Final, NamedTuple

import msgspec
import xxhash

from shmelim.eliminations.record import decode
from shmelim.eliminations.store.database import Database
from shmelim.eliminations.store.schema import damaged

_PRUNED: Final = "pruned"
MANY: Final = 64  # a change of more hotkeys is one row
LARGEST_ID: Final = (1 << 63) - 1
_CHUNK: Final = 500  # hotkeys in one question: below the 999 that an old SQLite allows

_COLUMNS: Final = "id, at_ms, action, hotkey, pid, uid, program, note, old, new, commit_number"
_HASHES: Final = "SELECT id, hashes FROM events"
_IDS_OF: Final = "SELECT id, NULL FROM events WHERE hotkey = :hotkey AND id < :before"
_SELECT: Final = f"SELECT {_COLUMNS} FROM events WHERE id = ?"  # noqa: S608
ADD_EVENT: Final = f"INSERT INTO events ({_COLUMNS}, hashes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?)"  # noqa: S608
# What tells of the record of a hotkey.
_RECORDED: Final = frozenset({"add", "update", "remove"})


class Origin(NamedTuple):
    """The process that asked for a change."""

    pid: int
    uid: int | None
    program: str


class Change(NamedTuple):
    """What an event tells of one change, with the record that it replaced, as msgpack."""

    action: str
    hotkey: str | None = None
    old: bytes | None = None
    note: str | None = None


class Pruned(NamedTuple):
    """An event up to which the history was forgotten: its number, its commit, and its time in ms since 1970."""

    event: int
    commit: int
    at_ms: int


class Event(NamedTuple):
    """One line of the history; `at_ms` is in milliseconds since 1970, UTC, records are msgpack.

    `commit_number` is that of the transaction that wrote it; None before schema 3.
    """

    id: int
    at_ms: int
    action: str
    hotkey: str | None
    pid: int
    uid: int | None
    program: str
    note: str | None
    old: bytes | None
    new: bytes | None
    commit_number: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it with its records decoded, as callers of the server get it."""
        old, new = (None if record is None else decode(record) for record in (self.old, self.new))
        return self._asdict() | {"old": old, "new": new}


def this_process() -> Origin:
    """Return this process as an origin."""
    return Origin(os.getpid(), os.getuid(), _program())


@cache
def _program() -> str:
    return Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"


def packed_as_one(changes: list[Change]) -> tuple[bytes, bytes]:
    """Return the changes and the hashes of their hotkeys, as one row holds them."""
    hashes = array("Q", sorted(_hash(str(change.hotkey)) for change in changes))
    return zlib.compress(msgspec.msgpack.encode(changes), 1), hashes.tobytes()


class Packing(Thread):
    """Makes that row while the caller goes on: nearly all of it is compressing, which needs no interpreter."""

    def __init__(self, changes: list[Change]) -> None:
        super().__init__(name="shmelim-events", daemon=True)
        self._changes = changes
        self._row: tuple[bytes, bytes] | None = None
        with suppress(RuntimeError):  # there is no room for a thread: then it is made when it is asked for
            self.start()

    def run(self) -> None:
        """Make it."""
        with suppress(MemoryError):  # which is told when it is asked for
            self._row = packed_as_one(self._changes)

    def row(self) -> tuple[bytes, bytes]:
        """Return it, as soon as it is made."""
        if self.ident is not None:
            self.join()
        return self._row or packed_as_one(self._changes)


class History(Database):
    """The events of a store."""

    def events(
        self, hotkey: str | None = None, limit: int | None = 100, before_id: int | None = None
    ) -> list[Event]:
        """Return at most `limit` events, newest first: of one hotkey, or older than the one with that id."""
        if limit is not None and limit < 0:
            raise ValueError(f"limit must be at least 0, not {limit}")
        before = LARGEST_ID if before_id is None else before_id
        with self.one_moment():
            found = list(islice(self._newest_first(hotkey, before), limit))
            unknown = {event.hotkey for event in found if event.action in _RECORDED and event.new is None}
            following = self._following({name for name in unknown if name is not None}, before)
        complete = []
        for event in found:
            if event.action in _RECORDED and event.hotkey is not None:
                new = following.get(event.hotkey) if event.new is None and event.action != "remove" else event.new
                following[event.hotkey] = event.old
                complete.append(event._replace(new=new))
            else:
                complete.append(event)
        return complete

    def events_between(self, commit: int, last: int) -> list[Event]:
        """Return the events of the commits after one and up to another, oldest first."""

        def number(event: Event) -> int:
            return event.commit_number or 0

        later = takewhile(lambda event: number(event) > commit, self._newest_first(None, LARGEST_ID))
        found = self.events(limit=sum(1 for _ in later))
        return [event for event in reversed(found) if number(event) <= last]

    def notes(self, action: str, hotkeys: Iterable[str]) -> dict[str, str]:
        """Return all that is noted of an action for each of these hotkeys of which something is.

        Of events that stand alone, as those of the rules do; a few µs a hotkey.
        """
        further = f"AND action = '{action}' AND note IS NOT NULL GROUP BY hotkey"
        return dict(self._ask_of("SELECT hotkey, group_concat(DISTINCT note) FROM events", hotkeys, further))

    def replaced_after(self, event: int) -> dict[str, bytes | None]:
        """Return the record (or None) that each hotkey had after an event, of those whose changed since.

        In the order of their last changes, the newest first. Costs a few µs for each event since.
        """
        return self._replaced(lambda each: each.id > event)

    def replaced_since(self, commit: int) -> dict[str, bytes | None]:
        """Do the same with a commit."""
        return self._replaced(lambda each: (each.commit_number or 0) > commit)

    def _replaced(self, is_later: Callable[[Event], bool]) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        for each in takewhile(is_later, self._newest_first(None, LARGEST_ID)):
            if each.action in _RECORDED and each.hotkey is not None:
                found[each.hotkey] = each.old
        return found

    @property
    def pruned(self) -> Pruned:
        """The last event that was forgotten; zeros where the history is whole."""
        return Pruned(*map(int, self.meta(_PRUNED, (0, 0, 0))))

    def prune(self, event: int) -> None:
        """Forget the events up to one, but the newest of all, whose number counts, and what debts are made of."""
        ((trigger,),) = self._ask("SELECT sql FROM sqlite_master WHERE name = 'events_are_not_deleted'")
        # Of the row that it is in, which may be one of many events that goes on beyond it.
        row = "SELECT coalesce(commit_number, 0), at_ms FROM events WHERE id >= ? ORDER BY id LIMIT 1"
        (about,) = self._ask(row, (event,))
        self._change("DROP TRIGGER events_are_not_deleted")
        newest = "(SELECT max(id) FROM events)"
        self._change(f"DELETE FROM events WHERE id <= ? AND id < {newest} AND action != 'owe'", (event,))  # noqa: S608
        self._change(trigger)
        self.set_meta(_PRUNED, (event, *about))

    def event_at(self, at_ms: int) -> int | None:
        """Return the number of the last event up to a time; None where the history begins later."""
        ((number,),) = self._ask("SELECT max(id) FROM events WHERE at_ms <= ?", (at_ms,))
        return number  # type: ignore[no-any-return]

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """Let all questions of the block be answered as of one commit."""
        if self.in_transaction:
            yield
            return
        self._ask("BEGIN")
        try:
            yield
        finally:
            self._ask("ROLLBACK")

    def _newest_first(self, hotkey: str | None, before: int) -> Iterator[Event]:
        """Yield the events with smaller ids, of one hotkey or of all; a row of many as its events."""
        # The row of many in whose middle an earlier page may have ended.
        yield from self._events_of(f"{_HASHES} WHERE id >= :before ORDER BY id LIMIT 1", hotkey, before)
        older = f"{_HASHES} WHERE id < :before ORDER BY id DESC"
        if hotkey is not None:
            # Each from its own index, which holds the hashes too.
            older = f"{_IDS_OF} UNION ALL {_HASHES} WHERE hashes IS NOT NULL AND id < :before ORDER BY 1 DESC"
        yield from self._events_of(older, hotkey, before)

    def _events_of(self, select: str, hotkey: str | None, before: int) -> Iterator[Event]:
        """Yield the events in the rows that a question for ids and hashes finds, newest first within a row."""
        for number, hashes in self._stream(select, {"before": before, "hotkey": hotkey}):
            if hashes is None and number < before:
                yield Event._make(self._ask(_SELECT, (number,))[0])
            elif hashes is not None and (hotkey is None or _is_among(_hash(hotkey), hashes)):
                yield from self._events_in(number, hotkey, 0, before)

    def _events_in(self, number: int, hotkey: str | None, first: int, before: int) -> Iterator[Event]:
        """Yield the events of a row of many, newest first: of one hotkey, or of all, with ids from `first` on."""
        row = Event._make(self._ask(_SELECT, (number,))[0])
        try:
            changes = msgspec.msgpack.decode(zlib.decompress(row.old or b""), type=list[Change])
        except (zlib.error, ValueError) as error:
            raise damaged(self.path, f"event {number} cannot be decoded") from error
        for at, change in zip(range(number, 0, -1), reversed(changes), strict=False):
            if first <= at < before and hotkey in {None, change.hotkey}:
                yield row._replace(id=at, **change._asdict())

    def _following(self, hotkeys: set[str], before: int) -> dict[str, bytes | None]:
        """Return the record that each of these hotkeys had after its last event with a smaller id, or None."""
        found: dict[str, bytes | None] = dict.fromkeys(hotkeys)
        found |= self._ask_of("SELECT hotkey, record FROM hotkeys", hotkeys)
        if before == LARGEST_ID:
            return found
        first: dict[str, int] = {}
        select = "SELECT hotkey, old, min(id) FROM events"
        recorded = f"AND id >= {int(before)} AND action IN ('add', 'update', 'remove') GROUP BY hotkey"
        for hotkey, old, number in self._ask_of(select, hotkeys, recorded):
            found[hotkey], first[hotkey] = old, number
        many = f"{_HASHES} WHERE hashes IS NOT NULL AND id >= :before ORDER BY id"
        for last, hashes in self._stream(many, {"before": before}):
            for hotkey in hotkeys:
                if first.get(hotkey, LARGEST_ID) > last and _is_among(_hash(hotkey), hashes):
                    for event in self._events_in(last, hotkey, before, LARGEST_ID):
                        if event.action in _RECORDED:
                            found[hotkey], first[hotkey] = event.old, event.id
        return found

    def _ask_of(self, select: str, hotkeys: Iterable[str], further: str = "") -> list[tuple[Any, ...]]:
        """Ask of many hotkeys."""
        remaining, found = iter(hotkeys), []
        while chunk := list(islice(remaining, _CHUNK)):
            found += self._ask(f"{select} WHERE hotkey IN ({','.join('?' * len(chunk))}) {further}", chunk)
        return found


def _hash(hotkey: str) -> int:
    return xxhash.xxh64_intdigest(hotkey.encode())


def _is_among(number: int, hashes: bytes) -> bool:
    """Tell whether a hash is one of these, sorted as they are stored."""
    numbers = memoryview(hashes).cast("Q")
    place = bisect_left(numbers, number)
    return place < len(numbers) and numbers[place] == number
