"""Bytes in shared memory that contradict each other: a reader answers or raises an error of ours, nothing else.

Everything runs in a child under a watchdog, so that a crash or a hang is a failure with a traceback.
"""

from __future__ import annotations

import random
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crashing
import pytest
from serving import row

from shmelim import EliminationReader
from shmelim.eliminations.comparing import difference
from shmelim.errors import CorruptSegmentError, ShmelimError
from shmelim.shm import SharedNamespace, TableReader, TableWriter
from shmelim.shm.layout import (
    COMMIT,
    COPY_HEADER_SIZE,
    FLAG_COUNTS,
    PACKED,
    ROOT_ID,
    SEQUENCE_BITS,
    SEQUENCE_MASK,
    SLOT_WORDS,
    VERSION,
    WORD,
    WRITER_STATE,
    unpack_data_header,
)
from shmelim.table import Reader
from shmelim.table.naming import MSGPACK, TableNamespace, kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmelim.shm.segment import Segment

LONG = b"l" * 200
KEYS = [b"key-%d" % number for number in range(6)] + [LONG, LONG + b"x", b"absent", LONG + b"absent"]


class Damaged:
    """A table without a writer, whose bytes can be changed."""

    def __init__(self, name: str) -> None:
        self.namespace = SharedNamespace(name)
        with TableWriter(self.namespace, capacity=16, arena_size=4096) as writer:
            writer.load((key, number + 1, b"record" * number, None) for number, key in enumerate(KEYS[:8]))
            with writer.transaction() as transaction:
                transaction.remove(KEYS[0])
                transaction.put(KEYS[1], 255, b"changed")
        self.root = self.namespace.open_root(writable=True)
        self.data = self.namespace.open_data(1, writable=True)
        root = self.root.words
        self.header = unpack_data_header(
            self.data.memory[:4096], self.data.size, root[ROOT_ID], root[VERSION], "data"
        )
        self.attached = TableReader(self.namespace)
        self.errors = self.answers = 0

    def attempt(self, run: Callable[[], Any]) -> None:
        try:
            run()
        except ShmelimError:
            self.errors += 1
        else:
            self.answers += 1

    def read_all(self) -> None:
        """Run every operation, on an attached reader and on a new one."""
        self.operations(self.attached)
        try:
            reader = TableReader(self.namespace)
        except ShmelimError:
            self.errors += 1
        else:
            self.operations(reader)

    def operations(self, reader: TableReader) -> None:
        for key in (KEYS[1], KEYS[6], KEYS[7], KEYS[8], KEYS[9]):
            self.attempt(lambda key=key: reader.flags(key))
            self.attempt(lambda key=key: reader.get(key))
        self.attempt(lambda: reader.read(KEYS[1], bytes))
        self.attempt(lambda: reader.read(KEYS[7], bytes))
        self.attempt(lambda: reader.flags_of(KEYS))
        self.attempt(reader.snapshot)
        self.attempt(lambda: reader.snapshot(verify=True))
        self.attempt(reader.info)
        self.attempt(lambda: reader.count_flag(3))
        self.attempt(reader.writer)
        self.attempt(reader.reattach)
        self.attempt(lambda: reader.version)
        self.attempt(lambda: reader.wait_for_change(0))

    def flip_each_bit(self, segment: Segment, words: range) -> None:
        for word in words:
            before = segment.words[word]
            for bit in range(64):
                segment.words[word] = before ^ 1 << bit
                self.read_all()
            segment.words[word] = before
        self.check_whole()

    def check_whole(self) -> None:
        entries = self.attached.snapshot(verify=True).entries
        assert set(entries) == set(KEYS[1:8])
        assert TableReader(self.namespace).flags(KEYS[1]) == 255


def test_every_bit_of_the_root(table_name: str) -> None:
    def run() -> tuple[int, int]:
        damaged = Damaged(table_name)
        damaged.flip_each_bit(damaged.root, range(2))
        damaged.flip_each_bit(damaged.root, range(VERSION, VERSION + 1))
        damaged.flip_each_bit(damaged.root, range(WRITER_STATE - 2, WRITER_STATE + 2))
        return damaged.answers, damaged.errors

    answers, errors = crashing.call(run)
    assert answers > 0
    assert errors > 0


def test_every_bit_of_the_data_header(table_name: str) -> None:
    def run() -> tuple[int, int]:
        damaged = Damaged(table_name)
        damaged.flip_each_bit(damaged.data, range(8))
        return damaged.answers, damaged.errors

    answers, errors = crashing.call(run)
    assert answers > 0
    assert errors > 0


def test_every_bit_of_a_copys_header(table_name: str) -> None:
    def run() -> tuple[int, int]:
        damaged = Damaged(table_name)
        start = damaged.header.copy_base(damaged.attached.version & 1) // WORD
        damaged.flip_each_bit(damaged.data, range(start, start + COPY_HEADER_SIZE // WORD))
        return damaged.answers, damaged.errors

    answers, errors = crashing.call(run)
    assert answers > 0
    assert errors > 0


@pytest.mark.parametrize("rounds", [400, pytest.param(40_000, marks=pytest.mark.long)])
def test_random_bytes_in_slots_and_arena(table_name: str, rounds: int) -> None:
    """Single bits, single words, runs of bytes, whole slots full of ones."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")

    def run() -> tuple[int, int]:
        damaged = Damaged(table_name)
        chance = random.Random(seed)
        copy = damaged.attached.version & 1
        start = damaged.header.slots_base(copy)
        end = damaged.header.arena_base(copy) + 1024
        whole = damaged.data.memory[start:end]
        taken = [at for at in range(0, end - start, WORD) if any(whole[at : at + WORD])]
        for number in range(rounds):
            for _ in range(chance.choice((1, 1, 2, 10))):
                at = start + chance.choice((chance.choice(taken), chance.randrange(0, end - start - 64)))
                size = chance.choice((1, 1, 2, 4, 8, 64))
                old = damaged.data.memory[at : at + size]
                new = chance.choice(
                    (
                        chance.randbytes(size),
                        b"\xff" * size,
                        b"\0" * size,
                        bytes([old[0] ^ 1 << chance.randrange(8)]) + old[1:],
                    )
                )
                damaged.data.memory[at : at + size] = new
            damaged.read_all()
            damaged.data.memory[start:end] = whole
            if number % 50 == 0:
                damaged.check_whole()
        return damaged.answers, damaged.errors

    answers, errors = crashing.call(run)
    assert answers > 0
    assert errors > 0


def test_no_empty_slot(table_name: str) -> None:
    """A lookup that never meets an empty slot ends all the same."""

    def run() -> None:
        damaged = Damaged(table_name)
        reader = damaged.attached
        start = damaged.header.slots_base(reader.version & 1) // WORD
        for slot in range(damaged.header.capacity):
            damaged.data.words[start + slot * SLOT_WORDS + PACKED] |= 1 << 8
        with pytest.raises(CorruptSegmentError, match="no empty slot"):
            reader.flags(b"absent")
        with pytest.raises(CorruptSegmentError, match="no empty slot"):
            reader.get(b"absent")
        with pytest.raises(CorruptSegmentError, match="no empty slot"):
            reader.flags_of(KEYS)

    crashing.call(run)


@pytest.mark.parametrize("offset", [4096 - 23, 4096, 1 << 20, (1 << 48) - 1])
def test_record_outside_the_arena(table_name: str, offset: int) -> None:
    def run() -> None:
        damaged = Damaged(table_name)
        reader = damaged.attached
        start = damaged.header.slots_base(reader.version & 1) // WORD
        for slot in range(damaged.header.capacity):
            word = start + slot * SLOT_WORDS + PACKED
            if damaged.data.words[word]:
                damaged.data.words[word] = damaged.data.words[word] & 0xFFFF | offset << 16
        assert reader.flags(KEYS[1]) == 255
        with pytest.raises(CorruptSegmentError, match="does not fit"):
            reader.get(KEYS[1])
        with pytest.raises(CorruptSegmentError, match="does not fit"):
            reader.read(KEYS[1], bytes)
        assert reader.flags(LONG) == 0
        assert reader.flags_of([KEYS[1], LONG]).tolist() == [255, 0]

    crashing.call(run)


@pytest.mark.parametrize("length", [4096, 1 << 31, (1 << 32) - 1])
def test_record_that_ends_outside_the_arena(table_name: str, length: int) -> None:
    def run() -> None:
        damaged = Damaged(table_name)
        for copy in (0, 1):
            arena = damaged.header.arena_base(copy)
            head = damaged.attached._view.memory
            at = head[:].find(b"changed", arena) - 24 - len(KEYS[1])
            damaged.data.memory[at + 16 : at + 20] = length.to_bytes(4, "little")
        with pytest.raises(CorruptSegmentError, match="does not fit"):
            damaged.attached.get(KEYS[1])
        with pytest.raises(CorruptSegmentError, match="does not fit"):
            damaged.attached.snapshot()

    crashing.call(run)


def test_key_lengths_that_differ(table_name: str) -> None:
    """Slot and entry do not agree where the record begins."""

    def run() -> None:
        damaged = Damaged(table_name)
        for copy in (0, 1):
            at = (
                damaged.attached._view.memory[:].find(b"changed", damaged.header.arena_base(copy))
                - len(KEYS[1])
                - 4
            )
            assert damaged.data.window[at] == len(KEYS[1])
            damaged.data.memory[at : at + 1] = b"\1"
        assert damaged.attached.flags(KEYS[1]) == 255
        with pytest.raises(CorruptSegmentError):
            damaged.attached.get(KEYS[1])

    crashing.call(run)


@pytest.mark.parametrize("rounds", [150, pytest.param(5000, marks=pytest.mark.long)])
def test_segments_of_any_length_and_content(table_name: str, rounds: int) -> None:
    """Files cut, lengthened and overwritten before a reader opens them."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")

    def run() -> tuple[int, int]:
        damaged = Damaged(table_name)
        chance = random.Random(seed)
        files = [Path(f"/dev/shm/shmelim.{table_name}{suffix}") for suffix in ("", ".1")]
        whole = [file.read_bytes() for file in files]
        for _ in range(rounds):
            which = chance.randrange(2)
            data = bytearray(whole[which])
            del data[chance.choice((0, 1, 8, 63, 64, 128, 4095, 4096, 5000, len(data) - 1, len(data))) :]
            data += bytes(chance.choice((0, 0, 1, 4096)))
            for _ in range(chance.choice((0, 1, 3))):
                if data:
                    data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
            files[which].unlink()
            files[which].write_bytes(data)
            files[which].chmod(0o600)
            try:
                damaged.operations(TableReader(damaged.namespace))
            except ShmelimError:
                damaged.errors += 1
            files[which].unlink()
            files[which].write_bytes(whole[which])
            files[which].chmod(0o600)
        damaged.attached = TableReader(damaged.namespace)
        damaged.check_whole()
        return damaged.answers, damaged.errors

    answers, errors = crashing.call(run)
    assert answers > 0
    assert errors > 0


def test_a_count_above_the_slots(table_name: str) -> None:
    damaged = Damaged(table_name)
    damaged.data.words[damaged.header.copy_base(damaged.attached.version & 1) // WORD + FLAG_COUNTS] = 1 << 63
    for reader in (damaged.attached, TableReader(damaged.namespace)):
        with pytest.raises(CorruptSegmentError, match=f"says that {1 << 63} entries have a flag"):
            reader.count_flag(0)


def test_a_commit_that_no_store_can_have_made(table_name: str) -> None:
    damaged = Damaged(table_name)
    damaged.data.words[damaged.header.copy_base(damaged.attached.version & 1) // WORD + COMMIT] = 1 << 63
    with pytest.raises(CorruptSegmentError, match=f"says commit {1 << 63}"):
        damaged.attached.identity()


def test_a_key_that_is_no_text_and_a_record_without_its_head(table_name: str) -> None:
    with TableWriter(SharedNamespace(table_name)) as writer:
        writer.load([(b"a\xff", 1, bytes(16) + b"\x80", None), (b"b", 2, b"short", None)])
        reader = EliminationReader(table_name)
        reads = (
            reader.get_eliminations_dict,
            reader.get_eliminated_hotkeys,
            reader.get_departed_hotkeys,
            reader.snapshot,
        )
        for read in reads:
            with pytest.raises(CorruptSegmentError, match=r"cannot be decoded|contradict each other"):
                read()
    with TableWriter(TableNamespace(table_name), store_id=kind(str, MSGPACK)) as writer:
        writer.load([(b"a\xff", 1, b"\x01", None), (b"b", 1, b"\xa1\xff", None)])
        table = Reader(table_name)
        for read in (table.snapshot, lambda: table["b"], lambda: table.many(["b"])):
            with pytest.raises(CorruptSegmentError, match="cannot be decoded"):
                read()


@pytest.mark.parametrize(
    "entry",
    [
        (b"a\xff", 1, bytes(16) + b"\x80", None),
        (b"a", 1, bytes(16) + b"\x82\xa1a", None),
        (b"a", 1, bytes(16) + b"\xc1", None),
    ],
)
def test_a_list_is_not_blamed_for_a_damaged_table_that_it_is_compared_with(table_name: str, entry: Any) -> None:
    """The error was a ValueError, which says of a record of the list that it cannot be stored."""
    with TableWriter(SharedNamespace(table_name)) as writer:
        writer.load([entry, (b"b", 1, bytes(16) + b"\x80", None)])
        reader = EliminationReader(table_name)
        for given in ([], [row("a")], [row("a"), row("b")]):
            with pytest.raises(CorruptSegmentError, match="cannot be decoded"):
                difference(reader, given)


@pytest.mark.parametrize("word", [0, 1 << SEQUENCE_BITS | SEQUENCE_MASK, 1 << SEQUENCE_BITS, 7 << SEQUENCE_BITS])
def test_a_successor_of_a_damaged_version_word_takes_all_readers_along(table_name: str, word: int) -> None:
    """Going on from there, generation 1 came again, and who was attached to the first one stayed there."""
    damaged = Damaged(table_name)
    with TableWriter(damaged.namespace, capacity=16, arena_size=4096) as writer:
        assert writer.adopt()
    damaged.root.words[VERSION] = word
    with TableWriter(damaged.namespace, capacity=16, arena_size=4096) as writer:
        for record in (b"1", b"2"):
            writer.load([(KEYS[1], 1, record, None)])
            for reader in (damaged.attached, TableReader(damaged.namespace)):
                assert reader.get(KEYS[1]).data == record


def test_a_writer_takes_over_whatever_it_finds(table_name: str) -> None:
    """Random bytes everywhere, root included: a new writer serves, and its readers read."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")

    def run() -> None:
        chance = random.Random(seed)
        for _ in range(100):
            for suffix in ("", ".1", ".2"):
                file = Path(f"/dev/shm/shmelim.{table_name}{suffix}")
                file.unlink(missing_ok=True)
                file.write_bytes(chance.randbytes(chance.choice((0, 1, 100, 4096, 8192))))
                file.chmod(0o600)
            with TableWriter(SharedNamespace(table_name)) as writer:
                writer.load([(b"a", 1, b"A", None)])
                assert TableReader(SharedNamespace(table_name)).get(b"a").data == b"A"
                generation = TableReader(SharedNamespace(table_name)).info().generation
                assert SharedNamespace(table_name).generations() == [generation]

    crashing.call(run)
