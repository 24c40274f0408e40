"""The extension over bytes that lie: it answers or raises an error of ours, and stays in its memory.

Segments are copied into buffers of exactly their size, and damaged there, so that AddressSanitizer notices a
single byte read beyond them; ``tests/sanitize.sh`` runs these tests under it.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import secrets
from typing import TYPE_CHECKING, Any

import crashing
import numpy as np
import pytest
from both_paths import HEAD, Native, NativeTableReader, native

from shmelim.errors import ShmelimError
from shmelim.shm import PrivateNamespace, TableWriter
from shmelim.shm.layout import (
    COPY_HEADER_SIZE,
    ENTRY_HEADER,
    PACKED,
    ROOT_ID,
    SLOT_SIZE,
    VERSION,
    WORD,
    unpack_data_header,
)
from shmelim.shm.segment import Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmelim.shm.layout import DataHeader

LONG = b"l" * 200
KEYS = [*[b"key-%d" % number for number in range(4)], b"k" * 48, LONG, LONG + b"x"]
ASKED = [*KEYS, b"", b"absent", b"k" * 47 + b"j", LONG + b"y", b"n" * 300]
EXTREMES = [0, 1, 7, 8, 1 << 15, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 47, 1 << 63, (1 << 64) - 1]


class NotAttachedError(ShmelimError):
    """Somebody asked for another segment."""


class Table(native.Table):
    """A table that can attach nothing."""

    def _attach(self) -> None:
        raise NotAttachedError("there is no other segment")

    def _look_at_name(self) -> None:
        """Stay, however old the heartbeat is by now."""


class Damaged:
    """A copy of a table in two buffers of their exact size, and everything that reads them."""

    def __init__(self) -> None:
        namespace = PrivateNamespace()
        writer = TableWriter(namespace, capacity=16, arena_size=4096)
        writer.load((key, number + 1, b"head" + b"record" * number, None) for number, key in enumerate(KEYS))
        with writer.transaction() as transaction:
            transaction.remove(KEYS[0])
            transaction.put(KEYS[1], 255, b"headchanged")
        root, data = namespace.open_root(), namespace.open_data(1)
        header = unpack_data_header(
            data.memory[:4096], data.size, root.words[ROOT_ID], root.words[VERSION], "data"
        )
        # The arena takes up all that is left of a copy, and the second copy is read: behind it, memory ends.
        arena = header.stride - COPY_HEADER_SIZE - header.capacity * SLOT_SIZE
        self.header: DataHeader = header._replace(arena_size=arena)
        root.words[VERSION] |= 1
        self.whole = root.memory[:], data.memory[:]
        # What is allocated on its own ends where its memory ends.
        self.root = (ctypes.c_char * len(self.whole[0])).from_buffer_copy(self.whole[0])
        self.data = (ctypes.c_char * len(self.whole[1])).from_buffer_copy(self.whole[1])
        self.current = 1
        self.table = Table()
        self.table._view = self.view()
        self.lookups = Native.__new__(Native)
        self.lookups._table = self.table
        self.answers = self.errors = 0

    def view(self, **changed: int) -> native.View:
        numbers = {name: getattr(self.header, name) for name in self.header._fields} | changed
        view = native.View()
        view._map(self.root, self.data, "copy", *list(numbers.values())[:5])
        return view

    def words(self) -> Any:
        return np.frombuffer(self.data, np.uint64)

    def restore(self) -> None:
        self.root[:], self.data[:] = self.whole

    def operations(self) -> Iterator[Any]:
        table, lookups = self.table, self.lookups
        for key in ASKED:
            yield lambda key=key: table.flags(key)
            yield lambda key=key: table._entry(key)
            yield lambda key=key: table.read(key, bytes)
            yield lambda key=key: lookups.first(key.decode())
            yield lambda key=key: lookups._record(key.decode())
            yield lambda key=key: lookups._read(key.decode(), bytes)
        yield lambda: table._fill(ASKED, bytearray(len(ASKED)), 0)
        yield lambda: table._fill(np.array(ASKED), bytearray(len(ASKED)), 1)
        for mask, form in itertools.product((0, 1, 3), range(4)):
            yield lambda mask=mask, form=form: table._collect(mask, form, HEAD)

    def read_all(self) -> None:
        for operation in self.operations():
            try:
                operation()
            except ShmelimError:
                self.errors += 1
            else:
                self.answers += 1

    def check_whole(self) -> None:
        self.restore()
        assert [self.table.flags(key) for key in ASKED] == [0, 255, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0]
        assert self.table._entry(KEYS[1]) == (255, 1, b"headchanged")
        assert len(self.table._collect(0, 0, HEAD)[1]) == 5 + sum(
            len(key) + (1 if len(key) < 32 else 2) for key in KEYS[1:]
        )


class DamagedForAWriter(Damaged):
    """The same, for what changes a copy; what it did is undone before the next damage."""

    def images(self, **changed: int) -> list[native.Image]:
        numbers = list((self.header._asdict() | changed).values())[1:5]
        images = [native.Image() for _ in range(2)]
        for copy, image in enumerate(images):
            image._map(self.data, "copy", copy, *numbers)
        return images

    def view(self, **changed: int) -> native.View:
        self.written = self.images(**changed)
        return super().view(**changed)

    def operations(self) -> Iterator[Any]:
        idle, current = self.written
        for key in ASKED[:-1]:
            if key:
                yield lambda key=key: current.apply([(key, 3, b"r" * 100, None)])
                yield lambda key=key: current.apply([(key, None, b"", None)])
        yield current._check
        yield lambda: current._missing(ASKED)
        yield lambda: idle.follow(current)
        yield lambda: current.follow(idle)
        yield lambda: idle.compact_into(current)
        yield lambda: idle.mirror_into(current, arena_from=0)
        yield lambda: current.mirror_into(idle, arena_from=64)
        yield lambda: current.compact_into(idle)
        yield lambda: current.fill([(key, 1, b"r" * 150, 5) for key in ASKED[:-1] if key])
        yield current.clear
        yield lambda: current.fill([(b"%d" % number, 1, b"", 5) for number in range(17)])

    def read_all(self) -> None:
        before = self.data[:]
        super().read_all()
        self.data[:] = before

    def check_whole(self) -> None:
        super().check_whole()
        _, current = self.written
        current.apply([(b"absent", 9, b"headnew", None), (KEYS[2], None, b"", None)])
        assert [self.table.flags(key) for key in (b"absent", KEYS[1], KEYS[2])] == [9, 255, 0]
        self.restore()


WHO = pytest.mark.parametrize("who", [Damaged, DamagedForAWriter])


def in_child(run: Any) -> None:
    """Run under a watchdog, where a crash or a hang is a failure; there must have been answers and errors."""
    answers, errors = crashing.call(run)
    assert answers > 0
    assert errors > 0


def values_for(word: int, damaged: Damaged) -> list[int]:
    """Return what a word is replaced by: extremes, neighbours, flipped bits, offsets around the arena's end."""
    arena = damaged.header.arena_size
    ends = [arena + by << 16 | 0x30FF for by in (-1, -24, -25, -48, -72, -73, 0, 1)]
    flips = [word ^ 1 << bit for bit in range(0, 64, 3)]
    return [*EXTREMES, *ends, *flips, word + 1 & (1 << 64) - 1, word - 1 & (1 << 64) - 1]


@WHO
@pytest.mark.parametrize("what", ["copy header", "slots", "arena"])
def test_every_word(what: str, who: type[Damaged]) -> None:
    def run() -> tuple[int, int]:
        damaged = who()
        header, words = damaged.header, damaged.words()
        base = header.copy_base(damaged.current)
        slots, arena = header.slots_base(damaged.current), header.arena_base(damaged.current)
        used = int(words[base // WORD + 1])
        start, stop = {
            "copy header": (base, base + COPY_HEADER_SIZE),
            "slots": (slots, arena),
            "arena": (arena, arena + used),
        }[what]
        for word in range(start // WORD, stop // WORD):
            before = int(words[word])
            # In a slot, hash and packed word are what decides; of the key's bytes, flipped ones are enough.
            inside = what == "slots" and (word - slots // WORD) % 8 not in (0, PACKED)
            for value in [before ^ 1] if inside else values_for(before, damaged):
                words[word] = value
                damaged.read_all()
            words[word] = before
        # A header's numbers are taken for no more than they are: these may all be answers.
        damaged.errors += what == "copy header"
        damaged.check_whole()
        return damaged.answers, damaged.errors

    in_child(run)


@WHO
def test_offsets_at_every_byte_around_the_ends_of_the_arena(who: type[Damaged]) -> None:
    """Inline and long keys, whose entries end just inside and just outside."""

    def run() -> tuple[int, int]:
        damaged = who()
        words, arena = damaged.words(), damaged.header.arena_size
        slots = damaged.header.slots_base(damaged.current) // WORD
        for slot in range(damaged.header.capacity):
            at = slots + slot * (SLOT_SIZE // WORD) + PACKED
            before = int(words[at])
            if before:
                size = before >> 8 & 0xFF
                around = range(arena - ENTRY_HEADER - size - 3, arena + 3)
                for offset in [*around, *(1 << bit for bit in range(48)), (1 << 48) - 1]:
                    words[at] = offset << 16 | before & 0xFFFF
                    damaged.read_all()
                words[at] = before
        damaged.check_whole()
        return damaged.answers, damaged.errors

    in_child(run)


@WHO
def test_a_table_without_an_empty_slot_is_no_endless_loop(who: type[Damaged]) -> None:
    def run() -> tuple[int, int]:
        damaged = who()
        words = damaged.words()
        for copy in (0, 1):
            start = damaged.header.slots_base(copy) // WORD
            for slot in range(damaged.header.capacity):
                words[start + slot * 8 + PACKED] |= 1
        damaged.read_all()
        with pytest.raises(ShmelimError, match="no empty slot"):
            damaged.table.flags(b"absent")
        with pytest.raises(ShmelimError, match="no empty slot"):
            damaged.table._fill([b"n" * 48], bytearray(1), 0)
        damaged.check_whole()
        return damaged.answers, damaged.errors

    in_child(run)


@WHO
@pytest.mark.parametrize("rounds", [400, pytest.param(20_000, marks=pytest.mark.long)])
def test_random_damage(rounds: int, who: type[Damaged]) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")

    def run() -> tuple[int, int]:
        damaged, chance = who(), random.Random(seed)
        header = damaged.header
        regions = [
            (damaged.root, 64, 72),
            *[(damaged.data, header.copy_base(copy), header.arena_base(copy) + 800) for copy in (0, 1)],
        ]
        for _ in range(rounds):
            for _ in range(chance.choice((1, 2, 8, 100))):
                buffer, start, stop = chance.choice(regions)
                at = chance.randrange(start, stop)
                kind = chance.randrange(3)
                if kind == 0:
                    buffer[at : at + 1] = bytes([chance.randrange(256)])
                elif kind == 1:
                    buffer[at : at + 1] = bytes([buffer[at][0] ^ 1 << chance.randrange(8)])
                else:
                    at &= -8
                    buffer[at : at + 8] = chance.choice(EXTREMES).to_bytes(8, "little")
            damaged.read_all()
            if chance.random() < 0.3:
                damaged.restore()
        damaged.check_whole()
        return damaged.answers, damaged.errors

    in_child(run)


@WHO
def test_numbers_of_a_header_that_do_not_fit(who: type[Damaged]) -> None:
    """Whoever attaches has checked them; the extension checks them again, and reads what it accepts."""

    def run() -> tuple[int, int]:
        damaged = who()
        size = len(damaged.data)
        sizes = [0, 1, 8, 16, 32, 64, 4096, 8192, size - 4096, size, size + 1, 1 << 32, 1 << 63, (1 << 64) - 1]
        for capacity, arena, stride in itertools.product(sizes, repeat=3):
            try:
                view = damaged.view(capacity=capacity, arena_size=arena, stride=stride)
            except ValueError:
                damaged.errors += 1
            else:
                damaged.table._view = view
                damaged.read_all()
        damaged.table._view = damaged.view()
        damaged.check_whole()
        return damaged.answers, damaged.errors

    in_child(run)


def test_segments_of_any_size() -> None:
    """Truncated ones, through the whole of attaching: what the header promises must be there."""

    class Cut(PrivateNamespace):
        def open_data(self, generation: int) -> Segment:
            memory = (ctypes.c_ubyte * len(self.kept)).from_buffer_copy(self.kept)
            return Segment("cut", memoryview(memory).cast("B"))

    def run() -> tuple[int, int]:
        namespace = Cut()
        writer = TableWriter(namespace, capacity=16, arena_size=4096)
        writer.load((key, 1, b"record", None) for key in KEYS)
        whole = PrivateNamespace.open_data(namespace, 1).memory[:]
        answers = errors = 0
        for size in (*range(0, 4200, 61), *range(4096, len(whole), 997), len(whole) - 1, len(whole)):
            namespace.kept = whole[:size]
            try:
                reader = NativeTableReader(namespace)
                assert reader.flags(KEYS[1]) == 1
                answers += 1
            except ShmelimError:
                errors += 1
        return answers, errors

    in_child(run)


def test_equal_hashes_of_keys_that_lie_about_their_length() -> None:
    """A probe of a long key compares in the arena only what lies there."""

    def run() -> tuple[int, int]:
        damaged = Damaged()
        seed = damaged.header.seed
        words = damaged.words()
        slots = damaged.header.slots_base(damaged.current) // WORD
        for key in (LONG, LONG + b"y"):
            for slot in range(damaged.header.capacity):
                words[slots + slot * 8] = native.key_hash(key, seed)
            damaged.read_all()
        damaged.errors += 1
        damaged.check_whole()
        return damaged.answers, damaged.errors

    in_child(run)
