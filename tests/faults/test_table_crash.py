"""A table's writer at full rate, killed again and again; and readers that read meanwhile in every way.

Every transaction puts one stamp in all values. Whatever is read bears one stamp, it never goes back, and after a
death it is that of the last transaction or, where the writer died before it could say so, of the one after it.
"""

from __future__ import annotations

import time

import crashing
import msgspec
import pytest
from segments import published_segments_of

from shmelim.table import Reader, Writer

KEYS = [f"key {number}" for number in range(24)]
SIZE = 40


def stamped(stamp: int) -> list[int]:
    return [stamp] * SIZE


def stamp_for_ever(name: str, first: int, done: crashing.Counter, stop: crashing.Counter) -> int:
    """Publish until told to stop, or killed: in place, compacting, growing, replacing everything."""
    writer = Writer(name, keep=True, capacity=16)
    stamp = first
    while not stop.value:
        stamp += 1
        values = {key: stamped(stamp) for key in KEYS}
        if stamp % 50 == 0:
            writer.replace_all(values)
        else:
            with writer.transaction() as transaction:
                for key, value in values.items():
                    transaction.put(key, value)
                for number in range(stamp % 400 // 8):
                    transaction.put(f"guest {number}", stamped(stamp))
                for number in range(stamp % 400 // 8, 50):
                    transaction.remove(f"guest {number}")
        done.value = stamp
    return stamp - first


def stamp_of(values: object) -> int:
    """The one stamp that values bear."""
    stamps = {stamp for value in values for stamp in value}  # type: ignore[attr-defined]
    assert len(stamps) == 1, stamps
    return int(stamps.pop())


def look_at_everything(name: str, stop: crashing.Counter) -> dict[str, int]:
    """Read in every way; return how many reads of each kind there were, and how many a publish overtook."""
    reader = Reader(name)
    counts = {"rounds": 0, "overtaken": 0}
    last = 0

    def seen(stamp: int) -> None:
        nonlocal last
        assert stamp >= last, f"went back from {last} to {stamp}"
        last = stamp

    before = reader.snapshot()
    while not stop.value:
        counts["rounds"] += 1
        for key in KEYS:
            seen(stamp_of([reader[key]]))
        seen(stamp_of(reader.many(KEYS)))
        seen(stamp_of(reader.snapshot().values()))
        for key in KEYS[:2]:
            # Two reads may see two publishes: each is whole, and none older than the last.
            seen(stamp_of([msgspec.msgpack.decode(reader.read(key, bytes) or b"")]))
        assert reader.contains_many([*KEYS, "never"]).tolist() == [True] * len(KEYS) + [False]
        before, put, _ = reader.changes(before)
        if put:
            assert set(KEYS) <= set(put)
            seen(stamp_of(put.values()))
    counts["overtaken"] = reader.retries
    return counts


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_killed_writer_leaves_its_last_whole_transaction(table_name: str, kills: int) -> None:
    done, stop, never = crashing.Counter(), crashing.Counter(), crashing.Counter()
    with Writer(table_name) as writer:
        writer.replace_all({key: stamped(1) for key in KEYS})
    done.value = 1
    reader = Reader(table_name)
    readers = [crashing.Child(lambda: look_at_everything(table_name, stop)) for _ in range(2)]
    for round_ in range(kills):
        first = stamp_of(reader.many(KEYS))
        with crashing.Child(lambda first=first: stamp_for_ever(table_name, first, done, never)) as child:
            # A little later each time, so that it dies in another place.
            child.until(lambda first=first, round_=round_: done.value > first + 300 + 37 * round_)
            child.kill()
        for look in (reader, Reader(table_name)):
            stamp = stamp_of(look.values())
            assert stamp in {done.value, done.value + 1}
            assert set(KEYS) <= set(look)
            assert stamp_of(look.many(KEYS)) == stamp
    stop.value = 1
    answers = [child.result() for child in readers]
    print(f"{done.value} publishes, {answers}")
    assert all(answer["rounds"] for answer in answers)
    with Writer(table_name, keep=True) as writer:
        writer.put("one more", stamped(stamp))
        assert stamp_of(reader.values()) == stamp
    assert len(published_segments_of(table_name)) == 2


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.long)])
def test_readers_never_see_a_mixture(table_name: str, seconds: float) -> None:
    done, stop, end = crashing.Counter(), crashing.Counter(), crashing.Counter()
    with crashing.Child(lambda: stamp_for_ever(table_name, 0, done, stop)) as writer:
        writer.until(lambda: done.value)
        readers = [crashing.Child(lambda: look_at_everything(table_name, end)) for _ in range(2)]
        start = done.value
        deadline = time.monotonic() + seconds
        writer.until(lambda: time.monotonic() > deadline and done.value > start + 50)
        end.value = 1
        answers = [reader.result() for reader in readers]
        stop.value = 1
        published = writer.result()
    total = {kind: sum(answer[kind] for answer in answers) for kind in answers[0]}
    print(f"{published} publishes, {total}")
    assert total["overtaken"] > 0, "a run in which no read was overtaken has shown nothing"
