"""One `multiprocessing.managers.BaseManager` server over loopback TCP: what many validators run today."""

from __future__ import annotations

import multiprocessing
import os
import platform
from multiprocessing.managers import BaseManager

from bench.peers.base import Host, Peer, Place, Reader


class Target:
    """The server side: a local dict behind methods."""

    def __init__(self) -> None:
        self.data: dict[str, dict] = {}

    def fill_rpc(self, place: Place) -> None:
        self.data = {record["hotkey"]: record for record in place.records()}

    def check_rpc(self, hotkey):
        return hotkey in self.data

    def get_rpc(self, hotkey):
        return self.data.get(hotkey)

    def check_many_rpc(self, hotkeys):
        data = self.data
        return [hotkey in data for hotkey in hotkeys]

    def everything_rpc(self):
        return list(self.data.values())

    def hotkeys_rpc(self):
        return set(self.data)

    def add_rpc(self, hotkey, record):
        self.data[hotkey] = record

    def sync_rpc(self, records):
        self.data = {record["hotkey"]: record for record in records}


_target = Target()


def get_target() -> Target:
    return _target


class RpcManager(BaseManager):
    pass


RpcManager.register("target", callable=get_target)


class RpcHost(Host):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        key = os.urandom(32)
        self.manager = RpcManager(("127.0.0.1", 0), key, ctx=multiprocessing.get_context("spawn"))
        self.manager.start()
        self.target = self.manager.target()
        self.target.fill_rpc(place)
        self.facts = (self.manager.address, key)

    def put(self, record: dict) -> None:
        self.target.add_rpc(record["hotkey"], record)

    def sync(self, records: list[dict]) -> None:
        self.target.sync_rpc(records)

    def close(self) -> None:
        self.manager.shutdown()


def connect(facts: tuple):
    """Return the proxy of a server."""
    address, key = facts
    multiprocessing.current_process().authkey = key
    manager = RpcManager(address, key)
    manager.connect()
    return manager.target()


class RpcReader(Reader):
    def __init__(self, _place: Place, facts: tuple) -> None:
        target = connect(facts)
        self.check = target.check_rpc
        self.get = target.get_rpc
        self.check_many = target.check_many_rpc
        self.everything = target.everything_rpc


class BaseManagerRpc(Peer):
    how = "one server process, methods called over loopback TCP, as the standard library makes them"
    limits = "nothing is durable; ends with its server; whoever has the key can run any code there (pickle)"
    host = RpcHost
    reader = RpcReader

    @classmethod
    def version(cls) -> str:
        return f"CPython {platform.python_version()}"
