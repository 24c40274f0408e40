"""A reader process of the demo: reads without pause, and counts whatever must not be.

Each record carries the ``stamp`` of the last sync, which writes all records anew: one snapshot never holds two
stamps. Each ends in a ``checksum`` over its other fields: parts of two records never make a whole one. And a sync
eliminates all of one camp and none of the other, in turns, so that mixed answers to a batch of checks show too.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from itertools import cycle
from typing import Any, Final, NamedTuple

import msgspec

from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.record import EliminationReason, generate_row

REAL_HOTKEYS: Final = resources.files("shmelim") / "data" / "default_departed_hotkeys.json"
BATCH: Final = 100  # checks between two looks at the clock
_SHOWN: Final = 3  # errors


class Cast(NamedTuple):
    """Which hotkey plays which part."""

    steady: list[str]  # eliminated from the first sync to the end
    even: list[str]  # eliminated in syncs with an even stamp
    odd: list[str]  # eliminated in syncs with an odd one
    single: list[str]  # added, replaced and removed one at a time
    first: str  # the first change that the second server makes
    never: list[str]  # never eliminated


def cast() -> Cast:
    """Give each of the real hotkeys its part, the same every time."""
    real = sorted(json.loads(REAL_HOTKEYS.read_text(encoding="utf-8"))["departed_hotkeys"])
    random.Random(0).shuffle(real)  # noqa: S311 - parts, not secrets
    return Cast(real[:120], real[120:180], real[180:240], real[240:300], real[300], real[301:])


def make_record(hotkey: str, stamp: int, serial: int) -> dict[str, Any]:
    """Return a hotkey's record as a change writes it after a sync; the same for the same arguments."""
    figures = random.Random(f"{hotkey} {serial}")  # noqa: S311 - plausible figures, not secrets
    prices = {pair: round(figures.uniform(1, 1e5), 5) for pair in ("BTC/USD", "ETH/USD", "EUR/USD")}
    drawdown, reason = round(figures.uniform(0.02, 0.3), 4), figures.choice(list(EliminationReason))
    row = generate_row(hotkey, drawdown, reason, 1_738_000_000_000 + figures.randrange(10**10), prices)
    record = {**row, "stamp": stamp, "serial": serial}
    return {**record, "checksum": _checksum(record)}


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(msgspec.msgpack.encode({**record, "checksum": 0}, order="sorted"))


def is_whole(record: dict[str, Any]) -> bool:
    """Tell whether a record is one that was made, and not parts of several."""
    return record.get("checksum") == _checksum(record)


def are_halves_mixed(even: Sequence[bool], odd: Sequence[bool]) -> bool:
    """Tell whether the answers for the two camps, read as one state, are of more than one."""
    return {*even} | {not it for it in odd} not in ({True}, {False})


class Watcher:
    """Reads of every kind in turn, each compared with what can be known of the answer."""

    def __init__(self, reader: EliminationReader, parts: Cast) -> None:
        self.reader, self.parts = reader, parts
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._steady = cycle(parts.steady)
        # Half of them are eliminated throughout, the others never.
        self._mixture = parts.steady[: BATCH // 2] + parts.never[: BATCH // 2]
        self._version = 0

    def round(self) -> None:
        """Do some reads of every kind."""
        for read in (*[self._check] * 100, *[self._get] * 50, *[self._check_camps] * 4, self._snapshot):
            try:
                read()
                self.counts["reads"] += 1
            except Exception as error:
                self.counts["failed"] += 1
                self.errors += [f"{read.__name__.strip('_')}: {type(error).__name__}: {error}"]
                del self.errors[_SHOWN:]

    def _check(self) -> None:
        began = time.perf_counter_ns()
        found = sum(map(self.reader.is_hotkey_eliminated, self._mixture))
        self.counts["checking_ns"] += time.perf_counter_ns() - began
        self.counts["checks"] += BATCH
        self.counts["wrong"] += found != BATCH // 2

    def _get(self) -> None:
        hotkey = next(self._steady)
        record = self.reader.get_elimination(hotkey) or {}
        self.counts["wrong"] += record.get("hotkey") != hotkey
        self.counts["torn"] += bool(record) and not is_whole(record)

    def _check_camps(self) -> None:
        half = len(self.parts.even)
        answers = self.reader.are_eliminated([*self.parts.even, *self.parts.odd]).tolist()
        self.counts["mixed"] += are_halves_mixed(answers[:half], answers[half:])

    def _snapshot(self) -> None:
        snapshot = self.reader.snapshot()
        records = snapshot.eliminations
        self.counts["snapshots"] += 1
        self.counts["mixed"] += len({record.get("stamp") for record in records.values()}) > 1
        self.counts["torn"] += sum(not is_whole(record) for record in records.values())
        self.counts["wrong"] += not records.keys() >= {*self.parts.steady}
        self.counts["backwards"] += snapshot.version < self._version
        self._version = snapshot.version


def main(name: str) -> None:
    """Read until the demo is gone; each line on stdin is answered, after a round, with what was counted."""
    reader, parts = EliminationReader(name, wait=30), cast()
    watcher = Watcher(reader, parts)
    while (asked := select.select([sys.stdin], [], [], 0)[0] and sys.stdin.readline()) != "":
        before = watcher.counts["reads"]
        watcher.round()
        if asked:
            about = {"pid": os.getpid(), "retries": reader.retries, "errors": watcher.errors}
            about |= {"round": watcher.counts["reads"] - before}
            about |= {"sees_first": reader.is_hotkey_eliminated(parts.first)}
            print(json.dumps(watcher.counts | about), flush=True)  # noqa: T201 - the demo reads it


if __name__ == "__main__":
    main(sys.argv[1])
