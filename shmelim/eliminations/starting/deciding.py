"""Which state a start begins from: one table of what is published, what the store is, and what else is known.

:func:`decide` is a pure function of what was found; finding it and carrying it out are others' business. How a
table or the registry stands to the store that was found is a :class:`Relation`, and makes a column each::

    store    published            remembered           begins with                    unless it was said
    -------  -------------------  -------------------  -----------------------------  ---------------------------
    whole    latest or behind     anything but ↓       the table where it lies
    whole    nothing, unreadable  anything but ↓       the store
    missing  nothing              nothing              the files, or nothing at all   must_exist
    damaged  of this directory    anything but ↓       a store made from the table
    damaged  anything but ↓       anything but ↓       a store made from the files
    damaged  (no files)                                refused: nothing is left
    any      ahead, of another    ahead, of another    refused: a conflict            adopt or replace, below
    missing  unreadable           anything             refused: a conflict            replace

``adopt`` makes the table the truth: the store is changed, or made, to say what it says. ``replace`` makes the
store the truth (or the files, or nothing, where it is missing). Both hold what moves money, and so does everything
that may have forgotten a slash: a store made from something else, and one with slashes of which nobody remembers
whether it is the latest.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class StoreIs(enum.Enum):
    """What stands in the state directory."""

    WHOLE = "whole"
    MISSING = "missing"
    DAMAGED = "damaged"


class Relation(enum.Enum):
    """How something that knows of a state stands to the store that was found."""

    NOTHING = "nothing"  # it knows of none, or of one without entries
    LATEST = "latest"  # it is the latest state of this store
    BEHIND = "behind"  # it is an earlier state of this store
    AHEAD = "ahead"  # it has commits that this store lacks: this one is an older copy, or went its own way
    HERE = "of this directory"  # whose store is damaged, and does not tell its identity
    OTHER = "of another store"
    UNREADABLE = "unreadable"


class Action(enum.Enum):
    """What a start does."""

    BEGIN = "a new store"
    TAKE_FILES = "a new store with what the JSON files say"
    CONTINUE = "the store"
    ADOPT = "the store, in the published table where it lies"
    FROM_TABLE = "the store, made to say what the published table says"
    REBUILD_FROM_TABLE = "a store made anew from the published table"
    REBUILD_FROM_FILES = "a store made anew from the JSON files"
    REFUSE_MISSING = "refused: there is no store"
    REFUSE_DAMAGED = "refused: the store is damaged, and there is no other record of the state"
    REFUSE_CONFLICT = "refused: what is known under the name is not this store's"


class Facts(NamedTuple):
    """What a start found, and what it was told."""

    store: StoreIs
    published: Relation
    remembered: Relation | None  # by the registry; None where there is none
    files: bool  # whether the JSON files are there, and count
    slashes: bool = False  # whether any slash was made, or begun, that the store knows of
    adopt_published: bool = False
    replace_published: bool = False
    must_exist: bool = False

    def __str__(self) -> str:
        known = "no registry" if self.remembered is None else f"remembered {self.remembered.value}"
        files = "files" if self.files else "no files"
        return f"store {self.store.value}, published {self.published.value}, {known}, {files}"


class Plan(NamedTuple):
    """What a start does: its action; ``hold``, whether money waits for a person; ``can_adopt``, for a refusal."""

    action: Action
    hold: bool = False
    can_adopt: bool = False


_STRANGE = frozenset({Relation.AHEAD, Relation.OTHER})
_READABLE = frozenset({Relation.LATEST, Relation.BEHIND, Relation.HERE, *_STRANGE})


def decide(facts: Facts) -> Plan:
    """Return what a start with these facts does."""
    store, published = facts.store, facts.published
    if facts.must_exist and store is StoreIs.MISSING:
        return Plan(Action.REFUSE_MISSING)
    lost = published is Relation.UNREADABLE and store is StoreIs.MISSING
    conflict = lost or published in _STRANGE or facts.remembered in _STRANGE
    if conflict and facts.adopt_published and published in _READABLE:
        return Plan(_adopt(facts), hold=True)
    if conflict and not facts.replace_published:
        return Plan(Action.REFUSE_CONFLICT, can_adopt=published in _READABLE)
    if store is StoreIs.DAMAGED:
        return _without_store(facts)
    if store is StoreIs.MISSING:
        return Plan(Action.TAKE_FILES if facts.files else Action.BEGIN, hold=conflict)
    # Here it is behind, or ahead and was said to be replaced: what differs is published.
    in_place = published in (Relation.LATEST, Relation.BEHIND, Relation.AHEAD)
    unsure = not in_place and facts.slashes and facts.remembered in (Relation.NOTHING, Relation.BEHIND)
    return Plan(Action.ADOPT if in_place else Action.CONTINUE, hold=conflict or unsure)


def _adopt(facts: Facts) -> Action:
    if facts.store is StoreIs.DAMAGED:
        return Action.REBUILD_FROM_TABLE
    if facts.published in (Relation.LATEST, Relation.BEHIND):
        return Action.ADOPT
    return Action.FROM_TABLE


def _without_store(facts: Facts) -> Plan:
    """Return how a damaged store is replaced."""
    if facts.published is Relation.HERE:
        return Plan(Action.REBUILD_FROM_TABLE, hold=True)
    if facts.files:
        return Plan(Action.REBUILD_FROM_FILES, hold=True)
    return Plan(Action.REFUSE_DAMAGED)
