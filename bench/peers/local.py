"""A dict of the reading process itself: the floor of what a lookup costs in Python."""

from __future__ import annotations

import platform

from bench.peers.base import Host, Peer, Place, Reader


class LocalReader(Reader):
    def __init__(self, place: Place, _facts: None) -> None:
        self.data = {record["hotkey"]: record for record in place.records()}
        self.check = self.data.__contains__
        self.get = self.data.get

    def check_many(self, hotkeys: list[str]) -> list[bool]:
        data = self.data
        return [hotkey in data for hotkey in hotkeys]

    def everything(self) -> list[dict]:
        return list(self.data.values())

    def put(self, record: dict) -> None:
        self.data[record["hotkey"]] = record


class LocalHost(Host):
    """Nobody reads it: each reader has its own. Here to be synced."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.data: dict[str, dict] = {}

    def put(self, record: dict) -> None:
        self.data[record["hotkey"]] = record

    def sync(self, records: list[dict]) -> None:
        self.data = {record["hotkey"]: record for record in records}


class LocalDict(Peer):
    how = "`d.__contains__`, `d.get`, `[h in d for h in hotkeys]`, `list(d.values())`; its writer is a thread"
    limits = (
        "not shared: every process has its own, which nobody keeps current; nothing is durable; records are "
        "references, not copies"
    )
    own_copies = True
    host = LocalHost
    reader = LocalReader

    @classmethod
    def version(cls) -> str:
        return f"CPython {platform.python_version()}"
