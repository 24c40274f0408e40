"""py-lmdb: a memory-mapped B+ tree; one read transaction a call, since an older one would not see changes."""

from __future__ import annotations

import lmdb
import msgspec

from bench.peers.base import Host, Peer, Place, Reader, distribution, installed

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode


def _map_size(place: Place) -> int:
    """Return a size for the map that is never the limit: what a sync replaces stays until it is committed."""
    return (64 << 20) + place.size * 8192


class LmdbHost(Host):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.env = lmdb.open(str(place.directory / "lmdb"), map_size=_map_size(place), sync=place.durable)
        self._fill(place.records(), append=True)

    def _fill(self, records: list[dict], *, append: bool = False) -> None:
        with self.env.begin(write=True) as transaction:
            transaction.drop(self.env.open_db(txn=transaction), delete=False)
            for record in records:
                transaction.put(record["hotkey"].encode(), _encode(record), append=append)

    def put(self, record: dict) -> None:
        with self.env.begin(write=True) as transaction:
            transaction.put(record["hotkey"].encode(), _encode(record))

    def sync(self, records: list[dict]) -> None:
        self._fill(records)

    def close(self) -> None:
        self.env.close()


class LmdbReader(Reader):
    def __init__(self, place: Place, _facts: None) -> None:
        # Values are copied out: views (buffers=True) took a third longer for records of this size.
        self.env = lmdb.open(
            str(place.directory / "lmdb"), map_size=_map_size(place), readonly=True, max_spare_txns=8
        )
        self.begin = self.env.begin

    def check(self, hotkey: str) -> bool:
        with self.begin() as transaction:
            return transaction.get(hotkey.encode()) is not None

    def get(self, hotkey: str) -> dict | None:
        with self.begin() as transaction:
            found = transaction.get(hotkey.encode())
        return None if found is None else _decode(found)

    def check_many(self, hotkeys: list[str]) -> list[bool]:
        with self.begin() as transaction:
            get = transaction.get
            return [get(hotkey.encode()) is not None for hotkey in hotkeys]

    def everything(self) -> list[dict]:
        with self.begin(buffers=True) as transaction:
            return [_decode(value) for value in transaction.cursor().iternext(keys=False, values=True)]

    def close(self) -> None:
        self.env.close()


class Lmdb(Peer):
    how = "a read transaction a call (with spare ones kept), msgpack values; `sync=False` but for the sync row"
    limits = "records come in the order of keys; a reader that dies in a transaction keeps old pages from reuse"
    host = LmdbHost
    durable = True
    reader = LmdbReader

    @classmethod
    def missing(cls) -> str | None:
        return installed("lmdb")

    @classmethod
    def version(cls) -> str:
        return f"{distribution('lmdb')} (LMDB {'.'.join(map(str, lmdb.version()))})"
