"""Publisher and follower in one thread, by hand: what the simulation found by chance, or cannot find."""

from __future__ import annotations

import pytest
from fleet_world import MS, SECOND, World
from memory_engine import State
from msgspec import structs

from shmelim.errors import SegmentFullError
from shmelim.fleet import follower as module
from shmelim.fleet import messages
from shmelim.fleet.engine import Id
from shmelim.fleet.messages import pack, unpack_head


def lose_everything(state: State) -> State:
    return State()


def lose_the_head(state: State) -> State:
    state.head = None
    return state


@pytest.mark.parametrize("lose", [lose_everything, lose_the_head])
def test_what_comes_back_with_an_older_copy_of_the_engine_is_not_taken_for_new(lose):
    """Its beats were not there when the follower looked, and yet they are old, by another setting of the clock."""
    world = World(1)
    world.stormy = False
    publisher, follower = world.publishers[0], world.followers[0]
    world.stores[0].change()
    for _ in range(30):
        world.now += 200 * MS
        world.turn(publisher)
        world.turn(follower)
    assert world.tables[0].position.confirmed
    copy = world.engine.saved()
    world.engine.state = lose(world.engine.state)
    world.engine_offset -= 20 * SECOND
    world.stores[0].change()  # the publisher is dead: nobody sends that
    for _ in range(105):
        world.now += 200 * MS
        world.turn(follower)
    world.engine.state = copy
    for _ in range(5):
        world.now += 200 * MS
        world.turn(follower)  # which checks, each time, that no age is too young


def test_a_change_in_parts_that_could_not_be_published_is_read_again_whole(monkeypatch):
    """Its first parts were read by an earlier turn, and stand in the log."""
    monkeypatch.setattr(messages, "PART", 1)
    monkeypatch.setattr(module, "_MESSAGES", 1)
    world = World(1)
    world.stormy = False
    publisher, follower, table, store = world.publishers[0], world.followers[0], world.tables[0], world.stores[0]

    def turns(count: int) -> None:
        for _ in range(count):
            world.now += 200 * MS
            world.turn(publisher)
            for _ in range(5):
                world.turn(follower)

    turns(5)
    apply, taken = table.apply, table.replaced
    failures = [SegmentFullError("no room")] * 3

    def apply_after_failures(*change) -> None:
        if failures:
            raise failures.pop()
        apply(*change)

    table.apply = apply_after_failures
    while len(store.rows) < 3:
        store.change()
    for _ in range(3):
        with pytest.raises(SegmentFullError):
            turns(9)
    turns(40)
    assert table.rows == store.rows
    assert table.replaced == taken, "it took no snapshot"
    assert follower.process.problems == {}


def lose_a_term(state: State) -> State:
    """An older copy, whose publisher another one had followed."""
    head = unpack_head(state.head)
    last = Id(head.term - 1, head.last.number)
    state.head = pack(structs.replace(head, last=last))
    state.log = [(Id(last.term, number.number), b"") for number, _ in state.log]
    return state


def write_into_the_log(state: State) -> State:
    state.log.append((Id(1_700_000_000_000, 0), b"does it work?"))
    return state


@pytest.mark.parametrize("damage", [lose_the_head, lose_a_term, write_into_the_log])
def test_what_does_not_count_is_read_once(damage):
    """An engine that waits for nothing, as something is there, would be asked without a pause."""
    world = World(1)
    world.stormy = False
    world.stores[0].change()
    for number in (0, 1):
        for _ in range(10):
            world.now += 500 * MS
            world.turn(world.publishers[number])
            world.turn(world.followers[0])
    world.engine.state = damage(world.engine.state)
    look, read = world.engine.look, []

    def counted(*asked):
        found = look(*asked)
        read.extend(found.entries)
        return found

    world.engine.look = counted
    for _ in range(20):
        world.now += 500 * MS
        world.turn(world.followers[0])
    assert len(read) <= len(world.engine.state.log)
