"""What happens in ``shmelim demo --fleet``: a server, an engine, three followers, and what befalls them.

The followers have hosts of their own where these may be made: network namespaces, each joined to this host by a
pair of interfaces with addresses of 198.18.0.0/15, which RFC 2544 sets aside for measurements. Linux alone has
them, they need ``ip`` (iproute2) and root.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import count, islice
from typing import Any, Final, cast

from shmelim.cli.demo.stage import PATIENCE, Stage, end
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.record import generate_row
from shmelim.errors import NotServingError, ShmelimError
from shmelim.shm import SharedNamespace

_FOLLOWERS: Final = 3
_ADDS: Final = 100
_OLD: Final = 5.0  # seconds
_CUT: Final = 3.0
_FIRST, _SYNCED = 1000, 5000  # records
_PORT: Final = 19837  # of addresses that nobody else has

_EQUAL: Final = "every follower became equal to the server"
_WHOLE: Final = "no follower showed half of a sync"
_FORWARD: Final = "no follower went back"
_ACKNOWLEDGED: Final = "every change was acknowledged, whatever the engine did"
_SUPERSEDED: Final = "the publisher that was superseded ended"


class Host:
    """A network namespace, how a command runs in it, and its link to this host, which is ``here`` on it."""

    def __init__(self, number: int, undo: contextlib.ExitStack) -> None:
        network, name = f"198.18.{os.getpid() % 256}", f"shmelim-demo-{os.getpid()}-{number}"
        self.here, there = f"{network}.{4 * number + 1}", f"{network}.{4 * number + 2}"
        self.run = ("ip", "netns", "exec", name)
        self._link = f"sh{os.getpid()}-{number}"  # an interface's name has at most 15 characters
        undo.callback(_remove, name)
        _ip("netns", "add", name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", self._link, "netns", name)
        _ip("address", "add", f"{self.here}/30", "dev", self._link)
        _ip("-n", name, "address", "add", f"{there}/30", "dev", self._link)
        _ip("-n", name, "link", "set", self._link, "up")
        self.link("up")

    def link(self, state: str) -> None:
        """Cut the link (``"down"``), or mend it (``"up"``)."""
        _ip("link", "set", self._link, state)


def make_hosts(count: int, undo: contextlib.ExitStack) -> tuple[list[Host], str]:
    """Return so many hosts; none, and why, where they cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return [], "network namespaces need root, and iproute2"
    try:
        return [Host(number, undo) for number in range(count)], ""
    except (OSError, subprocess.SubprocessError) as error:
        return [], f"no network namespace can be made: {getattr(error, 'stderr', None) or error}".strip()


def _remove(name: str) -> None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        _ip("netns", "delete", name)  # both ends of the link go with it


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)  # noqa: S603, S607


class FleetScenario:
    """One run of the demo with more than one host."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._socket, self._password = stage, stage.home / "engine", secrets.token_hex(16)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._new_records = map(_record, count(10**6))
        self._violations = Counter(dict.fromkeys((_EQUAL, _WHOLE, _FORWARD, _ACKNOWLEDGED, _SUPERSEDED), 0))

    def run(self) -> dict[str, Any]:
        """Start everything, let it happen, and return invariants, figures and faults."""
        if shutil.which("redis-server") is None:
            hint = "install it: apt-get install redis-server"
            raise ShmelimError("there is no redis-server on the path", hint=hint)
        self._hosts, missing = make_hosts(_FOLLOWERS, self._stage)
        where = "each on a host of its own" if self._hosts else f"on this host ({missing})"
        self._stage.narrate(f"starting an engine, a server, a publisher and three followers, {where}")
        self._start_engine()
        self._processes["server"], self._client = self._stage.serve("--files", "off")
        self._sync(_FIRST)
        self._publish("publisher")
        self._readers = [self._follow(number) for number in range(_FOLLOWERS)]
        self._equal_after()
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=[stop])
        self._stage.callback(watcher.join)
        self._stage.callback(stop.set)
        watcher.start()
        figures: dict[str, float] = {
            "followers": _FOLLOWERS,
            "hosts_of_their_own": len(self._hosts),
            "records": len(self._client),
        }
        figures = {**figures, **self._add()}
        faults: list[tuple[str, Callable[[], object]]] = [
            (f"a sync of {_SYNCED:,}", lambda: self._sync(_SYNCED)),
            ("a follower's network was cut for a while", self._cut),
            ("the engine was killed, and came back empty", self._kill_engine),
            ("the engine was flushed", self._flush_engine),
            ("a follower was killed", lambda: self._restart("follower 1")),
            ("the publisher was killed", lambda: self._restart("publisher")),
            ("a second publisher took over", self._take_over),
            ("the server was killed", lambda: self._restart("server")),
        ]
        found = [self._befall(*each) for each in faults if self._hosts or each[1] != self._cut]
        self._until(lambda: self._oldest() < _OLD)
        figures["oldest_follower_at_the_end_ms"] = int(self._oldest() * 1000)
        return {"invariants": dict(self._violations), "figures": figures, "faults": found}

    # ------------------------------------------------------------------ what happens

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
        self._until(self._socket.exists)

    def _flush_engine(self) -> None:
        import redis

        with redis.Redis(unix_socket_path=str(self._socket), password=self._password) as client:
            client.flushall()

    def _take_over(self) -> None:
        self._publish("second publisher")
        self._until(lambda: self._processes["publisher"].poll() is not None, violated=_SUPERSEDED)

    def _sync(self, count: int) -> None:
        self._client.sync_eliminations(list(map(_record, range(count))))

    def _change(self, times: int = 1) -> None:
        def add(record: dict[str, Any]) -> bool:
            self._client.add_elimination(record["hotkey"], record)
            return True

        for record in islice(self._new_records, times):
            self._until(add, record, violated=_ACKNOWLEDGED)

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
        p99 = statistics.quantiles(took, n=100)[-1]
        named = {"median": statistics.median(took), "p99": p99}
        return {f"acknowledged_to_visible_{what}_ms": round(figure, 2) for what, figure in named.items()}

    # ------------------------------------------------------------------ what comes of it

    def _watch(self, stop: threading.Event) -> None:
        last = [(0, 0)] * _FOLLOWERS
        while not stop.wait(0.001):
            for number, reader in enumerate(self._readers):
                here = _position(reader)
                self._violations[_FORWARD] += here < last[number]
                last[number] = here
                # The sync takes it from one in one step to the other, and whatever is added then.
                self._violations[_WHOLE] += _FIRST + _ADDS < len(reader) < _SYNCED

    def _until(self, condition: Callable[..., object], *of: Any, violated: str = "") -> None:
        """Wait for a condition; that it is not met in time violates an invariant, or else is an error."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(NotServingError, ConnectionError, TimeoutError):
                if condition(*of):
                    return
            time.sleep(0.002)
        if not violated:
            raise ShmelimError(f"nothing happened for {PATIENCE:.0f} s")
        self._violations[violated] += 1

    def _equal_after(self) -> list[float]:
        """Wait until every follower has what the server has; return the seconds that each took."""
        began, took = time.perf_counter(), []
        wanted = self._client.get_eliminations_dict()
        for reader in self._readers:
            self._until(lambda reader: reader.get_eliminations_dict() == wanted, reader, violated=_EQUAL)
            took.append(time.perf_counter() - began)
        return took

    def _oldest(self) -> float:
        """Return the age of the oldest follower."""
        return max(math.inf if (age := reader.staleness) is None else age for reader in self._readers)

    # ------------------------------------------------------------------ processes

    def _start_engine(self) -> None:
        # In files, since a password in a command is for everybody to see.
        (self._stage.home / "password").write_text(self._password, encoding="utf-8")
        addresses = " ".join(host.here for host in self._hosts)
        where = f"bind {addresses}\nport {_PORT}" if addresses else "port 0"
        lines = (
            f'unixsocket {self._socket}\ndir {self._stage.home}\nsave ""\nrequirepass {self._password}\n{where}'
        )
        settings = self._stage.home / "redis.conf"
        settings.write_text(lines, encoding="utf-8")
        self._processes["engine"] = self._stage.start("redis-server", str(settings))
        self._until(self._socket.exists)

    def _publish(self, role: str) -> None:
        self._run(role, "publish", "--to", f"unix://{self._socket}", "--state-dir", f"{self._stage.home}/state")

    def _follow(self, number: int) -> EliminationReader:
        table = f"{self._stage.name[:13]}-{number}"
        self._stage.callback(SharedNamespace(table).remove)
        host = self._hosts[number] if self._hosts else None
        url = f"redis://{host.here}:{_PORT}/0" if host else f"unix://{self._socket}"
        self._run(f"follower {number}", "follow", "--from", url, "--as", table, there=host.run if host else ())
        return EliminationReader(table, wait=PATIENCE)

    def _run(self, role: str, *arguments: str, there: tuple[str, ...] = ()) -> None:
        shared = ("--name", self._stage.name, "--password-file", f"{self._stage.home}/password")
        self._processes[role] = self._stage.start(*there, sys.executable, "-m", "shmelim", *arguments, *shared)

    def _restart(self, role: str) -> None:
        before = self._processes[role]
        end(before)
        self._processes[role] = self._stage.start(*cast("tuple[str, ...]", before.args))


def _position(reader: EliminationReader) -> tuple[int, int]:
    """Return in which line a follower is, and how far."""
    position = reader.position
    return (0, 0) if position is None else (position.line, position.seq)


def _record(number: int) -> dict[str, Any]:
    return generate_row(f"5{number:047d}", 11.5, "MAX_TOTAL_DRAWDOWN", 1_700_000_000_000 + number)
