"""A price that is ticked 20,000 times a second while two processes read it as fast as they can: how late are they?

    python -m bench.ticking [--seconds 3] [--rate 20000] [--readers 2]

The price is the moment at which it was put, so that a reader knows how old what it reads is. That contains the
time for which nothing new was there to be read: half the distance of two ticks, on average. With more processes
than free cores it is the scheduler that is measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time

from bench.stats import percentile
from shmelim.table import Reader, Writer

PAIR = "BTC/USD"


def read(name: str, begin, seconds: float, answers) -> None:
    reader = Reader(name)
    begin.wait()
    get, clock, ages, seen, last = reader.__getitem__, time.monotonic_ns, [], 0, 0
    reads, deadline = 0, clock() + int(seconds * 1e9)
    while clock() < deadline:
        put = get(PAIR)
        reads += 1
        assert put >= last, "a price went back"
        if put != last:
            seen, last = seen + 1, put
        if reads % 16 == 0 and seen > 1:
            ages.append(clock() - put)
    ages.sort()
    figures = {f"p{share:g}": percentile(ages, share / 100) / 1000 for share in (50, 99, 99.9)}
    answers.put({"reads": reads, "seen": seen, "retries": reader.retries} | figures)


def tick(writer: Writer, seconds: float, rate: float) -> int:
    put, clock, pause = writer.put, time.monotonic_ns, int(1e9 / rate)
    begun, ticks = clock(), 0
    while (now := clock()) < begun + seconds * 1e9:
        if now >= begun + ticks * pause:
            put(PAIR, now)
            ticks += 1
    return ticks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rate", type=float, default=20_000)
    parser.add_argument("--readers", type=int, default=2)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    begin, answers, name = context.Event(), context.Queue(), f"bench-{os.getpid()}"
    with Writer(name) as writer:
        writer.put(PAIR, time.monotonic_ns())
        readers = [
            context.Process(target=read, args=(name, begin, options.seconds, answers))
            for _ in range(options.readers)
        ]
        for reader in readers:
            reader.start()
        begin.set()
        ticks = tick(writer, options.seconds + 1, options.rate)
        print(f"{ticks / (options.seconds + 1):,.0f} ticks a second")
        for _ in readers:
            figures = answers.get()
            print(
                f"{figures['reads'] / options.seconds:,.0f} reads a second, {figures['retries']:,} started over, "
                f"{figures['seen'] / options.seconds:,.0f} prices a second seen; age of what was read, µs: "
                f"p50 {figures['p50']:.1f}, p99 {figures['p99']:.1f}, p99.9 {figures['p99.9']:.1f}"
            )
        for reader in readers:
            reader.join()
        writer.close(unlink=True)


if __name__ == "__main__":
    main()
