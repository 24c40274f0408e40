"""The data that every benchmark uses: hotkeys of 48 characters and records of about 0.5 kB."""

from __future__ import annotations


def hotkey(number: int) -> str:
    return f"5{number:047d}"


def record(number: int, stamp: int = 0) -> dict:
    """About 0.5 kB as msgpack, shaped like the field's records."""
    return {
        "hotkey": hotkey(number),
        "dd": 10.0 + number % 7,
        "reason": "MAX_TOTAL_DRAWDOWN",
        "elimination_initiated_time_ms": 1_750_000_000_000 + number + stamp,
        "price_info": {f"PAIR{i:02d}/USD": 1000.5 + i for i in range(14)},
        "return_info": {
            "dd_stats": {"last_dd": 0.91, "mdd": 0.89, "eliminated": True},
            "returns": [0.99, 1.01, 0.97],
        },
    }


def records(count: int, stamp: int = 0) -> list[dict]:
    return [record(number, stamp) for number in range(count)]
