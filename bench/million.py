"""What a large state costs: load, growth from the smallest table, lookups, snapshot, memory, and one durable add.

    python -m bench.million                   # 1,000,000 records
    python -m bench.million --records 100000

Everything is measured in this run; times are wall-clock seconds or microseconds as named, sizes in MB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from bench.records import hotkey, record
from shmelim import EliminationManagerServer, EliminationReader
from shmelim.shm import SharedNamespace, TableReader, TableWriter

MB = 1 << 20


class Stopwatch:
    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    def time(self, name, action):
        began = time.perf_counter()
        result = action()
        self.figures[name] = round(time.perf_counter() - began, 3)
        print(f"{name:48} {self.figures[name]:10.3f} s", flush=True)
        return result

    def note(self, name, value, unit) -> None:
        self.figures[name] = value
        print(f"{name:48} {value:10,.2f} {unit}", flush=True)


def median_us(action, count) -> float:
    times = []
    for _ in range(count):
        began = time.perf_counter_ns()
        action()
        times.append(time.perf_counter_ns() - began)
    return statistics.median(times) / 1000


def durable_add(server: EliminationManagerServer, label: str, watch: Stopwatch, count: int = 300) -> None:
    numbers = iter(range(10**9, 10**9 + count))

    def add() -> None:
        number = next(numbers)
        server.add_elimination_rpc(hotkey(number), record(number))

    watch.note(f"durable add at {label} records, median", median_us(add, count), "µs")


def grow_bare_table(count: int, watch: Stopwatch) -> None:
    """Put records one batch at a time into the smallest table there is."""
    namespace = SharedNamespace(f"bench-{os.getpid()}")
    payload = b"x" * 470
    with TableWriter(namespace, capacity=8, arena_size=4096) as writer:
        writer.load([])
        reader = TableReader(namespace)

        def grow() -> None:
            for start in range(0, count, 1000):
                with writer.transaction() as transaction:
                    for number in range(start, min(start + 1000, count)):
                        transaction.put(hotkey(number).encode(), 1, payload)

        watch.time(f"bare table grown from 8 slots to {count:,}", grow)
        watch.note("generations that took", reader.info().generation, "")
    namespace.remove()


def read_in_child(name: str, count: int, results) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    began = time.perf_counter()
    reader = EliminationReader(name)
    attach = time.perf_counter() - began
    generator = random.Random(1)
    hits = [hotkey(generator.randrange(count)) for _ in range(20_000)]
    misses = [hotkey(count + generator.randrange(count)) for _ in range(20_000)]
    figures = {"attach_s": attach}
    for label, keys in (("hit", hits), ("miss", misses)):
        for key in keys:  # the first pass maps the pages
            reader.is_hotkey_eliminated(key)
        began = time.perf_counter()
        for key in keys:
            reader.is_hotkey_eliminated(key)
        figures[f"check_{label}_us"] = (time.perf_counter() - began) / len(keys) * 1e6
    began = time.perf_counter()
    for key in hits:
        reader.get_elimination(key)
    figures["get_us"] = (time.perf_counter() - began) / len(hits) * 1e6
    figures["reader_mapped_mb"] = (process.memory_info().rss - before) / MB
    began = time.perf_counter()
    everything = reader.snapshot()
    figures["snapshot_s"] = time.perf_counter() - began
    figures["snapshot_records"] = len(everything.eliminations)
    figures["snapshot_peak_rss_mb"] = process.memory_info().rss / MB
    results.put(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end")
    options = parser.parse_args()
    count = options.records
    watch = Stopwatch()
    grow_bare_table(count, watch)
    namespace = SharedNamespace(f"bench-{os.getpid()}")
    with tempfile.TemporaryDirectory() as directory:
        state = Path(directory)
        server = EliminationManagerServer(namespace, state, registry=None, files="lagged")
        server.sync_eliminations_rpc([record(number) for number in range(1000)])
        durable_add(server, "1,000", watch)
        token = server.begin_upload_rpc()

        def upload() -> None:
            for start in range(0, count, 2000):
                server.upload_rpc(token, [record(n) for n in range(start, min(start + 2000, count))])

        watch.time(f"check and encode {count:,} records", upload)
        watch.time("sync them: commit, publish, write the files", lambda: server.sync_uploaded_rpc(token))
        durable_add(server, f"{count:,}", watch)
        server.save_eliminations_rpc()
        table = server.reader.table
        watch.note("shared memory (both copies)", table.segment_size / MB, "MB")
        watch.note("of it slots", 2 * table.capacity * 64 / MB, "MB")
        watch.note("of it records that are current", 2 * table.arena_live / MB, "MB")
        watch.note("server process, resident", psutil.Process().memory_info().rss / MB, "MB")
        watch.note("store on disk", server.health_check_rpc()["store_bytes"] / MB, "MB")
        watch.note("eliminations.json", (state / "eliminations.json").stat().st_size / MB, "MB")
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        child = context.Process(target=read_in_child, args=(namespace.name, count, results))
        child.start()
        for name, value in results.get(timeout=600).items():
            watch.note(f"reader process: {name}", value, "")
        child.join()
        watch.time("close", server.close)
        server = watch.time(
            "restart: check, load, publish",
            lambda: EliminationManagerServer(namespace, state, registry=None, files="lagged"),
        )
        server.close()
    namespace.remove()
    if options.json:
        print(json.dumps(watch.figures, indent=1))


if __name__ == "__main__":
    main()
