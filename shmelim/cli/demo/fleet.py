"""The scenario of ``shmelim demo --fleet``: a server, an engine, three followers, and what befalls them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Self, cast

from shmelim.cli.demo.hosts import Hosts, free_port
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.record import generate_row
from shmelim.errors import NotServingError, ShmelimError
from shmelim.shm import SharedNamespace

_FOLLOWERS: Final = 3
_PATIENCE: Final = 60.0
_ADDS: Final = 100
_OLD: Final = 5.0
_CUT: Final = 3.0  # seconds
_FIRST, _SYNCED = 1000, 5000


class FleetScenario:
    """Runs once; a context manager that ends every process it started, and removes what they left."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.narrate: Callable[[str], object] = lambda _what: None
        self._home = Path(tempfile.mkdtemp(prefix="shmelim-demo-"))
        self._socket = self._home / "engine"
        self._tables = [f"{name[:13]}-{number}" for number in range(_FOLLOWERS)]
        self._hosts, self._port = Hosts(0), 0  # until it runs: over the socket alone, where nobody else is
        self._password, self._secret = self._home / "password", ""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {
            "SHMELIM_RUNTIME_DIR": str(self._home),
            "SHMELIM_REGISTRY": str(self._home / "registry"),
        }
        self._violations: Counter[str] = Counter()
        self._added = 0

    def run(self) -> dict[str, Any]:
        """Start everything, let it happen, and return invariants, figures and faults."""
        if shutil.which("redis-server") is None:
            raise ShmelimError(
                "there is no redis-server on the path", hint="install it: apt-get install redis-server"
            )
        self._hosts = Hosts(_FOLLOWERS)
        if self._hosts:
            self._port, self._secret = free_port(self._hosts.here(0)), secrets.token_hex(16)
            self._password.touch(0o600)
            self._password.write_text(self._secret, encoding="utf-8")
        where = "each on a host of its own" if self._hosts else f"on this host ({self._hosts.missing})"
        self.narrate(f"starting an engine, a server, a publisher and three followers, {where}")
        self._start_engine()
        self._client = self._serve()
        self._client.sync_eliminations([self._record(number) for number in range(_FIRST)])
        self._publish("publisher")
        for number in range(_FOLLOWERS):
            self._follow(number + 1)
        self._readers = [self._until(lambda name=table: EliminationReader(name)) for table in self._tables]
        self._equal_after()
        with self._watching():
            figures: dict[str, Any] = {"followers": _FOLLOWERS, "hosts_of_their_own": len(self._hosts)}
            figures |= {"records": len(self._client), **self._add()}
            faults = [self._befall(*each) for each in self._faults()]
            oldest = self._until(self._oldest)
        figures["oldest_follower_at_the_end_ms"] = int(oldest * 1000)
        names = (
            "every follower became equal to the server",
            "no follower showed half of a sync",
            "no follower went back",
            "every change was acknowledged, whatever the engine did",
            "the publisher that was superseded ended",
        )
        return {
            "invariants": {name: self._violations[name] for name in names},
            "figures": figures,
            "faults": faults,
        }

    # ------------------------------------------------------------------ what happens

    def _faults(self) -> list[tuple[str, Callable[[], object]]]:
        cut = [("a follower's network was cut for a while", lambda: self._cut(2))] if self._hosts else []
        return [
            (f"a sync of {_SYNCED:,}", lambda: self._sync(_SYNCED)),
            *cut,
            ("the engine was killed, and came back empty", self._kill_engine),
            ("the engine was flushed", lambda: self._redis("FLUSHALL")),
            ("a follower was killed", lambda: self._kill_follower(1)),
            ("the publisher was killed", self._kill_publisher),
            ("a second publisher took over", self._take_over),
            ("the server was killed", self._kill_server),
        ]

    def _befall(self, what: str, happens: Callable[[], object]) -> dict[str, Any]:
        self.narrate(what)
        lines = [self._line(reader) for reader in self._readers]
        happens()
        self._change()
        seconds = self._equal_after()
        taken = sum(self._line(reader) != line for reader, line in zip(self._readers, lines, strict=True))
        return {"fault": what, "equal_after_s": [round(each, 3) for each in seconds], "took_snapshot": taken}

    def _kill_engine(self) -> None:
        self._kill("engine")
        self._socket.unlink(missing_ok=True)
        for _ in range(10):
            self._change()
        self._start_engine()

    def _cut(self, number: int) -> None:
        self._hosts.link(number - 1, "down")
        for _ in range(10):
            self._change()
        time.sleep(_CUT)
        self._hosts.link(number - 1, "up")

    def _kill_follower(self, number: int) -> None:
        self._kill(f"follower {number}")
        self._follow(number)

    def _kill_publisher(self) -> None:
        self._kill("publisher")
        self._publish("publisher")

    def _take_over(self) -> None:
        first = self._processes["publisher"]
        self._publish("second publisher")
        try:
            first.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._violations["the publisher that was superseded ended"] += 1

    def _kill_server(self) -> None:
        self._kill("server")
        self._serve()

    def _sync(self, count: int) -> None:
        self._client.sync_eliminations([self._record(number) for number in range(count)])

    def _new_record(self) -> dict[str, Any]:
        self._added += 1
        return self._record(10**6 + self._added)

    def _change(self) -> None:
        record = self._new_record()
        try:
            self._until(lambda: self._client.add_elimination(record["hotkey"], record) or True)
        except ShmelimError:
            self._violations["every change was acknowledged, whatever the engine did"] += 1

    def _add(self) -> dict[str, float]:
        """Add one by one; return how long it takes until a change is visible on all followers."""
        took = []
        for _ in range(_ADDS):
            record = self._new_record()
            self._client.add_elimination(record["hotkey"], record)
            began = time.perf_counter()
            for reader in self._readers:
                while not reader.is_hotkey_eliminated(record["hotkey"]):
                    reader.wait_for_change(0.002)
            took.append((time.perf_counter() - began) * 1000)
        took.sort()
        return {
            "acknowledged_to_visible_median_ms": round(statistics.median(took), 2),
            "acknowledged_to_visible_p99_ms": round(took[_ADDS * 99 // 100], 2),
        }

    @contextlib.contextmanager
    def _watching(self) -> Any:
        """Look at the followers all the time."""
        stop = threading.Event()

        def watch() -> None:
            last = [(0, 0)] * _FOLLOWERS
            while not stop.wait(0.001):
                for number, reader in enumerate(self._readers):
                    position = reader.position
                    here = (0, 0) if position is None else (position.line, position.seq)
                    if here < last[number]:
                        self._violations["no follower went back"] += 1
                    last[number] = here
                    # The sync takes it from one in one step to the other, and whatever is added then.
                    if _FIRST + _ADDS < len(reader) < _SYNCED:
                        self._violations["no follower showed half of a sync"] += 1

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    # ------------------------------------------------------------------ waiting

    def _equal_after(self) -> list[float]:
        """Wait until every follower has what the server has; return the seconds that each took."""
        began, took = time.perf_counter(), [0.0] * _FOLLOWERS
        wanted = self._client.get_eliminations_dict()
        for number, reader in enumerate(self._readers):
            try:
                self._until(lambda reader=reader: reader.get_eliminations_dict() == wanted)
            except ShmelimError:
                self._violations["every follower became equal to the server"] += 1
            took[number] = time.perf_counter() - began
        return took

    def _oldest(self) -> float | None:
        """Return the age of the oldest follower, once all are young."""
        ages = [reader.staleness for reader in self._readers]
        known = [age for age in ages if age is not None and age < _OLD]
        return max(known) if len(known) == len(ages) else None

    def _line(self, reader: EliminationReader) -> int:
        position = self._until(lambda: reader.position)
        return int(position.line)

    @staticmethod
    def _until(condition: Callable[..., Any]) -> Any:
        deadline = time.monotonic() + _PATIENCE
        while True:
            with contextlib.suppress(NotServingError, ConnectionError, TimeoutError):
                found = condition()
                if found is not None and found is not False:
                    return found
            if time.monotonic() > deadline:
                raise ShmelimError(f"nothing happened for {_PATIENCE:.0f} s")
            time.sleep(0.002)

    # ------------------------------------------------------------------ processes

    def _start_engine(self) -> None:
        # In a file, since a password in a command is for everybody to see.
        settings = self._home / "redis.conf"
        lines = [
            f"unixsocket {self._socket}",
            f"dir {self._home}",
            'save ""',
            "appendonly no",
            f"port {self._port}",
        ]
        if self._hosts:
            lines += [
                f"bind {' '.join(map(self._hosts.here, range(_FOLLOWERS)))}",
                f"requirepass {self._secret}",
            ]
        settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._run("engine", ["redis-server", str(settings)])
        self._until(lambda: self._socket.exists() and self._redis("PING"))

    def _redis(self, command: str) -> bool:
        import redis

        with redis.Redis(unix_socket_path=str(self._socket), password=self._secret or None) as client:
            try:
                client.execute_command(command)
            except redis.RedisError:
                return False
        return True

    def _serve(self) -> EliminationClient:
        self._start("server", "serve", "--state-dir", str(self._home / "state"), "--files", "off")
        return cast(
            "EliminationClient", self._until(lambda: EliminationClient(self.name, runtime_base=self._home))
        )

    def _follow(self, number: int) -> None:
        table = self._tables[number - 1]
        url = f"redis://{self._hosts.here(number - 1)}:{self._port}/0" if self._hosts else f"unix://{self._socket}"
        within = self._hosts.command(number - 1)
        self._start(f"follower {number}", "follow", "--from", url, "--as", table, *self._proof(), within=within)

    def _publish(self, role: str) -> None:
        state = str(self._home / "state")
        self._start(role, "publish", "--to", f"unix://{self._socket}", "--state-dir", state, *self._proof())

    def _proof(self) -> list[str]:
        return ["--password-file", str(self._password)] if self._hosts else []

    def _start(self, role: str, *arguments: str, within: Sequence[str] = ()) -> None:
        self._run(role, [*within, sys.executable, "-m", "shmelim", *arguments, "--name", self.name])

    def _run(self, role: str, command: list[str]) -> None:
        with (self._home / f"{role}.log").open("ab") as log:
            self._processes[role] = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)  # noqa: S603

    def _kill(self, role: str) -> None:
        process = self._processes[role]
        process.send_signal(signal.SIGKILL)
        process.wait()

    @staticmethod
    def _record(number: int) -> dict[str, Any]:
        return generate_row(f"5{number:047d}", 11.5, "MAX_TOTAL_DRAWDOWN", 1_700_000_000_000 + number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._hosts.close()
        for name in (self.name, *self._tables):
            SharedNamespace(name).remove()
        shutil.rmtree(self._home, ignore_errors=True)
