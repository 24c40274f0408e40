"""What changes cost beside py-lmdb, a bare SQLite and BaseManager RPC: the table of DESIGN 7, each row in one run.

    python -m bench.changes                   # 100 and 10,000 records
    python -m bench.changes --sizes 200000    # also: the worst add meanwhile, and a start after SIGKILL

Everything is as durable as it can be. Times are medians of wall-clock time, taken in turns; a ratio is that of
ours to py-lmdb's put of as many records (of an add to SQLite's insert, of an append to an add).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.peers.base import Place
from bench.peers.base_manager import RpcHost
from bench.peers.lmdb_ import LmdbHost
from bench.peers.shmelim_ import ShmelimHost
from bench.peers.sqlite import SqliteHost
from bench.records import record, records
from bench.stats import percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

_FEW = 14
_BULK = 100_000


def timed(call: Callable[..., object], *args: object) -> float:
    began = time.perf_counter()
    call(*args)
    return (time.perf_counter() - began) * 1e3


def lists(size: int, stamp: int) -> dict[str, list[dict]]:
    """The lists that follow each other in one round: all changed, a few, none."""
    every = records(size, stamp)
    few = records(size, stamp)
    for number in range(0, size, max(1, size // _FEW)):
        few[number] = record(number, stamp + 500_000)
    return {"all": every, f"{_FEW}": few, "none": [dict(each) for each in few]}


def rounds(size: int, directory: Path) -> Iterator[tuple[str, float]]:
    """Yield what each thing took, in turns."""
    place = Place(f"bench-{os.getpid()}", directory, size, durable=True)
    hosts: dict[str, Any] = {}
    numbers = count(10_000_000)
    try:
        for kind in (LmdbHost, SqliteHost, RpcHost, ShmelimHost):
            hosts[kind.__name__] = kind(place)
        ours = hosts["ShmelimHost"]
        for number in range(3 if size >= _BULK else 7):
            changed = lists(size, number + 1)
            yield "lmdb put", timed(hosts["LmdbHost"].sync, changed["all"])
            yield "rpc sync", timed(hosts["RpcHost"].sync, changed["all"])
            for name, listed in changed.items():
                yield f"sync, {name} changed", timed(ours.sync, listed)
            for _ in range(30):
                new = [record(next(numbers)) for _ in range(3)]
                yield "sqlite insert", timed(hosts["SqliteHost"].put, new[0])
                yield "add", timed(ours.put, new[1])
                yield "append", timed(ours.client.append_elimination_row, new[2]["hotkey"], 1.0, "ZOMBIE")
            # What was added is no change of the next round.
            ours.sync(changed["none"])
        if size >= _BULK:
            for name in ("all", "14"):
                listed = lists(size, number + 2)[name]
                yield f"worst add during a sync, {name} changed", worst_add(ours, listed, next(numbers))
            os.kill(ours.process.pid, signal.SIGKILL)
            ours.process.join()
            ours.client.close()
            yield "start after SIGKILL", timed(lambda: hosts.update(ShmelimHost=ShmelimHost(place, fill=False)))
            hosts["ShmelimHost"].sync([])
            yield "sync, for the first time", timed(hosts["ShmelimHost"].sync, lists(size, 1)["all"])
    finally:
        for host in hosts.values():
            host.close()


def worst_add(ours: ShmelimHost, listed: list[dict], first: int) -> float:
    """Return what the slowest add of another process took while a sync went on."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    adding = context.Process(target=add_on, args=(end, ours.place, first))
    adding.start()
    pipe.recv()
    ours.sync(listed)
    pipe.send("over")
    worst: float = pipe.recv()
    adding.join()
    return worst


def add_on(pipe: Connection, place: Place, first: int) -> None:
    """Add one record after the other until told to stop; answer with what the slowest took, in milliseconds."""
    from shmelim import EliminationClient

    worst = 0.0
    with EliminationClient(place.name, runtime_base=place.directory, timeout=600) as client:
        pipe.send("ready")
        for number in count(first * 1_000):
            new = record(number)
            worst = max(worst, timed(client.add_elimination, new["hotkey"], new))
            if pipe.poll():
                pipe.send(worst)
                return


def costs(size: int) -> list[dict]:
    """Return a row for each change: its median in seconds, how far it differed, and its ratio to the peer's."""
    took: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, ms in rounds(size, Path(directory)):
            took.setdefault(name, []).append(ms / 1e3)
    medians = {name: statistics.median(each) for name, each in took.items()}
    rows = []
    for name, each in took.items():
        peer = {"add": "sqlite insert", "append": "add"}.get(name, "lmdb put")
        spread = [percentile(sorted(each), share) for share in (0.25, 0.75)]
        ratio = medians[name] / medians[peer]
        rows.append({"what": name, "p50": medians[name], "spread": spread, "against": peer, "ratio": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 10_000])
    for size in parser.parse_args().sizes:
        print(f"{size:,} records")
        for row in costs(size):
            print(f"  {row['what']:40} {row['p50'] * 1e3:10.2f} ms   {row['ratio']:8.2f} x {row['against']}")


if __name__ == "__main__":
    main()
