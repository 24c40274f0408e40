"""Changing: one add, and syncs of 100 and 10,000. Only shmelim's are durable, atomic and kept in a history."""

from __future__ import annotations

from itertools import count

import pytest

from bench.records import hotkey, record, records

ADD_SIZES = pytest.mark.parametrize("size", [256, 10_000])
SYNC_SIZES = pytest.mark.parametrize("size", [100, 10_000])


@ADD_SIZES
def test_add(benchmark, filled, size):
    benchmark.group = f"add one record to {size}"
    numbers = count(10**6)

    def arguments():
        number = next(numbers)
        return (hotkey(number), record(number)), {}

    benchmark.pedantic(filled.add, setup=arguments, rounds=300, warmup_rounds=10)


@SYNC_SIZES
def test_sync(benchmark, filled, size):
    benchmark.group = f"sync {size} records, all of them changed"
    stamps = count(1)

    def arguments():
        return (records(size, next(stamps)),), {}

    benchmark.pedantic(filled.sync, setup=arguments, rounds=30 if size == 100 else 5, warmup_rounds=1)
