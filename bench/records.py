"""The data that every benchmark uses: hotkeys of 48 characters and records of about 0.5 kB."""

from __future__ import annotations

import random

COMPACT_FROM = 1_000_000
"""So many records are made without prices and returns (0.15 kB), so that they fit into memory several times."""


def hotkey(number: int) -> str:
    return f"5{number:047d}"


def record(number: int, stamp: int = 0) -> dict:
    """About 0.5 kB as msgpack, shaped like the field's records."""
    return {
        **compact(number, stamp),
        "price_info": {f"PAIR{i:02d}/USD": 1000.5 + i for i in range(14)},
        "return_info": {
            "dd_stats": {"last_dd": 0.91, "mdd": 0.89, "eliminated": True},
            "returns": [0.99, 1.01, 0.97],
        },
    }


def compact(number: int, stamp: int = 0) -> dict:
    """The same without prices and returns."""
    return {
        "hotkey": hotkey(number),
        "dd": 10.0 + number % 7,
        "reason": "MAX_TOTAL_DRAWDOWN",
        "elimination_initiated_time_ms": 1_750_000_000_000 + number + stamp,
    }


def records(count: int, stamp: int = 0) -> list[dict]:
    return [record(number, stamp) for number in range(count)]


def maker_for(size: int):
    """Return the function that makes the records of a state of that size: `record` or `compact`."""
    return record if size < COMPACT_FROM else compact


def hits(size: int, count: int, seed: int = 1) -> list[str]:
    """Hotkeys that are there, in random order, each a string object of its own."""
    chosen = random.Random(seed)
    return [hotkey(chosen.randrange(size)) for _ in range(count)]


def misses(size: int, count: int, seed: int = 2) -> list[str]:
    """Hotkeys that are not there."""
    chosen = random.Random(seed)
    return [hotkey(size + chosen.randrange(10**9)) for _ in range(count)]


def mixed(size: int, count: int, seed: int = 3) -> list[str]:
    """Half of each, shuffled."""
    both = hits(size, count // 2, seed) + misses(size, count - count // 2, seed + 1)
    random.Random(seed).shuffle(both)
    return both
