"""The manager beside the BaseManager pattern that it replaces, both with their server on loopback TCP.

One check, all of 256 records, a sync of 100, an update of one. *channel* is what the manager does not do: it asks
its server for what stands in shared memory, to compare the two channels alone. Only shmelim's changes are durable.

And the example services: what each publishes in a table, beside the call that this replaces.
"""

from __future__ import annotations

import os
import sys
import tempfile
from itertools import count
from pathlib import Path

import pytest

from bench.contenders import BaseManagerRpc
from bench.records import compact, hotkey, record, records
from shmelim import EliminationManager
from shmelim.shm import SharedNamespace
from shmelim.table.naming import TableNamespace

SIZE = 256
EXAMPLES = Path(__file__).parents[1] / "examples"


class Manager:
    """The manager of a validator: reads from shared memory, changes over TCP."""

    label = "manager"
    durability = "power"

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        base = Path(self.directory.name)
        self.manager = EliminationManager(
            None,
            None,
            None,
            name=f"bench-{os.getpid()}",
            port=0,
            state_dir=base / "state",
            runtime_base=base,
            durability=self.durability,
            registry=None,
            replace_published=True,
            start_method="spawn",
        )
        self.check = self.manager.is_hotkey_eliminated
        self.everything = self.manager.get_eliminations_from_memory
        self.add = self.manager.add_elimination
        self.sync = self.manager.sync_eliminations

    def close(self):
        self.manager.shutdown()
        SharedNamespace(self.manager.name).remove()
        self.directory.cleanup()


class Lenient(Manager):
    """Changes that survive the death of the server, not that of the machine."""

    label = "manager, durability=process"
    durability = "process"


class Channel(Manager):
    """Everything asked of the server."""

    label = "channel"

    def __init__(self) -> None:
        super().__init__()
        proxy = self.manager._server_proxy  # noqa: SLF001
        self.check = proxy.is_hotkey_eliminated_rpc
        self.everything = proxy.get_eliminations_from_memory_rpc


@pytest.fixture(
    scope="module", params=[Manager, Lenient, Channel, BaseManagerRpc], ids=lambda contender: contender.label
)
def service(request):
    contender = request.param()
    contender.sync(records(SIZE))
    yield contender
    contender.close()


def test_check(benchmark, service):
    benchmark.group = "one check"
    assert benchmark(service.check, hotkey(7)) is True


def test_everything(benchmark, service):
    benchmark.group = f"all of {SIZE} records of 0.5 kB"
    assert len(benchmark(service.everything)) == SIZE


def test_everything_short(benchmark, service):
    """With records of 0.15 kB, BaseManager's answer is one that Nagle's algorithm holds back."""
    benchmark.group = f"all of {SIZE} records of 0.15 kB"
    service.sync([compact(number) for number in range(SIZE)])
    assert len(benchmark(service.everything)) == SIZE
    service.sync(records(SIZE))


def test_update_one(benchmark, service):
    benchmark.group = "update one record"
    stamps = count(1)
    benchmark.pedantic(service.add, setup=lambda: ((hotkey(7), record(7, next(stamps))), {}), rounds=200)


def test_sync_100(benchmark, service):
    benchmark.group = "sync of 100 records, all of them changed"
    stamps = count(1)
    benchmark.pedantic(service.sync, setup=lambda: ((records(100, next(stamps)),), {}), rounds=30)
    service.sync(records(SIZE))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Of each example service, what is read in its table and the call that gives the same, and with what."""
    sys.path.insert(0, str(EXAMPLES))
    from limit_orders import LimitOrderManager
    from positions import PositionManager
    from price_fetcher import PriceFetcher

    names = [f"bench-{os.getpid()}-{number}" for number in range(3)]
    positions_file = str(tmp_path_factory.mktemp("positions") / "positions.json")
    with (
        PriceFetcher(0, published_table=names[0]) as prices,
        PositionManager(positions_file, 0, published_table=names[1]) as positions,
        LimitOrderManager(0, published_table=names[2]) as orders,
    ):
        prices.put_price("BTC/USD", 97_250.5)
        positions.open_position("5Miner", "BTC/USD", 0.5)
        number = orders.add_limit_order("5Miner", "BTC/USD", "buy", 95_000)
        yield {
            "a price": (prices.get_price, prices._server_proxy.get_price_rpc, "BTC/USD"),  # noqa: SLF001
            "a miner's positions": (
                positions.get_positions_for_one_hotkey,
                positions._server_proxy.get_positions_for_one_hotkey_rpc,  # noqa: SLF001
                "5Miner",
            ),
            "a limit order": (orders.get_limit_order, orders._server_proxy.get_limit_order_rpc, number),  # noqa: SLF001
        }
    for name in names:
        TableNamespace(name).remove()
    sys.path.remove(str(EXAMPLES))


@pytest.mark.parametrize("what", ["a price", "a miner's positions", "a limit order"])
@pytest.mark.parametrize("how", ["table", "call"])
def test_example(benchmark, examples, what, how):
    benchmark.group = f"example: {what}"
    read, call, key = examples[what]
    assert benchmark(read if how == "table" else call, key) == call(key)
