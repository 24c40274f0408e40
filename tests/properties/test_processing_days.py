"""Whole days of a validator with 256 miners, by fixed seeds: everything happens, everything fails now and then.

What must hold at the end is told by a ledger of the simulation's own, which knows what it did to whom.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import signal
import threading
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from crashing import Child, kill_self
from ledger import is_alive
from reference_validator import HOUR, MINUTE, Managed
from reference_validator.scoring import NothingMovedError
from reference_validator.trading import PAIRS
from waiting import PATIENCE, until

from shmelim.eliminations.debts.states import ATTEMPTING, IN_DOUBT
from shmelim.eliminations.rules import deadlines
from shmelim.eliminations.starting import keeping
from shmelim.eliminations.starting.registry import Registry
from shmelim.eliminations.state.changes import lost_hotkeys

if TYPE_CHECKING:
    from collections.abc import Callable

POINTS = [
    "registry", "liquidated", "has failed", "all failed", "clear failed", "in stage", "ledgers", "holdings",
    "holding", "lock", "price", "store", "store!", "cancel", "cancel!", "slash", "slash!",
    "websockets", "slack", "remove", "drop", "drop!", "save stages",
]  # fmt: skip
REASONS = ("PLAGIARISM", "FAILED_CHALLENGE_PERIOD_TIME", "FAILED_CHALLENGE_PERIOD_DRAWDOWN")
# What hangs once, in RPC mode; for longer than a call has there.
STUCK = [
    "registry", "liquidated", "all failed", "in stage", "ledgers", "holdings", "holding", "lock", "price", "store",
    "cancel", "slash", "websockets", "remove",
]  # fmt: skip
# Where the process of a loop is when its owner dies; None: anywhere.
HELD_UP = ["registry", "ledgers", "holdings", "store", "store!", "slash", "slash!", None]
DEADLINE_S = 0.5
LEASE_S = 1.0  # so that an attempt of a process that is gone is soon in doubt
FORK = multiprocessing.get_context("fork")
ODD = (float("nan"), None, 10**400, "text", -0.5, Decimal("0.3"))
RULES = {"LIQUIDATED": "perf ledger", "MAX_TOTAL_DRAWDOWN": "drawdown"}  # of the rest: challenge period
DELAY = 3 * HOUR  # of deletion: so that a day sees many


class Backup(NamedTuple):
    """A copy of the store, and what the simulation knew of it."""

    directory: Path
    seen: set[str]
    unproved: set[str]
    believed: int | None
    departed: list[str]
    first: dict[str, tuple[str, int]]


def die_with_a_living_loop(managed: Managed, point: str | None, go_on: Path, pids: Any) -> None:
    """A validator that is killed while the process of its loop lives on, stopped until it may go on."""
    managed._open()
    # On a busy machine a step may need longer than a day's short deadline; it would be repeated once some time has
    # passed, and time stands still here.
    managed.environment.call_deadline_s = PATIENCE
    loop = FORK.Process(target=managed.manager.run_update_loop)
    held_up = FORK.Value("b", False, lock=False)  # noqa: FBT003

    def hold_up() -> None:
        held_up.value = True
        until(go_on.exists)

    if point is not None:
        managed.validator.faults.at(point, hold_up)
    health = managed.manager._server_proxy.health_check_rpc
    before_ms = health()["last_tick_ms"]
    managed.validator.pass_time(1)
    loop.start()
    # Not every tick passes every point.
    until(lambda: held_up.value or health()["last_tick_ms"] not in (None, before_ms))
    assert loop.pid is not None
    os.kill(loop.pid, signal.SIGSTOP)
    pids.send((loop.pid, bool(held_up.value)))
    kill_self()


class Day:
    """A validator's day, and what the simulation knows of it."""

    def __init__(self, managed: Managed, seed: int, miners: int) -> None:
        self.managed = managed
        self.validator = managed.validator
        self.validator.faults.armed = False
        self.random = random.Random(seed)
        self.validator.register(*(self._new() for _ in range(miners)))
        self.causes: dict[str, set[str]] = {}
        self.departed: list[str] = []
        self.seen: set[str] = set()
        self.unproved: set[str] = set()
        self.believed: int | None = None
        self.first: dict[str, tuple[str, int]] = {}
        self.removed: set[str] = set()
        self.anew: set[str] = set()  # whose elimination was deleted, as old, before the one that stands
        self.restarts = self.syncs = self.hits = 0
        self.taken_back: list[dict[str, Any]] = []
        self.backup: Backup | None = None
        self.rules: dict[str, set[str]] = {}  # for which each miner was eliminated, as the history had it
        self.returns: Counter[str] = Counter()
        self.stuck: Counter[str] = Counter()
        self.figures: Counter[str] = Counter()

    def _new(self) -> str:
        return f"miner-{self.random.getrandbits(64):016x}"

    def one(self) -> str | None:
        return self.random.choice(self.validator.registry._hotkeys) if self.validator.registry._hotkeys else None

    def cause(self, hotkey: str, reason: str) -> None:
        self.causes.setdefault(hotkey, set()).add(reason)

    # ------------------------------------------------------------------ what happens

    def trade(self) -> None:
        for _ in range(8):
            hotkey = self.one()
            if hotkey not in self.managed.reasons:
                self.validator.open_position(hotkey, self.random.choice(PAIRS))
                if self.random.random() < 0.3:
                    self.validator.limit_orders.place(hotkey)

    def lose(self) -> None:
        hotkey = self.one()
        share = self.random.choice([0.02, 0.0999, 0.1, 0.15, 0.7])
        self.validator.lose(hotkey, share)
        if share >= 0.1:
            self.cause(hotkey, "MAX_TOTAL_DRAWDOWN")
        if share > 0.5:
            self.cause(hotkey, "LIQUIDATED")

    def fail_probation(self) -> None:
        hotkey, reason = self.one(), self.random.choice(REASONS)
        self.validator.probation.fail(hotkey, reason, self.random.random())
        self.cause(hotkey, reason)

    def leave(self) -> None:
        gone = {self.one() for _ in range(self.random.randint(1, 4))}
        self.validator.deregister(*gone)
        self.validator.register(*(self._new() for _ in gone))
        for hotkey in gone:
            self.cause(hotkey, "ZOMBIE")

    def come_back(self) -> None:
        known = sorted(set(self.departed) - set(self.validator.registry._hotkeys))
        if known:
            hotkey = self.random.choice(known)
            self.validator.registry.set([*self.validator.registry._hotkeys, hotkey])
            self.returns[hotkey] += 1

    def metagraph_breaks(self) -> None:
        """A tick that sees a third of the metagraph, and the whole again after it."""
        whole = list(self.validator.registry._hotkeys)
        self.validator.registry.set(self.random.sample(whole, len(whole) // 3))
        self.tick()
        self.validator.registry.set(whole)

    def collaborator_fails(self) -> None:
        point = self.random.choice(POINTS)
        certain = point == "slash" and self.random.random() < 0.5
        error = NothingMovedError("refused") if certain else None
        self.validator.faults.fail(point, error, times=self.random.randint(1, 3))

    def sync_in_the_middle(self) -> None:
        """A sync that knows all eliminations but one."""

        def sync() -> None:
            rows = self.managed.manager.get_eliminations_from_memory()
            if rows:
                dropped = rows.pop(self.random.randrange(len(rows)))["hotkey"]
                self.removed.add(dropped)
                self.first.pop(dropped, None)
            self.validator.sync(lambda: self.managed.manager.sync_eliminations(rows))
            self.syncs += 1

        self.validator.faults.at(
            self.random.choice(["liquidated", "all failed", "ledgers", "cancel", "slash!"]), sync
        )

    def fail_oddly(self) -> None:
        """Whose reason or drawdown nobody understands is eliminated all the same."""
        hotkey = self.one()
        why = self.random.choice([(None, 0.2), ("ODD", self.random.choice(ODD)), ("PLAGIARISM", None)])
        self.validator.probation.failed[hotkey] = why
        self.cause(hotkey, why[0] or "UNKNOWN")

    def be_liquidated_oddly(self) -> None:
        hotkey = self.one()
        prices = {1: self.random.choice(ODD), "BTC/USD": self.random.choice(ODD)}
        self.validator.ledgers._liquidated.setdefault(
            hotkey, [self.random.choice(ODD), self.validator.now_ms, prices]
        )
        self.cause(hotkey, "LIQUIDATED")

    def time_leaps(self) -> None:
        """A tick at another time, and the right one after it."""
        by = self.random.choice([2 * HOUR, -HOUR // 2])
        self.validator.now_ms += by
        self.tick()
        self.validator.now_ms -= by

    def sync_takes_back(self) -> None:
        rows = self.managed.manager.get_eliminations_from_memory()
        chosen = self.random.sample(rows, min(len(rows), 2))
        self.taken_back += chosen
        self._sync([row for row in rows if row not in chosen])
        for row in chosen:
            self.removed.add(row["hotkey"])
            self.first.pop(row["hotkey"], None)

    def sync_brings_again(self) -> None:
        rows = self.managed.manager.get_eliminations_from_memory()
        known = {row["hotkey"] for row in rows}
        again = [row for row in self.taken_back if row["hotkey"] not in known]
        self.taken_back.clear()
        self._sync([*rows, *{row["hotkey"]: row for row in again}.values()])

    def _sync(self, rows: list[dict[str, Any]]) -> None:
        self.validator.sync(lambda: self.managed.manager.sync_eliminations(rows))
        self.syncs += 1

    def collaborator_hangs(self) -> None:
        """A tick in which something hangs: it is named in the health by then, and goes on afterwards."""
        if self.managed.mode == "direct":
            return
        point, gate = self.random.choice(STUCK), threading.Event()
        self.validator.faults.at(point, gate.wait)
        try:
            self.tick()
            if left := [what for what, _, _ in deadlines.left_behind()]:
                self.stuck[point] += 1
                problems = self.managed.manager._server_proxy.health_check_rpc()["problems"]
                assert any(problem.get("part") == "processing" for problem in problems), (point, left)
        finally:
            gate.set()
            until(lambda: deadlines.left_behind() == [])

    def restart(self) -> None:
        self.managed.restart()
        self._begin_again()

    def _begin_again(self) -> None:
        self.validator = self.managed.validator
        self.validator.faults.armed = False
        self.restarts += 1

    def server_is_killed(self) -> None:
        if self.managed.mode == "direct":
            return
        manager, pid = self.managed.manager, self.managed.manager.server_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: manager.server_pid not in (None, pid))

    def owner_is_killed(self) -> None:
        self.loop_outlives_its_owner(self.random.choice(HELD_UP))

    def loop_outlives_its_owner(self, point: str | None) -> bool:
        """A successor begins while the loop of a killed validator lives; return whether that was held up."""
        if self.managed.mode == "direct":
            return False
        self.managed.close(final=False)
        before = set(self.first)
        go_on = self.managed.directory / f"go-on-{self.figures['owner_is_killed']}"
        reading, writing = FORK.Pipe(duplex=False)
        with Child(functools.partial(die_with_a_living_loop, self.managed, point, go_on, writing)) as owner:
            owner.until(reading.poll)
            loop, was_held_up = reading.recv()
            assert owner.wait() == -signal.SIGKILL
        try:
            self.managed._open()
            self._begin_again()
            self._note_eliminations(set(self.managed.reasons) - before)
            newcomer = self._new()
            self.validator.register(newcomer)
            self.tick()
            assert is_alive(loop)
            go_on.touch()
            os.kill(loop, signal.SIGCONT)
            until(lambda: not is_alive(loop), "the end of a loop whose owner is dead")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(loop, signal.SIGKILL)
        assert newcomer not in self.managed.manager.get_departed_hotkeys()
        self.tick()
        return bool(was_held_up)

    def back_up(self) -> None:
        target = self.managed.directory / f"backup-{self.figures['back_up']}"
        keeping.back_up(self.managed.directory / "state", target)
        self.backup = Backup(
            target, set(self.seen), set(self.unproved), self.believed, list(self.departed), dict(self.first)
        )

    def restore(self) -> None:
        """Begin again with an earlier state: what it forgot of money stands in the journal, and a person looks."""
        if self.backup is None:
            return
        self._note_rules()
        managed, (backup, *known, first) = self.managed, self.backup
        managed.close(final=False)
        state = managed.directory / "state"
        base = Path(os.environ["SHMELIM_REGISTRY"])
        registry = None if managed.mode == "direct" else Registry(base, managed.name)
        keeping.restore(backup, state, registry)
        managed._open()
        self._begin_again()
        self.removed |= {name for name in self.first | first if self.first.get(name) != first.get(name)}
        self.seen, self.unproved, self.believed = set(known[0]), set(known[1]), known[2]
        self.departed, self.first = list(known[3]), dict(first)
        # What a sync brings of which the store knows no rule owes nothing.
        self.taken_back.clear()
        self.tick()
        assert self.managed.manager.release_money()

    # ------------------------------------------------------------------ ticks

    def tick(self) -> None:
        before = set(self.managed.reasons)
        self.validator.pass_time(1)
        self.validator.faults.armed = True
        self.managed.tick(0)
        self.validator.faults.armed = False
        now = self.managed.reasons
        self._note_eliminations(set(now) - before)
        for hotkey, (reason, _) in self.first.items():
            assert now.get(hotkey, reason) == reason, "the first reason stays"
        self._expect_departures()

    def _note_eliminations(self, new: set[str]) -> None:
        for hotkey in new:
            row = self.managed.manager.get_elimination(hotkey)
            reason = row["reason"]
            if hotkey in self.first:
                self.anew.add(hotkey)
            assert reason in self.causes.get(hotkey, ()), f"{hotkey} was eliminated without cause: {reason}"
            self.first[hotkey] = reason, row["elimination_initiated_time_ms"]

    def _expect_departures(self) -> None:
        """What the rule says of what the metagraph showed; a look that failed shows nothing."""
        now = set(self.validator.registry._hotkeys)
        shown = set(self.managed.manager.reader.snapshot().registered)
        if not now <= shown:
            return  # the look at the metagraph failed this time
        believed = self.seen - self.unproved
        lost, anomalous = lost_hotkeys(believed, now, self.believed)
        self.believed = (self.believed or len(believed)) if anomalous else None
        self.unproved = now - believed if anomalous else set()
        if anomalous:
            self.seen = believed | now
        else:
            self.departed += [hotkey for hotkey in lost if hotkey not in self.departed]
            self.seen = now

    def run(self, steps: int) -> None:
        # As many whatever the steps: those who leave within a day must stay fewer than an anomaly.
        leave = 240 / steps
        happenings: list[tuple[Callable[[], None], float]] = [
            (self.trade, 10), (self.lose, 8), (self.fail_probation, 3), (self.leave, leave),
            (self.come_back, 1), (self.metagraph_breaks, 1), (self.collaborator_fails, 8),
            (self.sync_in_the_middle, 1), (self.restart, 1), (self.fail_oddly, 1), (self.be_liquidated_oddly, 1),
            (self.time_leaps, 1), (self.sync_takes_back, 1), (self.sync_brings_again, 1),
            (self.collaborator_hangs, 3), (self.server_is_killed, 1), (self.owner_is_killed, 1),
            (self.back_up, 1), (self.restore, 0.3),
        ]  # fmt: skip
        acts, weights = zip(*happenings, strict=True)
        for _ in range(steps):
            for act in self.random.choices(acts, weights, k=2):
                self.figures[act.__name__] += 1
                act()
            self.validator.pass_time(24 * HOUR // steps)
            self.tick()
            if self.random.random() < 0.5:
                self.hits += sum(fault.happened for fault in self.validator.faults._planned)
                self.validator.faults.clear()

    # ------------------------------------------------------------------ the end

    def end(self) -> None:
        """Let everything go well, settle doubts as a person would, and check."""
        self.validator.faults.clear()
        for _ in range(2):
            self.tick()
        until(self.is_nothing_attempted)
        for debt in self.owed():
            assert (debt["kind"], debt["state"]) == ("slash", IN_DOUBT), debt
            self.figures["doubtful"] += 1
            made = debt["hotkey"] in self.validator.collateral.slashes()
            assert self.managed.manager._server_proxy.resolve_slash_rpc(debt["hotkey"], made=made)
        for _ in range(2):
            self.tick()
        assert self.owed() == []
        self.check()

    def is_nothing_attempted(self) -> bool:
        """Whether no slash is taken for one that a process which is gone makes now."""
        self.tick()
        return not any(debt["state"] == ATTEMPTING for debt in self.managed.debts)

    def owed(self) -> list[dict[str, Any]]:
        """What is owed, but for what rests, as a sync took back what it is for."""
        resting = [debt for debt in self.managed.debts if not debt["due"] and debt["state"] == "owed"]
        for debt in resting:
            reason = self.managed.reasons.get(debt["hotkey"])
            assert reason is None or (debt["kind"] == "slash" and reason != debt["reason"])
        return [debt for debt in self.managed.debts if debt not in resting]

    def check(self) -> None:
        manager, validator = self.managed.manager, self.validator
        rows = manager.get_eliminations_dict()
        slashes = validator.collateral.slashes()
        for hotkey, row in rows.items():
            assert validator.is_flat(hotkey), f"{hotkey} is eliminated and not flat"
            for holding in validator.book.on_disk(hotkey):
                opened, closed = (trade.at_ms for trade in holding.trades)
                if hotkey not in self.removed:
                    assert closed == max(row["elimination_initiated_time_ms"], opened + 1)
            if hotkey not in self.removed | self.anew and not self.returns[hotkey]:
                assert slashes.count(hotkey) == (row["reason"] != "ZOMBIE"), f"{hotkey}: {row['reason']}"
        self.check_slashes(rows, slashes)
        assert sorted(manager.get_departed_hotkeys()) == sorted(self.departed)
        # Nobody who should be eliminated is not.
        registered = set(validator.registry._hotkeys)
        for hotkey, ledger in validator.ledgers._ledgers.items():
            if hotkey in registered and validator.probation.stages.get(hotkey) == "scored":
                assert (ledger.drawdown() < 0.1) or hotkey in rows, f"{hotkey} lost {ledger.drawdown()}"
        expired = [
            row for row in rows.values() if validator.now_ms - row["elimination_initiated_time_ms"] >= DELAY
        ]
        assert all(row["hotkey"] in registered for row in expired)

    def check_slashes(self, rows: dict[str, dict[str, Any]], slashes: list[str]) -> None:
        """One for a rule and a registration, and none lost."""
        self._note_rules()
        rules = self.rules
        for hotkey, times in Counter(slashes).items():
            causes = len(rules.get(hotkey, ())) * (1 + self.returns[hotkey])
            assert times <= causes, f"{hotkey} was slashed {times} times for {causes} causes"
        for hotkey, row in rows.items():
            assert row["reason"] == "ZOMBIE" or hotkey in slashes, f"the slash of {hotkey} was lost"
        self.figures |= {"slashes": len(slashes), "eliminations": sum(map(len, rules.values()))}

    def _note_rules(self) -> None:
        """Note what the history says, of which a restore forgets the end."""
        for event in self.managed.manager._server_proxy.get_history_rpc(None, 10_000):
            if event["action"] == "add" and event["new"]["reason"] != "ZOMBIE":
                rule = RULES.get(event["new"]["reason"], "challenge period")
                self.rules.setdefault(event["hotkey"], set()).add(rule)


def managed_for_days(mode: str, name: str, directory: Path) -> Managed:
    figures = {"deletion_delay_ms": DELAY, "check_interval_ms": 0, "max_slashes_per_hour": 10_000}
    if mode == "rpc":
        figures |= {"call_deadline_s": DEADLINE_S, "slash_deadline_s": DEADLINE_S, "slash_lease_s": LEASE_S}
    return Managed(mode, name, directory, **figures)


def live_through(mode: str, name: str, directory: Path, seed: int, *, miners: int, steps: int) -> Day:
    with managed_for_days(mode, name, directory) as managed:
        day = Day(managed, seed, miners)
        managed.tick()
        day.seen = set(day.validator.registry._hotkeys)
        day.run(steps)
        day.end()
        print({**day.figures, "faults": day.hits, "stuck": day.stuck.total()})
        return day


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mode", ["direct", "rpc"])
def test_a_day(new_name: Callable[[], str], tmp_path: Path, mode: str, seed: int) -> None:
    day = live_through(mode, new_name(), tmp_path, seed, miners=256, steps=60)
    assert len(day.first) > 10
    assert day.departed
    assert day.stuck or mode == "direct", "nothing hung"


@pytest.mark.parametrize("point", HELD_UP)
def test_a_loop_that_outlives_its_owner(new_name: Callable[[], str], tmp_path: Path, point: str | None) -> None:
    with managed_for_days("rpc", new_name(), tmp_path) as managed:
        day = Day(managed, 1, 40)
        managed.tick()
        day.seen = set(day.validator.registry._hotkeys)
        for _ in range(8):
            day.trade()
            day.lose()
        day.leave()
        assert day.loop_outlives_its_owner(point) == (point is not None)
        day.end()
        assert day.figures["slashes"]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 110))
@pytest.mark.parametrize("mode", ["direct", "rpc"])
def test_a_long_day(new_name: Callable[[], str], tmp_path: Path, mode: str, seed: int) -> None:
    day = live_through(mode, new_name(), tmp_path, seed, miners=256, steps=24 * HOUR // (5 * MINUTE))
    assert day.restarts
    assert day.syncs
