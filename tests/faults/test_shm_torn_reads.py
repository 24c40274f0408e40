"""Readers in processes of their own against a writer that never pauses: never a mixture of two states.

Every transaction stamps all entries; whatever is read must bear one stamp. A run in which no read was ever
overtaken has shown nothing, and fails. ``test_shm_overlap`` shows the same without chance, and what happens
without the recheck.
"""

from __future__ import annotations

import time

import crashing
import pytest

from shmelim.shm import SharedNamespace, TableReader, TableWriter

KEYS = [b"key-%d" % number for number in range(12)] + [b"long-" * 20 + b"%d" % number for number in range(4)]
COMES_AND_GOES = [b"guest-%d" % number for number in range(8)]
SIZE = 200


def record(stamp: int) -> bytes:
    return bytes([stamp]) * SIZE


def stamp_for_ever(name: str, stop: crashing.Counter, ready: crashing.Counter) -> int:
    """Publish until told to stop: plain updates, keys that come and go, compactions, new generations."""
    writer = TableWriter(SharedNamespace(name), capacity=64, arena_size=1 << 15)
    stamp = 1
    writer.load((key, stamp, record(stamp), None) for key in KEYS)
    ready.value = 1
    count = 0
    while not stop.value:
        count += 1
        stamp = stamp % 254 + 1
        with writer.transaction(replace=count % 100 == 0) as transaction:
            for key in KEYS:
                transaction.put(key, stamp, record(stamp))
            for key in COMES_AND_GOES[: stamp % 8]:
                transaction.put(key, stamp, record(stamp))
            for key in COMES_AND_GOES[stamp % 8 :]:
                transaction.remove(key)
        if count % 500 == 0:
            writer.load((key, stamp, record(stamp), None) for key in KEYS)
            with writer.transaction() as transaction:
                # Grow; a later replacement shrinks again.
                transaction.put(b"large", stamp, bytes([stamp]) * (1 << 17))
            with writer.transaction() as transaction:
                transaction.remove(b"large")
    return count


def look_at_everything(name: str, until: float) -> dict[str, int]:
    """Read in every way; return how many reads of each kind a publish overtook."""
    reader = TableReader(SharedNamespace(name))
    retries = dict.fromkeys(("flags", "get", "read", "late read", "flags_of", "snapshot", "info"), 0)
    rounds = 0

    def late(window: memoryview) -> bytes:
        """Decode once another version is published; in the end, of a copy."""
        seen = reader.version
        while reader.version == seen and time.monotonic() < until:
            pass
        return bytes(window)

    def counted(kind: str, before: int) -> None:
        retries[kind] += reader.retries - before

    while time.monotonic() < until:
        rounds += 1
        for key in KEYS:
            before = reader.retries
            assert reader.flags(key) != 0
            counted("flags", before)
            before = reader.retries
            found = reader.get(key)
            assert found.data == record(found.flags)
            counted("get", before)
            before = reader.retries
            assert len(set(reader.read(key, bytes))) == 1
            counted("read", before)
        before = reader.retries
        assert len(set(reader.read(KEYS[rounds % len(KEYS)], late))) == 1
        counted("late read", before)
        before = reader.retries
        flags = reader.flags_of(KEYS + COMES_AND_GOES).tolist()
        assert len(set(flags[: len(KEYS)])) == 1, flags
        assert set(flags[len(KEYS) :]) <= {flags[0], 0}
        counted("flags_of", before)
        before = reader.retries
        entries = reader.snapshot(verify=rounds % 4 == 0).entries
        assert set(KEYS) <= set(entries)
        assert len({entry.flags for entry in entries.values()}) == 1
        assert all(set(entry.record) == {entry.flags} for entry in entries.values())
        counted("snapshot", before)
        before = reader.retries
        info = reader.info()
        present = {count for count in info.flag_counts if count}
        assert present == {info.entries}, info
        counted("info", before)
    retries["rounds"] = rounds
    return retries


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.long)])
def test_never_a_mixture(table_name: str, seconds: float) -> None:
    stop, ready = crashing.Counter(), crashing.Counter()
    until = time.monotonic() + seconds
    with crashing.Child(lambda: stamp_for_ever(table_name, stop, ready)) as writer:
        writer.until(lambda: ready.value)
        readers = [crashing.Child(lambda: look_at_everything(table_name, until)) for _ in range(3)]
        answers = [reader.result() for reader in readers]
        stop.value = 1
        published = writer.result()
    total = {kind: sum(answer[kind] for answer in answers) for kind in answers[0]}
    print(f"{published} publishes, overtaken: {total}")
    assert sum(count for kind, count in total.items() if kind != "rounds") > 0
    assert total["rounds"] > 3


MANY = 20_000


@pytest.mark.parametrize("changes", [1, 400])
def test_large_reads_end_under_constant_mutation(table_name: str, changes: int) -> None:
    """``snapshot`` and ``flags_of`` of 20,000 entries, while transactions follow each other without a pause."""
    stop, ready = crashing.Counter(), crashing.Counter()
    keys = [b"%048d" % number for number in range(MANY)]

    def mutate() -> int:
        writer = TableWriter(SharedNamespace(table_name))
        writer.load((key, 1, record(1), None) for key in keys)
        ready.value = 1
        stamp = 1
        count = 0
        while not stop.value:
            count += 1
            stamp = stamp % 250 + 1
            with writer.transaction() as transaction:
                for key in keys[:changes]:
                    transaction.put(key, stamp, record(stamp))
        return count

    with crashing.Child(mutate) as child:
        child.until(lambda: ready.value)
        reader = TableReader(SharedNamespace(table_name))
        first = reader.version
        versions = []
        while len(versions) < 5 or versions[-1] < first + 20:
            snapshot = reader.snapshot()
            versions.append(snapshot.version)
            assert list(snapshot.entries) == keys
            stamps = {(entry.flags, entry.record) for entry in list(snapshot.entries.values())[:changes]}
            assert len(stamps) == 1
            flags, data = stamps.pop()
            assert data == record(flags)
            flags_of = reader.flags_of(keys)
            assert len(set(flags_of[:changes].tolist())) == 1
            assert (flags_of[changes:] == 1).all()
        stop.value = 1
        assert child.result() > 20
    assert versions == sorted(versions)
