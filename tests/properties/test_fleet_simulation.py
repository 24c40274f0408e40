"""Publishers, followers and an engine that does its worst, in one thread: a fleet keeps its promises.

And what it would do without one of its parts is found.
"""

from __future__ import annotations

from collections import Counter

import pytest
from fleet_world import World
from memory_engine import MemoryEngine
from msgspec import structs

from shmelim.fleet.cuts import Facts
from shmelim.fleet.engine import Id
from shmelim.fleet.follower import Follower
from shmelim.fleet.messages import pack, unpack_head, unpack_message
from shmelim.fleet.publisher import Publisher

STEPS = 250
SHORT = range(100)


def run(seed: int, engine: type[MemoryEngine] = MemoryEngine) -> World:
    world = World(seed, engine)
    try:
        world.storm(STEPS)
        world.calm()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    return world


def run_all(seeds: range) -> Counter[str]:
    faults: Counter[str] = Counter()
    for seed in seeds:
        world = run(seed)
        faults += world.faults
        faults["calls"] += world.steps
        faults["snapshots taken"] += sum(table.replaced for table in world.tables)
    return faults


def test_what_a_fleet_promises_holds():
    faults = run_all(SHORT)
    # A storm that never blew proves nothing.
    for name in (
        "killed",
        "errors",
        "fenced",
        "lost tail",
        "flushed",
        "evicted",
        "head lost",
        "full",
        "scribbled",
        "clock set",
        "restored",
        "moved",
    ):
        assert faults[name] > 0, name


@pytest.mark.long
def test_it_holds_for_thousands_of_seeds():
    print(dict(run_all(range(1000, 4000))))


def found(message: str, seeds: range = range(300), engine: type[MemoryEngine] = MemoryEngine) -> None:
    """Fail unless one of the seeds shows this."""
    for seed in seeds:
        try:
            run(seed, engine)
        except AssertionError as error:
            if message in str(error):
                return
    raise AssertionError(f"no seed found that {message}")


class Unfenced(MemoryEngine):
    """Takes whatever comes, and counts it on."""

    def commit(self, expected, head, entry, keep=None):
        self.before("commit")
        state = self.state
        last = state.log[-1][0] if state.log else entry[0]
        state.head = pack(structs.replace(unpack_head(head), last=Id(last.term, last.number + 1)))
        state.log.append((Id(last.term, last.number + 1), entry[1]))
        return True


def test_without_fencing_it_is_found(monkeypatch):
    def whatever_comes(_self, entries, line):
        for number, raw in entries:
            message = unpack_message(raw)
            if message.line == line:
                yield number, message

    monkeypatch.setattr(Publisher, "_leads", lambda self, look: True)
    monkeypatch.setattr(Publisher, "_not_fenced", lambda self, head: None)
    monkeypatch.setattr(Follower, "_messages", whatever_comes)
    found("never was", engine=Unfenced)


def test_without_lines_it_is_found(monkeypatch):
    monkeypatch.setattr(Facts, "continues", lambda self, run, seq: True)
    monkeypatch.setattr(Follower, "_is_another_history", staticmethod(lambda message, applied: False))
    monkeypatch.setattr(Follower, "_lose", lambda self, why: None)
    found("store")


def test_a_naive_age_is_found(monkeypatch):
    def when_it_was_asked(self, number, as_of):
        return self._clocks[-1][0] if self._clocks else None

    monkeypatch.setattr(Follower, "_moment_of", when_it_was_asked)
    found("an age is too young")


def test_the_engines_clock_alone_is_not_enough(monkeypatch):
    def by_the_last_look(self, number, as_of):
        if not self._clocks:
            return None
        asked, ms, _ = self._clocks[-1]
        return min(asked - (ms - as_of) * 1_000_000, asked)

    monkeypatch.setattr(Follower, "_moment_of", by_the_last_look)
    found("an age is too young")


def test_a_log_that_ends_before_the_snapshot_is_found(monkeypatch):
    keep = Publisher._keep

    def trim_all(self, look):
        keep(self, look)
        if self.head is not None:
            self._engine.trim(self.head.last)

    monkeypatch.setattr(Publisher, "_keep", trim_all)
    found("takes snapshots")
