"""Snapshots and batches end under any rate of publishing: that is what the append-only arena is for.

The log is sliced through an interposed mapping, and with every slice another transaction is published.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import pytest

from shmelim.shm import PrivateNamespace, TableWriter
from shmelim.shm.reader import TableReader  # the reference: the other path cannot be interposed
from shmelim.shm.segment import Segment

if TYPE_CHECKING:
    from collections.abc import Callable

ENTRIES = 2000


class Memory(mmap.mmap):
    """Runs something before and after every large slice."""

    act: Callable[[], None]

    def __getitem__(self, item: Any) -> Any:
        large = isinstance(item, slice) and item.stop - (item.start or 0) > 10_000
        if large:
            self.act()
        value = super().__getitem__(item)
        if large:
            self.act()
        return value


class Interposed(PrivateNamespace):
    """A private namespace with such memory."""

    act: Callable[[], None]

    def run(self) -> None:
        self.act()

    def create_data(self, generation: int, size: int) -> Segment:
        memory = Memory(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.act = self.run
        self._segments[generation] = Segment(f"{generation}", memory)
        return self._segments[generation]


@pytest.mark.parametrize("changes", [1, 50, 1000])
@pytest.mark.parametrize("operation", ["snapshot", "flags_of"])
def test_ends_although_publishes_never_pause(
    monkeypatch: pytest.MonkeyPatch, changes: int, operation: str
) -> None:
    namespace = Interposed()
    namespace.act = lambda: None
    writer = TableWriter(namespace, arena_size=1 << 20)
    keys = [b"%d" % number for number in range(ENTRIES)]
    writer.load((key, 0, b"0", None) for key in keys)
    reader = TableReader(namespace)
    stamp = publishes = 0

    def publish() -> None:
        nonlocal stamp, publishes
        publishes += 1
        assert publishes < 40, "no end in sight"
        stamp += 1
        with writer.transaction() as transaction:
            for key in keys[:changes]:
                transaction.put(key, stamp % 200, b"%d" % stamp)

    namespace.act = publish
    if operation == "snapshot":
        entries = reader.snapshot(verify=True).entries
        assert len(entries) == ENTRIES
        flags = [entries[key].flags for key in keys]
        assert {entries[key].record for key in keys[changes:]} <= {b"0"}
    else:
        probe_many = type(reader._view).probe_many

        def overtaken(*arguments: Any) -> Any:
            answer = probe_many(*arguments)
            publish()
            return answer

        monkeypatch.setattr(type(reader._view), "probe_many", overtaken)
        flags = reader.flags_of(keys).tolist()
    assert len(set(flags[:changes])) == 1
    assert set(flags[changes:]) <= {0}
    assert publishes > 1


def test_a_compaction_during_the_copy_is_noticed() -> None:
    namespace = Interposed()
    namespace.act = lambda: None
    writer = TableWriter(namespace, capacity=16, arena_size=1 << 17)
    writer.load([(b"%d" % number, 1, bytes(5000), None) for number in range(5)])
    reader = TableReader(namespace)
    left = 3

    def publish() -> None:
        nonlocal left
        if left:
            left -= 1
            for stamp in range(20):
                with writer.transaction() as transaction:
                    for number in range(5):
                        transaction.put(b"%d" % number, 2 + stamp, bytes([left * 20 + stamp]) * 5000)

    namespace.act = publish
    entries = reader.snapshot(verify=True).entries
    assert reader.retries > 0
    assert len({entry.record for entry in entries.values()}) == 1
    assert len({entry.flags for entry in entries.values()}) == 1
