"""What happens in the demo: changes, a kill without warning, the next server, and what became of it all."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, cycle
from pathlib import Path
from statistics import median
from typing import Any, Final

from shmelim.cli.demo.reader import REAL_HOTKEYS, cast, make_record
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.record import decode
from shmelim.eliminations.store.store import Store
from shmelim.errors import OutcomeUnknownError, ShmelimError

ENDING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE: Final = 60.0


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let an ending signal take effect at the end of the block, which starts processes or cleans up."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda it, _: came.append(it)) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


class Process(subprocess.Popen[str]):
    """The package once more, as server or reader, in a group of its own: Ctrl-C reaches the demo alone."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self._log = home / "log"
        self.started_ns = self.killed_ns = time.monotonic_ns()
        about: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        about["env"] = {**os.environ, "XDG_RUNTIME_DIR": str(home / "run")}
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", *arguments]
            super().__init__(command, stderr=log, text=True, process_group=0, **about)

    def hear(self) -> str:
        """Return the next line that it says; ShmelimError where it ends, or is silent for a minute."""
        assert self.stdout is not None
        waiting = select.poll()
        waiting.register(self.stdout, select.POLLIN)
        if waiting.poll(1000 * _PATIENCE) and (line := self.stdout.readline()):
            return line
        said = self._log.read_text(errors="replace").splitlines() or ["it said nothing"]
        raise ShmelimError(f"process {self.pid} of the demo ended or hangs: {said[-1]}")

    def ask(self) -> None:
        """Send it a line; if it has died, that shows when its answer is waited for."""
        with contextlib.suppress(OSError):
            print(file=self.stdin, flush=True)

    def kill(self) -> None:
        """Kill it without warning; returns once it is dead."""
        self.killed_ns = time.monotonic_ns()
        super().kill()
        self.wait()

    def close(self) -> None:
        """End it, if it still runs. Idempotent."""
        self.terminate()
        try:
            self.communicate(timeout=10)
        except (subprocess.TimeoutExpired, ValueError):
            self.kill()


class Ledger:
    """What the server acknowledged and therefore must be there.

    The add that was under way when the server was killed is in doubt: it may be there or not.
    """

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.doubt: dict[str, Any] | None = None
        self.events: list[tuple[str, str, int]] = []

    def put(self, *records: dict[str, Any]) -> None:
        """Enter acknowledged records."""
        for record in records:
            self.records[record["hotkey"]] = record
            self.events.append(("put", record["hotkey"], record["serial"]))

    def drop(self, *hotkeys: str) -> None:
        """Enter acknowledged removals."""
        self.events += [("remove", hotkey, self.records.pop(hotkey)["serial"]) for hotkey in hotkeys]

    def lost(self, state: dict[str, dict[str, Any]]) -> int:
        """Return for how many hotkeys a state differs from what was acknowledged."""
        doubt = {} if self.doubt is None else {self.doubt["hotkey"]: self.doubt}
        differing = [hotkey for hotkey in self.records | state if state.get(hotkey) != self.records.get(hotkey)]
        return sum(hotkey not in doubt or state.get(hotkey) != doubt[hotkey] for hotkey in differing)

    def settle(self, state: dict[str, dict[str, Any]]) -> None:
        """Take the change in doubt for made, or not, as a state says."""
        if self.doubt is not None and state.get(self.doubt["hotkey"]) == self.doubt:
            self.put(self.doubt)
        self.doubt = None


class Scenario:
    """One run of the demo, under a name and in a directory of its own; ``narrate`` hears what happens now."""

    def __init__(self, name: str, home: Path, seconds: float, readers: int) -> None:
        self._name, self._home, self._seconds, self._count = name, home, seconds, readers
        self.narrate: Callable[[str], object] = str
        self._open: list[Process | EliminationClient] = []
        self._parts = cast()
        self._singles, self._serials, self._stamp = cycle(self._parts.single), count(1), 0
        self._ledger = Ledger()
        self._counts: Counter[str] = Counter()
        self._sync_ms: list[float] = []

    def run(self) -> dict[str, Any]:
        """Play it; returns ``invariants``, ``figures`` and what each of the ``readers`` counted."""
        began, ledger = time.monotonic(), self._ledger
        self.narrate("starting a server")
        (self._home / "run").mkdir(mode=0o700)
        self._start_server()
        departed = self._client.num_departed_hotkeys
        self._sync()
        self.narrate(f"starting readers: {self._count}")
        self._readers = [self._start("shmelim.cli.demo.reader", self._name) for _ in range(self._count)]
        self._ask()
        self.narrate("adding, removing and syncing under the readers' eyes")
        self._change_until(began + 0.5 * self._seconds)
        self.narrate(f"killing the server, process {self._server.pid}, in the middle of changes")
        self._kill_amid_adds()
        idle = sum(not tally["round"] for tally in self._ask())
        lost_while_dead = ledger.lost(self._client.eliminations)
        self.narrate("starting the next server")
        killed_ns = self._server.killed_ns
        self._start_server()
        # The first change is timed, so it is made before the old ones are looked for.
        recovered = self._client.eliminations
        first = make_record(self._parts.first, self._stamp, next(self._serials))
        self._client.add_elimination(self._parts.first, first)
        serving_ns = time.monotonic_ns()
        blind = sum(not tally["sees_first"] for tally in self._ask())
        lost_by_restart = ledger.lost(recovered)
        ledger.settle(recovered)
        ledger.put(first)
        self.narrate("adding, removing and syncing with the second server")
        self._change_until(began + 0.9 * self._seconds)
        self.narrate("counting")
        tallies = self._ask()
        lost_by_the_end = ledger.lost(self._client.eliminations)
        self._server.close()
        seen: Counter[str] = Counter()
        for tally in tallies:
            seen.update({key: value for key, value in tally.items() if key != "errors"})
        return {
            "invariants": {
                "no record was torn": seen["torn"],
                "no snapshot and no batch of checks mixed two syncs": seen["mixed"],
                "no answer was wrong": seen["wrong"],
                "no reader saw the version go back": seen["backwards"],
                "no read failed": seen["failed"],
                "every reader read on while no server lived": idle,
                "every reader saw the next server's first change": blind,
                "every change was visible when its call returned": self._counts["late"],
                "no acknowledged change was lost while no server lived": lost_while_dead,
                "no acknowledged change was lost by the restart": lost_by_restart,
                "no acknowledged change was lost by the end": lost_by_the_end,
                "every acknowledged change is in the history": self._lost_in_history(),
            },
            "figures": {
                "readers": self._count,
                "checks_per_second": sum(1e9 * it["checks"] / it["checking_ns"] for it in tallies),
                "checks": seen["checks"],
                "snapshots": seen["snapshots"],
                "reads_overtaken_and_done_again": seen["retries"],
                "departed_hotkeys": departed,
                "durable_adds": self._counts["adds"],
                "durable_adds_per_second": 1e9 * self._counts["adds"] / self._counts["adding_ns"],
                "removes": self._counts["removes"],
                "syncs": len(self._sync_ms),
                "sync_records": self._sync_records,
                "sync_median_ms": median(self._sync_ms),
                "kill_to_next_change_ms": (serving_ns - killed_ns) / 1e6,
                "next_server_to_its_first_change_ms": (serving_ns - self._server.started_ns) / 1e6,
            },
            "readers": tallies,
        }

    def close(self) -> None:
        """End every process. Idempotent."""
        for each in reversed(self._open):
            each.close()

    def _start(self, *arguments: str) -> Process:
        with signals_held():
            self._open.append(process := Process(self._home, *arguments))
        return process

    def _start_server(self) -> None:
        # On a port: the path of a socket below a long TMPDIR may be too long.
        # Nothing is to be remembered of it.
        given = [
            "--registry",
            "off",
            "--name",
            self._name,
            "--state-dir",
            self._home / "state",
            "--default-departed",
            REAL_HOTKEYS,
        ]
        self._server = self._start("shmelim", "serve", "--port", "0", "--ready-fd", "1", *map(str, given))
        self._server.hear()
        self._client = EliminationClient(self._name, runtime_base=self._home / "run" / "shmelim")
        self._open.append(self._client)

    def _ask(self) -> list[dict[str, Any]]:
        """Return what each reader has counted, after another round."""
        for reader in self._readers:
            reader.ask()
        return [json.loads(reader.hear()) for reader in self._readers]

    def _change_until(self, deadline: float) -> None:
        """Add, remove and sync in turn, at least once each."""
        while True:
            for _ in range(40):
                self._add()
            for hotkey in [hotkey for hotkey in self._parts.single if hotkey in self._ledger.records][:10]:
                self._client.remove_elimination(hotkey)
                self._ledger.drop(hotkey)
                self._counts["removes"] += 1
                self._counts["late"] += self._client.is_hotkey_eliminated(hotkey)
            self._sync()
            if time.monotonic() >= deadline:
                return

    def _add(self) -> None:
        record = make_record(next(self._singles), self._stamp, next(self._serials))
        began = time.perf_counter_ns()
        try:
            self._client.add_elimination(record["hotkey"], record)
        except OutcomeUnknownError:
            self._ledger.doubt = record
            raise
        self._counts["adding_ns"] += time.perf_counter_ns() - began
        self._counts["adds"] += 1
        self._ledger.put(record)
        self._counts["late"] += self._client.get_elimination(record["hotkey"]) != record

    def _sync(self) -> None:
        """Write every record anew with the next stamp, and let the other camp be eliminated."""
        parts, ledger = self._parts, self._ledger
        self._stamp += 1
        camp = parts.odd if self._stamp % 2 else parts.even
        others = [hotkey for hotkey in (*parts.single, parts.first) if hotkey in ledger.records]
        serial = next(self._serials)
        records = [make_record(hotkey, self._stamp, serial) for hotkey in (*parts.steady, *camp, *others)]
        self._sync_records, began = len(records), time.perf_counter()
        self._client.sync_eliminations(records)
        self._sync_ms.append(1e3 * (time.perf_counter() - began))
        ledger.drop(*(ledger.records.keys() - {record["hotkey"] for record in records}))
        ledger.put(*records)
        self._counts["late"] += ledger.lost(self._client.eliminations)

    def _kill_amid_adds(self) -> None:
        killer = threading.Thread(target=self._server.kill, name="shmelim-demo-killer")
        for _ in range(25):
            self._add()
        killer.start()
        with contextlib.suppress(ConnectionError):  # the server is dead
            while True:
                self._add()
        killer.join()

    def _lost_in_history(self) -> int:
        """Look for every acknowledged change in the store, which the second server has closed."""
        told = set()
        with Store.read_only(self._home / "state") as store:
            events = store.events(limit=None)
        for event in events:
            if event.hotkey is not None and (record := event.new or event.old) is not None:
                action = "remove" if event.new is None else "put"
                told.add((action, event.hotkey, decode(record)["serial"]))
        return sum(event not in told for event in self._ledger.events)
