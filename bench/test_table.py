"""The table for other state beside what its users have otherwise: one value, and 256 in one transaction.

A price is a float under the name of a pair. Reads are of the process that writes, which flatters UltraDict: its
other processes replay what was written first. Nothing here is durable: py-lmdb is on tmpfs, and does not sync.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import tempfile
from itertools import count
from multiprocessing import shared_memory

import pytest

from shmelim.table import Reader, Writer

PAIRS = [f"PAIR{number}/USD" for number in range(256)]
NAME = f"bench-{os.getpid()}"


class Table:
    label = "shmelim.table"

    def __init__(self):
        self.writer = Writer(NAME)
        self.put = self.writer.put
        self.reader = Reader(NAME)
        self.get = self.reader.__getitem__
        self.get_all = self.reader.numbers

    def put_all(self, prices):
        with self.writer.transaction() as transaction:
            put = transaction.put
            for pair, price in prices:
                put(pair, price)

    def close(self):
        self.writer.close(unlink=True)


class Lmdb:
    label = "py-lmdb, no sync"

    def __init__(self):
        lmdb = pytest.importorskip("lmdb")
        import msgspec

        self.encode, self.decode = msgspec.msgpack.encode, msgspec.msgpack.decode
        self.directory = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.env = lmdb.open(self.directory.name, map_size=64 << 20, sync=False)

    def put(self, pair, price):
        with self.env.begin(write=True) as transaction:
            transaction.put(pair.encode(), self.encode(price))

    def put_all(self, prices):
        with self.env.begin(write=True) as transaction:
            for pair, price in prices:
                transaction.put(pair.encode(), self.encode(price))

    def get(self, pair):
        with self.env.begin() as transaction:
            return self.decode(transaction.get(pair.encode()))

    def get_all(self, pairs):
        with self.env.begin() as transaction:
            return [self.decode(transaction.get(pair.encode())) for pair in pairs]

    def close(self):
        self.env.close()
        self.directory.cleanup()


class Ultra:
    label = "UltraDict, not atomic"

    def __init__(self):
        ultra = pytest.importorskip("UltraDict2")
        self.shared = ultra.UltraDict(
            name=NAME, create=True, shared_lock=True, buffer_size=64 << 20, full_dump_size=1 << 20
        )
        self.put = self.shared.__setitem__
        self.get = self.shared.__getitem__

    def put_all(self, prices):
        with self.shared.lock:
            for pair, price in prices:
                self.shared[pair] = price

    def get_all(self, pairs):
        return [self.shared[pair] for pair in pairs]

    def close(self):
        self.shared.close(unlink=True)


class Blackboard:
    label = "iceoryx2 blackboard, keys fixed, 256 not atomic"

    def __init__(self):
        iox2 = pytest.importorskip("iceoryx2")
        iox2.set_log_level(iox2.LogLevel.Error)
        self.directory = tempfile.TemporaryDirectory()
        config = iox2.config.default()
        config.global_cfg.root_path = iox2.Path.new(self.directory.name)
        config.global_cfg.prefix = iox2.FileName.new(f"{NAME}-")
        self.node = iox2.NodeBuilder.new().config(config).create(iox2.ServiceType.Ipc)
        builder = self.node.service_builder(iox2.ServiceName.new("prices")).blackboard_creator(ctypes.c_uint64)
        for number in range(len(PAIRS)):
            builder = builder.add(ctypes.c_uint64(number), ctypes.c_double(0.0))
        self.service = builder.create()
        self.ports = self.service.writer_builder().create(), self.service.reader_builder().create()
        self.entries, self.handles = (
            {pair: port.entry(ctypes.c_uint64(number), ctypes.c_double) for number, pair in enumerate(PAIRS)}
            for port in self.ports
        )

    def put(self, pair, price):
        self.entries[pair].update_with_copy(ctypes.c_double(price))

    def put_all(self, prices):
        for pair, price in prices:
            self.put(pair, price)

    def get(self, pair):
        return ctypes.c_double.from_buffer_copy(self.handles[pair].get().data).value

    def get_all(self, pairs):
        return [self.get(pair) for pair in pairs]

    def close(self):
        for entry in self.entries.values():
            entry.delete()
        for port in self.ports:
            port.delete()
        del self.entries, self.handles, self.ports, self.service, self.node
        gc.collect()
        self.directory.cleanup()


class ManagerDict:
    label = "Manager dict"

    def __init__(self):
        self.manager = multiprocessing.get_context("spawn").Manager()
        self.shared = self.manager.dict()
        self.put = self.shared.__setitem__
        self.get = self.shared.__getitem__
        self.put_all = self.shared.update

    def get_all(self, _):
        return self.shared.copy()

    def close(self):
        self.manager.shutdown()


class Pickled:
    label = "shared_memory, pickled whole, torn reads possible"

    def __init__(self):
        import pickle

        self.dumps, self.loads = pickle.dumps, pickle.loads
        self.memory = shared_memory.SharedMemory(create=True, size=1 << 20)
        self.prices = {}

    def put(self, pair, price):
        self.put_all([(pair, price)])

    def put_all(self, prices):
        self.prices.update(prices)
        data = self.dumps(self.prices)
        self.memory.buf[: len(data)] = data

    def get(self, pair):
        return self.loads(self.memory.buf)[pair]

    def get_all(self, _):
        return self.loads(self.memory.buf)

    def close(self):
        self.memory.close()
        self.memory.unlink()


@pytest.fixture(
    scope="module",
    params=[Table, Lmdb, Ultra, Blackboard, ManagerDict, Pickled],
    ids=lambda contender: contender.label,
)
def table(request):
    contender = request.param()
    contender.put_all([(pair, 1.5) for pair in PAIRS])
    yield contender
    contender.close()


def test_put_one(benchmark, table):
    benchmark.group = "put one of 256"
    prices = count(1.5)
    benchmark(lambda: table.put(PAIRS[7], next(prices)))


def test_put_all(benchmark, table):
    benchmark.group = "put 256 together"
    prices = count(1.5)

    def together():
        price = next(prices)
        table.put_all([(pair, price) for pair in PAIRS])

    benchmark(together)


def test_get_one(benchmark, table):
    benchmark.group = "read one of 256"
    assert benchmark(table.get, PAIRS[7]) > 0


def test_get_all(benchmark, table):
    benchmark.group = "read 256"
    assert len(benchmark(table.get_all, PAIRS)) == len(PAIRS)
