"""memcached over a Unix socket: one item a hotkey."""

from __future__ import annotations

import os
import subprocess

import msgspec

from bench.peers.base import Host, Peer, Place, Reader, distribution, installed, program
from bench.peers.servers import start, stop

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode
_PART = 1000


def connect(place: Place):
    """Return a client: pylibmc, which is quicker, where it is installed, else pymemcache."""
    path = str(place.directory / "memcached")
    try:
        import pylibmc
    except ImportError:
        from pymemcache.client.base import Client

        return Client(path, default_noreply=False)
    return pylibmc.Client([path], binary=True)


class MemcachedHost(Host):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        path = place.directory / "memcached"
        memory = 128 + place.size // 1000
        command = ["memcached", "-s", str(path), "-a", "0600", "-m", str(memory), "-I", "4m"]
        if os.geteuid() == 0:
            command += ["-u", "root"]
        self.process = start(command, path)
        self.client = connect(place)
        self._add(place.records())

    def _add(self, records: list[dict]) -> None:
        for first in range(0, len(records), _PART):
            part = records[first : first + _PART]
            failed = self.client.set_multi({record["hotkey"]: _encode(record) for record in part})
            if failed:
                raise RuntimeError(f"memcached did not take {len(failed)} items")

    def put(self, record: dict) -> None:
        self.client.set(record["hotkey"], _encode(record))

    def sync(self, records: list[dict]) -> None:
        self.client.flush_all()
        self._add(records)

    def close(self) -> None:
        stop(self.process)


class MemcachedReader(Reader):
    def __init__(self, place: Place, _facts: None) -> None:
        self.client = connect(place)

    def check(self, hotkey: str) -> bool:
        return self.client.get(hotkey) is not None

    def get(self, hotkey: str) -> dict | None:
        found = self.client.get(hotkey)
        return None if found is None else _decode(found)

    def check_many(self, hotkeys: list[str]) -> list[bool]:
        found = self.client.get_multi(hotkeys)
        return [hotkey in found for hotkey in hotkeys]


class Memcached(Peer):
    how = "Unix socket, one connection a reader, binary protocol where the client is pylibmc"
    limits = (
        "may drop items when it is full; a sync is a flush and many sets, so readers see it half done; not durable"
    )
    host = MemcachedHost
    reader = MemcachedReader

    @classmethod
    def missing(cls) -> str | None:
        clients = installed("pylibmc") and installed("pymemcache")
        return clients or program("memcached")

    @classmethod
    def version(cls) -> str:
        said = subprocess.run(["memcached", "--version"], capture_output=True, text=True, check=True).stdout
        client = "pymemcache" if installed("pylibmc") else "pylibmc"
        return f"{said.strip()}, {distribution(client)}"

    @classmethod
    def too_much(cls, size: int, operation: str | None = None) -> str | None:  # noqa: ARG003
        return "memcached cannot list what it holds" if operation == "everything" else None
