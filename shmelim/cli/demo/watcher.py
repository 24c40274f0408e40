"""A reader process of the demo: reads without pause, and counts whatever must not be."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Final

from shmelim.cli.demo.records import are_halves_mixed, are_mixed, is_whole
from shmelim.eliminations.reader import EliminationReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from shmelim.cli.demo.records import Cast

BATCH: Final = 20
"""Checks that are timed together, so that reading the clock twice adds little to each."""

_BATCHES: Final = 50
_GETS: Final = 50
_GROUPS: Final = 4
_SHOWN: Final = 3
_ATTACH: Final = 30.0


@dataclass
class Tally:
    """What one reader did and saw; ``check_ns`` counts batches by their mean nanoseconds for one check."""

    pid: int = 0
    seconds: float = 0.0
    checks: int = 0
    gets: int = 0
    batch_checks: int = 0
    snapshots: int = 0
    snapshot_records: int = 0
    retries: int = 0
    torn: int = 0
    mixed: int = 0
    wrong: int = 0
    errors: int = 0
    messages: list[str] = field(default_factory=list)
    reads_in: Counter[str] = field(default_factory=Counter)
    errors_in: Counter[str] = field(default_factory=Counter)
    check_ns: Counter[int] = field(default_factory=Counter)

    @property
    def reads(self) -> int:
        """How many calls were answered, a snapshot or a batch of checks being one."""
        return self.checks + self.gets + self.batch_checks + self.snapshots


class Watcher:
    """Reads of every kind in turn, each compared with what can be known of the answer.

    Parameters
    ----------
    reader
        What it reads through.
    cast
        Which hotkey plays which part.

    """

    def __init__(self, reader: EliminationReader, cast: Cast) -> None:
        self.reader = reader
        self.cast = cast
        self.tally = Tally(pid=os.getpid())
        self.phase = "starting"
        self.awaited: str | None = None
        self.seen_ns: int | None = None
        half = BATCH // 2
        mixtures = [
            [hotkey for pair in zip(steady, never, strict=True) for hotkey in pair]
            for steady, never in zip(_windows(cast.steady, half), _windows(cast.never, half), strict=False)
        ]
        self._mixtures = cycle(mixtures)
        self._steady = cycle(cast.steady)
        self._camps = [*cast.even, *cast.odd]

    def round(self) -> None:
        """Do some reads of every kind."""
        for _ in range(_BATCHES):
            self._guarded(self._check_batch)
            self.look_out()
        for _ in range(_GETS):
            self._guarded(self._get)
        self.look_out()
        for _ in range(_GROUPS):
            self._guarded(self._check_group)
        self.look_out()
        self._guarded(self._snapshot)
        self.look_out()

    def look_out(self) -> None:
        """Note when the awaited hotkey is seen to be eliminated for the first time."""
        if self.awaited is not None and self.reader.is_hotkey_eliminated(self.awaited):
            self.seen_ns, self.awaited = time.monotonic_ns(), None

    def _guarded(self, read: Callable[[], int]) -> None:
        before = self.tally.reads
        try:
            read()
        except Exception as error:
            self.tally.errors += 1
            self.tally.errors_in[self.phase] += 1
            if len(self.tally.messages) < _SHOWN:
                self.tally.messages.append(f"{read.__name__.strip('_')}: {type(error).__name__}: {error}")
        self.tally.reads_in[self.phase] += self.tally.reads - before

    def _check_batch(self) -> int:
        check, mixture, found = self.reader.is_hotkey_eliminated, next(self._mixtures), 0
        began = time.perf_counter_ns()
        for hotkey in mixture:
            if check(hotkey):
                found += 1
        took = time.perf_counter_ns() - began
        self.tally.checks += BATCH
        self.tally.check_ns[took // BATCH] += 1
        # Half of them are eliminated throughout, the others never.
        self.tally.wrong += found != BATCH // 2
        return found

    def _get(self) -> int:
        hotkey = next(self._steady)
        record = self.reader.get_elimination(hotkey)
        self.tally.gets += 1
        if record is None:
            self.tally.wrong += 1
        else:
            self.tally.torn += not is_whole(record)
            self.tally.wrong += record.get("hotkey") != hotkey
        return 1

    def _check_group(self) -> int:
        answers = self.reader.are_eliminated(self._camps).tolist()
        self.tally.batch_checks += 1
        half = len(self.cast.even)
        self.tally.mixed += are_halves_mixed(answers[:half], answers[half:])
        return 1

    def _snapshot(self) -> int:
        records = self.reader.snapshot().eliminations
        self.tally.snapshots += 1
        self.tally.snapshot_records += len(records)
        self.tally.mixed += are_mixed(records.values())
        self.tally.torn += sum(not is_whole(record) for record in records.values())
        self.tally.wrong += any(hotkey not in records for hotkey in self.cast.steady)
        return 1


def watch(line: Connection, name: str, cast: Cast) -> None:
    """Read until told to report; runs in a process of its own, and ends when the other end of its line does.

    Understands ``("phase", label)``, answered once a whole round was made in it; ``("await", hotkey)``, answered
    with the time at which the hotkey was first seen to be eliminated; and ``("report", None)``, answered with the
    :class:`Tally`.
    """
    watcher = Watcher(EliminationReader(name, wait=_ATTACH), cast)
    entering: str | None = None
    began = time.monotonic()
    try:
        line.send(("attached", os.getpid()))
        while True:
            if line.poll():
                what, about = line.recv()
                if what == "report":
                    break
                if what == "phase":
                    watcher.phase = entering = about
                else:
                    watcher.awaited = about
            watcher.round()
            if entering is not None:
                line.send(("entered", entering))
                entering = None
            if watcher.seen_ns is not None:
                line.send(("seen", watcher.seen_ns))
                watcher.seen_ns = None
        tally = watcher.tally
        tally.seconds = time.monotonic() - began
        tally.retries = watcher.reader.retries
        line.send(("report", tally))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the demo was broken off


def _windows(hotkeys: list[str], size: int) -> list[list[str]]:
    return [hotkeys[start : start + size] for start in range(0, len(hotkeys) - size + 1, size)]
