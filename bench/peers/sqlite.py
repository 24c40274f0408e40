"""SQLite, as the standard library has it: WAL, memory-mapped, one connection a reader."""

from __future__ import annotations

import json
import sqlite3

import msgspec

from bench.peers.base import Host, Peer, Place, Reader

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode
_MAPPED = 4 << 30


def connect(place: Place) -> sqlite3.Connection:
    # Autocommit: each statement is a transaction of its own, and sees what is current.
    # Made in one thread and used in another, never by two at once: the host's writer is a thread.
    path = place.directory / "state.sqlite"
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA mmap_size={_MAPPED}")
    return connection


class SqliteHost(Host):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.connection = connect(place)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=" + ("FULL" if place.durable else "NORMAL"))
        self.connection.execute("CREATE TABLE eliminations (hotkey TEXT PRIMARY KEY, record BLOB) WITHOUT ROWID")
        self.sync(place.records())
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def put(self, record: dict) -> None:
        self.connection.execute(
            "INSERT OR REPLACE INTO eliminations VALUES (?, ?)", (record["hotkey"], _encode(record))
        )

    def sync(self, records: list[dict]) -> None:
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        execute("DELETE FROM eliminations")
        rows = ((record["hotkey"], _encode(record)) for record in records)
        self.connection.executemany("INSERT INTO eliminations VALUES (?, ?)", rows)
        execute("COMMIT")

    def close(self) -> None:
        self.connection.close()


class SqliteReader(Reader):
    def __init__(self, place: Place, _facts: None) -> None:
        self.connection = connect(place)
        self.connection.execute("PRAGMA query_only=1")
        self.execute = self.connection.execute

    def check(self, hotkey: str) -> bool:
        found = self.execute("SELECT 1 FROM eliminations WHERE hotkey = ?", (hotkey,))
        return found.fetchone() is not None

    def get(self, hotkey: str) -> dict | None:
        row = self.execute("SELECT record FROM eliminations WHERE hotkey = ?", (hotkey,)).fetchone()
        return None if row is None else _decode(row[0])

    def check_many(self, hotkeys: list[str]) -> list[bool]:
        rows = self.execute(
            "SELECT hotkey FROM eliminations WHERE hotkey IN (SELECT value FROM json_each(?))",
            (json.dumps(hotkeys),),
        )
        found = {row[0] for row in rows}
        return [hotkey in found for hotkey in hotkeys]

    def everything(self) -> list[dict]:
        return [_decode(row[0]) for row in self.execute("SELECT record FROM eliminations")]

    def close(self) -> None:
        self.connection.close()


class Sqlite(Peer):
    how = "WAL, memory-mapped, prepared statements, msgpack values; `synchronous=NORMAL` but for the sync row"
    limits = "every read takes a file lock and gives it back: system calls; records come in the order of keys"
    host = SqliteHost
    durable = True
    reader = SqliteReader

    @classmethod
    def version(cls) -> str:
        return f"SQLite {sqlite3.sqlite_version}"
