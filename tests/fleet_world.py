"""A world in one thread: stores, publishers, an engine, followers; each call may fail, kill, or be overtaken.

Time passes only where the world says so. Everything is drawn from one seed, so that what fails can be run again.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from typing import TYPE_CHECKING

from memory_engine import MemoryEngine, State

from shmelim.eliminations.store.touched import RUN_BITS
from shmelim.errors import FencedError, StoreError
from shmelim.fleet.cuts import Cut, Facts, Whole
from shmelim.fleet.engine import HIGHEST, START, EngineError, Id
from shmelim.fleet.follower import Applied, Follower
from shmelim.fleet.messages import DIGEST_MASK, FORMAT, Report, Row, pack, row_digest
from shmelim.fleet.publisher import Publisher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from shmelim.shm.following import Position

STORE_ID = b"store-id-of-16-b"
MS = 1_000_000
SECOND = 1000 * MS
KEYS = [b"a", b"b", b"c", b"d", b"e", b"f"]


class Killed(BaseException):
    """The process that runs was ended."""


def digest_of(rows: Iterable[Row]) -> int:
    return sum(row_digest(*row) for row in rows) & DIGEST_MASK


class Store:
    """Rows, the changes of them, and every state that there ever was, with when it was the current one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[bytes, Row] = {}
        self.touched: list[tuple[int, bytes]] = []
        self.top = 0
        self.runs: tuple[int, ...] = ()
        self.notice: str | None = None
        self.history: list[tuple[int, frozenset[Row]]] = []
        self.restart()
        self._note()

    def _note(self) -> None:
        self.history.append((self.world.now, frozenset(self.rows.values())))

    def restart(self) -> None:
        self.runs = (*self.runs, (self.top + 1) << RUN_BITS | self.world.chance.getrandbits(RUN_BITS))

    def change(self) -> None:
        """One commit, of one to three keys."""
        chance = self.world.chance
        for key in chance.sample(KEYS, chance.randint(1, 3)):
            self.top += 1
            self.touched.append((self.top, key))
            if key in self.rows and chance.random() < 0.3:
                del self.rows[key]
            else:
                self.rows[key] = Row(key, chance.randrange(8), b"%d" % self.world.count(), self.top)
        self._note()

    def forget(self) -> None:
        self.touched = self.touched[self.world.chance.randint(0, len(self.touched)) :]

    def saved(self) -> tuple:
        return dict(self.rows), list(self.touched), self.top, self.runs

    def restore(self, saved: tuple) -> None:
        """Become what was saved, and be started."""
        rows, touched, self.top, self.runs = saved
        self.rows, self.touched = dict(rows), list(touched)
        self.restart()
        self._note()

    def was_current_after(self, state: frozenset[Row], moment: int) -> bool:
        """Tell whether a state was the current one at that moment, or at any later one."""
        ends = [began for began, _ in self.history[1:]] + [self.world.now + 1]
        return any(each == state and end > moment for (_, each), end in zip(self.history, ends, strict=True))

    # ------------------------------------------------------------------ what a publisher asks

    def _facts(self) -> Facts:
        oldest = self.touched[0][0] if self.touched else self.top + 1
        return Facts(STORE_ID, self.runs, self.top, oldest, self.notice)

    def facts(self) -> Facts:
        self.world.call("facts")
        return self._facts()

    def cut(self, after: int, *, digest_rows: int = 0) -> Cut:
        self.world.call("cut")
        keys = dict.fromkeys(key for number, key in self.touched if number > after)
        rows = [self.rows[key] for key in keys if key in self.rows]
        digest = digest_of(self.rows.values()) if len(self.rows) <= digest_rows else None
        return Cut(self._facts(), rows, [key for key in keys if key not in self.rows], digest)

    @contextlib.contextmanager
    def whole(self) -> Iterator[Whole]:
        self.world.call("whole")
        yield Whole(self._facts(), iter(list(self.rows.values())))


class SharedTable:
    """A follower's table, which outlives it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[bytes, Row] = {}
        self.applied: Applied | None = None
        self.position: Position | None = None
        self.replaced = 0
        self.term = 0

    @property
    def digest(self) -> int:
        return digest_of(self.rows.values())

    def __len__(self) -> int:
        return len(self.rows)

    def apply(self, applied: Applied, rows: list[Row], gone: list[bytes]) -> None:
        self.world.call("apply")
        self.rows |= {row.key: row for row in rows}
        for key in gone:
            self.rows.pop(key, None)
        self.applied = applied
        self._note()
        self.world.call("applied")

    def replace(self, applied: Applied, rows: Iterable[Row]) -> None:
        self.world.call("replace")
        self.rows, self.applied = {row.key: row for row in rows}, applied
        self.replaced += 1
        self._note()
        self.world.call("replaced")

    def _note(self) -> None:
        """Remember by whom the follower was told what it shows now."""
        self.term = self.world.followers[self.world.tables.index(self)].process._term

    def confirm(self, position: Position) -> None:
        self.world.call("confirm")
        self.position = position


class Actor:
    """A process: a publisher or a follower, that can be started and killed."""

    def __init__(self, make: Callable[[], Publisher | Follower]) -> None:
        self.make = make
        self.process: Publisher | Follower | None = None


class World:
    """Everything, and what may go wrong with it, of one seed.

    ``faults`` are counted by name; ``steps`` are calls at which something could have gone wrong.
    """

    def __init__(self, seed: int, engine: type[MemoryEngine] = MemoryEngine) -> None:
        self.chance = random.Random(seed)
        self.now = 1_000_000 * SECOND
        self.faults: Counter[str] = Counter()
        self.steps = 0
        self.stormy = True
        self._counter = 0
        self._running: list[Actor] = []
        self.engine_offset = 500_000 * SECOND
        self.full_until = self.clock_set = 0
        self.engine = engine(lambda: (self.now + self.engine_offset) // MS)
        self.engine.before = self.engine.after = self._engine_call
        self.saved_engine: list[State] = []
        self.saved_store: tuple | None = None
        first = Store(self)
        self.stores = [first]
        self.stores_of_term: dict[int, set[int]] = {}
        self.publishers = [self._publisher(0), self._publisher(0)]
        self.tables = [SharedTable(self) for _ in range(3)]
        self.seen: list[tuple[int, int]] = [(0, 0)] * len(self.tables)
        self.offsets = [self.chance.randrange(1, 10**6) * SECOND for _ in self.tables]
        self.followers = [self._follower(number) for number in range(len(self.tables))]

    def count(self) -> int:
        self._counter += 1
        return self._counter

    # ------------------------------------------------------------------ processes

    def _publisher(self, store: int) -> Actor:
        def make() -> Publisher:
            publisher = Publisher(
                self.engine,
                self.stores[store],
                owner=self.chance.randbytes(16),
                monotonic=lambda: self.now / SECOND,
                wall=lambda: self.now // MS,
            )
            enter = publisher._enter

            def note(look, head):
                self.stores_of_term.setdefault(head.term, set()).add(store)
                return enter(look, head)

            publisher._enter = note
            return publisher

        return Actor(make)

    def _follower(self, number: int) -> Actor:
        table, offset = self.tables[number], self.offsets[number]
        return Actor(
            lambda: Follower(
                self.engine,
                table,
                who=f"follower {number}",
                position=table.position,
                boottime=lambda: self.now + offset,
            )
        )

    def turn(self, actor: Actor) -> None:
        """Let a process do one turn, starting it where it is not there."""
        if actor in self._running:
            return
        if actor.process is None:
            actor.process = actor.make()
        self._running.append(actor)
        try:
            actor.process.turn()
        except (EngineError, StoreError):
            self.faults["errors"] += 1
        except FencedError:
            self.faults["fenced"] += 1
            actor.process = None
        except Killed:
            self.faults["killed"] += 1
            actor.process = None
        finally:
            self._running.pop()
        self.check()

    def call(self, _what: str) -> None:
        """A process calls something: time passes, and anything may happen."""
        self.steps += 1
        self.now += self.chance.randrange(2 * MS)
        if not self.stormy:
            return
        luck = self.chance.random()
        if luck < 0.01:
            raise Killed
        if luck < 0.02:
            raise StoreError("the store failed")
        if luck < 0.06 and len(self._running) < 3:
            self.turn(self.chance.choice(self.publishers + self.followers))
        elif luck < 0.08:
            self.chance.choice(self.stores).change()

    def _engine_call(self, what: str) -> None:
        self.call(what)
        if not self.stormy:
            return
        if self.chance.random() < 0.02 or (self.now < self.full_until and what in {"commit", "put", "report"}):
            raise EngineError(f"{what} failed")

    # ------------------------------------------------------------------ what happens

    def storm(self, steps: int) -> None:
        """Let anything happen."""
        happenings = [
            (40, lambda: self.turn(self.chance.choice(self.followers))),
            (25, lambda: self.turn(self.publishers[0])),
            (3, lambda: self.turn(self.publishers[1])),
            (15, lambda: self.chance.choice(self.stores).change()),
            (4, self._save_engine),
            (2, self._lose_tail),
            (0.7, self._flush),
            (1, self._evict),
            (0.7, self._lose_head),
            (1, self._fill),
            (1, self._scribble),
            (2.5, self._set_clock),
            (1, lambda: self.chance.choice(self.stores).restart()),
            (1, lambda: self.chance.choice(self.stores).forget()),
            (1.5, self._back_up),
            (1, self._restore),
            (1, self._move),
            (2, self._hold),
        ]
        weights = [weight for weight, _ in happenings]
        for _ in range(steps):
            self.now += self.chance.randrange(400 * MS)
            self.chance.choices(happenings, weights)[0][1]()
            self.check()

    def _save_engine(self) -> None:
        self.saved_engine = [*self.saved_engine[-3:], self.engine.saved()]

    def _lose_tail(self) -> None:
        if self.saved_engine:
            self.faults["lost tail"] += 1
            self.engine.state = self.saved_engine.pop()

    def _flush(self) -> None:
        self.faults["flushed"] += 1
        self.engine.state = State()

    def _evict(self) -> None:
        self.faults["evicted"] += 1
        state = self.engine.state
        kind = self.chance.randrange(3)
        if kind == 0:
            state.chunks.clear()
        elif kind == 1:
            del state.log[: self.chance.randint(0, len(state.log))]
        else:
            state.log, state.top = [], START

    def _lose_head(self) -> None:
        self.faults["head lost"] += 1
        self.engine.state.head = None
        if self.chance.random() < 0.3:
            self.engine.state.log.clear()

    def _scribble(self) -> None:
        """Somebody tries whether the engine works, and writes into the log; or a follower says anything."""
        self.faults["scribbled"] += 1
        chance, state = self.chance, self.engine.state
        if chance.random() < 0.5:
            self.engine.append(Id(state.top.term + chance.randrange(3), state.top.number + 1), b"does it work?")
        else:
            term, line, seq = (chance.choice((0, 1, 5, 1 << 62, HIGHEST)) for _ in range(3))
            report = Report(FORMAT, "", 1, term, line, seq, chance.random() < 0.5, -1, 0, 0)
            state.reports["anybody"] = pack(report), self.engine.clock() + 1000

    def _fill(self) -> None:
        self.faults["full"] += 1
        self.full_until = self.now + self.chance.randrange(5 * SECOND)

    def _set_clock(self) -> None:
        if self.now < self.clock_set + 6 * SECOND:
            return
        self.clock_set = self.now
        self.faults["clock set"] += 1
        self.engine_offset += self.chance.choice((-3600, -20, -1, 1, 20, 3600)) * SECOND

    def _back_up(self) -> None:
        self.saved_store = self.stores[0].saved()

    def _restore(self) -> None:
        if self.saved_store is not None:
            self.faults["restored"] += 1
            self.stores[0].restore(self.saved_store)

    def _move(self) -> None:
        """The store is moved to another host, and somebody forgets to stop the first one."""
        if len(self.stores) > 1:
            return
        self.faults["moved"] += 1
        other = Store(self)
        other.history = list(self.stores[0].history)
        other.restore(self.chance.choice((self.saved_store, None)) or self.stores[0].saved())
        self.stores.append(other)
        self.publishers[1] = self._publisher(1)

    def _hold(self) -> None:
        self.engine.state.held = None if self.engine.state.held else b"look at this first"

    def calm(self, rounds: int = 110) -> None:
        """Let no more faults happen, and one publisher be left; all must become equal, and stay so."""
        self.stormy = False
        self.engine.state.held = None
        number = len(self.stores) - 1
        for actor in self.publishers:
            actor.process = None
        publisher = self._publisher(number)
        for actor in self.followers:
            actor.process = None
        before = [0] * len(self.tables)
        for left in range(rounds, 0, -1):
            self.now += 200 * MS
            if left > 15:
                self.stores[number].change()
            if left == rounds // 2:
                before = [table.replaced for table in self.tables]
            self.turn(publisher)
            for actor in self.followers:
                # One is slow: the log must hold what it has not read yet.
                if actor is not self.followers[0] or left % 7 == 0 or left < 5:
                    self.turn(actor)
        wanted = self.stores[number].rows
        for table, offset, replaced in zip(self.tables, self.offsets, before, strict=True):
            assert table.rows == wanted, "a follower is not equal to the store"
            assert table.replaced == replaced, "a follower that nothing happens to takes snapshots"
            assert self.now + offset - table.position.confirmed < 3 * SECOND, "an age does not come down"

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        for number, table in enumerate(self.tables):
            if table.applied is None:
                continue
            here = table.applied.line, table.applied.seq
            assert here >= self.seen[number], "a follower went back"
            self.seen[number] = here
            state = frozenset(table.rows.values())
            assert table.term in self.stores_of_term, "a follower believes a term that no publisher had"
            stores = [self.stores[each] for each in self.stores_of_term[table.term]]
            assert any(store.was_current_after(state, 0) for store in stores), (
                "a follower shows what its publisher's store never was"
            )
            position = table.position
            if position is not None and position.confirmed:
                moment = position.confirmed - self.offsets[number]
                assert moment <= self.now
                assert any(store.was_current_after(state, moment) for store in self.stores), "an age is too young"
