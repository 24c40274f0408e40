"""The run: every contender with every number of records, and the duels; what is not measured is noted with why."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import traceback
from typing import TYPE_CHECKING, Any

from bench import around, machine, worker
from bench.crew import CORES, Crew, Process, WorkerError, place_for
from bench.peers import LABELS, NAMES, load
from bench.plan import DUELS_WITH
from bench.verdicts import verdicts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.peers.base import Peer
    from bench.plan import Plan

__all__ = ["Run"]

_HEAD_START = 0.03
_SMALL = 256
_SLACK = 60.0


@dataclasses.dataclass
class Run:
    """One run and what it found.

    Parameters
    ----------
    plan
        What to measure.
    names
        Which contenders.
    say
        Told what is being done.

    """

    plan: Plan
    names: Sequence[str] = NAMES
    say: Callable[[str], Any] = print
    cells: list[dict] = dataclasses.field(default_factory=list)
    duels: list[dict] = dataclasses.field(default_factory=list)
    scaling: list[dict] = dataclasses.field(default_factory=list)
    skipped: list[dict] = dataclasses.field(default_factory=list)
    failed: list[dict] = dataclasses.field(default_factory=list)
    peers: dict[str, dict] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    _classes: dict[str, type[Peer]] = dataclasses.field(default_factory=dict)

    def run(self) -> dict:
        """Measure everything, and return what is written to results.json."""
        began = time.monotonic()
        about = {**machine.describe(), "pinned": len(CORES) > 1}
        before = machine.load()
        self._meet()
        for size in self.plan.sizes:
            for name in self.names:
                if name in self._classes and name != "shmelim-pure":
                    with self._part(f"{name}, {size}"):
                        self._compare(name, size)
        with self._part("durable syncs"):
            self._durable_syncs()
        beside, costs = {}, {}
        with self._part("around a check"):
            self.say("around a check: import, waiting")
            beside = {"import": around.importing(), "waking": around.waking()}
        for size in self.plan.changed:
            self.say(f"what changes cost, {size:,} records")
            with self._part(f"changes, {size}"):
                from bench import changes  # whose peers a run without it does not need

                costs[str(size)] = changes.costs(size)
        results = {
            "machine": {**about, "load_before": before, "load_after": machine.load()},
            "plan": dataclasses.asdict(self.plan),
            "peers": self.peers,
            "cells": self.cells,
            "duels": self.duels,
            "scaling": self.scaling,
            "around": beside,
            "changes": costs,
            "skipped": self.skipped,
            "failed": self.failed,
            "seconds": {**self.seconds, "all": round(time.monotonic() - began, 1)},
        }
        results["verdicts"] = verdicts(results)
        return results

    @property
    def _smallest(self) -> int | None:
        """The smallest of the sizes, if it is one for what a large state would only make slow."""
        return next((size for size in sorted(self.plan.sizes) if size <= 10_000), None)

    @contextlib.contextmanager
    def _part(self, what: str) -> Iterator[None]:
        """Measure a part of the run; one that fails leaves the others whole."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed.append({"part": what, "why": f"{type(error).__name__}: {error}"})
        self.seconds[what] = round(time.monotonic() - began, 1)

    def _skip(self, peer: str, why: str, **where: Any) -> None:
        self.skipped.append({"peer": peer, "why": why, **where})
        self.say(f"    skipped: {why}")

    def _meet(self) -> None:
        """Find out who is there."""
        for name in self.names:
            about: dict[str, Any] = {"label": LABELS[name]}
            self.peers[name] = about
            try:
                peer = load(name)
                missing = peer.missing()
            except ImportError as error:
                missing = f"not installed: {error.name} (pip install 'shmelim[bench]')"
            if missing is None:
                self._classes[name] = peer
                about |= {"version": peer.version(), "how": peer.how, "limits": peer.limits}
            else:
                about["missing"] = missing
                self.say(f"{LABELS[name]}: missing, {missing}")

    def _compare(self, name: str, size: int) -> None:
        self.say(f"{LABELS[name]}, {size:,} records")
        peer = self._classes[name]
        why = peer.too_much(size)
        if why is not None:
            self._skip(name, why, size=size)
            return
        with (
            place_for(size) as place,
            Crew(name, place, peer.environment) as crew,
            contextlib.suppress(_Noted),
            self._noting(name, size=size),
        ):
            crew.open(self.plan.fill_seconds)
            self._measure(crew, name)
            if name == "shmelim":
                self._measure_ourselves(crew)
            if size == self._smallest and not peer.durable and name != "cache":
                self._sync(crew)

    def _measure(self, crew: Crew, name: str) -> None:
        """Measure one view of a running host, with ever more readers."""
        peer, size = self._classes[name], crew.place.size
        counts = self.plan.reader_counts(size, own_copies=peer.own_copies)
        # All at once, since they start side by side; those that are not needed yet wait in their pipe.
        crew.add_readers(max(counts), self.plan.fill_seconds, name=name, environment=peer.environment)
        for count in self.plan.readers:
            if count not in counts:
                why = f"each reader has its own {size:,} records, so {count} take {count} times the memory"
                self._skip(name, why, size=size, readers=count)
                continue
            self._measure_with(crew, name, count, None)
            with crew.writing(count) as writing:
                cells = self._measure_with(crew, name, count, writing)
            for cell in cells:
                cell["written_per_second"] = writing["per_second"]

    def _measure_with(self, crew: Crew, name: str, count: int, writing: dict | None) -> list[dict]:
        peer, size = self._classes[name], crew.place.size
        operations = []
        for operation in self.plan.operations(count):
            why = peer.too_much(size, operation)
            if why is not None:
                if count == 1 and writing is None:
                    self._skip(name, why, size=size, operation=operation)
                continue
            if writing is not None and operation == "everything" and crew.place.large:
                why = "takes seconds a call with so many records: measured without a writer only"
                self._skip(name, why, size=size, operation=operation, writer=True)
                continue
            operations.append(operation)
        seconds = self.plan.main_seconds if count == 1 else self.plan.crowd_seconds
        rounds = [
            [_worst(self._together(crew.readers[:count], "sample", each, seconds)) for each in operations]
            for _ in range(self.plan.rounds)
        ]
        about = {"peer": name, "size": size, "readers": count, "writer": writing is not None}
        found = [
            {**about, "operation": operation, **_settled(of_one)}
            for operation, of_one in zip(operations, zip(*rounds, strict=True), strict=True)
        ]
        self.cells += found
        return found

    def _together(self, readers: Sequence[Process], command: str, operation: str, seconds: float) -> list[Any]:
        """Have readers do the same at the same time."""
        # Each warms up before it waits for that moment; who is late begins late.
        begin_at = time.perf_counter() + _HEAD_START * len(readers)
        for process in readers:
            process.tell(command, operation, seconds, begin_at)
        return [process.answer(seconds + _SLACK) for process in readers]

    # ------------------------------------------------------------------ shmelim's own

    def _measure_ourselves(self, crew: Crew) -> None:
        """While its host runs: two readers against one, the pure path, and the duels."""
        size = crew.place.size
        with self._part(f"scaling, {size}"):
            self._scale(crew)
        crew.dismiss_readers()
        if "shmelim-pure" in self._classes:
            self.say(f"{LABELS['shmelim-pure']}, {size:,} records")
            with (
                self._part(f"shmelim-pure, {size}"),
                contextlib.suppress(_Noted),
                self._noting("shmelim-pure", size=size),
            ):
                self._measure(crew, "shmelim-pure")
            crew.dismiss_readers()
        if "dict" in self._classes:
            self.say(f"duels, {size:,} records")
            with self._part(f"duels, {size}"), self._noting("shmelim", size=size, operation="duels"):
                self._fight(crew)

    @contextlib.contextmanager
    def _noting(self, name: str, **where: Any) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            self._skip(name, str(error), **where)
            raise _Noted from None

    def _scale(self, crew: Crew) -> None:
        """Measure the checks of one reader alone and of two together, in turn."""
        crew.add_readers(2, self.plan.fill_seconds)
        both = crew.readers[:2]
        seconds = max(self.plan.crowd_seconds, 0.1)
        for number in range(self.plan.scaling_rounds):
            alone = self._together([both[number % 2]], "rate", "hit", seconds)
            together = self._together(both, "rate", "hit", seconds)
            self.scaling.append({"size": crew.place.size, "alone": alone[0], "together": sum(together)})

    def _fight(self, crew: Crew) -> None:
        place, seconds = crew.place, self.plan.duel_seconds
        with contextlib.ExitStack() as stack:
            names = [name for name in DUELS_WITH if name in self._classes and not place.large]
            crews = self._start(stack, names, place.size)
            others = {other.name: (other.place, other.facts) for other in crews}
            environment = self._classes["shmelim"].environment
            process = stack.enter_context(
                Process("the duels", worker.duellist, place, others, environment=environment, seat=1)
            )
            process.answer(self.plan.fill_seconds)
            quiet = process.ask("duels", seconds, within=40 * seconds + _SLACK)
            with crew.writing() as writing:
                busy = process.ask("brief duels", seconds, within=20 * seconds + _SLACK)
            self.duels += [{**result, "writer": False} for result in quiet]
            self.duels += [
                {**result, "writer": True, "written_per_second": writing["per_second"]} for result in busy
            ]
            if place.size == self._smallest:
                self._keep(process.ask("manager", seconds, within=_SLACK))
                if "base-manager" in others:
                    self._keep(process.ask("lists", 2 * seconds, within=_SLACK))
        if place.size == self._smallest and "base-manager" in self._classes:
            self._fight_with_short_records()

    def _fight_with_short_records(self) -> None:
        """Compare lists whose reply fits into one TCP segment, and so runs into Nagle's algorithm."""
        environment = self._classes["shmelim"].environment
        with contextlib.ExitStack() as stack:
            ours, theirs = self._start(stack, ("shmelim", "base-manager"), _SMALL, short=True)
            others = {theirs.name: (theirs.place, theirs.facts)}
            process = stack.enter_context(
                Process("the duel of lists", worker.duellist, ours.place, others, environment=environment, seat=1)
            )
            process.answer(self.plan.fill_seconds)
            self._keep(process.ask("lists", 2 * self.plan.duel_seconds, within=_SLACK))

    def _start(
        self, stack: contextlib.ExitStack, names: Sequence[str], size: int, *, short: bool = False
    ) -> list[Crew]:
        """Start hosts side by side."""
        crews = []
        for name in names:
            place = stack.enter_context(place_for(size, short=short))
            crews.append(stack.enter_context(Crew(name, place, self._classes[name].environment)))
            crews[-1].start()
        for crew in crews:
            crew.wait(self.plan.fill_seconds)
        return crews

    def _keep(self, found: list[dict]) -> None:
        self.duels += [{**result, "writer": False} for result in found]

    # ------------------------------------------------------------------ syncs

    def _durable_syncs(self) -> None:
        """Measure the syncs of those who can make them durable, on hosts that do."""
        for name, peer in self._classes.items():
            if not peer.durable or name == "shmelim-pure":
                continue
            self.say(f"{LABELS[name]}, durable sync")
            with (
                place_for(_SMALL, durable=True) as place,
                Crew(name, place, peer.environment) as crew,
                contextlib.suppress(_Noted),
                self._noting(name, size=place.size, operation="sync"),
            ):
                crew.open(self.plan.fill_seconds)
                self._sync(crew)

    def _sync(self, crew: Crew) -> None:
        """Measure the replacement of the whole state by a hundred records; there is no other afterwards."""
        size = crew.place.size
        seconds = max(self.plan.main_seconds * 2, 0.2)
        samples = [crew.host.ask("sync", seconds) for _ in range(self.plan.rounds)]
        where = {"peer": crew.name, "size": size, "readers": 0, "writer": False, "operation": "sync"}
        self.cells.append({**where, **_settled(samples)})


class _Noted(Exception):  # noqa: N818
    """What went wrong is noted already."""


def _worst(samples: Sequence[dict]) -> dict:
    """Join what several readers found: of each percentile the worst, of the rates the sum."""
    joined = {}
    for key in ("p50", "p99", "p999"):
        values = [sample[key] for sample in samples]
        joined[key] = None if None in values else max(values)
    return {
        **joined,
        "calls": min(sample["calls"] for sample in samples),
        "rate": sum(sample["rate"] for sample in samples),
        "batched": samples[0]["batched"],
    }


def _settled(rounds: Sequence[dict]) -> dict:
    """Join the rounds of one operation: of each figure the median, and how far the rounds differ."""
    joined: dict[str, Any] = {"spread": {}}
    for key in ("p50", "p99", "p999", "rate"):
        values = [found[key] for found in rounds]
        joined[key] = None if None in values else statistics.median(values)
        joined["spread"][key] = None if None in values else (min(values), max(values))
    return {**joined, "calls": min(found["calls"] for found in rounds), "batched": rounds[0]["batched"]}
