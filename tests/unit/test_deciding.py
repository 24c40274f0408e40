"""Which state a start begins from, cell by cell."""

import itertools

import pytest

from shmelim.eliminations.starting.deciding import Action, Facts, Plan, Relation, StoreIs, decide

WHOLE, MISSING, DAMAGED = StoreIs.WHOLE, StoreIs.MISSING, StoreIs.DAMAGED
NOTHING, LATEST, BEHIND, AHEAD, HERE, OTHER, UNREADABLE = Relation
ADOPT, REPLACE = {"adopt_published": True}, {"replace_published": True}

# What can be found: a store that is whole tells how everything stands to it, any other does not.
PUBLISHED = {
    WHOLE: [NOTHING, LATEST, BEHIND, AHEAD, OTHER, UNREADABLE],
    MISSING: [NOTHING, OTHER, UNREADABLE],
    DAMAGED: [NOTHING, HERE, OTHER, UNREADABLE],
}
REMEMBERED = {
    WHOLE: [None, NOTHING, LATEST, BEHIND, AHEAD, OTHER],
    MISSING: [None, NOTHING, OTHER],
    DAMAGED: [None, NOTHING, HERE, OTHER],
}
CELLS = [
    Facts(store, published, remembered, files)
    for store in StoreIs
    for published, remembered, files in itertools.product(PUBLISHED[store], REMEMBERED[store], [False, True])
]

# Without a conflict, what is remembered decides nothing but whether money is held; files count where named.
PEACEFUL = {
    (WHOLE, NOTHING): Action.CONTINUE,
    (WHOLE, LATEST): Action.ADOPT,
    (WHOLE, BEHIND): Action.ADOPT,
    (WHOLE, UNREADABLE): Action.CONTINUE,
    (MISSING, NOTHING, False): Action.BEGIN,
    (MISSING, NOTHING, True): Action.TAKE_FILES,
    (DAMAGED, HERE): Action.REBUILD_FROM_TABLE,
    (DAMAGED, NOTHING, False): Action.REFUSE_DAMAGED,
    (DAMAGED, NOTHING, True): Action.REBUILD_FROM_FILES,
    (DAMAGED, UNREADABLE, False): Action.REFUSE_DAMAGED,
    (DAMAGED, UNREADABLE, True): Action.REBUILD_FROM_FILES,
}
# With one: what is done when it was said that the table is the truth (None: it cannot be), or the store.
ADOPTED = {
    (WHOLE, NOTHING): None,
    (WHOLE, LATEST): Action.ADOPT,
    (WHOLE, BEHIND): Action.ADOPT,
    (WHOLE, AHEAD): Action.FROM_TABLE,
    (WHOLE, OTHER): Action.FROM_TABLE,
    (WHOLE, UNREADABLE): None,
    (MISSING, NOTHING): None,
    (MISSING, OTHER): Action.FROM_TABLE,
    (MISSING, UNREADABLE): None,
    (DAMAGED, NOTHING): None,
    (DAMAGED, HERE): Action.REBUILD_FROM_TABLE,
    (DAMAGED, OTHER): Action.REBUILD_FROM_TABLE,
    (DAMAGED, UNREADABLE): None,
}
REPLACED = {
    (WHOLE, NOTHING): Action.CONTINUE,
    (WHOLE, LATEST): Action.ADOPT,
    (WHOLE, BEHIND): Action.ADOPT,
    (WHOLE, AHEAD): Action.ADOPT,
    (WHOLE, OTHER): Action.CONTINUE,
    (WHOLE, UNREADABLE): Action.CONTINUE,
    (MISSING, NOTHING, False): Action.BEGIN,
    (MISSING, NOTHING, True): Action.TAKE_FILES,
    (MISSING, OTHER, False): Action.BEGIN,
    (MISSING, OTHER, True): Action.TAKE_FILES,
    (MISSING, UNREADABLE, False): Action.BEGIN,
    (MISSING, UNREADABLE, True): Action.TAKE_FILES,
    (DAMAGED, HERE): Action.REBUILD_FROM_TABLE,
    (DAMAGED, NOTHING, False): Action.REFUSE_DAMAGED,
    (DAMAGED, NOTHING, True): Action.REBUILD_FROM_FILES,
    (DAMAGED, OTHER, False): Action.REFUSE_DAMAGED,
    (DAMAGED, OTHER, True): Action.REBUILD_FROM_FILES,
    (DAMAGED, UNREADABLE, False): Action.REFUSE_DAMAGED,
    (DAMAGED, UNREADABLE, True): Action.REBUILD_FROM_FILES,
}


def entry(table, facts):
    key = (facts.store, facts.published)
    return table[key] if key in table else table[*key, facts.files]


def conflicts(facts):
    """SPEC 9: it goes on only where its own store is that table's store and at least as new."""
    lost = facts.store is MISSING and facts.published is UNREADABLE
    return lost or bool({facts.published, facts.remembered} & {AHEAD, OTHER})


@pytest.mark.parametrize("facts", CELLS, ids=str)
def test_cell(facts):
    if not conflicts(facts):
        for said in ({}, ADOPT, REPLACE):
            plan = decide(facts._replace(**said))
            assert plan.action is entry(PEACEFUL, facts)
            assert plan.hold is (plan.action in (Action.REBUILD_FROM_TABLE, Action.REBUILD_FROM_FILES))
        return
    adopted = entry(ADOPTED, facts)
    refusal = Plan(Action.REFUSE_CONFLICT, can_adopt=adopted is not None)
    assert decide(facts) == refusal
    assert decide(facts._replace(**ADOPT)) == (refusal if adopted is None else Plan(adopted, hold=True))
    replaced = decide(facts._replace(**REPLACE))
    assert replaced.action is entry(REPLACED, facts)
    assert replaced.hold is (replaced.action is not Action.REFUSE_DAMAGED)


@pytest.mark.parametrize("facts", CELLS, ids=str)
def test_must_exist_refuses_every_new_store_and_nothing_else(facts):
    for said in ({}, ADOPT, REPLACE):
        plan = decide(facts._replace(**said, must_exist=True))
        if facts.store is MISSING:
            assert plan == Plan(Action.REFUSE_MISSING)
        else:
            assert plan == decide(facts._replace(**said))


@pytest.mark.parametrize("facts", [cell for cell in CELLS if cell.store is WHOLE and not conflicts(cell)], ids=str)
def test_a_store_with_slashes_of_which_nobody_knows_that_it_is_the_latest_holds_money(facts):
    known = facts.published in (LATEST, BEHIND) or facts.remembered in (None, LATEST)
    assert decide(facts._replace(slashes=True)) == decide(facts)._replace(hold=not known)


def test_every_cell_was_looked_at():
    assert len(CELLS) == 2 * (6 * 6 + 3 * 3 + 4 * 4)
    assert sum(map(conflicts, CELLS)) > len(CELLS) / 3
