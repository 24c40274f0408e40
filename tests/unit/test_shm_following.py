"""The line that says how far a follower is: whole or the one before, whatever was written half."""

from __future__ import annotations

import doctest

import pytest

from shmelim.shm import PrivateNamespace, following
from shmelim.shm.following import Position, position_of, put_position, put_source, source_of
from shmelim.shm.layout import COUNTERS, FLEET, PAGE, PLACE, SOURCE_SIZE, WORD
from shmelim.shm.place import put_place
from shmelim.shm.segment import Segment

OLD = Position(1, 2, 3, 4, 5)
NEW = Position(6, 7, 8, 9, 10)


@pytest.fixture
def root() -> Segment:
    return PrivateNamespace().make_root()


def test_the_newest_position_counts(root: Segment) -> None:
    assert position_of(root) is None
    for seq in range(5):
        put_position(root, OLD._replace(seq=seq))
        found = position_of(root)
        assert found is not None
        assert found.seq == seq


def test_a_position_written_half_leaves_the_one_before(root: Segment) -> None:
    put_position(root, OLD)
    before = root.memory[:PAGE]
    put_position(root, NEW)
    after = root.memory[:PAGE]
    # In whatever order the bytes arrive: from the front, and from the back.
    torn = [after[:n] + before[n:] for n in range(FLEET, PLACE)] + [
        before[:n] + after[n:] for n in range(FLEET, PLACE)
    ]
    seen = set()
    for page in torn:
        root.memory[:PAGE] = page
        seen.add(position_of(root))
    assert seen == {OLD, NEW}


@pytest.mark.parametrize("byte", range(FLEET + WORD + SOURCE_SIZE, PLACE))
def test_damage_is_no_position(root: Segment, byte: int) -> None:
    put_position(root, OLD)
    put_position(root, NEW)
    root.memory[byte : byte + 1] = bytes([root.window[byte] ^ 1])
    assert position_of(root) in {OLD, NEW}


def test_the_line_stays_within_its_bounds(root: Segment) -> None:
    put_place(root, b"x" * 504)
    others = root.memory[:FLEET], root.memory[PLACE:PAGE]
    put_source(root, "é" * SOURCE_SIZE)
    put_position(root, Position(*[(1 << 64) - 1] * 5))
    put_position(root, Position(*[(1 << 64) - 1] * 5))
    assert (root.memory[:FLEET], root.memory[PLACE:PAGE]) == others
    assert source_of(root) == "é" * (SOURCE_SIZE // 2)
    assert COUNTERS > PLACE


def test_a_length_that_cannot_be_is_no_source(root: Segment) -> None:
    root.words[FLEET // WORD] = SOURCE_SIZE + 1
    assert source_of(root) == ""


def test_examples() -> None:
    assert doctest.testmod(following).attempted > 0
    assert doctest.testmod(following).failed == 0
