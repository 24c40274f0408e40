"""An age is never too young: in one thread, by hand, what the simulation found by chance."""

from __future__ import annotations

import pytest
from fleet_world import MS, SECOND, World
from memory_engine import State


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
