"""Slots: linear probing, removal that shifts back, bulk placing, compaction, growth."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from segments import copies_of

from shmelim.shm import Namespace, PrivateNamespace, TableReader, TableWriter, layout
from shmelim.shm.image import place
from shmelim.shm.layout import PACKED

pytestmark = pytest.mark.usefixtures("image")

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


def one_by_one(hashes: Sequence[int], capacity: int) -> set[int]:
    """Return the slots that linear probing takes."""
    taken: set[int] = set()
    for value in hashes:
        slot = value % capacity
        while slot in taken:
            slot = (slot + 1) % capacity
        taken.add(slot)
    return taken


def assert_reachable(spots: dict[int, int], capacity: int) -> None:
    """Check that from each entry's home to its slot nothing is empty; ``spots`` maps slots to hashes."""
    for slot, value in spots.items():
        probe = value % capacity
        while probe != slot:
            assert probe in spots
            probe = (probe + 1) % capacity


@given(
    bits=st.integers(0, 6),
    data=st.data(),
)
def test_place_is_linear_probing(bits: int, data: st.DataObject) -> None:
    capacity = 1 << bits
    near_the_end = st.integers(max(0, capacity - 3), capacity - 1)
    values = st.one_of(st.integers(0, (1 << 64) - 1), near_the_end, st.integers(0, 2))
    hashes = data.draw(st.lists(values, max_size=capacity))
    placed = place(np.array(hashes, np.uint64), capacity).tolist()
    assert len(set(placed)) == len(hashes)
    assert set(placed) == one_by_one(hashes, capacity)
    assert_reachable(dict(zip(placed, hashes, strict=True)), capacity)


class Table:
    """A writer and its reader over keys whose home slots are chosen."""

    def __init__(self, capacity: int = 16) -> None:
        self.namespace = PrivateNamespace()
        self.writer = TableWriter(self.namespace, capacity=capacity, arena_size=1 << 16)
        self.writer.load([])
        self.reader = TableReader(self.namespace)

    def keys(self, *homes: int) -> list[bytes]:
        """Return distinct keys with these home slots."""
        seed, mask = self.writer._images[0].header.seed, self.writer._images[0].header.capacity - 1
        numbers = itertools.count()
        found = []
        for home in homes:
            for number in numbers:
                key = b"key-%d" % number
                if layout.key_hash(key, seed) & mask == home:
                    found.append(key)
                    break
        return found

    def put(self, *keys: bytes) -> None:
        for key in keys:
            with self.writer.transaction() as transaction:
                transaction.put(key, 1, b"record of " + key)

    def remove(self, *keys: bytes) -> None:
        for key in keys:
            with self.writer.transaction() as transaction:
                transaction.remove(key)

    def rows(self) -> Iterator[NDArray[np.uint64]]:
        """Return the slots of both copies."""
        self.writer.settle()
        return (image.rows for image in copies_of(self.writer))

    def check(self, present: Sequence[bytes], absent: Sequence[bytes] = ()) -> None:
        mask = self.writer._images[0].header.capacity - 1
        for rows in self.rows():
            spots = {slot: int(row[0]) for slot, row in enumerate(rows) if row[PACKED]}
            assert len(spots) == len(present)
            assert_reachable(spots, mask + 1)
            assert not rows[rows[:, PACKED] == 0].any()
        first, second = self.rows()
        assert (first == second).all()
        for key in present:
            assert self.reader.get(key).data == b"record of " + key
        assert [self.reader.flags(key) for key in absent] == [0] * len(absent)
        assert list(self.reader.snapshot(verify=True).entries) == list(present)


@pytest.mark.parametrize("start", range(16))
@pytest.mark.parametrize("gone", range(5))
def test_removal_shifts_a_cluster_back_anywhere(start: int, gone: int) -> None:
    """One cluster of five, wherever it begins (it may wrap around), each of its members removed."""
    table = Table()
    keys = table.keys(*((start + offset) % 16 for offset in (0, 0, 1, 0, 3)))
    table.put(*keys)
    table.check(keys)
    table.remove(keys[gone])
    table.check([key for key in keys if key != keys[gone]], [keys[gone]])


@pytest.mark.parametrize("start", [0, 5, 13, 14, 15])
def test_entries_at_home_stay(start: int) -> None:
    """An entry in its home slot may not be moved in front of it; what lies behind may jump over it."""
    table = Table()
    first, at_home, displaced = table.keys(start, (start + 1) % 16, start)
    table.put(first, at_home, displaced)
    table.remove(first)
    table.check([at_home, displaced], [first])
    for rows in table.rows():
        homes = {int(row[0]) & 15 for row in rows[[start, (start + 1) % 16]]}
        assert homes == {start, (start + 1) % 16}


def test_removal_down_to_nothing_in_every_order() -> None:
    for order in itertools.permutations(range(4)):
        table = Table(8)
        keys = table.keys(7, 7, 0, 7)
        table.put(*keys)
        left = list(keys)
        for number in order:
            table.remove(keys[number])
            left.remove(keys[number])
            table.check(left, [key for key in keys if key not in left])


def test_capacity_grows_at_half() -> None:
    table = Table(8)
    for number in range(200):
        table.put(b"%d" % number)
        info = table.reader.info()
        assert info.entries == number + 1
        assert 2 * info.entries <= info.capacity
    table.check([b"%d" % number for number in range(200)])


def test_a_full_table_takes_changes_without_growing() -> None:
    table = Table(8)
    keys = [b"%d" % number for number in range(4)]
    table.put(*keys)
    generation = table.reader.info().generation
    with table.writer.transaction() as transaction:
        for key in keys:
            transaction.put(key, 2, b"record of " + key)
            transaction.put(key, 1, b"record of " + key)
    assert table.reader.info().generation == generation
    table.check(keys)


def test_arena_is_compacted_in_place() -> None:
    table = Table(64)
    keys = [b"%d" % number for number in range(20)]
    table.put(*keys)
    before = table.reader.info()
    for round_ in range(100):
        with table.writer.transaction() as transaction:
            for key in keys:
                transaction.put(key, round_ & 0xFF, b"record of " + key)
    after = table.reader.info()
    assert after.generation == before.generation
    assert after.arena_live == before.arena_live
    assert after.arena_used <= after.arena_size
    table.check(keys)


def test_compaction_keeps_holes_and_neighbours_apart() -> None:
    """Removed entries between kept ones, single and in runs, then a compaction."""
    table = Table(256)
    keys = [b"%d" % number for number in range(60)]
    table.put(*keys)
    gone = {0, 1, 2, 10, 12, 13, 30, 58, 59}
    table.remove(*[keys[number] for number in gone])
    kept = [key for number, key in enumerate(keys) if number not in gone]
    table.put(*kept[::7])
    current = table.writer._images[table.writer.version & 1]
    while (info := table.reader.info()).arena_used > info.arena_live:
        table.put(kept[0])
        if table.reader.info().arena_used < info.arena_used:
            break
    assert current is not None
    table.check(kept, [keys[number] for number in gone])


def test_compaction_of_nothing() -> None:
    table = Table()
    for _ in range(3000):
        with table.writer.transaction() as transaction:
            transaction.put(b"k", 1, bytes(10))
            transaction.remove(b"k")
    assert table.reader.info().generation == 1
    table.check([])


def test_arena_grows_for_what_does_not_fit() -> None:
    table = Table()
    table.put(b"a")
    with table.writer.transaction() as transaction:
        transaction.put(b"b", 1, bytes(1 << 20))
    info = table.reader.info()
    assert info.arena_size > 1 << 20
    assert info.generation == 2
    assert table.reader.get(b"b").data == bytes(1 << 20)
    assert table.reader.get(b"a").data == b"record of a"


def test_removals_need_room_in_the_log(namespace: Namespace) -> None:
    """Each removal is an entry too: many of them in a nearly full arena must not run over its end."""
    with TableWriter(namespace, capacity=64, arena_size=4096) as writer:
        keys = [bytes([number]) * 200 for number in range(16)]
        writer.load([])
        for key in keys:
            with writer.transaction() as transaction:
                transaction.put(key, 1)
        reader = TableReader(namespace)
        assert reader.info().arena_size == 4096
        for gone in (keys[:8], keys[8:]):
            with writer.transaction() as transaction:
                for key in gone:
                    transaction.remove(key)
            assert reader.info().arena_used <= reader.info().arena_size
        assert reader.snapshot(verify=True).entries == {}
        assert reader.flags_of(keys).tolist() == [0] * 16
