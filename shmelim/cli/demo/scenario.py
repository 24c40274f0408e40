"""What happens in the demo: changes, a kill without warning, the next server, and what became of it all."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import count, cycle
from statistics import median
from typing import Any

from shmelim.cli.demo.reader import REAL_HOTKEYS, cast, make_record
from shmelim.cli.demo.stage import PATIENCE, Stage
from shmelim.eliminations.record import decode
from shmelim.eliminations.store.store import Store
from shmelim.errors import OutcomeUnknownError


class Ledger:
    """What the server acknowledged and therefore must be there.

    The add that was under way when the server was killed is in doubt: it may be there or not.
    """

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.doubt: dict[str, dict[str, Any]] = {}
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
        differing = [hotkey for hotkey in self.records | state if state.get(hotkey) != self.records.get(hotkey)]
        return sum(state.get(hotkey) != self.doubt.get(hotkey, {}) for hotkey in differing)

    def settle(self, state: dict[str, dict[str, Any]]) -> None:
        """Take the change in doubt for made, or not, as a state says."""
        self.put(*(record for hotkey, record in self.doubt.items() if state.get(hotkey) == record))
        self.doubt.clear()


class Scenario:
    """One run of the demo on a stage, of about so many seconds and with so many readers."""

    def __init__(self, stage: Stage, seconds: float, readers: int) -> None:
        self._stage, self._seconds, self._count = stage, seconds, readers
        self._parts = cast()
        self._singles, self._serials, self._stamp = cycle(self._parts.single), count(1), 0
        self._ledger = Ledger()
        self._counts: Counter[str] = Counter()
        self._sync_ms: list[float] = []

    def run(self) -> dict[str, Any]:
        """Play it; returns ``invariants``, ``figures`` and what each of the ``readers`` counted."""
        began, ledger, narrate = time.monotonic(), self._ledger, self._stage.narrate
        narrate("starting a server")
        self._serve()
        departed = self._client.num_departed_hotkeys
        self._sync()
        narrate(f"starting readers: {self._count}")
        reader = (sys.executable, "-m", "shmelim.cli.demo.reader", self._stage.name)
        self._readers = [self._stage.start(*reader, stdout=subprocess.PIPE) for _ in range(self._count)]
        self._ask()
        narrate("adding, removing and syncing under the readers' eyes")
        self._change_until(began + 0.5 * self._seconds)
        narrate(f"killing the server, process {self._server.pid}, in the middle of changes")
        killed = self._kill_amid_adds()
        idle = sum(not tally["round"] for tally in self._ask())
        lost_while_dead = ledger.lost(self._client.eliminations)
        narrate("starting the next server")
        started = time.monotonic()
        self._serve()
        # The first change is timed, so it is made before the old ones are looked for.
        recovered = self._client.eliminations
        first = make_record(self._parts.first, self._stamp, next(self._serials))
        self._client.add_elimination(self._parts.first, first)
        changed = time.monotonic()
        blind = sum(not tally["sees_first"] for tally in self._ask())
        lost_by_restart = ledger.lost(recovered)
        ledger.settle(recovered)
        ledger.put(first)
        narrate("adding, removing and syncing with the second server")
        self._change_until(began + 0.9 * self._seconds)
        narrate("counting")
        tallies = self._ask()
        lost_by_the_end = ledger.lost(self._client.eliminations)
        self._server.terminate()
        self._server.wait(PATIENCE)
        counted = ("torn", "mixed", "wrong", "backwards", "failed", "checks", "snapshots", "retries")
        seen = {what: sum(tally.get(what, 0) for tally in tallies) for what in counted}
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
                "kill_to_next_change_ms": 1e3 * (changed - killed),
                "next_server_to_its_first_change_ms": 1e3 * (changed - started),
            },
            "readers": tallies,
        }

    def _serve(self) -> None:
        self._server, self._client = self._stage.serve("--default-departed", str(REAL_HOTKEYS))

    def _ask(self) -> list[dict[str, Any]]:
        """Return what each reader has counted, after another round."""
        for reader in self._readers:
            assert reader.stdin is not None
            with contextlib.suppress(OSError):  # that it has died shows when its answer is waited for
                reader.stdin.write(b"\n")
        return [json.loads(self._stage.hear(reader)) for reader in self._readers]

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
            self._ledger.doubt[record["hotkey"]] = record
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

    def _kill_amid_adds(self) -> float:
        """Kill the server; returns when."""
        for _ in range(25):
            self._add()
        killed = time.monotonic()
        threading.Thread(target=self._server.kill).start()
        with contextlib.suppress(ConnectionError):  # the server is dead
            while True:
                self._add()
        self._server.wait()
        return killed

    def _lost_in_history(self) -> int:
        """Look for every acknowledged change in the store, which the second server has closed."""
        with Store.read_only(self._stage.home / "state") as store:
            told = {
                ("remove" if event.new is None else "put", event.hotkey, decode(record)["serial"])
                for event in store.events(limit=None)
                if event.hotkey is not None and (record := event.new or event.old) is not None
            }
        return sum(event not in told for event in self._ledger.events)
