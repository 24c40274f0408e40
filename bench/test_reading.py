"""Reading: one check, one record, many checks, all records; each contender side by side in one run."""

from __future__ import annotations

import pytest

from bench.records import hotkey, record

SIZES = pytest.mark.parametrize("size", [256, 10_000])


@SIZES
def test_check_hit(benchmark, filled, size):
    benchmark.group = f"check, hit, {size} records"
    assert benchmark(filled.check, hotkey(size // 2)) is True


@SIZES
def test_check_miss(benchmark, filled, size):
    benchmark.group = f"check, miss, {size} records"
    assert benchmark(filled.check, hotkey(10**6)) is False


@SIZES
def test_get(benchmark, filled, size):
    benchmark.group = f"get one record, {size} records"
    assert benchmark(filled.get, hotkey(7)) == record(7)


@SIZES
def test_batch_of_256(benchmark, filled, size):
    benchmark.group = f"256 checks at once, {size} records"
    hotkeys = [hotkey(number) for number in range(size - 128, size + 128)]
    assert sum(benchmark(filled.check_many, hotkeys)) == 128


@SIZES
def test_everything(benchmark, filled, size):
    benchmark.group = f"all records, {size} records"
    assert len(benchmark(filled.everything)) == size
