"""The scenario of ``shmelim demo --fleet``: a server, an engine, three followers, and what befalls them."""

from __future__ import annotations

import contextlib
import math
import secrets
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, Final, cast

from shmelim.cli.demo.hosts import make_hosts
from shmelim.cli.demo.stage import PATIENCE, Stage, end
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.record import generate_row
from shmelim.errors import NotServingError, ShmelimError
from shmelim.shm import SharedNamespace

_FOLLOWERS: Final = 3
_ADDS: Final = 100
_OLD: Final = 5.0
_CUT: Final = 3.0  # seconds
_FIRST, _SYNCED = 1000, 5000
_PORT: Final = 19837  # of addresses that nobody else has

_EQUAL: Final = "every follower became equal to the server"
_WHOLE: Final = "no follower showed half of a sync"
_FORWARD: Final = "no follower went back"
_ACKNOWLEDGED: Final = "every change was acknowledged, whatever the engine did"
_SUPERSEDED: Final = "the publisher that was superseded ended"


class FleetScenario:
    """One run of the demo with more than one host."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._socket, self._password = stage.home / "engine", secrets.token_hex(16)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._new_records = map(_record, count(10**6))
        self._violations = Counter(dict.fromkeys((_EQUAL, _WHOLE, _FORWARD, _ACKNOWLEDGED, _SUPERSEDED), 0))

    def run(self) -> dict[str, Any]:
        """Start everything, let it happen, and return invariants, figures and faults."""
        if shutil.which("redis-server") is None:
            raise ShmelimError(
                "there is no redis-server on the path", hint="install it: apt-get install redis-server"
            )
        self._hosts, missing = make_hosts(_FOLLOWERS, self._stage)
        where = "each on a host of its own" if self._hosts else f"on this host ({missing})"
        self._stage.narrate(f"starting an engine, a server, a publisher and three followers, {where}")
        self._start_engine()
        self._processes["server"], self._client = self._stage.serve("--files", "off")
        self._sync(_FIRST)
        self._publish("publisher")
        self._readers = [self._follow(number) for number in range(_FOLLOWERS)]
        self._equal_after()
        with self._watching():
            figures = {
                "followers": _FOLLOWERS,
                "hosts_of_their_own": len(self._hosts),
                "records": len(self._client),
                **self._add(),
            }
            faults = [self._befall(*each) for each in self._faults()]
            _until(lambda: self._oldest() < _OLD)
        figures["oldest_follower_at_the_end_ms"] = int(self._oldest() * 1000)
        return {"invariants": dict(self._violations), "figures": figures, "faults": faults}

    # ------------------------------------------------------------------ what happens

    def _faults(self) -> list[tuple[str, Callable[[], object]]]:
        cut = [("a follower's network was cut for a while", self._cut)] if self._hosts else []
        return [
            (f"a sync of {_SYNCED:,}", lambda: self._sync(_SYNCED)),
            *cut,
            ("the engine was killed, and came back empty", self._kill_engine),
            ("the engine was flushed", self._flush_engine),
            ("a follower was killed", lambda: self._restart("follower 1")),
            ("the publisher was killed", lambda: self._restart("publisher")),
            ("a second publisher took over", self._take_over),
            ("the server was killed", lambda: self._restart("server")),
        ]

    def _befall(self, what: str, happens: Callable[[], object]) -> dict[str, Any]:
        self._stage.narrate(what)
        lines = [_position(reader)[0] for reader in self._readers]
        happens()
        self._change()
        seconds = self._equal_after()
        taken = sum(_position(reader)[0] != line for reader, line in zip(self._readers, lines, strict=True))
        return {"fault": what, "equal_after_s": [round(each, 3) for each in seconds], "took_snapshot": taken}

    def _cut(self) -> None:
        self._hosts[1].link("down")
        self._change(10)
        time.sleep(_CUT)
        self._hosts[1].link("up")

    def _kill_engine(self) -> None:
        end(self._processes["engine"])
        self._socket.unlink()
        self._change(10)
        self._restart("engine")
        _until(self._socket.exists)

    def _flush_engine(self) -> None:
        import redis

        with redis.Redis(unix_socket_path=str(self._socket), password=self._password) as client:
            client.flushall()

    def _take_over(self) -> None:
        self._publish("second publisher")
        self._must(_SUPERSEDED, lambda: self._processes["publisher"].poll() is not None)

    def _sync(self, count: int) -> None:
        self._client.sync_eliminations([_record(number) for number in range(count)])

    def _change(self, times: int = 1) -> None:
        for record in islice(self._new_records, times):
            self._must(_ACKNOWLEDGED, lambda it: self._client.add_elimination(it["hotkey"], it) or True, record)

    def _add(self) -> dict[str, float]:
        """Add one by one; return how long it takes until a change is visible on all followers."""
        took = []
        for record in islice(self._new_records, _ADDS):
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
    def _watching(self) -> Iterator[None]:
        """Look at the followers all the time."""
        stop = threading.Event()

        def watch() -> None:
            last = [(0, 0)] * len(self._readers)
            while not stop.wait(0.001):
                for number, reader in enumerate(self._readers):
                    here = _position(reader)
                    self._violations[_FORWARD] += here < last[number]
                    last[number] = here
                    # The sync takes it from one in one step to the other, and whatever is added then.
                    self._violations[_WHOLE] += _FIRST + _ADDS < len(reader) < _SYNCED

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    # ------------------------------------------------------------------ what comes of it

    def _must(self, invariant: str, condition: Callable[..., object], *of: Any) -> None:
        """Wait for a condition; that it is not met in time violates the invariant."""
        try:
            _until(condition, *of)
        except ShmelimError:
            self._violations[invariant] += 1

    def _equal_after(self) -> list[float]:
        """Wait until every follower has what the server has; return the seconds that each took."""
        began, took = time.perf_counter(), []
        wanted = self._client.get_eliminations_dict()
        for reader in self._readers:
            self._must(_EQUAL, lambda reader: reader.get_eliminations_dict() == wanted, reader)
            took.append(time.perf_counter() - began)
        return took

    def _oldest(self) -> float:
        """Return the age of the oldest follower."""
        return max(math.inf if (age := reader.staleness) is None else age for reader in self._readers)

    # ------------------------------------------------------------------ processes

    def _start_engine(self) -> None:
        # In files, since a password in a command is for everybody to see.
        (self._stage.home / "password").write_text(self._password, encoding="utf-8")
        settings, addresses = self._stage.home / "redis.conf", [host.here for host in self._hosts]
        lines = [f"unixsocket {self._socket}", f"dir {self._stage.home}", 'save ""', "appendonly no"]
        lines += [f"bind {' '.join(addresses)}", f"port {_PORT}"] if addresses else ["port 0"]
        settings.write_text("\n".join([*lines, f"requirepass {self._password}"]), encoding="utf-8")
        self._processes["engine"] = self._stage.start("redis-server", str(settings))
        _until(self._socket.exists)

    def _publish(self, role: str) -> None:
        where = ("--to", f"unix://{self._socket}", "--state-dir", f"{self._stage.home}/state")
        self._processes[role] = self._stage.start(*self._command("publish", *where))

    def _follow(self, number: int) -> EliminationReader:
        table = f"{self._stage.name[:13]}-{number}"
        self._stage.callback(SharedNamespace(table).remove)
        url = f"redis://{self._hosts[number].here}:{_PORT}/0" if self._hosts else f"unix://{self._socket}"
        command = self._command("follow", "--from", url, "--as", table)
        if self._hosts:
            command = self._hosts[number].command(*command)
        self._processes[f"follower {number}"] = self._stage.start(*command)
        return EliminationReader(table, wait=PATIENCE)

    def _command(self, *arguments: str) -> list[str]:
        shared = ("--name", self._stage.name, "--password-file", f"{self._stage.home}/password")
        return [sys.executable, "-m", "shmelim", *arguments, *shared]

    def _restart(self, role: str) -> None:
        before = self._processes[role]
        end(before)
        self._processes[role] = self._stage.start(*cast("Sequence[str]", before.args))


def _position(reader: EliminationReader) -> tuple[int, int]:
    """Return in which line a follower is, and how far."""
    position = reader.position
    return (0, 0) if position is None else (position.line, position.seq)


def _record(number: int) -> dict[str, Any]:
    return generate_row(f"5{number:047d}", 11.5, "MAX_TOTAL_DRAWDOWN", 1_700_000_000_000 + number)


def _until(condition: Callable[..., object], *of: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(NotServingError, ConnectionError, TimeoutError):
            if condition(*of):
                return
        time.sleep(0.002)
    raise ShmelimError(f"nothing happened for {PATIENCE:.0f} s")
