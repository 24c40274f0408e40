"""iceoryx2's blackboard: a fixed set of keys in shared memory, each with a value of fixed size."""

from __future__ import annotations

import ctypes
import gc

import iceoryx2 as iox2
import msgspec

from bench.peers.base import Host, Peer, Place, Reader, distribution, installed

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode
_ROOM = 1008
_PORTS = 16


class Value(ctypes.Structure):
    _fields_ = (("eliminated", ctypes.c_uint32), ("length", ctypes.c_uint32), ("record", ctypes.c_uint8 * _ROOM))


def value_of(record: dict | None) -> Value:
    data = b"" if record is None else _encode(record)
    value = Value(record is not None, len(data))
    ctypes.memmove(value.record, data, len(data))
    return value


def node_at(place: Place):
    """Return a node that keeps its files to the place's directory and its segments to the place's name."""
    iox2.set_log_level(iox2.LogLevel.Error)
    config = iox2.config.default()
    config.global_cfg.root_path = iox2.Path.new(str(place.directory / "iceoryx2"))
    config.global_cfg.prefix = iox2.FileName.new(f"{place.name}_")
    return iox2.NodeBuilder.new().config(config).create(iox2.ServiceType.Ipc)


class BlackboardHost(Host):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        (place.directory / "iceoryx2").mkdir()
        self.node = node_at(place)
        builder = self.node.service_builder(iox2.ServiceName.new("eliminations"))
        builder = builder.blackboard_creator(ctypes.c_uint64).max_readers(_PORTS).max_nodes(_PORTS)
        self.numbers = {}
        for number, record in enumerate(place.records()):
            self.numbers[record["hotkey"]] = number
            builder = builder.add(ctypes.c_uint64(number), value_of(record))
        self.service = builder.create()
        self.writer = self.service.writer_builder().create()
        self.entries = {
            hotkey: self.writer.entry(ctypes.c_uint64(number), Value) for hotkey, number in self.numbers.items()
        }
        self.facts = self.numbers

    def put(self, record: dict) -> None:
        self.entries[record["hotkey"]].update_with_copy(value_of(record))

    def sync(self, records: list[dict]) -> None:
        wanted = {record["hotkey"]: record for record in records}
        for hotkey, entry in self.entries.items():
            entry.update_with_copy(value_of(wanted.get(hotkey)))

    def close(self) -> None:
        for entry in self.entries.values():
            entry.delete()
        self.writer.delete()
        del self.entries, self.writer, self.service, self.node
        gc.collect()


class BlackboardReader(Reader):
    """Keeps a handle and the last value of each key, and asks the blackboard whether that value is current."""

    def __init__(self, place: Place, numbers: dict[str, int]) -> None:
        self.node = node_at(place)
        builder = self.node.service_builder(iox2.ServiceName.new("eliminations"))
        self.service = builder.blackboard_opener(ctypes.c_uint64).open()
        self.reader = self.service.reader_builder().create()
        self.handles = {
            hotkey: self.reader.entry(ctypes.c_uint64(number), Value) for hotkey, number in numbers.items()
        }
        self.values = {hotkey: handle.get() for hotkey, handle in self.handles.items()}

    def value(self, hotkey: str):
        handle = self.handles.get(hotkey)
        if handle is None:
            return None
        value = self.values[hotkey]
        if not handle.is_up_to_date(value):
            value = self.values[hotkey] = handle.get()
        return value

    def check(self, hotkey: str) -> bool:
        value = self.value(hotkey)
        return value is not None and value.data[0] != 0

    def get(self, hotkey: str) -> dict | None:
        value = self.value(hotkey)
        if value is None or not value.data[0]:
            return None
        return _decode(value.data[8 : 8 + int.from_bytes(value.data[4:8], "little")])

    def check_many(self, hotkeys: list[str]) -> list[bool]:
        check = self.check
        return [check(hotkey) for hotkey in hotkeys]

    def everything(self) -> list[dict]:
        return [found for found in map(self.get, self.handles) if found is not None]

    def close(self) -> None:
        self.handles.clear()
        self.reader.delete()
        del self.reader, self.service, self.node
        gc.collect()


class Blackboard(Peer):
    how = "a handle and the last value of each key in each reader, `is_up_to_date` a call, `get` where it is not"
    limits = (
        "the set of keys is fixed when it is made, so no new hotkey can be eliminated, and a miss is a lookup in "
        "the reader's own dict of handles; values have a fixed size (1 KiB here); a batch is not atomic; nothing "
        "is durable"
    )
    host = BlackboardHost
    reader = BlackboardReader

    @classmethod
    def missing(cls) -> str | None:
        return installed("iceoryx2")

    @classmethod
    def version(cls) -> str:
        return distribution("iceoryx2")

    @classmethod
    def too_much(cls, size: int, operation: str | None = None) -> str | None:  # noqa: ARG003
        if size > 1000:
            return (
                "making a blackboard compares every key with every other in Python: 0.2 s for 256 keys and 9 s "
                "for 2,000 when this was written, so minutes for 10,000"
            )
        return None
