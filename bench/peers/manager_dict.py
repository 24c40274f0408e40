"""`multiprocessing.Manager().dict()`."""

from __future__ import annotations

import multiprocessing
import os
import platform
from multiprocessing.managers import DictProxy, SyncManager

from bench.peers.base import Host, Peer, Place, Reader

_PART = 20_000


class ManagerHost(Host):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.key = os.urandom(32)
        # A proxy carries its key to other processes only as that of the process.
        multiprocessing.current_process().authkey = self.key
        self.manager = SyncManager(authkey=self.key, ctx=multiprocessing.get_context("spawn"))
        self.manager.start()
        self.data = self.manager.dict()
        for first in range(0, place.size, _PART):
            part = [place.make(number) for number in range(first, min(first + _PART, place.size))]
            self.data.update({record["hotkey"]: record for record in part})
        self.facts = (self.data._token, self.key)  # noqa: SLF001

    def put(self, record: dict) -> None:
        self.data[record["hotkey"]] = record

    def sync(self, records: list[dict]) -> None:
        self.data.clear()
        self.data.update({record["hotkey"]: record for record in records})

    def close(self) -> None:
        self.manager.shutdown()


class ManagerReader(Reader):
    def __init__(self, _place: Place, facts: tuple) -> None:
        token, key = facts
        multiprocessing.current_process().authkey = key
        self.data = DictProxy(token, "pickle", authkey=key)
        self.check = self.data.__contains__
        self.get = self.data.get
        self.everything = self.data.values

    def check_many(self, hotkeys: list[str]) -> list[bool]:
        """Check one by one: a Manager dict has no method for many."""
        check = self.check
        return [check(hotkey) for hotkey in hotkeys]


class ManagerDict(Peer):
    how = "`multiprocessing.Manager().dict()` over its Unix socket; 256 checks are 256 calls"
    limits = (
        "a sync is a clear and an update, so readers see it empty between; nothing is durable; ends with its "
        "server; whoever has the key can run any code there (pickle)"
    )
    host = ManagerHost
    reader = ManagerReader

    @classmethod
    def version(cls) -> str:
        return f"CPython {platform.python_version()}"
