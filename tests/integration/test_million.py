"""A large state, from the smallest table up: grow, serve, look up, snapshot, restart. A million under ``long``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shmelim import EliminationClient
from shmelim.eliminations.serve import ServeOptions, Service
from shmelim.shm import SharedNamespace, TableReader, TableWriter

if TYPE_CHECKING:
    from pathlib import Path

SIZES = pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)])


def hotkey(number: int) -> str:
    return f"5{number:047d}"


def record(number: int) -> dict[str, object]:
    return {
        "hotkey": hotkey(number),
        "reason": "ZOMBIE",
        "elimination_initiated_time_ms": number,
        "price_info": {f"PAIR{i:02d}/USD": number + i / 7 for i in range(14)},
    }


@SIZES
def test_grown_from_the_smallest_table(table_name: str, count: int) -> None:
    with TableWriter(SharedNamespace(table_name), capacity=8, arena_size=4096) as writer:
        writer.load([])
        reader = TableReader(SharedNamespace(table_name))
        for start in range(0, count, 1000):
            with writer.transaction() as transaction:
                for number in range(start, start + 1000):
                    transaction.put(hotkey(number).encode(), number % 7 + 1, b"%d" % number * 60)
        info = reader.info()
        assert (info.entries, info.generation > 4) == (count, True)
        assert 2 * info.entries <= info.capacity < 8 * info.entries
        for number in (*range(0, count, count // 1000), count - 1):
            found = reader.get(hotkey(number).encode())
            assert (found.flags, found.data) == (number % 7 + 1, b"%d" % number * 60)
            assert reader.flags(hotkey(count + number).encode()) == 0
        entries = reader.snapshot(verify=True).entries
        assert list(entries) == [hotkey(number).encode() for number in range(count)]


@SIZES
def test_served_and_taken_over(table_name: str, tmp_path: Path, count: int) -> None:
    options = ServeOptions(table_name, state_dir=tmp_path / "state", runtime_base=tmp_path, durability="process")
    with Service(options):
        client = EliminationClient(table_name, runtime_base=tmp_path, timeout=600)
        client.add_elimination("before", record(0) | {"hotkey": "before"})
        sent: list[int] = []
        removed = client.sync_eliminations((record(number) for number in range(count)), on_progress=sent.append)
        assert removed == ["before"]
        assert sent[-1] == len(client) == count
        assert client.add_elimination("after", record(0) | {"hotkey": "after"})
    reader = client
    assert reader.get_elimination(hotkey(count - 1)) == record(count - 1)
    with Service(options):
        assert len(reader) == count + 1
        sample = [hotkey(number) for number in range(0, 2 * count, 2 * count // 1000)]
        assert reader.are_eliminated(sample).tolist() == [True] * (len(sample) // 2) + [False] * (len(sample) // 2)
        everything = reader.snapshot().eliminations
        assert len(everything) == count + 1
        assert list(everything)[-1] == "after"
        assert everything[hotkey(count // 2)] == record(count // 2)
    client.close()
