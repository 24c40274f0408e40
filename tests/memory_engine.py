"""An engine in this process' memory, which loses, refuses and forgets when it is told to."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from shmelim.fleet.engine import START, Engine, Id, LogAheadError, Look


@dataclass
class State:
    """What an engine holds of one name; ``top`` is the highest id of its log, also after that is emptied."""

    head: bytes | None = None
    held: bytes | None = None
    log: list[tuple[Id, bytes]] = field(default_factory=list)
    top: Id = START
    chunks: dict[str, dict[int, bytes]] = field(default_factory=dict)
    reports: dict[str, tuple[bytes, int]] = field(default_factory=dict)


class MemoryEngine(Engine):
    """Keeps to the :class:`~shmelim.fleet.engine.Engine` protocol, as far as ``before`` and ``after`` let it.

    ``before`` is called with the name of each method before it does anything, ``after`` when it is done; what they
    raise is what the caller gets. ``clock`` is the engine's, in ms since 1970.
    """

    def __init__(self, clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self.state = State()
        self.clock = clock
        self.before: Callable[[str], object] = lambda _what: None
        self.after: Callable[[str], object] = lambda _what: None

    def saved(self) -> State:
        """Return a copy of what it holds, to put back later."""
        return copy.deepcopy(self.state)

    def look(self, after: Id | None = None, limit: int = 0, wait: float = 0.0) -> Look:
        """Waits for nothing."""
        self.before("look")
        state = self.state
        entries = [] if after is None else [entry for entry in state.log if entry[0] > after][:limit]
        look = Look(self.clock(), state.head, state.held, state.log[0][0] if state.log else None, entries)
        self.after("look")
        return look

    def commit(
        self, expected: bytes | None, head: bytes, entry: tuple[Id, bytes], keep: Collection[str] | None = None
    ) -> bool:
        """Refuses an id that is not higher than all, as a stream does."""
        self.before("commit")
        state = self.state
        done = state.head == expected
        if done:
            if entry[0] <= state.top:
                raise LogAheadError(f"id {entry[0]} is not above {state.top}")
            state.head = head
            self.append(*entry)
            if keep is not None:
                state.chunks = {name: chunks for name, chunks in state.chunks.items() if name in keep}
        self.after("commit")
        return done

    def append(self, number: Id, entry: bytes) -> None:
        """Put an entry in the log, whoever's it is."""
        self.state.log.append((number, entry))
        self.state.top = number

    def top(self) -> Id:
        self.before("top")
        top = self.state.top
        self.after("top")
        return top

    def trim(self, before: Id) -> None:
        self.before("trim")
        self.state.log = [entry for entry in self.state.log if entry[0] >= before]
        self.after("trim")

    def put(self, snapshot: str, number: int, chunk: bytes) -> None:
        self.before("put")
        self.state.chunks.setdefault(snapshot, {})[number] = chunk
        self.after("put")

    def fetch(self, snapshot: str, number: int) -> bytes | None:
        self.before("fetch")
        chunk = self.state.chunks.get(snapshot, {}).get(number)
        self.after("fetch")
        return chunk

    def chunks(self, snapshot: str) -> int:
        self.before("chunks")
        there = len(self.state.chunks.get(snapshot, ()))
        self.after("chunks")
        return there

    def hold(self, why: bytes | None) -> None:
        self.before("hold")
        self.state.held = why
        self.after("hold")

    def report(self, who: str, report: bytes | None, ttl: float) -> None:
        self.before("report")
        if report is None:
            self.state.reports.pop(who, None)
        else:
            self.state.reports[who] = report, self.clock() + int(ttl * 1000)
        self.after("report")

    def reports(self) -> Mapping[str, bytes]:
        self.before("reports")
        now = self.clock()
        found = {who: report for who, (report, until) in self.state.reports.items() if until > now}
        self.after("reports")
        return found

    def close(self) -> None:
        pass
