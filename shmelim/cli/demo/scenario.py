"""What happens in the demo: changes, a kill without warning, the next writer, and what became of it all."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import TYPE_CHECKING, Any, Final

import psutil

from shmelim.cli.demo.processes import Crowd, ServerProcess, signals_deferred
from shmelim.cli.demo.records import Cast, make_record
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.files import format as files
from shmelim.eliminations.record import decode
from shmelim.eliminations.store.history import read_events
from shmelim.errors import ChannelError, OutcomeUnknownError, ShmelimError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shmelim.cli.demo.watcher import Tally

BEFORE, KILLING, DEAD, AFTER = "before", "killing", "dead", "after"
"""What the readers are told to count for: the writer serves, is about to be killed, is dead, has a successor."""

_ADDS: Final = 40
_REMOVES: Final = 10
_ADDS_BEFORE_KILL: Final = 25
_FIRST_PART: Final = 0.5
_SECOND_PART: Final = 0.9
_ENDING: Final = 30.0


@dataclass
class Findings:
    """Everything that was measured; None and empty lists are what was not."""

    tallies: list[Tally] = field(default_factory=list)
    add_seconds: list[float] = field(default_factory=list)
    sync_seconds: list[float] = field(default_factory=list)
    sync_records: int | None = None
    removes: int = 0
    acknowledged: int = 0
    late: int = 0
    lost_while_dead: int | None = None
    lost_after_restart: int | None = None
    lost_at_the_end: int | None = None
    lost_in_history: int | None = None
    unknown_outcomes: int = 0
    kill_to_first_ms: float | None = None
    start_to_first_ms: float | None = None
    departed: int = 0
    filesystem: str | None = None


class Ledger:
    """What the server acknowledged, and therefore must be there.

    A change whose outcome nobody knows, because the server was killed in the middle of it, may be there or not.
    """

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.doubt: tuple[str, dict[str, Any] | None] | None = None
        self.events: list[tuple[str, str, int]] = []

    def put(self, record: dict[str, Any]) -> None:
        """Enter an acknowledged record."""
        self.records[record["hotkey"]] = record
        self.events.append(("put", record["hotkey"], record["serial"]))

    def drop(self, hotkey: str) -> None:
        """Enter an acknowledged removal."""
        self.events.append(("remove", hotkey, self.records.pop(hotkey)["serial"]))

    def replace(self, records: list[dict[str, Any]]) -> None:
        """Enter an acknowledged sync."""
        stay = {record["hotkey"] for record in records}
        for hotkey in [hotkey for hotkey in self.records if hotkey not in stay]:
            self.drop(hotkey)
        for record in records:
            self.put(record)

    def missing_from(self, state: dict[str, dict[str, Any]]) -> int:
        """Return of how many hotkeys a state says something else than was acknowledged."""
        hotkeys = set(self.records) | set(state)
        return sum(not self._allows(hotkey, state.get(hotkey)) for hotkey in hotkeys)

    def _allows(self, hotkey: str, found: dict[str, Any] | None) -> bool:
        if found == self.records.get(hotkey):
            return True
        return self.doubt is not None and self.doubt == (hotkey, found)

    def missing_from_history(self, events: set[tuple[str, str, int]]) -> int:
        """Return how many acknowledged changes a history does not tell of."""
        return sum(event not in events for event in self.events)

    def settle(self, state: dict[str, dict[str, Any]]) -> None:
        """Take the change in doubt for made, or not, as a state says."""
        if self.doubt is not None:
            hotkey, record = self.doubt
            if record is not None and state.get(hotkey) == record:
                self.put(record)
            self.doubt = None


class Scenario:
    """One run of the demo in a directory and under a name of its own.

    Parameters
    ----------
    name
        The name to serve.
    home
        A directory for the state and everything else.
    departed
        The file of real departed hotkeys.
    seconds
        About how long it takes.
    readers
        How many reader processes.
    tell
        Called with what happens now.

    """

    def __init__(
        self, name: str, home: Path, departed: Path, seconds: float, readers: int, tell: Callable[[str], Any]
    ) -> None:
        self._name, self._home, self._departed = name, home, departed
        self._seconds, self._count, self._tell = seconds, readers, tell
        self._server: ServerProcess | None = None
        self._crowd: Crowd | None = None
        self._client: EliminationClient | None = None
        self._ledger = Ledger()
        self._serials = count(1)
        self._stamp = 0
        self.findings = Findings(filesystem=_filesystem(home))

    def run(self) -> Findings:
        """Play it and return what was measured."""
        began = time.monotonic()
        found = files.read_departed(self._departed)
        if found is None:
            raise ShmelimError(f"{self._departed} does not exist", hint="install the package with its data")
        cast = Cast.of([hotkey for hotkey, _ in found.items.items()])
        self._singles = cycle(cast.single)
        self._cast = cast
        self._tell("starting a server")
        self._server = self._start_server()
        self._server.wait_ready()
        self._client = self._connect()
        self.findings.departed = self._client.num_departed_hotkeys
        self._sync()
        self._tell(f"starting {self._count} readers")
        with signals_deferred():
            self._crowd = Crowd(self._name, cast, self._count)
        self._crowd.gather("attached")
        self._crowd.enter(BEFORE)
        self._tell("adding, removing and syncing under the eyes of the readers")
        self._change_until(began + self._seconds * _FIRST_PART)
        killed_ns = self._kill()
        self._take_over(killed_ns)
        self._tell("adding, removing and syncing with the second writer")
        self._change_until(began + self._seconds * _SECOND_PART)
        self._tell("counting")
        self.findings.tallies = self._crowd.report()
        self.findings.lost_at_the_end = self._ledger.missing_from(self._client.eliminations)
        self._server.close()
        self._read_history()
        self.findings.acknowledged = len(self.findings.add_seconds) + self.findings.removes
        self.findings.acknowledged += len(self.findings.sync_seconds)
        return self.findings

    def close(self) -> None:
        """End every process. Idempotent."""
        for part in (self._client, self._crowd, self._server):
            if part is not None:
                part.close()

    # ------------------------------------------------------------------ changes

    def _start_server(self) -> ServerProcess:
        with signals_deferred():
            # Kept here too: once signals have effect again, whoever cleans up must know of it.
            self._server = server = ServerProcess(self._name, self._home, self._departed)
        return server

    def _connect(self) -> EliminationClient:
        return EliminationClient(self._name, runtime_base=self._home / "run" / "shmelim")

    def _change_until(self, deadline: float) -> None:
        """Add, remove and sync in turn, at least once each."""
        while True:
            for _ in range(_ADDS):
                self._add(next(self._singles))
            present = [hotkey for hotkey in self._cast.single if hotkey in self._ledger.records]
            for hotkey in present[:_REMOVES]:
                self._remove(hotkey)
            self._sync()
            if time.monotonic() >= deadline:
                return

    def _add(self, hotkey: str) -> None:
        assert self._client is not None
        record = make_record(hotkey, self._stamp, next(self._serials))
        self._ledger.doubt = (hotkey, record)
        began = time.perf_counter()
        try:
            self._client.add_elimination(hotkey, record)
        except OutcomeUnknownError:
            self.findings.unknown_outcomes += 1
            raise
        except ChannelError:
            self._ledger.doubt = None
            raise
        self.findings.add_seconds.append(time.perf_counter() - began)
        self._ledger.doubt = None
        self._ledger.put(record)
        self.findings.late += self._client.get_elimination(hotkey) != record

    def _remove(self, hotkey: str) -> None:
        assert self._client is not None
        self._client.remove_elimination(hotkey)
        self._ledger.drop(hotkey)
        self.findings.removes += 1
        self.findings.late += self._client.is_hotkey_eliminated(hotkey)

    def _sync(self) -> None:
        """Write every record anew with the next stamp, and let the other camp be eliminated."""
        assert self._client is not None
        cast, present = self._cast, self._ledger.records
        self._stamp += 1
        camp = cast.odd if self._stamp % 2 else cast.even
        others = [hotkey for hotkey in (*cast.single, cast.first) if hotkey in present]
        serial = next(self._serials)
        records = [make_record(hotkey, self._stamp, serial) for hotkey in (*cast.steady, *camp, *others)]
        began = time.perf_counter()
        self._client.sync_eliminations(records)
        self.findings.sync_seconds.append(time.perf_counter() - began)
        self.findings.sync_records = len(records)
        self._ledger.replace(records)
        self.findings.late += self._ledger.missing_from(self._client.eliminations) > 0

    # ------------------------------------------------------------------ the kill, and what comes after

    def _kill(self) -> int:
        """Kill the server in the middle of a stream of changes; returns when, by the monotonic clock."""
        assert self._server is not None
        assert self._crowd is not None
        assert self._client is not None
        self._tell(f"killing the server, process {self._server.pid}, in the middle of changes")
        self._crowd.enter(KILLING)
        enough, surprises = threading.Event(), []

        def stream() -> None:
            try:
                for number in count():
                    if number == _ADDS_BEFORE_KILL:
                        enough.set()
                    self._add(next(self._singles))
            except ChannelError:
                pass
            except Exception as error:
                surprises.append(error)
            finally:
                enough.set()

        adding = threading.Thread(target=stream, name="shmelim-demo-adds", daemon=True)
        adding.start()
        enough.wait()
        killed_ns = self._server.kill()
        adding.join(_ENDING)
        if surprises:
            raise surprises[0]
        if adding.is_alive():
            raise ShmelimError("a change that was under way when the server was killed has not ended")
        self._crowd.enter(DEAD)
        self.findings.lost_while_dead = self._ledger.missing_from(self._client.eliminations)
        return killed_ns

    def _take_over(self, killed_ns: int) -> None:
        """Start the next server and time its first change, as the readers see it."""
        assert self._server is not None
        assert self._crowd is not None
        assert self._client is not None
        self._tell("starting the next server")
        self._client.close()
        self._server.close()
        self._crowd.look_out_for(self._cast.first)
        self._server = self._start_server()
        self._server.wait_ready()
        self._client = self._connect()
        recovered = self._client.eliminations
        doubtful, self._ledger.doubt = self._ledger.doubt, None
        self._add(self._cast.first)
        self._ledger.doubt = doubtful
        # The first change is made before the old ones are looked for: it is being timed.
        recovered[self._cast.first] = self._ledger.records[self._cast.first]
        self.findings.lost_after_restart = self._ledger.missing_from(recovered)
        self._ledger.settle(recovered)
        seen_ns = min(self._crowd.gather("seen"))
        self.findings.kill_to_first_ms = (seen_ns - killed_ns) / 1e6
        self.findings.start_to_first_ms = (seen_ns - self._server.started_ns) / 1e6
        self._crowd.enter(AFTER)

    def _read_history(self) -> None:
        """Look for every acknowledged change in the store, which the second server has closed."""
        told: set[tuple[str, str, int]] = set()
        for event in read_events(self._home / "state", limit=None):
            if event.hotkey is None:
                continue
            if event.new is not None:
                told.add(("put", event.hotkey, decode(event.new)["serial"]))
            elif event.old is not None:
                told.add(("remove", event.hotkey, decode(event.old)["serial"]))
        self.findings.lost_in_history = self._ledger.missing_from_history(told)


def add_rate(seconds: list[float]) -> float | None:
    """Return how many a second, one after the other, took these times."""
    return len(seconds) / sum(seconds) if seconds else None


def median_ms(seconds: list[float]) -> float | None:
    """Return the median in milliseconds."""
    return statistics.median(seconds) * 1e3 if seconds else None


def _filesystem(directory: Path) -> str | None:
    """Return the kind of file system a directory is on, if that can be found out."""
    resolved = f"{directory.resolve()}/"
    found = {
        partition.mountpoint: partition.fstype
        for partition in psutil.disk_partitions(all=True)
        if resolved.startswith(f"{partition.mountpoint.rstrip('/')}/")
    }
    return found[max(found, key=len)] if found else None
