"""UltraDict (its maintained fork UltraDict2): a dict in each process, kept in step through shared memory."""

from __future__ import annotations

from UltraDict2 import UltraDict

from bench.peers.base import Host, Peer, Place, Reader, distribution, installed

# Large enough that no full dump is needed while it is measured; its documentation says to size it so.
_BUFFER = 64 << 20


class UltraHost(Host):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        # A dump of fixed size has a name of its own; others get random names, which a kill would leave behind.
        self.shared = UltraDict(
            name=place.name,
            create=True,
            shared_lock=True,
            buffer_size=_BUFFER,
            full_dump_size=_BUFFER + place.size * 1024,
        )
        # Filled and dumped once: item by item it takes minutes for a million.
        self.shared.data.update({record["hotkey"]: record for record in place.records()})
        self.shared.dump()

    def put(self, record: dict) -> None:
        self.shared[record["hotkey"]] = record

    def sync(self, records: list[dict]) -> None:
        with self.shared.lock:
            wanted = {record["hotkey"]: record for record in records}
            for hotkey in self.shared.keys() - wanted.keys():
                del self.shared[hotkey]
            self.shared.update(wanted)

    def close(self) -> None:
        self.shared.close(unlink=True)


class UltraReader(Reader):
    def __init__(self, place: Place, _facts: None) -> None:
        self.shared = UltraDict(name=place.name, create=False, shared_lock=True, buffer_size=_BUFFER)
        self.check = self.shared.__contains__
        self.get = self.shared.get

    def check_many(self, hotkeys: list[str]) -> list[bool]:
        # The first check catches up; the others look at what is local then.
        shared = self.shared
        shared.apply_update()
        data = shared.data
        return [hotkey in data for hotkey in hotkeys]

    def everything(self) -> list[dict]:
        return list(self.shared.values())

    def close(self) -> None:
        self.shared.close()


class UltraDictPeer(Peer):
    how = "`shared_lock=True`, a buffer of 64 MiB, so that changes are streamed and never dumped"
    limits = (
        "each reader holds a copy of everything and replays every change when it next reads; a batch is not "
        "atomic; nothing is durable; pickle; records are references, not copies"
    )
    own_copies = True
    host = UltraHost
    reader = UltraReader

    @classmethod
    def missing(cls) -> str | None:
        return installed("UltraDict2")

    @classmethod
    def version(cls) -> str:
        return distribution("UltraDict2")
