"""Redis over a Unix socket, without persistence: a set of hotkeys to check, a hash of records."""

from __future__ import annotations

import subprocess

import msgspec
import redis

from bench.peers.base import Host, Peer, Place, Reader, distribution, installed, program
from bench.peers.servers import start, stop

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode
_PART = 10_000


def connect(place: Place) -> redis.Redis:
    # One connection held by the client: a pool would be asked, and a lock taken, at each call.
    return redis.Redis(unix_socket_path=str(place.directory / "redis"), single_connection_client=True)


class RedisHost(Host):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        path = place.directory / "redis"
        command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "600"]
        command += ["--save", "", "--appendonly", "no", "--dir", str(place.directory)]
        self.process = start(command, path)
        self.client = connect(place)
        records = place.records()
        for first in range(0, len(records), _PART):
            pipeline = self.client.pipeline(transaction=False)
            self._add(pipeline, records[first : first + _PART])
            pipeline.execute()

    @staticmethod
    def _add(pipeline: redis.client.Pipeline, records: list[dict]) -> None:
        pipeline.sadd("eliminated", *[record["hotkey"] for record in records])
        pipeline.hset("records", mapping={record["hotkey"]: _encode(record) for record in records})

    def put(self, record: dict) -> None:
        pipeline = self.client.pipeline(transaction=True)
        self._add(pipeline, [record])
        pipeline.execute()

    def sync(self, records: list[dict]) -> None:
        pipeline = self.client.pipeline(transaction=True)
        pipeline.delete("eliminated", "records")
        self._add(pipeline, records)
        pipeline.execute()

    def close(self) -> None:
        self.client.close()
        stop(self.process)


class RedisReader(Reader):
    def __init__(self, place: Place, _facts: None) -> None:
        self.client = connect(place)

    def check(self, hotkey: str) -> bool:
        return bool(self.client.sismember("eliminated", hotkey))

    def get(self, hotkey: str) -> dict | None:
        found = self.client.hget("records", hotkey)
        return None if found is None else _decode(found)

    def check_many(self, hotkeys: list[str]) -> list[bool]:
        return [bool(found) for found in self.client.smismember("eliminated", hotkeys)]

    def everything(self) -> list[dict]:
        return [_decode(value) for value in self.client.hvals("records")]

    def close(self) -> None:
        self.client.close()


class Redis(Peer):
    how = (
        "Unix socket, hiredis, one connection a reader, no persistence; `SISMEMBER`, `HGET`, `SMISMEMBER`, "
        "`HVALS`, changes in `MULTI`"
    )
    limits = "nothing is durable as set up here; reads end with the server; records come in no order"
    host = RedisHost
    reader = RedisReader

    @classmethod
    def missing(cls) -> str | None:
        return installed("redis", "hiredis") or program("redis-server")

    @classmethod
    def version(cls) -> str:
        said = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
        server = next((word[2:] for word in said.split() if word.startswith("v=")), "?")
        return f"redis-server {server}, {distribution('redis')}, {distribution('hiredis')}"
