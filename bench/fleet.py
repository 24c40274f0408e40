"""More than one host on one machine: from an acknowledged change to followers' readers, rows a second, snapshots.

    python -m bench.fleet                                  # over a Unix socket
    python -m bench.fleet --delay 20                       # with so many ms of network, there and back
    python -m bench.fleet --rows 1000000 --followers 3 30
    python -m bench.fleet --engines                        # what a change costs while the engine is not well
    python -m bench.fleet --soak 1800                      # changes without a pause, a fault every few seconds

Starts its own engine, server, publisher and followers, and leaves none. A change counts as visible once it is in
the last follower's table. Beside it, in turns: Redis' own publish and subscribe, which carry the hotkey alone, to
as many subscribers, each a process, until the last of them has it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import queue
import random
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import redis

from bench.records import compact, record
from bench.stats import percentile
from shmelim import EliminationClient, EliminationReader
from shmelim.errors import ShmelimError
from shmelim.shm import SharedNamespace

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHANGES = 300
_PAUSE = 0.01
_LATEST = 1800.0
_FAULT_EVERY = 5.0
_CHECKS = 20_000
_ROUNDS = 40

# Says a byte once it listens, and with each message.
_SUBSCRIBER = """
import os, sys, redis
listening = redis.Redis.from_url(sys.argv[1]).pubsub()
listening.subscribe("bench")
for message in listening.listen():
    os.write(int(sys.argv[2]), b".")
"""


class Fleet:
    """All processes, in a directory of their own."""

    def __init__(self, directory: Path, delay: float) -> None:
        self.directory = directory
        self.name = f"bench-{secrets.token_hex(3)}"
        self.processes: list[subprocess.Popen[bytes]] = []
        path = directory / "engine"
        self.roles: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[str, ...]] = {}
        engine = ("redis-server", "--port", "0", "--unixsocket", str(path), "--dir", str(directory), "--save", "")
        self.have("engine", *engine)
        self.until(path.exists)
        if delay:
            Delay(directory / "delayed", path, delay / 2000)
            path = directory / "delayed"
        self.url = f"unix://{path}"
        self.engine = redis.Redis.from_url(self.url)
        self.until(self.engine.ping)
        os.environ |= {"SHMELIM_RUNTIME_DIR": str(directory), "SHMELIM_REGISTRY": str(directory / "registry")}
        serve = ("serve", "--state-dir", str(directory / "state"), "--files", "off", "--durability", "process")
        self.start(*self.command(*serve))
        self.client = self.until(lambda: [EliminationClient(self.name, runtime_base=directory, timeout=600)])[0]
        self.have("publisher", *self.command("publish", "--to", self.url, "--state-dir", str(directory / "state")))
        self.tables: list[str] = []

    def start(self, *command: str, keeping: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        log = (self.directory / f"{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=keeping)
        self.processes.append(process)
        return process

    def have(self, role: str, *command: str) -> None:
        self._commands[role] = command
        self.roles[role] = self.start(*command)

    def again(self, role: str) -> None:
        """Kill a process, and start it again."""
        self.roles[role].kill()
        self.roles[role].wait()
        self.have(role, *self._commands[role])

    def command(self, *arguments: str) -> tuple[str, ...]:
        return sys.executable, "-m", "shmelim", *arguments, "--name", self.name

    def follow(self, count: int = 1) -> tuple[list[EliminationReader], float]:
        """Start followers at once; return a reader of each table, and how long it took until all were equal."""
        names = [f"{self.name[:13]}{len(self.tables) + number:03d}" for number in range(count)]
        self.tables += names
        began = time.perf_counter()
        for name in names:
            self.have("follower", *self.command("follow", "--from", self.url, "--as", name))
        readers = [self.until(lambda name=name: [EliminationReader(name)])[0] for name in names]
        for reader in readers:
            self.until(lambda reader=reader: len(reader) == len(self.client))
        return readers, time.perf_counter() - began

    @staticmethod
    def until(condition: Any) -> Any:
        deadline = time.monotonic() + _LATEST
        while time.monotonic() < deadline:
            with contextlib.suppress(ShmelimError, redis.RedisError, OSError):
                if (found := condition()) or (found is not False and found is not None and found != 0):
                    return found
            time.sleep(0.0005)
        raise TimeoutError("it took too long")

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in (self.name, *self.tables):
            SharedNamespace(name).remove()


class Subscribers:
    """Processes that listen to Redis' own messages."""

    def __init__(self, fleet: Fleet, count: int) -> None:
        self._count = count
        self._said, saying = os.pipe()
        command = (sys.executable, "-c", _SUBSCRIBER, fleet.url, str(saying))
        self._processes = [fleet.start(*command, keeping=(saying,)) for _ in range(count)]
        os.close(saying)
        self.wait()

    def wait(self) -> None:
        """Wait until each has said a byte."""
        left = self._count
        while left:
            left -= len(os.read(self._said, left))

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        os.close(self._said)


def latencies(fleet: Fleet, readers: list[EliminationReader]) -> Iterator[tuple[str, list[float]]]:
    """Yield seconds from acknowledged to visible at the last reader, and those of Redis' publish and subscribe."""
    subscribers = Subscribers(fleet, len(readers))
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(_CHANGES):
        new = compact(10_000_000 + 1000 * len(readers) + number)
        fleet.client.add_elimination(new["hotkey"], new)
        began = time.perf_counter()
        for reader in readers:
            while not reader.is_hotkey_eliminated(new["hotkey"]):
                reader.wait_for_change(0.001)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        fleet.engine.publish("bench", new["hotkey"])
        subscribers.wait()
        theirs.append(time.perf_counter() - began)
        time.sleep(_PAUSE)
    subscribers.close()
    yield "acknowledged to visible", sorted(ours)
    yield "redis publish to subscribers", sorted(theirs)


def checks(*readers: EliminationReader) -> list[float]:
    """Return seconds of a check by each of these readers, in turns; each the median of its rounds."""
    hotkeys = [f"hotkey {number % 1000}" for number in range(_CHECKS)]
    took: list[list[float]] = [[] for _ in readers]
    for _ in range(_ROUNDS):
        for reader, rounds in zip(readers, took, strict=True):
            check = reader.is_hotkey_eliminated
            began = time.perf_counter()
            for hotkey in hotkeys:
                check(hotkey)
            rounds.append((time.perf_counter() - began) / len(hotkeys))
    return [statistics.median(rounds) for rounds in took]


def rows_a_second(fleet: Fleet, reader: EliminationReader, rows: int) -> float:
    """Return rows a second of a sync of so many changed records, from acknowledged to visible on a follower."""
    changed = [record(number, 1) for number in range(rows)]
    fleet.client.sync_eliminations(changed)
    began = time.perf_counter()
    last = changed[-1]["elimination_initiated_time_ms"]
    fleet.until(lambda: reader.get_elimination(changed[-1]["hotkey"])["elimination_initiated_time_ms"] == last)
    return rows / (time.perf_counter() - began)


def engines(fleet: Fleet) -> Iterator[tuple[str, list[float]]]:
    """Yield what a change costs at its caller's, while the engine is well, and while it is not."""
    numbers = itertools.count(20_000_000)

    def changes() -> list[float]:
        took = []
        for number in itertools.islice(numbers, _CHANGES):
            new = compact(number)
            began = time.perf_counter()
            fleet.client.add_elimination(new["hotkey"], new)
            took.append(time.perf_counter() - began)
            time.sleep(_PAUSE)
        return sorted(took)

    engine = fleet.roles["engine"]
    yield "is well", changes()
    fleet.engine.config_set("maxmemory", "1mb")
    yield "is full", changes()
    fleet.engine.config_set("maxmemory", "0")
    engine.send_signal(signal.SIGSTOP)
    yield "hangs", changes()
    engine.send_signal(signal.SIGCONT)
    fleet.engine.config_set("requirepass", "another")
    fleet.engine.execute_command("CLIENT", "KILL", "TYPE", "normal")
    yield "has another password", changes()
    engine.kill()
    yield "is dead", changes()
    fleet.again("engine")
    yield "is well again", changes()


def soak(fleet: Fleet, seconds: float) -> None:
    """Change without a pause, let something happen every five seconds, and say what memory was used meanwhile.

    In the second half it happens to the engine alone: what publisher and follower hold grows only while they live.
    """
    chance, stop, numbers = random.Random(1), threading.Event(), itertools.count()

    def change() -> None:
        while not stop.is_set():
            number = next(numbers)
            new = compact(number % 5000, number)
            fleet.client.add_elimination(new["hotkey"], new)

    changing = threading.Thread(target=change)
    changing.start()
    ends, used, faults = time.monotonic() + seconds, [], Counter()
    happens = ["engine", "flush", "hang", "publisher", "follower"]
    while (left := ends - time.monotonic()) > 0:
        stop.wait(_FAULT_EVERY)
        if left < seconds / 2:
            happens = happens[:3]
            used.append({role: psutil.Process(each.pid).memory_info().rss for role, each in fleet.roles.items()})
        fault = chance.choice(happens)
        faults[fault] += 1
        if fault == "flush":
            with contextlib.suppress(redis.RedisError):
                fleet.engine.flushall()
        elif fault == "hang":
            fleet.roles["engine"].send_signal(signal.SIGSTOP)
            stop.wait(3)
            fleet.roles["engine"].send_signal(signal.SIGCONT)
        else:
            fleet.again(fault)
    stop.set()
    changing.join()
    began = time.perf_counter()
    wanted = fleet.client.get_eliminations_dict()
    reader = EliminationReader(fleet.tables[0])
    fleet.until(lambda: reader.get_eliminations_dict() == wanted)
    print(f"{next(numbers):,} changes in {seconds:.0f} s, {dict(faults)}")
    print(f"equal {time.perf_counter() - began:.2f} s after the last of them; age {reader.staleness:.2f} s")
    half = len(used) // 2
    for role in used[0]:
        parts = (used[:half], used[half:])
        first, last = (statistics.median(each[role] / 2**20 for each in part) for part in parts)
        print(f"{role}: {first:.1f} MB in the third quarter, {last:.1f} MB in the last (medians)")


class Delay:
    """Passes on what comes to one socket to another one, both ways, each byte so many seconds later."""

    def __init__(self, path: Path, to: Path, seconds: float) -> None:
        self._to, self._seconds = to, seconds
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            here, there = self._listening.accept()[0], socket.socket(socket.AF_UNIX)
            try:
                there.connect(str(self._to))
            except OSError:  # the engine has ended
                here.close()
                continue
            for one, other in ((here, there), (there, here)):
                parts: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                threading.Thread(target=self._take, args=(one, parts), daemon=True).start()
                threading.Thread(target=self._give, args=(other, parts), daemon=True).start()

    def _take(self, connection: socket.socket, parts: queue.SimpleQueue) -> None:
        part = b"-"
        while part:
            try:
                part = connection.recv(1 << 20)
            except OSError:
                part = b""
            parts.put((time.perf_counter() + self._seconds, part))

    @staticmethod
    def _give(connection: socket.socket, parts: queue.SimpleQueue) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, part = parts.get()
                if not part:
                    connection.shutdown(socket.SHUT_WR)
                    return
                if (left := due - time.perf_counter()) > 0:
                    time.sleep(left)
                connection.sendall(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.0, help="ms of network, there and back")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--followers", type=int, nargs="+", default=[1, 3])
    parser.add_argument(
        "--soak", type=float, metavar="SECONDS", help="change without a pause, and let things happen"
    )
    parser.add_argument("--engines", action="store_true", help="what a change costs while the engine is not well")
    options = parser.parse_args()
    # What ends the run ends its processes too, and removes their tables.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="shmelim-bench-") as place:
        fleet = Fleet(Path(place), options.delay)
        try:
            make = record if options.rows <= 100_000 else compact
            fleet.client.sync_eliminations([make(number) for number in range(options.rows)])
            if options.soak:
                fleet.follow()
                soak(fleet, options.soak)
                return
            if options.engines:
                for state, found in engines(fleet):
                    p50, p99 = (percentile(found, share) * 1e3 for share in (0.5, 0.99))
                    print(f"a change while the engine {state}: p50 {p50:.2f} ms, p99 {p99:.2f} ms", flush=True)
                return
            readers, seconds = fleet.follow()
            memory = fleet.engine.info("memory")["used_memory"]
            print(f"{options.rows:,} rows: a new follower is equal after {seconds:.2f} s", flush=True)
            print(f"the engine holds {memory / options.rows:.0f} bytes a row", flush=True)
            here, there = (each * 1e9 for each in checks(readers[0], EliminationReader(fleet.name)))
            print(
                f"a check: {here:.1f} ns by a follower's table, {there:.1f} ns by the writer's, "
                f"{here / there:.2f} times as long",
                flush=True,
            )
            if make is record:
                took = rows_a_second(fleet, readers[0], options.rows)
                print(f"a follower takes {took:,.0f} rows a second", flush=True)
            for count in options.followers:
                if len(readers) < count:
                    more, seconds = fleet.follow(count - len(readers))
                    readers += more
                    print(f"{len(more)} more followers at once: all equal after {seconds:.2f} s", flush=True)
                for what, found in latencies(fleet, readers):
                    p50, p99 = (percentile(found, share) * 1e3 for share in (0.5, 0.99))
                    print(f"{count} followers, {what}: p50 {p50:.2f} ms, p99 {p99:.2f} ms", flush=True)
                threading.Event().wait(0.1)
        finally:
            fleet.close()


if __name__ == "__main__":
    main()
