"""What a JSON file beside a store means, cell by cell."""

import pytest

from shmelim.eliminations.files.meaning import Meaning, Owner, Taken, decide
from shmelim.eliminations.files.sidecar import Sidecars, Written

OURS, BEFORE, NEXT, EDIT = "digest of ours", "digest of the one before", "digest of the next", "digest of an edit"
STORE, OTHER = b"this store", b"another one"
OWNER = Owner(STORE, 10)


def written(digest=OURS, store_id=STORE, commit=10):
    return Written(digest, store_id, commit)


STRANGE = Sidecars(written(store_id=OTHER))
ALONE = Sidecars(written())
DYING = Sidecars(written(BEFORE, commit=8), written(NEXT, commit=9))
FRESH = OWNER._replace(fresh=True)
TAKEN = [Taken(EDIT, 10)]
FIRST = [Taken(EDIT, None)]
CELLS = {
    # what stands there, what is known of it, the store, what was taken over → what it means
    "there is no file": (None, ALONE, OWNER, (), Meaning.ABSENT),
    "there is neither file nor store": (None, Sidecars(), FRESH, (), Meaning.ABSENT),
    "a file and no store": (EDIT, Sidecars(), FRESH, (), Meaning.STATE),
    "our own file and a new store": (OURS, STRANGE, FRESH, (), Meaning.STATE),
    "our own file of a store in which nothing was": (OURS, ALONE, FRESH, (), Meaning.CURRENT),
    "an edit beside a store in which nothing was": (EDIT, ALONE, FRESH, (), Meaning.STATE),
    "ours, of later than that": (OURS, ALONE, Owner(STORE, 0, fresh=True), (), Meaning.STATE),
    "ours, and nothing was committed since": (OURS, ALONE, OWNER, (), Meaning.CURRENT),
    "ours, and more was committed since": (OURS, ALONE, Owner(STORE, 11), (), Meaning.OLDER),
    "ours, and the store was put back": (OURS, ALONE, Owner(STORE, 9), (), Meaning.NEWER),
    "ours, and another store was put there": (OURS, ALONE, Owner(OTHER, 10), (), Meaning.FOREIGN),
    "the one before, when the writer died before the rename": (BEFORE, DYING, OWNER, (), Meaning.OLDER),
    "the next one, when the writer died after the rename": (NEXT, DYING, OWNER, (), Meaning.OLDER),
    "an edit of ours": (EDIT, ALONE, OWNER, (), Meaning.EDIT),
    "an edit of ours, and more was committed since": (EDIT, ALONE, Owner(STORE, 99), (), Meaning.EDIT),
    "an edit of one that is newer than the store": (EDIT, ALONE, Owner(STORE, 9), (), Meaning.UNKNOWN),
    "an edit of another store's": (EDIT, ALONE, Owner(OTHER, 10), (), Meaning.UNKNOWN),
    "an edit of either of two": (EDIT, DYING, OWNER, (), Meaning.UNKNOWN),
    "a file of which nothing is known": (EDIT, Sidecars(), OWNER, (), Meaning.UNKNOWN),
    "an edit that was taken over, before a death": (EDIT, ALONE, OWNER, TAKEN, Meaning.TAKEN),
    "the same edit made again": (EDIT, ALONE, OWNER, [Taken(EDIT, 9)], Meaning.EDIT),
    "a first file that was taken over": (EDIT, Sidecars(), OWNER, FIRST, Meaning.TAKEN),
    "another one after that": ("later", Sidecars(), OWNER, FIRST, Meaning.UNKNOWN),
    "that file put back over ours": (EDIT, ALONE, OWNER, FIRST, Meaning.EDIT),
    "another store's that a recovery has seen": (OURS, ALONE, Owner(OTHER, 1), [Taken(OURS, 10)], Meaning.TAKEN),
}  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
def test_cell(cell):
    digest, sidecars, owner, taken, meaning = CELLS[cell]
    assert decide(digest, sidecars, owner, taken) is meaning


def test_there_is_a_cell_for_every_meaning():
    assert {meaning for *_, meaning in CELLS.values()} == set(Meaning)
