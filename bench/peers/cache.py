"""The workaround of the field: a copy in each client, fetched again from a server when it is 5 seconds old."""

from __future__ import annotations

import time

from bench.peers.base import Peer, Place, Reader
from bench.peers.base_manager import BaseManagerRpc, RpcHost, connect

MAX_AGE = 5.0


class CacheReader(Reader):
    def __init__(self, _place: Place, facts: tuple) -> None:
        self.target = connect(facts)
        self.refresh()

    def refresh(self) -> None:
        self.data = {record["hotkey"]: record for record in self.target.everything_rpc()}
        self.fetched = time.monotonic()

    def current(self) -> dict[str, dict]:
        if time.monotonic() - self.fetched > MAX_AGE:
            self.refresh()
        return self.data

    def check(self, hotkey: str) -> bool:
        return hotkey in self.current()

    def get(self, hotkey: str) -> dict | None:
        return self.current().get(hotkey)

    def check_many(self, hotkeys: list[str]) -> list[bool]:
        data = self.current()
        return [hotkey in data for hotkey in hotkeys]

    def everything(self) -> list[dict]:
        return list(self.current().values())


class Cache(Peer):
    how = "a dict in each reader, fetched whole from a BaseManager server by the first call after 5 seconds"
    limits = (
        "up to 5 seconds stale; every 5 seconds one call takes as long as *all records* of BaseManager RPC; "
        "records are references, not copies; nothing is durable"
    )
    own_copies = True
    host = RpcHost
    reader = CacheReader

    @classmethod
    def version(cls) -> str:
        return BaseManagerRpc.version()
